"""Lay moments and reference side by side, one row per voxel that any mask needs.

in:   results/{model}/samples/{patient}/*.safetensors, the reference, results/preprocessed/{patient}.safetensors
out:  results/{model}/voxels/{patient}.parquet
"""


rule voxels:
    input:
        moments=chunks_of,
        scan="results/preprocessed/{patient}.safetensors",
        reference=reference_of,
    output:
        voxels="results/{model}/voxels/{patient}.parquet",
    log:
        "logs/voxels/{model}/{patient}.log",
    benchmark:
        "logs/benchmark/voxels/{model}/{patient}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(6000),
        runtime=each_attempt(10),
    params:
        code=code("voxels"),
        coding=coding_of,
        passes=passes_wanted,
        reference=reference_size_of,
    script:
        "../scripts/voxels.py"
