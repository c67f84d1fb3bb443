"""Put four modalities on one canonical grid, z-score them and crop them to the brain box; no model is involved.

in:   the files of one patient
out:  results/preprocessed/{patient}.safetensors
"""


rule preprocess:
    input:
        unpack(scan_of),
    output:
        scan="results/preprocessed/{patient}.safetensors",
    log:
        "logs/preprocess/{patient}.log",
    benchmark:
        "logs/benchmark/preprocess/{patient}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(2000),
        runtime=each_attempt(10),
    params:
        code=code("preprocess"),
        modalities=modalities_of,
    script:
        "../scripts/preprocess.py"
