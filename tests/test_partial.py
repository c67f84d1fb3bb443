"""The tables of the patients that are finished, while others still fail."""

import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pandas as pd
import pytest
from conftest import draw_scan, save
from small_studies import GIVEN, changed, draw_study, snakemake

from segtrust import cli

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of four test patients, of whom one is damaged and one has no reference."""
    folder = tmp_path_factory.mktemp("partial")
    draw_study(folder, {"given": GIVEN}, ["test"] * 4, without_reference=[3])
    path = folder / "data/p1/p1_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    snakemake(folder, expect=1)
    return folder


@pytest.fixture(scope="module")
def told(study):
    with redirect_stdout(StringIO()) as words:
        assert cli.main(["cohort", "given", str(study), "--partial"]) == 0
    return words.getvalue()


def test_it_says_how_many_of_how_many_and_who_is_missing(study, told):
    assert "results/given/cohort_partial: 2 of 3 patients" in told
    assert "p1: preprocess: p1: the file ends early or is damaged" in told
    state = json.loads((study / "results/given/cohort_partial/missing.json").read_text())
    assert (state["n"], state["of"], list(state["missing"])) == (2, 3, ["p1"])
    first = json.loads((study / "results/given/cohort_partial/alarms.json").read_text())[0]
    assert (first["alarm"], first["severity"], first["value"]) == ("partial", "error", {"n": 2, "of": 3})


def test_the_tables_are_those_of_a_cohort_without_the_missing(study, told):
    exclude = changed(study, on_bad_patient="exclude")
    snakemake(study, *exclude)
    for table in ("metrics", "patients", "strata", "curves"):
        whole = pd.read_parquet(study / f"results/given/cohort/{table}.parquet")
        part = pd.read_parquet(study / f"results/given/cohort_partial/{table}.parquet")
        pd.testing.assert_frame_equal(whole, part)


def test_a_partial_cohort_is_no_reason_to_run_anything(study, told):
    exclude = changed(study, on_bad_patient="exclude")
    assert "Nothing to be done" in snakemake(study, "-n", *exclude)


def test_a_model_that_is_not_there_is_told_with_those_that_are(study, capsys):
    assert cli.main(["cohort", "other", str(study), "--partial"]) == 1
    assert "no model other; it has given" in capsys.readouterr().err


def test_a_tally_that_is_out_of_date_does_not_count(study, told, capsys):
    _, codes = draw_scan(0)
    save(study / "data/p0/p0_seg.nii.gz", np.where(codes == 4, 1, codes).astype(np.uint8))
    assert cli.main(["cohort", "given", str(study), "--partial"]) == 0
    said = capsys.readouterr().out
    assert "1 of 3 patients" in said
    assert "p0: stale: " in said
