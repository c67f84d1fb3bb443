"""Status: how far a study is, stage by stage, as Snakemake itself judges it.

A job is done when all its outputs are up to date, stale when they are there and would be made again, failed when they
are missing and its log does not end as that of a finished job, and missing else.
"""

import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from segtrust.config import ROOT
from segtrust.errors import SegtrustError

STAGES = (
    *("preprocess", "train", "inject", "sample", "gather", "maps", "voxels", "tally"),
    *("score", "cohort", "comparison", "triage", "page", "report"),
)
STATES = ("done", "stale", "failed", "missing")
EVERY_MODEL = "all models"
_MOST_NAMED = 5
_FINISHED = ": done in "


class Job(NamedTuple):
    """A job of a study; patient and model are None where it has none; log : its path in the study's folder."""

    stage: str
    model: str | None
    patient: str | None
    log: str


def status(study):
    """Return what is done, stale, failed and missing in a study, as text.

    study : Path of a folder with config.yaml

    Raises SegtrustError with Snakemake's words where it cannot say.
    """
    jobs = jobs_of(summary(study))
    judged = judge(study, jobs)
    return "\n".join([*_table(judged), *_reasons(study, jobs, judged)])


def judge(study, jobs):
    """Return {Job: one of `STATES`}; jobs : from `jobs_of`."""
    return {job: _judged(study / job.log, states) for job, states in jobs.items()}


def summary(study):
    """Return rows (dicts) of Snakemake's summary of every file that a study makes; study : Path."""
    command = [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")),
        *(
            "--workflow-profile",
            str(ROOT / "profiles" / "local"),
            "--directory",
            str(study),
            "--cores",
            "1",
            "--summary",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SegtrustError(f"{study}: Snakemake cannot plan this study:\n{done.stderr.strip()}")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    header = next((number for number, line in enumerate(lines) if line[0] == "output_file"), len(lines))
    return [dict(zip(lines[header], line, strict=True)) for line in lines[header + 1 :] if len(line) > 1]


def jobs_of(rows):
    """Return {Job: list of the states of its files}; rows : from `summary`."""
    jobs = defaultdict(list)
    for row in rows:
        waiting = row["status"] == "ok" and row["plan"] == "update pending"
        state = "what it is made from is made again" if waiting else row["status"]
        jobs[_job(row["rule"], Path(row["output_file"]))].append(state)
    return dict(jobs)


def _job(stage, path):
    """Return the job that makes a file."""
    _, folder, *rest = path.parts
    if stage == "preprocess":
        patient = rest[0].removesuffix(".safetensors")
        return Job(stage, None, patient, f"logs/{stage}/{patient}.log")
    if stage in ("comparison", "report"):
        return Job(stage, None, None, f"logs/{stage}.log")
    if stage in ("page", "triage"):
        # report/patients/<model>/<patient>.html, report/patients/<model>/order.js, report/triage/<model>.html
        model = rest[1] if rest[0] == "patients" else rest[1].removesuffix(".html")
        patient = rest[2].removesuffix(".html") if stage == "page" else None
        return Job(stage, model, patient, f"logs/{stage}/{model}{f'/{patient}' if patient else ''}.log")
    if stage == "score":
        patient = rest[1].removesuffix(".json")
        return Job(stage, folder, patient, f"logs/{stage}/{folder}/{patient}.log")
    if stage in ("sample", "gather"):
        chunk = rest[2].removesuffix(".safetensors")
        return Job(stage, folder, rest[1], f"logs/{stage}/{folder}/{rest[1]}/{chunk}.log")
    if stage in ("maps", "voxels", "tally"):
        # the name of a map follows the patient's and begins with the last part that is one
        patient = rest[1].rsplit(".nii.gz" if rest[1].endswith(".nii.gz") else ".", 1)[0]
        patient = _before_map(patient) if stage == "maps" else patient
        return Job(stage, folder, patient, f"logs/{stage}/{folder}/{patient}.log")
    return Job(stage, folder, None, f"logs/{stage}/{folder}.log")


def _before_map(name):
    from segtrust.config import schema

    known = schema("config")["properties"]["maps"]["properties"]["write"]["items"]["enum"]
    ending = max((f"_{one}" for one in known if name.endswith(f"_{one}")), key=len)
    return name.removesuffix(ending)


def _judged(log, states):
    if "missing" not in states:
        return "done" if all(state == "ok" for state in states) else "stale"
    return "missing" if not log.exists() or _FINISHED in _last_line(log) else "failed"


def _last_line(log):
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "(the log is empty)"


def _table(judged):
    counts = defaultdict(Counter)
    for job, state in judged.items():
        counts[job.model or EVERY_MODEL, job.stage][state] += 1
    models = sorted({model for model, _ in counts}, key=lambda model: (model != EVERY_MODEL, model))
    width = max(map(len, models), default=0) + 2
    yield f"{'model':{width}}{'stage':12}" + "".join(f"{state:>9}" for state in STATES)
    for model in models:
        for stage in STAGES:
            if (model, stage) in counts:
                numbers = "".join(f"{counts[model, stage][state]:9,}" for state in STATES)
                yield f"{model:{width}}{stage:12}{numbers}"


def _reasons(study, jobs, judged):
    """Yield why jobs are stale, and how failed ones ended."""
    stale = defaultdict(list)
    for job, states in jobs.items():
        if judged[job] == "stale":
            reason = "; ".join(sorted({state for state in states if state != "ok"}))
            stale[job.model or EVERY_MODEL, job.stage, reason].append(job.patient)
    if stale:
        yield "\nstale, and made again by the next run:"
    for (model, stage, reason), patients in sorted(stale.items()):
        yield f"  {model}, {stage}: {reason}{_named(patients)}"
    failed = [job for job in jobs if judged[job] == "failed"]
    if failed:
        yield "\nfailed (or running now); the end of each log:"
    for job in failed:
        who = ", ".join(filter(None, (job.model, job.stage, job.patient)))
        yield f"  {who}: {_last_line(study / job.log)}  ({job.log})"


def _named(patients):
    names = sorted(set(filter(None, patients)))
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f" ({', '.join(names[:_MOST_NAMED])}{more})" if names else ""
