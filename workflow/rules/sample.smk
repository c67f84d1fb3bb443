"""Draw a chunk of Monte Carlo dropout passes of one patient and sum them into moments.

A source is a member (one checkpoint) seen under one flip; its passes are numbered from 0.

in:   results/preprocessed/{patient}.safetensors, the member's weights
out:  results/{model}/samples/{patient}/{source}_{first}-{last}.safetensors
"""


rule sample:
    input:
        unpack(weights_of),
        scan="results/preprocessed/{patient}.safetensors",
    output:
        moments="results/{model}/samples/{patient}/{source}_{first}-{last}.safetensors",
    log:
        "logs/sample/{model}/{patient}/{source}_{first}-{last}.log",
    benchmark:
        "logs/benchmark/sample/{model}/{patient}/{source}_{first}-{last}.tsv"
    wildcard_constraints:
        model=only(name for name, model in STUDY.models.items() if model.is_network),
    conda:
        "../../envs/segtrust.yaml"
    resources:
        gpu=GPU,
        # on one machine: a patient is begun while another is computed, and a job that waits for a GPU needs no processor
        gpu_shares=GPU,
        cpu=1 - GPU,
        mem_mb=each_attempt(4000),
        runtime=each_attempt(60),
    params:
        settings=sample_settings,
        code=code("sample"),
        weights=weights_digest,
    script:
        "../scripts/sample.py"
