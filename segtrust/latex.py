"""Tables for papers: CSV with every digit, and LaTeX with its caption."""

import pyarrow as pa

from segtrust.files import replacing, write_csv

# letters that LaTeX sets without a further package
_PLAIN = {"−": "-", "–": "--", "≥": ">=", "≤": "<=", "τ": "tau", "ρ": "rho", "δ": "delta"}


def write_table(rows, shown, folder, name, caption):
    """Write a table as `name.csv` and as `name.tex`.

    rows : DataFrame, unrounded, for the CSV
    shown : DataFrame of text, for LaTeX (booktabs); None where only the CSV makes sense
    caption : plain text

    Returns the names of the files.
    """
    write_csv(folder / f"{name}.csv", pa.Table.from_pandas(rows, preserve_index=False))
    if shown is None:
        return [f"{name}.csv"]
    with replacing(folder / f"{name}.tex") as partial:
        partial.write_text(latex_of(shown, name, caption), encoding="utf-8")
    return [f"{name}.csv", f"{name}.tex"]


def latex_of(shown, name, caption):
    """Return a DataFrame of text as a LaTeX table, with markup in it shown as text."""
    plain = shown.astype(str).map(_spelled).rename(columns=_spelled)
    plain.columns = [escaped(column) for column in plain.columns]
    text = plain.map(escaped).to_latex(
        index=False, escape=False, longtable=len(shown) > 40, caption=escaped(_spelled(caption)), label=f"tab:{name}"
    )
    return f"% needs \\usepackage{{booktabs{',longtable' if len(shown) > 40 else ''}}}\n{text}"


def _spelled(text):
    for letter, plain in _PLAIN.items():
        text = text.replace(letter, plain)
    return text


def escaped(text):
    """Return text in which LaTeX sees no command."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "Δ": r"$\Delta$"}
    special["["] = "{[}"  # after a line's end it would begin an option
    return "".join(special.get(letter, letter) for letter in text)
