"""Partial: the tables of the patients that are finished, while others still fail.

No rule makes them, and no report shows them: a cohort without its difficult patients is not the cohort.
"""

import json
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import yaml

from segtrust.alarms import partial
from segtrust.cohort import cohort
from segtrust.config import ROOT
from segtrust.errors import SegtrustError
from segtrust.files import write_json
from segtrust.patients import SAMPLED_SPLITS, read_sheet
from segtrust.provenance import code_digest
from segtrust.status import jobs_of, judge, summary
from segtrust.study import failures, read_study
from segtrust.tables import TABLES, read_scales, read_tallies, write_cohort

_MOST_NAMED = 20


def pool_finished(model, study):
    """Pool the tallies that are up to date into results/<model>/cohort_partial/; return what was done, as text.

    model : name; study : Path of the folder with config.yaml

    The tables are those of rule `cohort`, with an alarm that says how many patients are missing; missing.json says
    who, and why. Raises SegtrustError for an unknown model, and where no patient is finished.
    """
    jobs = jobs_of(summary(study))
    states = judge(study, jobs)
    with chdir(study):
        described = read_study(yaml.safe_load(Path("config.yaml").read_text(encoding="utf-8")), False)
        if model not in described.models:
            raise SegtrustError(f"config.yaml has no model {model}; it has {', '.join(described.models)}")
        rows = read_sheet(described.config["patients"])
        asked = [row.patient for row in rows if row.seg and row.split in SAMPLED_SPLITS]
        tallies = {job.patient: job for job in jobs if job.stage == "tally" and job.model == model}
        finished = [name for name in described.evaluated if states[tallies[name]] == "done"]
        known = {**failures(described.patients, described.config["models"]), **described.left_out}
        missing = {
            name: known.get(name) or _why(states[tallies[name]], jobs[tallies[name]])
            for name in asked
            if name not in finished
        }
        if not finished:
            raise SegtrustError(f"{model}: no patient of {len(asked)} has a tally that is up to date{_listed(missing)}")
        folder = Path("results") / model / "cohort_partial"
        _write(folder, model, described, finished, missing)
    return f"{folder}: {len(finished)} of {len(asked)} patients{_listed(missing)}"


def _write(folder, model, study, finished, missing):
    paths = [f"results/{model}/tally/{name}.parquet" for name in finished]
    tallies, patients, provenance = read_tallies(paths, json.loads(study.rows(finished)))
    rate = Path("results") / model / "inject" / "rate.json"
    settings = {
        **json.loads(study.cohort_settings()),
        "scales": read_scales(rate if study.models[model].inject and study.fitting else None),
    }
    tables = cohort(tallies, patients, model=model, threads=1, **settings)
    state = {"n": len(finished), "of": len(finished) + len(missing), "missing": missing}
    tables["alarms"] = [*partial(state["n"], state["of"], model), *tables["alarms"]]
    code = code_digest(ROOT / "workflow" / "scripts" / "cohort.py")
    write_cohort(_outputs(folder), tables, {**provenance, "cohort": {**settings, "code": code, "partial": state}})
    write_json(folder / "missing.json", state)


def _outputs(folder):
    names = {name: f"{name}.parquet" for name in (*TABLES, "curves")}
    names |= {f"{name}_csv": f"{name}.csv" for name in TABLES}
    return SimpleNamespace(**{name: folder / file for name, file in names.items()}, alarms=folder / "alarms.json")


def _why(state, states):
    """Say why a tally does not count; states : of its files."""
    return f"stale: {'; '.join(sorted(set(states)))}" if state == "stale" else f"its tally is {state}"


def _listed(missing):
    lines = [f"  {name}: {why}" for name, why in list(missing.items())[:_MOST_NAMED]]
    more = [f"  and {len(missing) - _MOST_NAMED} more, see missing.json"] if len(missing) > _MOST_NAMED else []
    return "\n".join(["; missing:", *lines, *more]) if missing else ""
