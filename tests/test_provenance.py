"""Digests change with what matters, and with nothing else."""

import pytest

from segtrust import provenance
from segtrust.provenance import code_digest, file_digest, settings_digest, versions


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two modules and a script that imports one, which imports the other."""
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    provenance._without_docstrings.cache_clear()
    provenance._package_imports.cache_clear()
    (tmp_path / "outer.py").write_text("from segtrust.inner import f\n")
    (tmp_path / "inner.py").write_text('def f(x):\n    """Say it."""\n    return x\n')
    (tmp_path / "other.py").write_text("y = 1\n")
    (tmp_path / "script.py").write_text("from segtrust import outer\n")
    return tmp_path


def digest(package):
    provenance._without_docstrings.cache_clear()
    provenance._package_imports.cache_clear()
    return code_digest(package / "script.py")


def test_a_comment_a_docstring_and_layout_do_not_count(package):
    before = digest(package)
    (package / "inner.py").write_text('"""New."""\n\ndef f( x ):\n    """Say it better."""\n    return (x)  # so\n')
    assert digest(package) == before


WRITTEN = "def f(x, y):\n    if x:\n        return g(x, [y, 1], 'a')\n    return f'{x:>{y}} of'\n"


@pytest.mark.parametrize(
    "text",
    [
        WRITTEN.replace("if x:", "if (x):  # so"),
        WRITTEN.replace("[y, 1], ", "[\n\n            y,\n            1,  # one\n        ],\n"),
        WRITTEN.replace("'a')", "'a',)"),
        WRITTEN.replace("'", '"'),
        WRITTEN.replace("    if", '    """Say it."""\n\n    if'),
        WRITTEN.replace("    ", "  "),
    ],
    ids=["brackets", "lines", "comma", "quotes", "docstring", "indentation"],
)
def test_what_says_the_same_otherwise_does_not_count(package, text):
    (package / "inner.py").write_text(WRITTEN)
    before = digest(package)
    (package / "inner.py").write_text(text)
    assert text != WRITTEN
    assert digest(package) == before


@pytest.mark.parametrize(
    "text",
    [
        WRITTEN.replace("1]", "2]"),
        WRITTEN.replace("1]", "1.0]"),
        WRITTEN.replace("    return f'", "        return f'"),
        WRITTEN.replace("'a'", "'b'"),
        WRITTEN.replace("'a'", "b'a'"),
        WRITTEN.replace(" of'", " for'"),
        WRITTEN.replace("{y}", "{x}"),
        WRITTEN.replace("{x:", "{x!r:"),
        WRITTEN.replace("f(x, y)", "f(x, y=None)"),
        WRITTEN.replace("return g", "yield g"),
        WRITTEN + "None\n",
    ],
)
def test_what_says_something_else_counts(package, text):
    (package / "inner.py").write_text(WRITTEN)
    before = digest(package)
    (package / "inner.py").write_text(text)
    assert text != WRITTEN
    assert digest(package) != before


def test_a_digest_is_the_same_under_every_version_of_python(package):
    # as Python 3.11 to 3.14 give it; the emoji is a character only to newer versions
    (package / "inner.py").write_text(
        "def f(x, *, y=1e3):\n    return f'{x!r:>{y}} {x=}' '\U0001fae8' if x else {**y}\n"
    )
    assert digest(package) == "acd0fa3294ca0c1a8061055a0a611c185e259f44d0c3d1c9dc58647a9fc9c8eb"


def test_code_imported_through_other_modules_counts(package):
    before = digest(package)
    (package / "inner.py").write_text("def f(x):\n    return x + 1\n")
    assert digest(package) != before


def test_code_that_is_not_imported_does_not_count(package):
    before = digest(package)
    (package / "other.py").write_text("y = 2\n")
    assert digest(package) == before


def test_the_order_of_keys_does_not_count():
    assert settings_digest({"a": 1, "b": [1, 2]}) == settings_digest({"b": [1, 2], "a": 1})
    assert settings_digest({"b": [2, 1], "a": 1}) != settings_digest({"b": [1, 2], "a": 1})


def test_a_files_digest_is_its_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_versions_of_what_computes_are_recorded():
    assert {"segtrust", "python", "numpy", "torch"} <= set(versions())
