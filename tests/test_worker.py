"""Warm workers: what a job gets from one is what it gets without, and only a job that has lost its worker fails."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from conftest import draw_scan, write_patient, write_sheet

from segtrust import gpus, worker
from segtrust.channel import Gone, connected
from segtrust.config import ROOT, checked_config
from segtrust.errors import PatientError, Problems, SegtrustError
from segtrust.models import read_models
from segtrust.moments import read_moments
from segtrust.networks import build
from segtrust.preprocess import preprocess, write_preprocessed
from segtrust.volumes import Geometry

WAIT_S = 60
NETWORK = {"name": "UNet-Res", "channels": [4, 8], "strides": [2], "dropout": 0.2}
OUTPUTS = {"softmax": ["background", "NCR", "ED", "ET"]}
MANY = 3000  # passes that take seconds


def save_weights(path, seed):
    torch.save(build({**NETWORK, "out_channels": 4}, seed=seed).state_dict(), path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with preprocessed scans, weights, and what a job without a worker made of each patient."""
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(3):
        scan, _ = draw_scan(number)
        geometry = Geometry(scan.shape[1:], torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0])).numpy())
        path = folder / f"p{number}.safetensors"
        write_preprocessed(path, preprocess(scan.astype("float32"), geometry), {"preprocess": number})
    save_weights(folder / "w.pt", 0)
    config = checked_config(
        {"models": {"m": {"network": NETWORK, "checkpoint": str(folder / "w.pt"), "outputs": OUTPUTS}}}
    )
    (folder / "settings.json").write_text(json.dumps(read_models(config)[0]["m"].settings))
    for number in range(3):
        worker.sample_on_gpu(warm=0, log=print, **request(folder, number, device="cpu", output=f"cold{number}"))
    return folder


def request(folder, number=0, output="moments.safetensors", **more):
    return {
        "scan": f"{folder}/p{number}.safetensors",
        "checkpoint": f"{folder}/w.pt",
        "rate": None,
        "output": f"{folder}/{output}",
        "cache": f"{folder}/.traced",
        "model": "m",
        "patient": f"p{number}",
        "source": "member0",
        "first": 0,
        "last": 3,
        "settings": json.loads((folder / "settings.json").read_text()),
        "device": "auto",
        "threads": 1,
        "batch": "auto",
        "code": "some code",
        **more,
    }


@pytest.fixture
def study(prepared, tmp_path, monkeypatch):
    """A study of its own, the working folder, on a machine that pretends to have one GPU."""
    study = Path(shutil.copytree(prepared, tmp_path / "study"))
    (tmp_path / "locks").mkdir()
    monkeypatch.chdir(study)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "locks"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield study
    gpus.dismiss("0")


def ask(study, number=0, log=print, **more):
    worker.sample_on_gpu(warm=1, log=log, **request(study, number, **more))


def said(study):
    """Return what the workers of the GPU have written down."""
    return (study / "logs/sample/worker-gpu-0.log").read_text()


def process():
    """Return the process of the worker of the GPU."""
    channel, greeting = connected(gpus.socket_of("0"))
    channel.close()
    return greeting["process"]


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class Job(Thread):
    """A job in a thread; `lines` is its log, `error` what it raised."""

    def __init__(self, study, number=0, **more):
        super().__init__(daemon=True)
        self.lines, self.times, self.error = [], [], None
        self._arguments = study, number, more
        self.start()

    def log(self, line):
        self.times.append(time.monotonic())
        self.lines.append(line)

    def run(self):
        study, number, more = self._arguments
        try:
            ask(study, number, self.log, **more)
        except Exception as error:
            self.error = error

    def is_computed(self):
        return sum("passes of " in line for line in self.lines) > 2


def test_a_worker_writes_the_very_bytes_that_a_job_writes_without(study):
    for number in range(3):
        ask(study, number, output=f"warm{number}")
        assert (study / f"warm{number}").read_bytes() == (study / f"cold{number}").read_bytes()
    assert not list(study.glob(".partial*"))


def test_the_network_is_opened_once_for_many_patients(study):
    processes = set()
    for number in range(3):
        ask(study, number)
        processes.add(process())
    assert len(processes) == 1
    assert said(study).count("network opened") == 1


