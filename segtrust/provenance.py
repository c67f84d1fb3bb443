"""Where a number comes from: digests of files, settings and code, and versions of what computed it."""

import ast
import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import segtrust
from segtrust.files import canonical_json

PACKAGE = Path(segtrust.__file__).resolve().parent
LIBRARIES = ("torch", "monai", "openvino", "numpy", "scipy", "nibabel", "pyarrow", "pandas", "snakemake")


def file_digest(path):
    """Return the SHA-256 of a file's bytes, as hexadecimal text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_digest(settings):
    """Return the SHA-256 of a JSON-able value, whatever the order of its keys."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()


def versions():
    """Return the versions of segtrust, Python and the libraries that compute."""
    found = {"segtrust": segtrust.__version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def code_digest(script):
    """Return the SHA-256 of a script and of every module of the package that it imports, directly or not.

    script : path of a Python file

    Comments, docstrings and layout do not count, so that editing them recomputes nothing.
    """
    sources, waiting = {}, [Path(script)]
    while waiting:
        path = waiting.pop()
        if path in sources:
            continue
        sources[path] = _without_docstrings(path)
        waiting += _package_imports(path)
    parts = sorted(f"{path.name}\n{text}" for path, text in sources.items())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@cache
def _without_docstrings(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            text = first.value if isinstance(first, ast.Expr) else None
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                node.body = node.body[1:] or [ast.Pass()]
    return _text(tree)


def _text(node):
    """Return a syntax tree, or part of one, as text that is the same under every version of Python.

    `ast.dump` and `ast.unparse` write one tree differently from version to version, as does `repr` characters that
    only some versions know. New versions add fields to nodes: those that hold nothing are left out.
    """
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = [f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({','.join(fields)})"


@cache
def _package_imports(path):
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    modules = []
    for name in names:
        package, _, module = name.partition(".")
        candidate = PACKAGE / f"{module}.py"
        if package == "segtrust" and module and candidate.is_file():
            modules.append(candidate)
    return modules
