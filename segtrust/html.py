"""What all pages of the report are made with: templates, provenance as rows, and writing."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from segtrust.files import replacing


def environment():
    """Return the Jinja2 environment of all pages; text is escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["marked"] = marked
    return made


def marked(text):
    """Return text as HTML, with what stands between backticks as code."""
    parts = [escape(part) for part in text.split("`")]
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if place % 2 else part for place, part in enumerate(parts)
    )


def flatten(value, prefix=""):
    """Return [(dotted name, text)] of a nested dict, sorted by name."""
    rows = []
    for name, part in sorted(value.items()):
        rows += flatten(part, f"{prefix}{name}.") if isinstance(part, dict) else [(f"{prefix}{name}", str(part))]
    return rows


def write_html(path, text):
    """Write the text of a page."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