@pytest.mark.slow
def test_other_weights_under_the_old_name_are_opened_and_named(study):
    ask(study)
    before = read_moments("moments.safetensors")[1]["model"]["weights"]
    save_weights("w.pt", 1)
    ask(study)
    assert said(study).count("network opened") == 2
    assert read_moments("moments.safetensors")[1]["model"]["weights"] != before


def test_a_jobs_log_says_what_it_says_without_a_worker(study, monkeypatch):
    cold, warm = [], []
    ask(study, 1, warm.append)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ask(study, 1, cold.append)
    without_times = [[re.sub(r"[\d.]+ s", "", line) for line in lines] for lines in (warm, cold)]
    assert len(cold) > 3
    assert without_times[0] == without_times[1]


def test_relative_paths_are_those_of_the_job(study):
    ask(study, scan="p1.safetensors", checkpoint="w.pt", output="new/moments", cache=".traced", patient="p1")
    assert (study / "new/moments").read_bytes() == (study / "cold1").read_bytes()


@pytest.mark.slow
def test_an_error_of_the_user_is_raised_as_it_is_without_a_worker(study):
    still = json.loads((study / "settings.json").read_text())
    still["stochastic"] = {**still["stochastic"], "dropout": False}
    with pytest.raises(SegtrustError, match="4 passes were asked for, but no dropout layer"):
        ask(study, settings=still)
    ask(study)  # the worker goes on
    assert said(study).count("worker of GPU") == 1


def test_a_damaged_scan_fails_alone_and_its_log_has_the_traceback(study):
    (study / "p1.safetensors").write_bytes((study / "p1.safetensors").read_bytes()[:5000])
    lines = []
    with pytest.raises(RuntimeError, match="SafetensorError"):
        ask(study, 1, lines.append)
    assert "read_preprocessed" in "".join(lines)
    ask(study, 2)
    assert (study / "moments.safetensors").read_bytes() == (study / "cold2").read_bytes()
    assert said(study).count("worker of GPU") == 1


def test_a_missing_file_is_named_by_the_error_of_python(study):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{study}/nowhere.pt")):
        ask(study, checkpoint="nowhere.pt")


