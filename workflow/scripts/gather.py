"""Sum the predictions of one patient, made elsewhere, into moments."""

import json

from segtrust.gather import gather
from segtrust.jobs import job
from segtrust.moments import write_moments
from segtrust.preprocess import read_preprocessed
from segtrust.provenance import settings_digest, versions

with job(snakemake, "gather"):
    settings = json.loads(snakemake.params.settings)
    scan, provenance = read_preprocessed(snakemake.input.scan)
    moments = gather(
        list(snakemake.input.predictions),
        patient=snakemake.wildcards.patient,
        geometry=scan.geometry,
        **settings,
    )
    model = {
        "name": snakemake.wildcards.model,
        "weights": None,
        "settings": settings,
        "settings_digest": settings_digest(settings),
        "code": snakemake.params.code,
    }
    write_moments(snakemake.output.moments, moments, {**provenance, "model": model, "versions": versions()})
