"""Writing under another name, and provenance in tables."""

import pyarrow as pa
import pytest

from segtrust.files import read_parquet, replacing, write_csv, write_json, write_parquet


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["table.txt"]


def test_the_partial_file_keeps_its_ending_and_its_folder(tmp_path):
    with replacing(tmp_path / "new" / "scan.nii.gz") as partial:
        partial.write_text("")
        assert partial.name.endswith("scan.nii.gz")
        assert partial.parent == tmp_path / "new"


def test_what_a_killed_job_left_is_written_over(tmp_path):
    path = tmp_path / "table.txt"
    with replacing(path) as partial:
        left = partial.name
        partial.write_text("first")
    (tmp_path / left).write_text("half")
    with replacing(path) as partial:
        partial.write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["table.txt"]


def test_provenance_travels_with_a_table(tmp_path):
    table = pa.table({"dice": [0.5, None]})
    write_parquet(tmp_path / "t.parquet", table, {"seed": 3})
    read, provenance = read_parquet(tmp_path / "t.parquet")
    assert read["dice"].to_pylist() == [0.5, None]
    assert provenance == {"seed": 3}


def test_other_metadata_of_a_table_is_kept(tmp_path):
    table = pa.table({"n": [1]}).replace_schema_metadata({b"masks": b"brain"})
    write_parquet(tmp_path / "t.parquet", table, {})
    assert read_parquet(tmp_path / "t.parquet")[0].schema.metadata[b"masks"] == b"brain"


def test_null_is_an_empty_field_in_csv(tmp_path):
    write_csv(tmp_path / "t.csv", pa.table({"region": ["ET", "WT"], "value": [None, 0.25]}))
    assert (tmp_path / "t.csv").read_text().splitlines()[1:] == ['"ET",', '"WT",0.25']


def test_nan_cannot_be_written_as_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
