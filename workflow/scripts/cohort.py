"""Pool the patients of one model."""

import json

from segtrust.cohort import cohort
from segtrust.jobs import job
from segtrust.tables import read_scales, read_tallies, write_cohort

with job(snakemake, "cohort"):
    tallies, patients, provenance = read_tallies(snakemake.input.tallies, json.loads(snakemake.params.patients))
    settings = {**json.loads(snakemake.params.settings), "scales": read_scales(snakemake.input.get("rate"))}
    tables = cohort(tallies, patients, model=snakemake.wildcards.model, threads=snakemake.threads, **settings)
    write_cohort(snakemake.output, tables, {**provenance, "cohort": {**settings, "code": snakemake.params.code}})
