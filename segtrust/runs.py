"""Runs: what a Snakemake that died without a word has left of its run, so that the next command goes on from there.

A killed Snakemake leaves the lock of its study, jobs in SLURM's queue, and processes that go on computing. Which are
a study's is told by Snakemake's own logs, which name the host and the run's id in SLURM, and by the folder that a
process works in.
"""

import re
import shutil
import socket
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from segtrust.errors import SegtrustError

SLURM_S = 60
_HEAD_BYTES = 65536


class Log(NamedTuple):
    """What a log of Snakemake says of its run; started : seconds since 1970; slurm_id : name of its jobs, or None."""

    started: float
    host: str | None
    slurm_id: str | None


def prepare(study, unlock):
    """End and clear away what a dead run has left, and return what was done or is in the way, as lines of text.

    study : Path of its folder
    unlock : function without arguments that removes Snakemake's lock

    Nothing is touched while a Snakemake works on the study, here or, as far as its log tells, on another machine.
    Raises SegtrustError where SLURM does not end the jobs.
    """
    processes = processes_in(study)
    running = [process for process in processes if _is_snakemake(process)]
    if running:
        return [f"Snakemake works on this study already (process {running[0].pid} on {socket.gethostname()})."]
    logs = logs_of(study)
    holder = _holder(study, logs)
    if holder and holder.host not in (None, socket.gethostname()):
        started = datetime.fromtimestamp(holder.started)
        return [
            f"The study is locked by the run that began on {holder.host} at {started:%Y-%m-%d %H:%M}. If that is dead, "
            f"go on from {holder.host}, or give the option --unlock here and run again."
        ]
    left = [process for process in processes if _is_job(process, study)]
    said = [f"Ending process {process.pid}, which a dead run has left." for process in left]
    _end(left)
    if queued := _queued([log.slurm_id for log in logs if log.slurm_id]):
        said.append(f"Cancelling {len(queued)} SLURM job(s), which a dead run has left: {', '.join(queued)}.")
        _cancel(queued)
    if holder:
        said.append("Removing the lock of a run that is dead.")
        unlock()
    return said


def logs_of(study):
    """Return the Logs of a study's runs, newest first."""
    return sorted(filter(None, map(_log, (study / ".snakemake" / "log").glob("*.snakemake.log"))), reverse=True)


def _log(path):
    try:
        started = datetime.strptime(path.name.partition(".snakemake")[0], "%Y-%m-%dT%H%M%S.%f").timestamp()
    except ValueError:
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(_HEAD_BYTES)
    host = re.search(r"^\s*Host: (\S+)", head, flags=re.MULTILINE)
    slurm_id = re.search(r"SLURM run ID: (\S+)", head)
    return Log(started, host and host[1], slurm_id and slurm_id[1])


def _holder(study, logs):
    """Return the Log of the run that holds the lock, None where there is no lock; later ones have been refused."""
    locks = study / ".snakemake" / "locks"
    locked = [path.stat().st_mtime for path in locks.iterdir()] if locks.is_dir() else []
    if not locked:
        return None
    return next((log for log in logs if log.started <= min(locked)), Log(min(locked), None, None))


def processes_in(study):
    """Return the processes of this machine that work in a study's folder; those of other users cannot be seen."""
    study, found = study.resolve(), []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        folder = process.info["cwd"]
        if folder and process.info["cmdline"] and Path(folder) == study:
            found.append(process)
    return found


def _is_snakemake(process):
    """Say whether a process is a Snakemake that a user has started, and not one in a job."""
    command = process.info["cmdline"]
    named = any(Path(word).name == "snakemake" for word in command[:3])
    return named and "--mode" not in command


def _is_job(process, study):
    scripts = str(study.resolve() / ".snakemake" / "scripts")
    return any(word.startswith(scripts) for word in process.info["cmdline"])


def _end(processes):
    for process in processes:
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=10)


def _queued(names):
    """Return the ids of the jobs with one of these names that SLURM has not ended; none where there is no SLURM."""
    if not names or not shutil.which("squeue"):
        return []
    command = ["squeue", "--me", "--noheader", "--format=%A", f"--name={','.join(names)}"]
    return _slurm(command).split()


def _cancel(jobs):
    _slurm(["scancel", "--full", *jobs])
    until = time.monotonic() + SLURM_S
    while running := sorted(set(_slurm(["squeue", "--me", "--noheader", "--format=%A"]).split()) & set(jobs)):
        if time.monotonic() > until:
            raise SegtrustError(
                f"SLURM has not ended {', '.join(running)} within {SLURM_S} s of scancel; end them, and run again"
            )
        time.sleep(1)


def _slurm(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_S, check=False)
    except subprocess.TimeoutExpired:
        raise SegtrustError(f"SLURM does not answer: {' '.join(command)}") from None
    if done.returncode:
        raise SegtrustError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
