"""The patient sheet, and what headers show."""

import numpy as np
import pytest
from conftest import LPS, MODALITIES, SHAPE, save, write_patient, write_sheet

from segtrust.errors import Problems
from segtrust.patients import header_problems, read_sheet

FILES = {modality: f"{modality}.nii.gz" for modality in MODALITIES}


def problems(path):
    with pytest.raises(Problems) as caught:
        read_sheet(path)
    return caught.value.problems


def test_relative_paths_are_relative_to_the_sheet(tmp_path):
    sheet = write_sheet(tmp_path / "patients.tsv", [{"patient": "a", **FILES, "seg": "/data/seg.nii.gz"}])
    patient = read_sheet(sheet)[0]
    assert patient.scan["t1"] == str(tmp_path / "t1.nii.gz")
    assert patient.seg == "/data/seg.nii.gz"


def test_paths_stay_relative_to_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    write_sheet("demo/patients.tsv", [{"patient": "a", **FILES}])
    assert read_sheet("demo/patients.tsv")[0].scan["t1"] == "demo/t1.nii.gz"


def test_empty_cells_take_the_defaults(tmp_path):
    row = {"patient": "a", **FILES, "seg": "", "coding": "", "split": "", "subject": ""}
    patient = read_sheet(write_sheet(tmp_path / "p.tsv", [row]))[0]
    assert (patient.seg, patient.coding, patient.split, patient.subject) == (None, "brats2021", "test", "a")


def test_further_columns_are_kept_for_grouping(tmp_path):
    sheet = write_sheet(tmp_path / "p.tsv", [{"patient": "a", **FILES, "site": "Basel <b>", "grade": "4"}])
    assert read_sheet(sheet)[0].extra == {"site": "Basel <b>", "grade": "4"}


def test_ids_that_look_like_numbers_stay_as_they_are(tmp_path):
    sheet = write_sheet(tmp_path / "p.tsv", [{"patient": "00012", **FILES}])
    assert read_sheet(sheet)[0].patient == "00012"


@pytest.mark.parametrize("name", ["../up", "a/b", "/abs", ".", "", "a b", "-n", "<script>", "a\\b"])
def test_an_id_that_could_lead_elsewhere_is_refused(tmp_path, name):
    found = problems(write_sheet(tmp_path / "p.tsv", [{"patient": name, **FILES}]))
    assert any("is no usable patient id" in message for message in found)


def test_repeated_ids_are_named_with_their_lines(tmp_path):
    sheet = write_sheet(tmp_path / "p.tsv", [{"patient": name, **FILES} for name in ("a", "b", "A")])
    assert "'a' is there 2 times, in lines 2, 4" in problems(sheet)[0]


def test_a_missing_modality_is_named(tmp_path):
    sheet = write_sheet(tmp_path / "p.tsv", [{"patient": "a", **FILES, "flair": "", "t2": ""}])
    assert "a: no file is given for t2, flair" in problems(sheet)[0]


def test_problems_of_all_rows_are_reported_together(tmp_path):
    rows = [
        {"patient": "a", **FILES, "coding": "brats22"},
        {"patient": "../b", **FILES, "coding": "msd"},
        {"patient": "c", **FILES, "split": "tst"},
    ]
    assert len(problems(write_sheet(tmp_path / "p.tsv", rows))) == 3


def test_a_column_that_is_missing_is_named(tmp_path):
    row = {"patient": "a", **{modality: path for modality, path in FILES.items() if modality != "t1ce"}, "t1c": "x"}
    assert "no column 't1ce' (is it 't1c'?)" in problems(write_sheet(tmp_path / "p.tsv", [row]))[0]


def test_commas_instead_of_tabs_are_recognised(tmp_path):
    (tmp_path / "p.tsv").write_text("patient,t1,t1ce,t2,flair\na,b,c,d,e\n")
    assert any("separated by tabs" in message for message in problems(tmp_path / "p.tsv"))


def test_a_sheet_without_patients_is_an_error(tmp_path):
    (tmp_path / "p.tsv").write_text("patient\tt1\tt1ce\tt2\tflair\n")
    assert "has no patients" in problems(tmp_path / "p.tsv")[0]


def test_a_sheet_that_is_not_there_says_how_to_make_one(tmp_path):
    assert "segtrust init" in problems(tmp_path / "gone.tsv")[0]


def test_headers_of_good_patients_show_nothing(cohort):
    assert header_problems(read_sheet(cohort / "patients.tsv")) == {}


def test_header_problems_of_all_patients_are_found_together(tmp_path):
    rows = [{"patient": f"p{i}", **write_patient(tmp_path, f"p{i}", i)} for i in range(4)]
    (tmp_path / "p0" / "p0_t2.nii.gz").unlink()
    shifted = LPS.copy()
    shifted[1, 3] = 0
    save(rows[1]["seg"], np.zeros((20, 22, 18), np.uint8), shifted)
    (tmp_path / "p2" / "p2_t1.nii.gz").write_text("no image")
    found = header_problems(read_sheet(write_sheet(tmp_path / "p.tsv", rows)))
    assert list(found) == ["p0", "p1", "p2"]
    assert "p0, t2: no such file" in found["p0"][0]
    assert "seg has 20×22×18" in found["p1"][0]
    assert "not a readable NIfTI" in found["p2"][0]


def test_a_line_longer_than_the_first_is_refused_and_shifts_nothing(tmp_path):
    (tmp_path / "p.tsv").write_text("patient\tt1\tt1ce\tt2\tflair\na\tb\tc\td\te\tf\n")
    assert "Expected 5 fields in line 2, saw 6" in problems(tmp_path / "p.tsv")[0]


def test_cells_left_out_at_the_end_of_a_line_are_empty(tmp_path):
    (tmp_path / "p.tsv").write_text("patient\tt1\tt1ce\tt2\tflair\tsite\tseg\t\na\tb\tc\td\te\n")
    patient = read_sheet(tmp_path / "p.tsv")[0]
    assert (patient.seg, patient.extra) == (None, {"site": ""})


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "p.tsv").write_text("patient\tt1\tt1\tt1ce\tt2\tflair\na\tb\tc\td\te\tf\n")
    assert "a column name is there twice" in problems(tmp_path / "p.tsv")[0]


@pytest.mark.parametrize("content", [b"", "patient\tsite\na\tZürich\n".encode("latin-1")])
def test_a_file_that_is_no_table_of_text_is_refused(tmp_path, content):
    (tmp_path / "p.tsv").write_bytes(content)
    assert "no table of tab-separated UTF-8 text" in problems(tmp_path / "p.tsv")[0]


@pytest.mark.parametrize(
    ("column", "shape"), [("t2", (*SHAPE, 2)), ("t2", SHAPE[:2]), ("seg", (*SHAPE, 1)), ("image", (*SHAPE, 3))]
)
def test_headers_show_files_of_other_dimensions(tmp_path, column, shape):
    row = {"patient": "a", **write_patient(tmp_path, "a", 0), column: save(tmp_path / "x.nii.gz", np.ones(shape))}
    (message,) = header_problems(read_sheet(write_sheet(tmp_path / "p.tsv", [row])))["a"]
    assert f"has shape {shape}" in message


@pytest.mark.parametrize("name", ["dice", "region", "score_brain_mean_entropy"])
def test_a_column_named_like_one_of_the_results_is_refused(tmp_path, name):
    sheet = write_sheet(tmp_path / "p.tsv", [{"patient": "a", **FILES, name: "1"}])
    assert f"has the name {name!r}" in problems(sheet)[0]
