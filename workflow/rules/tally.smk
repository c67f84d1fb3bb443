"""Reduce voxels to counts and sums over fine bins, from which every metric follows.

in:   results/{model}/voxels/{patient}.parquet
out:  results/{model}/tally/{patient}.parquet
"""


rule tally:
    input:
        voxels="results/{model}/voxels/{patient}.parquet",
    output:
        tally="results/{model}/tally/{patient}.parquet",
    log:
        "logs/tally/{model}/{patient}.log",
    benchmark:
        "logs/benchmark/tally/{model}/{patient}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(2500),
        runtime=each_attempt(10),
    params:
        code=code("tally"),
    script:
        "../scripts/tally.py"
