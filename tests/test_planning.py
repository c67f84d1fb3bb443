from snakemake.resources import Resource
from snakemake.sourcecache import LocalSourceFile, SourceFile

from segtrust.planning import quicken_plans


def test_quick_plans_find_the_copies_of_scripts_where_snakemake_puts_them(monkeypatch):
    monkeypatch.setattr(LocalSourceFile, "get_cache_path", SourceFile.get_cache_path)
    files = [LocalSourceFile(path) for path in ("a.py", "/x/a.py", "/x/a b.py", "/x/a%20b.py", "/x/ä.py", "a.py")]
    expected = [file.get_cache_path() for file in files]
    quicken_plans()
    assert [file.get_cache_path() for file in files] == expected
    assert [file.get_cache_path() for file in files] == expected
    assert len(set(expected)) == 4


def test_quick_plans_give_resources_the_arguments_that_they_ask_for():
    quicken_plans()
    resource = Resource("mem_mb", lambda wildcards, attempt: 100 * attempt)
    assert resource.evaluate("wildcards", attempt=2, threads=4, input=[]).value == 200
