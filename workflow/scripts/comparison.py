"""Compare the models of a study, two at a time."""

import json

from segtrust.comparison import comparison
from segtrust.jobs import job
from segtrust.tables import read_tallies_of_models, write_comparison

with job(snakemake, "comparison"):
    rows, settings = json.loads(snakemake.params.patients), json.loads(snakemake.params.settings)
    models, provenances = read_tallies_of_models(snakemake.input.tallies, snakemake.params.models, rows)
    table = comparison(models, threads=snakemake.threads, **settings)
    settings["code"] = snakemake.params.code
    write_comparison(snakemake.output, table, {"comparison": settings, "models": provenances})
