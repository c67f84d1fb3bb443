"""What every job of the workflow shares: its log, and a record when a patient's content makes it fail."""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from threadpoolctl import threadpool_limits

from segtrust.errors import SegtrustError, patient_errors
from segtrust.files import write_json


@contextmanager
def job(snakemake, stage):
    """Run the body of a script as one job.

    snakemake : the object that Snakemake gives to scripts
    stage : word of the stage

    Everything written to the file descriptors 1 and 2 goes to the job's log, the words of C libraries too. A
    `SegtrustError` is shown without a traceback, in the log and to the caller, and ends the job; every `PatientError`
    also leaves a record in results/failed/, which `on_bad_patient: exclude` reads.
    """
    shown = _take_over_output(snakemake.log[0])
    started = time.monotonic()
    try:
        # libraries would start a thread per core of the node, whatever the job was given
        with threadpool_limits(snakemake.threads):
            yield
    except SegtrustError as error:
        for of_one in patient_errors(error):
            failure = _failure(snakemake, stage, of_one)
            write_json(_record_path(stage, failure["model"], failure["patient"]), failure)
        print(error, flush=True)
        os.write(shown, f"segtrust {stage}: {error}\n".encode())
        raise SystemExit(1) from None
    if patient := getattr(snakemake.wildcards, "patient", None):
        _record_path(stage, getattr(snakemake.wildcards, "model", None), patient).unlink(missing_ok=True)
    print(f"{stage}: done in {time.monotonic() - started:.1f} s", flush=True)


def log_line(message):
    """Print a line at once, so that a log can be followed."""
    print(message, flush=True)


def _take_over_output(path):
    shown = os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return shown


def _record_path(stage, model, patient):
    return Path("results/failed", stage, model or "", f"{patient}.json")


def _failure(snakemake, stage, error):
    return {
        "stage": stage,
        "patient": error.patient or snakemake.wildcards.patient,
        "model": getattr(snakemake.wildcards, "model", None),
        "coding": error.coding or getattr(snakemake.params, "coding", None),
        "reason": str(error),
        "inputs": [input_state(path) for path in error.files or snakemake.input],
    }


def input_state(path):
    """Return path, size and date of a file: what an excluded patient is watched by."""
    state = os.stat(path)
    return {"path": str(path), "size": state.st_size, "modified_ns": state.st_mtime_ns}