@pytest.mark.parametrize(
    "error",
    [
        PatientError("p1: bad"),
        SegtrustError("ü: bad"),
        Problems(["a", "b"]),
        ValueError("x", 3),
        KeyError("x"),
        OSError(28, "No space left on device", "/f"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_their_words_and_the_kind_that_a_job_looks_at(error):
    with pytest.raises(Exception) as raised:  # noqa: PT011 - which it is, is asked below
        worker._raise(json.loads(json.dumps(worker._told(error))), lambda line: None)
    assert str(error) in str(raised.value)
    for kind in (PatientError, SegtrustError, OSError):
        assert isinstance(raised.value, kind) == isinstance(error, kind)


def test_patients_are_computed_one_after_the_other(study):
    jobs = [Job(study, number, last=300, output=f"warm{number}") for number in (0, 1)]
    for job in jobs:
        job.join(WAIT_S)
        assert job.error is None
    (_, first_end), (second_begin, _) = sorted((job.times[0], job.times[-1]) for job in jobs)
    assert first_end <= second_begin


def test_two_jobs_that_start_a_worker_at_once_get_the_same(study):
    jobs = [Job(study, number, output=f"warm{number}") for number in (0, 1)]
    for job in jobs:
        job.join(WAIT_S)
        assert job.error is None
    assert said(study).count("worker of GPU") == 1


def test_a_killed_worker_fails_the_job_it_had_and_the_next_starts_another(study):
    job = Job(study, last=MANY)
    until(job.is_computed)
    os.kill(process(), signal.SIGKILL)
    job.join(WAIT_S)
    assert isinstance(job.error, SegtrustError)
    assert re.search(r"p0: the worker of GPU 0 \(process \d+\) ended.*worker-gpu-0.log", str(job.error))
    assert not (study / "moments.safetensors").exists()
    ask(study)
    assert (study / "moments.safetensors").read_bytes() == (study / "cold0").read_bytes()


CLIENT = """
import json, sys
from segtrust.worker import sample_on_gpu
sample_on_gpu(warm=1, **json.loads(sys.argv[1]))
print("libraries:", [name for name in ("torch", "monai", "openvino", "scipy") if name in sys.modules])
"""


def start_client(study, **more):
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps(request(study, **more))], stdout=subprocess.PIPE, text=True
    )


def test_a_job_with_a_worker_imports_no_library_that_computes(study):
    with start_client(study) as client:
        assert client.stdout.read().splitlines()[-1] == "libraries: []"


def test_a_patient_whose_job_was_killed_is_given_up_without_an_output(study):
    with start_client(study, last=MANY) as client:
        until(lambda: "passes of " in client.stdout.readline())
        client.kill()
    until(lambda: "given up, its job has gone" in said(study))
    assert not (study / "moments.safetensors").exists()
    ask(study)
    assert (study / "moments.safetensors").read_bytes() == (study / "cold0").read_bytes()
    assert not list(study.glob(".partial*"))
    assert said(study).count("worker of GPU") == 1


def test_other_code_gets_another_worker(study):
    ask(study)
    before = process()
    ask(study, code="newer code")
    assert process() != before
    assert read_moments("moments.safetensors")[1]["model"]["code"] == "newer code"
    assert re.findall("worker of GPU|the end", said(study)) == ["worker of GPU", "the end", "worker of GPU"]


def test_an_idle_worker_ends_and_leaves_no_socket(study, monkeypatch):
    monkeypatch.setattr(worker, "IDLE_S", 0.5)
    ask(study)
    until(lambda: "the end" in said(study))
    gpus.locked(gpus.life_of("0"), wait=True).close()
    assert not gpus.socket_of("0").exists()


def test_a_socket_that_a_killed_worker_left_is_in_nobodys_way(study):
    ask(study)
    os.kill(process(), signal.SIGKILL)
    gpus.locked(gpus.life_of("0"), wait=True).close()
    assert gpus.socket_of("0").exists()
    ask(study)
    assert process()


def test_a_job_that_needs_all_of_a_gpu_ends_its_worker(study):
    ask(study)
    with gpus.own_gpu("auto"):
        assert connected(gpus.socket_of("0")) is None
        assert "the end" in said(study)


def test_a_worker_that_met_what_it_does_not_know_leaves_the_rest_to_another(study):
    first = Job(study, 0, last=600, output="long")
    until(first.is_computed)
    # computing fails; what waits meanwhile is done by the next worker
    broken = Job(study, 1, batch="many", output="broken")
    until(lambda: gpus._any_share(["0"]) is None)
    time.sleep(0.3)
    channel, _ = connected(gpus.socket_of("0"))
    with channel:
        channel.send(request(study, 2, output="waiting"))
        for job in (first, broken):
            job.join(WAIT_S)
        message = channel.receive()
    assert first.error is None
    assert isinstance(broken.error, TypeError)
    assert message == {"done": False}
    until(lambda: "left to another worker" in said(study))
    ask(study, 2)
    assert (study / "moments.safetensors").read_bytes() == (study / "cold2").read_bytes()
    assert said(study).count("worker of GPU") == 2


def test_a_worker_that_cannot_start_is_told_with_its_log(study, monkeypatch):
    monkeypatch.setattr(worker.sys, "executable", shutil.which("false"))
    with pytest.raises(SegtrustError, match=r"the worker of GPU 0 did not start .*worker-gpu-0.log"):
        ask(study)


def test_half_a_message_is_none(study):
    ask(study)
    channel, _ = connected(gpus.socket_of("0"))
    os.kill(process(), signal.SIGKILL)
    with channel, pytest.raises(Gone):
        channel.receive()


# --- a whole study ---

N_PATIENTS = 3
TRAINING = {"iterations": 2, "batch": 1, "patch": [8, 8, 8], "validate_every": 2}


def run(study, profile, devices, *arguments, expect=0):
    """Run a study as a user does, with locks of its own and some pretended GPUs; return what is said."""
    locks = study / "locks"
    locks.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    segtrust = [sys.executable, "-c", "import sys; from segtrust.cli import main; sys.exit(main())"]
    command = [*segtrust, "run", str(study), "--profile", profile, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT,
        env={**environment, "CUDA_VISIBLE_DEVICES": devices, "TMPDIR": str(locks)},
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_study(folder):
    rows = []
    for number, split in enumerate(["train", "validation", *["test"] * N_PATIENTS]):
        paths = write_patient(folder / "data", f"p{number}", number)
        relative = {column: str(Path(path).relative_to(folder)) for column, path in paths.items()}
        rows.append({"patient": f"p{number}", **relative, "split": split})
    write_sheet(folder / "patients.tsv", rows)
    model = {"network": NETWORK, "outputs": OUTPUTS, "train": TRAINING}
    config = {"models": {"m": model}, "sample": {"passes": 3}, "cohort": {"resamples": 100}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def end_workers(study, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(study / "locks"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for device in ("0", "1"):
        gpus.dismiss(device)


@pytest.fixture(scope="module")
def allocated(tmp_path_factory):
    """A finished study that ran in an allocation with two pretended GPUs, and what Snakemake said."""
    study = tmp_path_factory.mktemp("an allocated study")
    write_study(study)
    told = run(study, "allocation", "0,1")
    with pytest.MonkeyPatch.context() as monkeypatch:
        end_workers(study, monkeypatch)
    return study, told


def moments_of(study):
    return {str(path.relative_to(study)): path.read_bytes() for path in study.glob("results/m/samples/*/*.safetensors")}


@pytest.fixture
def again(allocated, tmp_path):
    """A copy of the finished study that has its moments to make again."""
    study = Path(shutil.copytree(allocated[0], tmp_path / "study", ignore=shutil.ignore_patterns("samples", "locks")))
    shutil.rmtree(study / "logs/sample")
    return study


@pytest.mark.slow
def test_an_allocation_gives_the_bytes_of_a_workstation_without_gpus(allocated, again):
    expected = moments_of(allocated[0])
    run(again, "local", "", *expected)
    assert len(expected) == N_PATIENTS
    assert moments_of(again) == expected
    assert not list((again / "logs/sample").glob("worker-*"))


@pytest.mark.slow
def test_every_patient_is_computed_once_on_one_of_both_gpus(allocated):
    study, _ = allocated
    logs = [(study / f"logs/sample/worker-gpu-{device}.log").read_text() for device in (0, 1)]
    done = [re.findall(r"m, (p\d+), .*: done", log) for log in logs]
    assert all(done)
    assert sorted(done[0] + done[1]) == [f"p{number}" for number in range(2, 2 + N_PATIENTS)]


@pytest.mark.slow
def test_an_allocations_processors_are_not_taken_by_jobs_that_wait_for_a_gpu(allocated):
    _, told = allocated
    n_processors = int(re.search(r"--max-threads (\d+)", told)[1])
    assert f"--cores {n_processors + 4} " in told
    assert re.search(rf"--resources mem_mb=\d+ cpu={n_processors} gpu_shares=4", told)
    for rule, cpu, shares in (("sample", 0, 1), ("preprocess", 1, None), ("train", min(8, n_processors), 2)):
        resources = re.search(rf"localrule {rule}:.*?resources: (.*?)\n", told, flags=re.DOTALL)[1]
        assert f"cpu={cpu}," in resources
        assert (f"gpu_shares={shares}," in resources) == (shares is not None)
        assert ("warm=1" in resources) == (rule == "sample")


@pytest.mark.slow
def test_a_damaged_patient_fails_alone_beside_a_worker_and_is_alone_planned_again(allocated, again, monkeypatch):
    expected = moments_of(allocated[0])
    scan = again / "results/preprocessed/p3.safetensors"
    dates = scan.stat().st_atime_ns, scan.stat().st_mtime_ns
    scan.write_bytes(scan.read_bytes()[:5000])
    os.utime(scan, ns=dates)
    told = run(again, "allocation", "0,1", *expected, "--retries", "0", expect=1)
    end_workers(again, monkeypatch)
    failed = "results/m/samples/p3/member0_0-2.safetensors"
    assert re.findall(r"Error in rule sample.*?output: (\S+)", told, flags=re.DOTALL) == [failed]
    assert "SafetensorError" in (again / "logs/sample/m/p3/member0_0-2.log").read_text()
    assert moments_of(again) == {name: written for name, written in expected.items() if name != failed}
    planned = run(again, "allocation", "0,1", *expected, "-n")
    assert re.findall(r"output: (results/\S+)", planned) == [failed]
