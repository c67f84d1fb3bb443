"""Charts: what is drawn is what the table holds."""

import re
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from drawn_cohorts import N_BINS, curves_table

from segtrust import charts
from segtrust.colours import REGION_COLOURS
from segtrust.drawing import DARK, LIGHT, coloured, save_chart, specification, svg_of
from segtrust.figures import reliability_points


def data_of(specified):
    """Return the tables inside a specification, a list of DataFrames."""
    return [pd.read_csv(StringIO(held)) for held in specified["datasets"].values() if isinstance(held, str)]


def points(**columns):
    return pd.DataFrame(columns)


@pytest.fixture(scope="module")
def diagram():
    """The specification of a reliability diagram of two masks and `brain`."""
    table = reliability_points(curves_table("m"), "class_probability", "ET", N_BINS)
    return table, specification(charts.reliability(table, "ET", "class_probability", N_BINS))


def test_a_reliability_diagram_draws_the_points_of_its_table(diagram):
    table, specified = diagram
    drawn = data_of(specified)[0]
    assert len(drawn) == len(table) == 3 * N_BINS
    for column in ("x", "y", "low", "high", "n"):
        assert drawn[column].to_numpy() == pytest.approx(table[column].to_numpy(), rel=1e-4)
    assert drawn["mask"].tolist() == table["mask"].tolist()


def test_papers_show_the_first_mask_and_brain(diagram):
    _, specified = diagram
    (parameter,) = [one for one in specified["params"] if one["name"] == "mask"]
    assert parameter["value"] == "predicted_5mm"
    svg = svg_of(specified)
    # circles of the diagram: the bins of two of the three masks
    assert len(re.findall(r'aria-roledescription="(?:point|circle)"', svg)) == 2 * N_BINS


def test_a_chart_has_its_region_s_colour_and_no_other(diagram):
    svg = coloured(svg_of(diagram[1]), LIGHT).lower()
    assert REGION_COLOURS["ET"] in svg
    assert not any(REGION_COLOURS[region] in svg for region in ("WT", "TC"))


def test_charts_are_coloured_for_light_and_dark_pages(diagram):
    svg = svg_of(diagram[1])
    assert "var(--" in svg
    light, dark = coloured(svg, LIGHT), coloured(svg, DARK)
    assert "var(--" not in light + dark
    assert (DARK[charts.INK] in dark, LIGHT[charts.INK] in dark) == (True, False)


def test_pictures_have_the_colours_of_the_page():
    css = (Path(charts.__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"(--[a-z]+): (#[0-9a-f]{6})", part)) for part in css.split("@media", 2)[:2])
    for colours, named in ((LIGHT, light), (DARK, dark)):
        assert colours == {f"var({name})": named[name] for name in ("--paper", "--ink", "--muted", "--line")}


def test_the_same_chart_is_the_same_file_whatever_was_drawn_before(diagram):
    first = svg_of(diagram[1])
    svg_of(diagram[1])
    assert svg_of(diagram[1]) == first
    assert "clip1" in first


def test_a_chart_is_saved_for_pages_and_papers_with_its_caption(tmp_path, diagram):
    (width, height), files = save_chart(diagram[1], tmp_path, "name", "How to read it.")
    assert 280 < width < 360
    assert 300 < height < 460
    assert sorted(files) == sorted(path.name for path in tmp_path.iterdir())
    assert (tmp_path / "name.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "name.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "name.txt").read_text() == "How to read it.\n"


def test_files_have_no_links_that_only_the_page_could_resolve(tmp_path):
    people = points(
        patient=["a", "b"], x=[0.1, 0.2], y=[0.5, 0.9], volume_ml=[3.0, 30.0], href=["patients/m/a.html"] * 2
    )
    specified = specification(charts.scatter(people, "ET", 0.8))
    assert "href" in str(specified)
    assert "<a " not in svg_of(specified)


def test_markup_in_an_id_is_text(tmp_path):
    evil = '<script>alert("1")</script>, a'
    people = points(patient=[evil, "b"], x=[0.1, 0.2], y=[0.5, 0.9], volume_ml=[3.0, 30.0], href=["x", "y"])
    specified = specification(charts.scatter(people, "ET", 0.8))
    assert data_of(specified)[0]["patient"].tolist() == [evil, "b"]
    assert "<script" not in svg_of(specified)


def test_numbers_that_are_missing_stay_missing():
    table = points(region=["TC"] * 2, passes=[5, 10], value=[0.2, 0.3], low=[0.1, np.nan], high=[0.3, np.nan])
    drawn = data_of(specification(charts.convergence(table, "gap", "brain", from_zero=True)))[0]
    assert drawn["low"].isna().tolist() == [False, True]


def domain_of(table, from_zero):
    specified = specification(charts.convergence(table, "gap", "brain", from_zero=from_zero))
    return specified["layer"][1]["encoding"]["y"]["scale"]["domain"]


def test_the_axis_of_an_error_begins_at_zero():
    table = points(region=["TC"] * 2, passes=[5, 10], value=[0.2, 0.3], low=[0.1, 0.2], high=[0.3, 0.4])
    low, high = domain_of(table, from_zero=True)
    assert (low, high >= 0.4) == (0, True)


def test_a_small_change_over_passes_is_not_blown_up():
    values = [0.998, 0.999, 0.997, 0.998]
    low_high = {"low": np.array(values) - 0.001, "high": np.nan}
    table = points(region=["WT", "WT", "TC", "TC"], passes=[5, 10] * 2, value=values, **low_high)
    low, high = domain_of(table, from_zero=False)
    assert high - low >= charts.LEAST_SPAN
    assert low < 0.996 < 0.999 < high <= 1


def test_close_points_of_a_stratum_lie_apart_and_always_in_the_same_place():
    spread = charts._spread(pd.Series([0.5, 0.5, 0.5, 0.9]))
    assert len(set(spread)) == 4
    assert np.abs(spread).max() <= 0.6
    assert np.array_equal(spread, charts._spread(pd.Series([0.5, 0.5, 0.5, 0.9])))


def test_patients_without_a_score_are_drawn_hollow():
    people = points(
        stratum=["Q1", "missed"], patient=["a", "b"], y=[0.9, 0.0], apart=[False, True], href=[None, "p/b.html"]
    )
    medians = points(stratum=["Q1", "missed"], y=[0.9, 0.0], low=[np.nan] * 2, high=[np.nan] * 2, n=[1, 1])
    svg = svg_of(specification(charts.strata(people, medians, "ET")))
    assert sorted(re.findall(r'fill-opacity="([\d.]+)"', svg)) == ["0", "0.5"]


@pytest.mark.parametrize("largest", [0.02, 0.9, 7.3, 143.0])
def test_the_legend_of_volumes_lies_within_the_volumes(largest):
    shown = charts._round(pd.Series([0.0, largest / 3, largest]))
    assert shown == sorted(set(shown))
    assert 0 < shown[0] < shown[-1] <= largest


def test_where_no_interval_exists_charts_are_drawn_without(diagram):
    table = diagram[0].assign(low=np.nan, high=np.nan)
    svg = svg_of(specification(charts.reliability(table, "ET", "top_label", N_BINS)))
    assert "NaN" not in svg
    assert "Infinity" not in svg
