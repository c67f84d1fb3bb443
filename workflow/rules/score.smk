"""Score one patient without a reference: volumes and uncertainty, by which patients are ordered where nothing else is known.

in:   results/{model}/samples/{patient}/*.safetensors, results/preprocessed/{patient}.safetensors
out:  results/{model}/scores/{patient}.json
"""


rule score:
    input:
        moments=chunks_of,
        scan="results/preprocessed/{patient}.safetensors",
    output:
        numbers="results/{model}/scores/{patient}.json",
    log:
        "logs/score/{model}/{patient}.log",
    benchmark:
        "logs/benchmark/score/{model}/{patient}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(6000),
        runtime=each_attempt(10),
    params:
        code=code("score"),
        passes=passes_wanted,
    script:
        "../scripts/score.py"
