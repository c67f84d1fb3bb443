import inspect

import snakemake.common
import snakemake.rules
from snakemake.resources import Resource
from snakemake.sourcecache import LocalSourceFile, SourceFile

from segtrust.planning import parameters_of, quicken_plans


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
    assert resource.evaluate("wildcards", attempt=3, threads=4, input=[]).value == 300


def test_parameters_are_those_of_the_signature():
    def of_wildcards(wildcards, threads, **more):
        return wildcards, threads, more

    class Called:
        def __call__(self, wildcards, input):
            return wildcards, input

        def method(self, wildcards):
            return wildcards

    for function in (of_wildcards, lambda wildcards: 1, Called(), Called().method, len):
        for _ in range(2):
            assert dict(parameters_of(function)) == dict(inspect.signature(function).parameters)


def test_what_is_replaced_is_what_this_version_of_snakemake_uses():
    quicken_plans()
    assert "get_function_params(func)" in inspect.getsource(snakemake.rules.Rule.apply_input_function)
    assert snakemake.rules.get_function_params is parameters_of
    assert "get_function_params(func)" in inspect.getsource(snakemake.common.get_input_function_aux_params)
    assert snakemake.common.get_function_params is parameters_of
