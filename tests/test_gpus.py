"""GPUs told apart: which there are, who has one, and what happens when its owner ends."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from threading import Thread

import pytest

from segtrust import cli, gpus
from segtrust.config import ROOT
from segtrust.errors import SegtrustError

WAIT_S = 30


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Locks in a folder of the test, whose path is longer than a socket's address may be."""
    folder = tmp_path / ("a long name " * 10)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return folder


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("0", ["0"]),
        ("2, 0", ["2", "0"]),
        ("GPU-8a1,MIG-0f", ["GPU-8a1", "MIG-0f"]),
        ("", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
    ],
)
def test_gpus_are_those_that_cuda_would_see(monkeypatch, value, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert gpus.visible() == names


LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aaa)
  MIG 3g.20gb     Device  0: (UUID: MIG-bbb)
  MIG 3g.20gb     Device  1: (UUID: MIG-ccc)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-ddd)
"""


def test_gpus_are_asked_of_nvidia_smi_and_divided_ones_are_named_by_their_parts(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpus, "_may_be_there", lambda: True)
    assert gpus.visible() == ["MIG-bbb", "MIG-ccc", "GPU-ddd"]


def test_a_machine_without_gpus_has_none(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "_may_be_there", lambda: False)
    assert gpus.visible() == []


def test_the_folder_of_locks_is_the_users_alone(place):
    assert gpus.folder().stat().st_mode & 0o777 == 0o700
    gpus.folder().chmod(0o755)
    with pytest.raises(SegtrustError, match=r"mode 755; remove it, or set TMPDIR"):
        gpus.folder()


def test_a_link_is_no_folder_of_locks(place, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (place / f"segtrust-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SegtrustError, match="must be a folder of this user"):
        gpus.folder()


def test_every_allocation_has_locks_of_its_own(monkeypatch):
    without = gpus.folder()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert gpus.folder().name == f"{without.name}-17"


def test_samples_are_spread_over_gpus_before_two_share_one():
    with ExitStack() as held:
        taken = [held.enter_context(gpus.one_share(["0", "1", "2"])) for _ in range(6)]
        assert sorted(taken[:3]) == sorted(taken[3:]) == ["0", "1", "2"]
        assert gpus._any_share(["0", "1", "2"]) is None


def test_a_share_is_free_again_when_its_job_is_done():
    for _ in range(3):
        with gpus.one_share(["0"]) as first, gpus.one_share(["0"]) as second:
            assert first == second == "0"


def waiting(job):
    """Start a job in a thread; return the thread."""
    thread = Thread(target=job, daemon=True)
    thread.start()
    return thread


def until(condition):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_wants_all_of_a_gpu_waits_for_its_sample_and_no_other_sample_comes_before(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    had = []

    def train():
        with gpus.own_gpu("auto"):
            had.append(os.environ["CUDA_VISIBLE_DEVICES"])

    with gpus.one_share(["0"]):
        thread = waiting(train)
        until(lambda: gpus._any_share(["0"]) is None)
        assert not had
    thread.join(WAIT_S)
    assert had == ["0"]


def test_all_of_a_gpu_is_taken_where_nobody_uses_one():
    with gpus.one_share(["0", "1"]) as used, gpus.all_shares(["0", "1"]) as own:
        assert used != own


def test_a_gpu_of_ones_own_is_the_only_one_that_cuda_sees(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with gpus.own_gpu("auto"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
        assert gpus._any_share(["3"]) is None


def test_who_computes_on_the_processor_takes_no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with gpus.own_gpu("cpu"):
        assert not list(gpus.folder().iterdir())


def test_nothing_is_left_when_all_jobs_are_done(place):
    with gpus.one_share(["0", "1"]), gpus.all_shares(["0", "1"]):
        assert len(list(gpus.folder().iterdir())) == 1 + gpus.SHARES
    assert not list(place.iterdir())


HOLDER = """
import sys, time
from segtrust import cli, gpus
from segtrust.config import ROOT
with gpus.all_shares(["0"]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_job_leaves_its_gpu_to_others():
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert gpus._any_share(["0"]) is None
        holder.send_signal(signal.SIGKILL)
    with gpus.all_shares(["0"]) as device:
        assert device == "0"


USER = """
import sys, time
from segtrust import cli, gpus
from segtrust.config import ROOT
for _ in range(10):
    with gpus.all_shares(["0", "1"]) as device:
        began = time.monotonic()
        time.sleep(0.01)
        print(device, began, time.monotonic(), flush=True)
"""


def test_many_jobs_never_have_one_gpu_at_the_same_time():
    users = [subprocess.Popen([sys.executable, "-c", USER], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    lines = [line.split() for user in users for line in user.communicate(timeout=WAIT_S)[0].splitlines()]
    assert len(lines) == 40
    for device in ("0", "1"):
        times = sorted((float(began), float(ended)) for name, began, ended in lines if name == device)
        assert all(ended <= began for (_, ended), (began, _) in pairwise(times))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "3000", "SLURM_CPUS_ON_NODE": "1"}, ("5", "1", "mem_mb=3000", "cpu=1")),
        ({"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "1"}, ("5", "1", "mem_mb=500", "cpu=1")),
    ],
    ids=["memory of the node", "memory per processor"],
)
def test_limits_of_an_allocation_are_what_slurm_has_given(monkeypatch, variables, expected):
    for name, value in {**variables, "CUDA_VISIBLE_DEVICES": "0,1"}.items():
        monkeypatch.setenv(name, value)
    limits = cli._limits(ROOT / "profiles/allocation", [])
    cores, threads, memory, cpu = expected
    assert limits == ["--cores", cores, "--max-threads", threads, "--resources", memory, cpu, "gpu_shares=4"]


def test_limits_that_a_user_gives_are_the_users(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    profile = ROOT / "profiles/local"
    assert "--cores" not in cli._limits(profile, ["--cores", "3"])
    assert cli._limits(profile, ["-c3", "--resources", "gpu_shares=1"]) == []
    assert cli._limits(ROOT / "profiles/slurm", []) == []
