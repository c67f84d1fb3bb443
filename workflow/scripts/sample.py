"""Draw a chunk of Monte Carlo dropout passes of one patient."""

import json

from segtrust.jobs import job
from segtrust.worker import sample_on_gpu

with job(snakemake, "sample"):
    sample_on_gpu(
        scan=snakemake.input.scan,
        checkpoint=snakemake.input.checkpoint,
        rate=snakemake.input.get("rate"),
        output=snakemake.output.moments,
        cache=f"results/{snakemake.wildcards.model}/samples/.traced",
        model=snakemake.wildcards.model,
        patient=snakemake.wildcards.patient,
        source=snakemake.wildcards.source,
        first=int(snakemake.wildcards.first),
        last=int(snakemake.wildcards.last),
        settings=json.loads(snakemake.params.settings),
        device=snakemake.config["sample"]["device"],
        threads=snakemake.threads,
        batch=snakemake.config["sample"]["batch"],
        code=snakemake.params.code,
        warm=snakemake.resources.get("warm", 0),
    )
