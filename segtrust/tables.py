"""Files of the cohort: tallies in, tables out."""

import pandas as pd

from segtrust.cohort import check_agreement
from segtrust.files import read_json, write_csv, write_json, write_parquet
from segtrust.pool import StoredTally

TABLES = ("metrics", "patients", "strata")


def read_tallies(paths, rows):
    """Read the tallies of a cohort.

    paths : files of tallies, one per patient
    rows : list of dicts, the patients' rows of the sheet in the same order: `patient`, `subject`, `split`,
        `coding`, `extra`

    Returns (list of StoredTally, DataFrame of the patients, provenance they share). Raises Problems when tallies were
    made with different weights, settings or code, naming patients.
    """
    tallies = [StoredTally(path) for path in paths]
    provenances = [tally.provenance for tally in tallies]
    check_agreement({row["patient"]: provenance for row, provenance in zip(rows, provenances, strict=True)})
    patients = pd.DataFrame(
        [{**{key: row[key] for key in ("patient", "subject", "split", "coding")}, **row["extra"]} for row in rows]
    )
    shared = {key: value for key, value in provenances[0].items() if key != "patient"}
    shared["device"] = sorted({provenance["device"] for provenance in provenances if "device" in provenance})
    return tallies, patients, shared


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
