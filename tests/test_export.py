"""What leaves a study: an archive for readers of its numbers, Snakemake's own report, and results that can be moved."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import draw_scan, save, write_patient, write_sheet
from test_progress import shown, terminal

from segtrust import cli
from segtrust.config import ROOT
from segtrust.errors import SegtrustError
from segtrust.export import EXTRAS, export
from segtrust.files import canonical_json, write_parquet

MODEL = {"network": {"name": "UNet-Res"}, "checkpoint": "model.pt"}


def write(path, text="content"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def study(tmp_path):
    """A folder with the files of a finished study, though nothing was computed."""
    folder = tmp_path / "my study"
    write(folder / "config.yaml", yaml.safe_dump({"models": {"m": MODEL, "n": MODEL}}))
    write(folder / "patients.tsv", "patient\n")
    write(folder / "data/p/p_t1.nii.gz")
    write(folder / "model.pt")
    for place in (
        *("preprocessed/p.safetensors", "report/index.html", "report/figures/m_slice_p_scan.png"),
        *("report/assets/charts_m.js", "report/assets/vega.js"),
        *(
            "report/patients/m/p.html",
            "report/triage/m.html",
            "comparison/metrics.csv",
            "removed/cohort/metrics.csv",
            "failed/voxels/p.json",
        ),
    ):
        write(folder / "results" / place)
    for name in (
        *(
            "cohort/alarms.json",
            "inject/rate.json",
            "train/curve.csv",
            "train/checkpoint.sha256",
            "train/checkpoint.pt",
        ),
        *("maps/p_entropy.nii.gz", "tally/p.parquet", "voxels/p.parquet", "samples/p/member0_0-4.safetensors"),
        *("samples/.traced/a.xml", "cohort/.partial-metrics.csv"),
    ):
        write(folder / "results/m" / name)
    write_parquet(folder / "results/m/cohort/metrics.parquet", pa.table({"value": [1]}), {"versions": {"torch": "x"}})
    return folder


def contents(archive):
    """Return {name without the study's folder: bytes} of an archive."""
    with tarfile.open(archive) as tar:
        return {entry.name.partition("/")[2]: tar.extractfile(entry).read() for entry in tar}


ALWAYS = {
    *("MANIFEST.sha256", "provenance.json", "config.yaml", "patients.tsv"),
    *("results/m/cohort/alarms.json", "results/m/cohort/metrics.parquet", "results/m/inject/rate.json"),
    *("results/m/train/curve.csv", "results/m/train/checkpoint.sha256", "results/comparison/metrics.csv"),
    *("results/report/index.html", "results/report/figures/m_slice_p_scan.png", "results/report/triage/m.html"),
    *("results/report/assets/charts_m.js", "results/report/assets/vega.js"),
}


def test_settings_tables_and_report_are_packed_and_nothing_else(study, tmp_path):
    export(study, tmp_path / "a.tar.gz")
    assert set(contents(tmp_path / "a.tar.gz")) == ALWAYS


@pytest.mark.parametrize(
    ("extra", "added"),
    [
        ("maps", "results/m/maps/p_entropy.nii.gz"),
        ("pages", "results/report/patients/m/p.html"),
        ("tally", "results/m/tally/p.parquet"),
        ("voxels", "results/m/voxels/p.parquet"),
        ("samples", "results/m/samples/p/member0_0-4.safetensors"),
    ],
)
def test_what_is_asked_for_is_added(study, tmp_path, extra, added):
    export(study, tmp_path / "a.tar.gz", [extra])
    assert set(contents(tmp_path / "a.tar.gz")) == {*ALWAYS, added}


def test_that_links_to_pages_left_out_lead_nowhere_is_said(study, tmp_path):
    said = "without pages of patients, so links to them lead nowhere"
    assert said in export(study, tmp_path / "a.tar.gz")
    assert said not in export(study, tmp_path / "b.tar.gz", ["pages"])


def test_scans_and_weights_never_go_in(study, tmp_path):
    export(study, tmp_path / "a.tar.gz", EXTRAS)
    names = set(contents(tmp_path / "a.tar.gz"))
    assert not [name for name in names if re.search(r"preprocessed|^data|\.pt$|\.traced", name)]


def test_a_bar_counts_the_files(study, tmp_path):
    with terminal() as sent:
        export(study, tmp_path / "a.tar.gz")
    n = len(contents(tmp_path / "a.tar.gz")) - 2  # manifest and provenance are made
    assert [line.partition(" |")[0] for line in shown(sent())] == [
        f"files read: {n} of {n}",
        f"files packed: {n} of {n}",
    ]


def test_the_manifest_has_the_digest_of_every_other_file(study, tmp_path):
    export(study, tmp_path / "a.tar.gz", EXTRAS)
    files = contents(tmp_path / "a.tar.gz")
    listed = dict(line.split("  ", 1)[::-1] for line in files.pop("MANIFEST.sha256").decode().splitlines())
    assert listed == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def test_the_provenance_is_that_of_the_tables(study, tmp_path):
    export(study, tmp_path / "a.tar.gz")
    provenance = json.loads(contents(tmp_path / "a.tar.gz")["provenance.json"])
    assert provenance["models"] == {"m": {"versions": {"torch": "x"}}}


def test_the_same_files_give_the_same_bytes_under_another_name_and_later(study, tmp_path):
    export(study, tmp_path / "a.tar.gz")
    for path in study.rglob("*"):
        path.touch()
    (study / "config.yaml").chmod(0o600)
    export(study, tmp_path / "b.tgz")
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tgz").read_bytes()


def test_names_begin_with_the_studys_and_say_nothing_of_this_machine(study, tmp_path):
    export(study, tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        entries = list(tar)
    assert {entry.name.split("/")[0] for entry in entries} == {"my study"}
    assert {(entry.uname, entry.uid, entry.mtime, entry.mode) for entry in entries} == {("", 0, 0, 0o644)}


@pytest.mark.parametrize(("patients", "name"), [("../sheet.tsv", "sheet.tsv"), ("sheets/a.tsv", "sheets/a.tsv")])
def test_a_sheet_that_lies_elsewhere_is_packed_too(study, tmp_path, patients, name):
    (study / "sheets").mkdir()
    write(study / patients)
    write(study / "config.yaml", yaml.safe_dump({"patients": patients, "models": {"m": MODEL}}))
    export(study, tmp_path / "a.tar.gz")
    assert name in contents(tmp_path / "a.tar.gz")


def test_the_summary_says_what_is_missing_and_that_slices_are_shown(study, tmp_path):
    said = export(study, tmp_path / "a.tar.gz")
    assert "without tables, as there are none: n" in said
    assert "single slices of scans (1 figures)" in said


def test_nothing_is_overwritten(study, tmp_path):
    write(tmp_path / "a.tar.gz", "mine")
    with pytest.raises(SegtrustError, match="exists already"):
        export(study, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_text() == "mine"


def test_other_archives_are_refused(study, tmp_path):
    with pytest.raises(SegtrustError, match=r"ends with \.tar\.gz"):
        export(study, tmp_path / "a.zip")


def test_a_study_without_a_report_is_refused_and_leaves_nothing(study, tmp_path, capsys):
    (study / "results/report/index.html").unlink()
    assert cli.main(["export", str(study), str(tmp_path / "a.tar.gz")]) == 1
    assert "no results/report/index.html yet; `segtrust run` makes it" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.tar.gz"))


def test_the_command_packs_what_is_asked_for(study, tmp_path, capsys):
    assert cli.main(["export", str(study), str(tmp_path / "a.tar.gz"), "--with", "maps", "tally"]) == 0
    assert {"results/m/maps/p_entropy.nii.gz", "results/m/tally/p.parquet"} < set(contents(tmp_path / "a.tar.gz"))
    assert "sha256sum --check" in capsys.readouterr().out


# --- a study that has run ---

TRAINED = {
    "network": {"name": "UNet-Res", "channels": [4, 8], "strides": [2]},
    "outputs": {"softmax": ["background", "NCR", "ED", "ET"]},
    "train": {"iterations": 2, "batch": 1, "patch": [8, 8, 8], "validate_every": 2},
}
SECRET = "where nobody else looks"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that has run, under a path that would be known again."""
    folder = tmp_path_factory.mktemp(SECRET) / "study"
    rows = []
    for seed, split in enumerate(("train", "validation", "test")):
        paths = write_patient(folder / "data", f"p{seed}", seed)
        relative = {column: str(Path(path).relative_to(folder)) for column, path in paths.items()}
        rows.append({"patient": f"p{seed}", **relative, "split": split})
    write_sheet(folder / "patients.tsv", rows)
    _, codes = draw_scan(2)
    save(folder / "labels/p2.nii.gz", codes)
    models = {
        "trained": TRAINED,
        "labels": {"predictions": "labels/{patient}.nii.gz", "outputs": {"labels": "brats2021"}},
    }
    config = {"models": models, "sample": {"passes": 2, "device": "cpu"}, "cohort": {"resamples": 100}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    snakemake(folder)
    return folder


def snakemake(study, *arguments, offline=False):
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(study)]
    command += ["--workflow-profile", str(ROOT / "profiles/local"), "--cores", "2", *arguments]
    # a network of its own, without any other machine in it, where that is allowed
    alone = (
        ["unshare", "--net"]
        if offline and not subprocess.run(["unshare", "--net", "true"], check=False).returncode
        else []
    )
    done = subprocess.run([*alone, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def parts_of(path):
    """Return all that is in a file of results, with compressed content unpacked, as bytes."""
    content = path.read_bytes()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        content += canonical_json(table.to_pydict()).encode() if "metrics" in path.name else b""
        content += str(table.schema.metadata).encode() + b"".join(
            str(column.unique()).encode() for name, column in zip(table.column_names, table.columns, strict=True)
            if pa.types.is_string(table.schema.field(name).type)
        )  # fmt: skip
    if path.name.endswith(".nii.gz"):
        content += str(nib.load(path).header).encode()
    return content


@pytest.mark.slow
def test_no_result_holds_a_path_of_this_machine(finished):
    files = [path for path in (finished / "results").rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".parquet", ".csv", ".json", ".gz", ".html", ".safetensors", ".pt", ".svg"} <= kinds
    telling = (SECRET.encode(), str(finished).encode(), str(ROOT).encode())
    assert [str(path) for path in files if any(word in parts_of(path) for word in telling)] == []


@pytest.mark.slow
def test_snakemakes_report_is_made_offline_with_all_captions_and_settings(finished, tmp_path):
    snakemake(finished, "--report", str(tmp_path / "report.zip"), offline=True)
    with zipfile.ZipFile(tmp_path / "report.zip") as packed:
        names = [name.rpartition("/")[2] for name in packed.namelist()]
        page = packed.read("report/report.html").decode()
    each_model = ["metrics.csv", "patients.csv", "strata.csv", "alarms.json"]
    assert sorted(names) == sorted(["report.html", *each_model, *each_model, "metrics.csv", "curve.csv"])
    for said in (
        "2 model(s): labels, trained",
        "from 100 bootstrap resamples of subjects",
        "10, 15, 20 bins",
        "below a Dice of 0.8",
        "sorted by uncertainty and cut into quartiles",
        "An empty list is what one wants",
        "Paired differences of every two of labels, trained",
        "2 iterations, 1 patches of 8 \\u00d7 8 \\u00d7 8 voxels",
    ):
        assert said in page, said


@pytest.mark.slow
def test_a_report_of_snakemake_costs_no_job(finished, tmp_path):
    snakemake(finished, "--report", str(tmp_path / "report.html"))
    assert "Nothing to be done" in snakemake(finished, "-n")


@pytest.mark.slow
def test_a_study_that_was_moved_has_nothing_to_do(finished, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)  # dates are kept, as by rsync -a
    assert "Nothing to be done" in snakemake(moved, "-n")


@pytest.mark.slow
def test_a_finished_study_is_packed_with_where_its_numbers_come_from(finished, tmp_path):
    export(finished, tmp_path / "a.tar.gz")
    files = contents(tmp_path / "a.tar.gz")
    assert {"results/trained/train/curve.csv", "results/labels/cohort/metrics.csv"} < set(files)
    provenance = json.loads(files["provenance.json"])
    weights = files["results/trained/train/checkpoint.sha256"].decode().split()[0]
    assert provenance["models"]["trained"]["model"]["weights"] == weights
    assert set(provenance["comparison"]["models"]) == {"trained", "labels"}
