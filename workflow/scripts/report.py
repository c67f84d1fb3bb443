"""Write the report of a study."""

import json

from segtrust.jobs import job
from segtrust.patients import Patient
from segtrust.report import report

with job(snakemake, "report"):
    report(
        snakemake.params.models,
        "results",
        "results/report",
        {**json.loads(snakemake.params.settings), "n_bins": 15},
        [Patient(**row) for row in json.loads(snakemake.params.patients)],
        json.loads(snakemake.params.left_out),
        json.loads(snakemake.params.sources),
    )
