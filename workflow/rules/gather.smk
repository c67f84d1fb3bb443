"""Sum predictions made elsewhere into moments; each file is one pass.

in:   the files that the model's pattern names for one patient, results/preprocessed/{patient}.safetensors
out:  results/{model}/samples/{patient}/predictions_{first}-{last}.safetensors
"""


rule gather:
    input:
        predictions=predictions_of,
        companions=companions_of,
        scan="results/preprocessed/{patient}.safetensors",
    output:
        moments="results/{model}/samples/{patient}/predictions_{first}-{last}.safetensors",
    log:
        "logs/gather/{model}/{patient}/predictions_{first}-{last}.log",
    benchmark:
        "logs/benchmark/gather/{model}/{patient}/predictions_{first}-{last}.tsv"
    wildcard_constraints:
        model=only(name for name, model in STUDY.models.items() if not model.is_network),
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(6000),
        runtime=each_attempt(20),
    params:
        settings=gather_settings,
        code=code("gather"),
        sizes=prediction_sizes,
    script:
        "../scripts/gather.py"
