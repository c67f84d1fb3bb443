"""Draw a chunk of Monte Carlo dropout passes of one patient."""

import json

from segtrust.backends import open_backend, rate_of
from segtrust.jobs import job, log_line
from segtrust.moments import write_moments
from segtrust.preprocess import read_preprocessed
from segtrust.provenance import file_digest, settings_digest, versions
from segtrust.sample import sample
from segtrust.sources import source_named

with job(snakemake, "sample"):
    settings = json.loads(snakemake.params.settings)
    scan, provenance = read_preprocessed(snakemake.input.scan)
    weights = file_digest(snakemake.input.checkpoint)
    rate = rate_of(settings["stochastic"]["inject"], snakemake.input.get("rate"))
    backend = open_backend(
        snakemake.input.checkpoint,
        digest=weights,
        settings=settings,
        rate=rate,
        device=snakemake.config["sample"]["device"],
        threads=snakemake.threads,
        cache=f"results/{snakemake.wildcards.model}/samples/.traced",
        log=log_line,
    )
    moments = sample(
        scan,
        backend,
        passes=range(int(snakemake.wildcards.first), int(snakemake.wildcards.last) + 1),
        patient=snakemake.wildcards.patient,
        source=source_named(snakemake.wildcards.source),
        batch=snakemake.config["sample"]["batch"],
        **settings["sample"],
    )
    model = {
        "name": snakemake.wildcards.model,
        "weights": weights,
        "settings": settings,
        "rate": rate,
        "settings_digest": settings_digest(settings),
        "code": snakemake.params.code,
    }
    computed = {"device": backend.device, "backend": backend.name, "precision": backend.precision}
    write_moments(snakemake.output.moments, moments, {**provenance, "model": model, **computed, "versions": versions()})
