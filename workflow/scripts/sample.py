"""Draw a chunk of Monte Carlo dropout passes of one patient."""

import json

import torch

from segtrust.jobs import job
from segtrust.moments import write_moments
from segtrust.networks import build, load_checkpoint, load_weights, torch_device
from segtrust.preprocess import read_preprocessed
from segtrust.provenance import file_digest, settings_digest, versions
from segtrust.sample import sample

with job(snakemake, "sample"):
    torch.set_num_threads(snakemake.threads)
    settings = json.loads(snakemake.params.settings)
    checkpoint = snakemake.input.checkpoint
    scan, provenance = read_preprocessed(snakemake.input.scan)
    device = torch_device(snakemake.config["sample"]["device"]).type
    network = build(settings["network"], seed=0)
    load_weights(network, load_checkpoint(checkpoint), checkpoint)
    moments = sample(
        scan,
        network,
        passes=range(int(snakemake.wildcards.first), int(snakemake.wildcards.last) + 1),
        patient=snakemake.wildcards.patient,
        source="dropout",
        flip=(),
        device=device,
        batch=snakemake.config["sample"]["batch"],
        **settings["sample"],
    )
    model = {
        "name": snakemake.wildcards.model,
        "weights": file_digest(checkpoint),
        "settings": settings,
        "settings_digest": settings_digest(settings),
        "code": snakemake.params.code,
    }
    write_moments(
        snakemake.output.moments, moments, {**provenance, "model": model, "device": device, "versions": versions()}
    )
