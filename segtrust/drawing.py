"""Charts as files: SVG for pages, light and dark, and SVG, PDF and PNG for papers, with the caption beside them."""

import json
import re

import vl_convert

from segtrust.charts import INK, LINE, MUTED, PAPER
from segtrust.files import replacing

# as in the style sheet of the pages
LIGHT = {PAPER: "#ffffff", INK: "#1b1f24", MUTED: "#5b6470", LINE: "#dfe4ea"}
DARK = {PAPER: "#1b1f26", INK: "#e8eaed", MUTED: "#a3acb7", LINE: "#343b45"}
VEGA_LITE = "6.4"
PNG_DOTS_PER_INCH = 300


def specification(chart):
    """Return a chart as a Vega-Lite specification, a dict."""
    return chart.to_dict()


def svg_of(specified):
    """Return the SVG of a specification, in the names of the style sheet's colours and without links."""
    svg = vl_convert.vegalite_to_svg(json.dumps(_without_links(specified)), vl_version=VEGA_LITE)
    # Vega numbers clipping paths through all charts of a process; here each chart begins with 1
    places = {}
    return re.sub(r'((?:id="|url\(#)clip)(\d+)', lambda at: f"{at[1]}{places.setdefault(at[2], len(places) + 1)}", svg)


def coloured(svg, colours):
    """Return the text of an SVG with colours in place of the names of the style sheet."""
    return re.sub("|".join(map(re.escape, colours)), lambda match: colours[match[0]], svg)


def _without_links(part):
    """Return a specification without addresses, which hold on the page alone."""
    if isinstance(part, dict):
        return {name: _without_links(value) for name, value in part.items() if name != "href"}
    return [_without_links(value) for value in part] if isinstance(part, list) else part


def save_chart(specified, folder, name, caption):
    """Write a chart as `name.svg`, `name_dark.svg`, `name.pdf`, `name.png`, and its caption as `name.txt`.

    Returns ((width, height) in pixels of a page, names of the files).
    """
    svg = svg_of(specified)
    light = coloured(svg, LIGHT)
    files = {
        f"{name}.svg": light.encode(),
        f"{name}_dark.svg": coloured(svg, DARK).encode(),
        f"{name}.pdf": vl_convert.svg_to_pdf(light),
        f"{name}.png": vl_convert.svg_to_png(light, ppi=PNG_DOTS_PER_INCH),
        f"{name}.txt": f"{caption}\n".encode(),
    }
    for file, content in files.items():
        with replacing(folder / file) as partial:
            partial.write_bytes(content)
    width, height = re.search(r'<svg [^>]*?width="([\d.]+)" height="([\d.]+)"', svg).groups()
    return (round(float(width)), round(float(height))), list(files)
