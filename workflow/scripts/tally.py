"""Tally the voxels of one patient."""

from segtrust.files import read_parquet
from segtrust.jobs import job
from segtrust.tally import Tally

with job(snakemake, "tally"):
    table, provenance = read_parquet(snakemake.input.voxels)
    Tally.of(table).write(snakemake.output.tally, {**provenance, "tally": {"code": snakemake.params.code}})
