"""Choose the rate of injected dropout, and fit the scale of its uncertainty."""

import json
from functools import partial

from segtrust.backends import open_backend
from segtrust.cases import checked
from segtrust.files import write_json
from segtrust.gpus import own_gpu
from segtrust.inject import Calibration, fit, passes_fitted
from segtrust.jobs import job, log_line
from segtrust.provenance import file_digest, settings_digest, versions

with job(snakemake, "inject"), own_gpu(snakemake.config["sample"]["device"]):
    settings = json.loads(snakemake.params.settings)
    weights = file_digest(snakemake.input.checkpoint)
    open_at = partial(
        open_backend,
        snakemake.input.checkpoint,
        digest=weights,
        settings=settings,
        device=snakemake.config["sample"]["device"],
        threads=snakemake.threads,
        cache=f"results/{snakemake.wildcards.model}/samples/.traced",
        log=log_line,
    )
    (calibration,) = checked(Calibration(snakemake.input.scans, snakemake.input.references, **snakemake.params.cases))
    result = fit(
        calibration,
        open_at,
        inject=settings["stochastic"]["inject"],
        passes=passes_fitted(snakemake.config, snakemake.wildcards.model),
        batch=snakemake.config["sample"]["batch"],
        sampling=settings["sample"],
    )
    model = {
        "name": snakemake.wildcards.model,
        "weights": weights,
        "settings": settings,
        "settings_digest": settings_digest(settings),
        "code": snakemake.params.code,
    }
    provenance = {"model": model, "versions": versions()}
    write_json(snakemake.output.chosen, {"rate": result["rate"]})
    write_json(snakemake.output.rate, {**result, "provenance": provenance})
