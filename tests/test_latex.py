import pandas as pd
import pytest

from segtrust.latex import escaped, latex_of, write_table


def test_a_table_is_written_unrounded_and_for_latex(tmp_path):
    rows = pd.DataFrame({"region": ["ET"], "value": [0.123456789012345]})
    shown = pd.DataFrame({"region": ["ET"], "value": ["0.123 [0.100–0.200]"]})
    assert write_table(rows, shown, tmp_path, "main", "What it says.") == ["main.csv", "main.tex"]
    assert pd.read_csv(tmp_path / "main.csv")["value"].tolist() == [0.123456789012345]
    text = (tmp_path / "main.tex").read_text()
    for part in (r"\toprule", r"\caption{What it says.}", r"\label{tab:main}", "0.123 {[}0.100--0.200]"):
        assert part in text


def test_a_table_of_points_is_csv_alone(tmp_path):
    assert write_table(pd.DataFrame({"x": [1]}), None, tmp_path, "points", "") == ["points.csv"]


@pytest.mark.parametrize("text", ["a_b & 50 % #1 $x$ {y}", r"\input{/etc/passwd}", "a~b^c", "<script>", "|x|"])
def test_what_latex_would_obey_is_shown_as_text(text):
    named = {"\\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^"}
    named |= {r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|"}
    read = escaped(text)
    for command, letter in named.items():
        read = read.replace(command, f"\0{letter}")
    for letter in "&%$#_{}":
        read = read.replace(f"\\{letter}", letter)
    assert "\\" not in read.replace("\0\\", "")
    assert read.replace("\0", "") == text


def test_headings_and_captions_are_text_too():
    text = latex_of(pd.DataFrame({"ece_top_label": ["−0.1"]}), "a", "5 % of ece_top_label")
    assert r"ece\_top\_label" in text
    assert r"5 \% of ece\_top\_label" in text
    assert "-0.1" in text


def test_a_long_table_runs_over_pages():
    text = latex_of(pd.DataFrame({"x": ["1"] * 60}), "a", "c")
    assert r"\begin{longtable}" in text
    assert "longtable" in text.splitlines()[0]


def test_brackets_and_greek_letters_are_set_as_such():
    assert escaped("[0.1]") == "{[}0.1]"
    assert escaped("ΔDice") == r"$\Delta$Dice"
