"""Files of cohorts and comparisons: tallies in, tables out."""

from collections import defaultdict

import pandas as pd

from segtrust.alarms import listed
from segtrust.errors import Problems, raise_if_any
from segtrust.files import read_json, write_csv, write_json, write_parquet
from segtrust.pool import StoredTally
from segtrust.progress import progress

TABLES = ("metrics", "patients", "strata")
# what has to be the same for all patients of a model; of a comparison, all but the model itself
AGREEING = ("preprocess", "model", "voxels", "tally")
AGREEING_OF_MODELS = ("preprocess", "voxels", "tally")


def read_tallies(paths, rows):
    """Read the tallies of a cohort.

    paths : files of tallies, one per patient
    rows : list of dicts, the patients' rows of the sheet in the same order: `patient`, `subject`, `split`,
        `coding`, `extra`

    Returns (list of StoredTally, DataFrame of the patients, provenance they share). Raises Problems when tallies were
    made with different weights, settings or code, naming patients.
    """
    tallies = [StoredTally(path) for path in progress(paths, "tallies read")]
    provenances = [tally.provenance for tally in tallies]
    check_agreement({row["patient"]: provenance for row, provenance in zip(rows, provenances, strict=True)})
    patients = pd.DataFrame(
        [{**{key: row[key] for key in ("patient", "subject", "split", "coding")}, **row["extra"]} for row in rows]
    )
    shared = {key: value for key, value in provenances[0].items() if key != "patient"}
    shared["device"] = sorted({provenance["device"] for provenance in provenances if "device" in provenance})
    return tallies, patients, shared


def check_agreement(provenances):
    """Raise Problems when results of several patients were made differently and may not be pooled.

    provenances : {patient: provenance}; the flat dicts under its keys `AGREEING` have to agree. Every key that
    differs is named with its values and patients.
    """
    problems = []
    for part in AGREEING:
        held = {name: provenance.get(part, {}) for name, provenance in provenances.items()}
        for key in sorted(set().union(*held.values())):
            who = defaultdict(list)
            for name in sorted(held):
                who[str(held[name].get(key, "nothing"))].append(name)
            if len(who) > 1:
                groups = sorted(who.items(), key=lambda group: (-len(group[1]), group[0]))
                problems.append(
                    f"{part} {key}: "
                    + "; ".join(f"{value} in {listed(names)}" for value, names in groups)
                    + ". Make the smaller group again with the settings of the larger one."
                )
    if problems:
        raise Problems(problems)


def read_tallies_of_models(paths, models, rows):
    """Read the tallies of several models.

    paths : files of tallies, one per model and patient, model after model
    models : names, in the order of the paths
    rows : list of dicts, the patients' rows of the sheet in the order of the paths, as of `read_tallies`

    Returns ({name: (list of StoredTally, DataFrame of the patients)}, {name: provenance of the model's tallies}).
    Raises Problems where tallies of one model disagree, or models were evaluated with other code or settings.
    """
    held, provenances, problems = {}, {}, []
    for number, name in enumerate(models):
        own = paths[number * len(rows) : (number + 1) * len(rows)]
        try:
            tallies, patients, provenances[name] = read_tallies(own, rows)
        except Problems as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
        else:
            held[name] = tallies, patients
    try:
        check_agreement(
            {
                name: {part: provenance.get(part, {}) for part in AGREEING_OF_MODELS}
                for name, provenance in provenances.items()
            }
        )
    except Problems as error:
        problems += error.problems
    raise_if_any(problems)
    return held, provenances


def _shared(provenance):
    return {part: provenance.get(part, {}) for part in AGREEING_OF_MODELS}


def read_scales(path):
    """Return the factors of `segtrust.cohort.cohort` from the file of rule `inject`; None where there is no file.

    path : JSON whose `scale` is a dict from region to factor or null; or None
    """
    return read_json(path)["scale"] if path else None


def write_cohort(paths, tables, provenance):
    """Write the tables of a cohort.

    paths : object with the attributes metrics, metrics_csv, patients, patients_csv, strata, strata_csv, curves, alarms
    tables : what `segtrust.cohort.cohort` returned
    """
    for name in (*TABLES, "curves"):
        write_parquet(getattr(paths, name), tables[name], provenance)
    for name in TABLES:
        write_csv(getattr(paths, f"{name}_csv"), tables[name])
    write_json(paths.alarms, tables["alarms"])


def write_comparison(paths, table, provenance):
    """Write a comparison; paths : object with the attributes metrics and metrics_csv."""
    write_parquet(paths.metrics, table, provenance)
    write_csv(paths.metrics_csv, table)
