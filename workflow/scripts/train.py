"""Train the network of one model."""

from segtrust.gpus import own_gpu
from segtrust.jobs import job

with job(snakemake, "train"), own_gpu(snakemake.config["sample"]["device"]):
    # not before: what imports PyTorch may look for GPUs, and CUDA looks but once
    import json

    import torch

    from segtrust.cases import Cases, checked
    from segtrust.files import write_csv, write_parquet
    from segtrust.networks import build, check_sampling
    from segtrust.provenance import versions
    from segtrust.train import curve_table, train

    torch.set_num_threads(snakemake.threads)
    settings = json.loads(snakemake.params.settings)
    network = build(settings["network"], settings["seed"])
    check_sampling(snakemake.config["models"], snakemake.wildcards.model)
    training, validation = checked(
        Cases(snakemake.input.scans, snakemake.input.references, **snakemake.params.training),
        Cases(snakemake.input.validation_scans, snakemake.input.validation_references, **snakemake.params.validation),
    )
    curve = train(
        network,
        training,
        validation,
        channels=settings["channels"],
        outputs=settings["outputs"],
        window=settings["window"],
        overlap=settings["overlap"],
        settings=settings["train"],
        seed=settings["seed"],
        device=snakemake.config["sample"]["device"],
        checkpoint=snakemake.output.checkpoint,
        state=f"{snakemake.output.checkpoint}.state",
        code=snakemake.params.code,
    )
    provenance = {"train": {"settings": settings, "code": snakemake.params.code}, "versions": versions()}
    write_parquet(snakemake.output.curve, curve_table(curve), provenance)
    write_csv(snakemake.output.curve_csv, curve_table(curve))
