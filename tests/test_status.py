import pytest
from conftest import write_patient, write_sheet

from segtrust import cli, status
from segtrust.errors import SegtrustError


def row(rule, path, state="ok", plan="no update"):
    return {"rule": rule, "output_file": path, "status": state, "plan": plan}


ROWS = [
    row("preprocess", "results/preprocessed/p_1.safetensors"),
    row("train", "results/m/train/checkpoint.pt"),
    row("train", "results/m/train/checkpoint.sha256"),
    row("sample", "results/m/samples/p_1/member1_0-9.safetensors"),
    row("sample", "results/m/samples/p_1/member1_10-19.safetensors", "missing"),
    row("maps", "results/m/maps/p_1_entropy_4class.nii.gz", "params changed"),
    row("maps", "results/m/maps/p_1_entropy.nii.gz"),
    row("maps", "results/m/maps/p_1_entropy.json"),
    row("tally", "results/m/tally/p_1.parquet", "missing"),
    row("cohort", "results/m/cohort/metrics.parquet", "missing"),
    row("score", "results/m/scores/p_2.json"),
    row("triage", "results/report/triage/m.html"),
    row("triage", "results/report/patients/m/order.js"),
    row("page", "results/report/patients/m/p_1.html"),
    row("report", "results/report/index.html", "missing"),
]


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A study's status with these rows and two logs of jobs that ended badly."""
    monkeypatch.setattr(status, "summary", lambda study: ROWS)
    for name, text in {
        "tally/m/p_1.log": "reading\nMemoryError: out of it\n",
        "sample/m/p_1/member1_10-19.log": "sample: done in 3.0 s\n",
    }.items():
        (tmp_path / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / name).write_text(text)
    return status.status(tmp_path)


def counts(text, stage):
    (line,) = [line.split() for line in text.splitlines() if f" {stage} " in line and line.split()[-1].isdigit()]
    return dict(zip(status.STATES, map(int, line[-4:]), strict=True))


def test_jobs_are_counted_and_not_files():
    jobs = status.jobs_of(ROWS)
    assert len(jobs) == 11
    assert {job.patient for job in jobs if job.stage == "maps"} == {"p_1"}


def test_jobs_of_the_report_belong_to_their_model_and_patient():
    jobs = {(job.stage, job.model, job.patient, job.log) for job in status.jobs_of(ROWS)}
    assert {
        ("score", "m", "p_2", "logs/score/m/p_2.log"),
        ("triage", "m", None, "logs/triage/m.log"),
        ("page", "m", "p_1", "logs/page/m/p_1.log"),
        ("report", None, None, "logs/report.log"),
    } <= jobs


@pytest.mark.parametrize(
    ("stage", "state"),
    [("preprocess", "done"), ("train", "done"), ("maps", "stale"), ("tally", "failed"), ("cohort", "missing")],
)
def test_a_job_is_done_stale_failed_or_missing(judged, stage, state):
    assert counts(judged, stage) == dict.fromkeys(status.STATES, 0) | {state: 1}


def test_a_log_of_a_finished_job_is_no_failure(judged):
    assert counts(judged, "sample") == {"done": 1, "stale": 0, "failed": 0, "missing": 1}


def test_stale_jobs_say_why_and_failed_ones_how_they_ended(judged):
    assert "  m, maps: params changed (p_1)" in judged
    assert "  m, tally, p_1: MemoryError: out of it  (logs/tally/m/p_1.log)" in judged


def test_what_is_made_from_something_stale_is_stale():
    (states,) = status.jobs_of([row("voxels", "results/m/voxels/p1.parquet", plan="update pending")]).values()
    assert states == ["what it is made from is made again"]


def test_a_folder_without_a_study_is_refused(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 1
    assert "no config.yaml" in capsys.readouterr().err


def test_a_study_that_cannot_be_planned_is_told_in_snakemakes_words(tmp_path):
    (tmp_path / "config.yaml").write_text("models: {}\n")
    with pytest.raises(SegtrustError, match="cannot plan this study"):
        status.status(tmp_path)


def test_a_fresh_study_has_everything_missing(tmp_path):
    rows = [{"patient": f"p{i}", **write_patient(tmp_path / "data", f"p{i}", i)} for i in range(2)]
    write_sheet(tmp_path / "patients.tsv", rows)
    for i in range(2):
        write_patient(tmp_path / "given", f"p{i}", i)
    text = (
        "models:\n  given:\n    predictions: given/{patient}/{patient}_seg.nii.gz\n    outputs: {labels: brats2021}\n"
    )
    (tmp_path / "config.yaml").write_text(text)
    told = status.status(tmp_path)
    assert counts(told, "preprocess") == {"done": 0, "stale": 0, "failed": 0, "missing": 2}
    assert counts(told, "gather")["missing"] == 2
    assert counts(told, "report")["missing"] == 1
