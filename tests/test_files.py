"""Writing under another name, and provenance in tables."""

import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from segtrust.files import (
    own_partial,
    read_parquet,
    remove_leftovers,
    replacing,
    write_csv,
    write_json,
    write_parquet,
)


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


@pytest.fixture
def killed():
    """The id of a process that was there and is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def partial_of(path, process):
    """Return the path that a process of this machine writes to."""
    own = own_partial(path)
    return own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{process}-"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_job_left_is_removed_by_the_next(tmp_path, killed):
    path, other = tmp_path / "table.txt", tmp_path / "other-table.txt"
    for file in (path, other):
        partial_of(file, killed).write_text("half")
    write_json(path, 1)
    assert names(tmp_path) == [partial_of(other, killed).name, "table.txt"]


def test_what_a_running_job_writes_is_left_alone(tmp_path):
    path = tmp_path / "table.txt"
    theirs = partial_of(path, os.getppid())
    theirs.write_text("half")
    write_json(path, 1)
    assert names(tmp_path) == [theirs.name, "table.txt"]


def test_what_another_machine_writes_is_left_alone_for_an_hour(tmp_path, killed):
    theirs = tmp_path / f".partial-abcdef-{killed}-table.txt"
    theirs.write_text("half")
    remove_leftovers(tmp_path)
    assert theirs.exists()
    long_ago = time.time() - 3601
    os.utime(theirs, (long_ago, long_ago))
    remove_leftovers(tmp_path)
    assert not theirs.exists()


def test_leftovers_of_all_folders_are_removed_together(tmp_path, killed):
    results = tmp_path / "model" / "samples"
    results.mkdir(parents=True)
    partial_of(results / "a.safetensors", killed).write_text("half")
    folder = partial_of(results / "trace.xml", killed)
    folder.mkdir()
    (folder / "trace.xml").write_text("half")
    (results / "whole.safetensors").write_text("whole")
    remove_leftovers(tmp_path)
    assert names(results) == ["whole.safetensors"]


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
