"""Preprocess one patient."""

from segtrust.jobs import job
from segtrust.preprocess import preprocess, read_modalities, write_preprocessed
from segtrust.provenance import versions

with job(snakemake, "preprocess"):
    patient = snakemake.wildcards.patient
    volumes, geometry = read_modalities(dict(snakemake.input.items()), patient)
    provenance = {"preprocess": {"code": snakemake.params.code}, "versions": versions()}
    write_preprocessed(snakemake.output.scan, preprocess(volumes, geometry), provenance)
