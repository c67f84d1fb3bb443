"""Tally the voxels of one patient."""

from segtrust.files import read_parquet
from segtrust.jobs import job
from segtrust.tally import Tally
from segtrust.values import to_text

with job(snakemake, "tally"):
    table, provenance = read_parquet(snakemake.input.voxels)
    tally = Tally.of(table)
    provenance["tally"] = {"code": snakemake.params.code}
    tally.write(snakemake.output.tally, provenance, to_text(tally))
