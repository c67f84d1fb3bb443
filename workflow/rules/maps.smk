"""Turn moments into maps of probability and uncertainty, in the patient's own space.

in:   results/{model}/samples/{patient}/*.safetensors
out:  results/{model}/maps/{patient}_{probability,segmentation,entropy,…}.nii.gz, each with a .json beside it
"""


rule maps:
    input:
        moments=chunks_of,
    output:
        maps=[f"results/{{model}}/maps/{{patient}}_{name}.nii.gz" for name in STUDY.config["maps"]["write"]],
        sidecars=[f"results/{{model}}/maps/{{patient}}_{name}.json" for name in STUDY.config["maps"]["write"]],
    log:
        "logs/maps/{model}/{patient}.log",
    benchmark:
        "logs/benchmark/maps/{model}/{patient}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(5000),
        runtime=each_attempt(10),
    params:
        settings=STUDY.settings("maps"),
        code=code("maps"),
        coding=coding_of,
        passes=passes_wanted,
    script:
        "../scripts/maps.py"
