"""Choose the rate of injected dropout, and fit the scale of its uncertainty, on the patients of split calibration.

It draws as many passes per patient and rate as a source of the model gives; another number of passes later does not
choose anew, so that the passes already drawn stay.

in:   the first member's weights, results/preprocessed/{patient}.safetensors and the references of split calibration
out:  results/{model}/inject/rate.json, and the rate alone in chosen.json: passes depend on nothing else of it
"""


rule inject:
    input:
        unpack(first_weights_of),
        scans=expand("results/preprocessed/{patient}.safetensors", patient=STUDY.fitting),
        references=references_of(STUDY.fitting),
    output:
        rate="results/{model}/inject/rate.json",
        chosen="results/{model}/inject/chosen.json",
    log:
        "logs/inject/{model}.log",
    benchmark:
        "logs/benchmark/inject/{model}.tsv"
    wildcard_constraints:
        model=only(name for name, model in STUDY.models.items() if model.inject),
    conda:
        "../../envs/segtrust.yaml"
    threads: 8
    resources:
        cpu=all_threads,
        gpu=GPU,
        gpu_shares=SHARES * GPU,
        mem_mb=each_attempt(6000),
        runtime=each_attempt(240),
    params:
        settings=sample_settings,
        code=code("inject"),
        weights=first_weights_digest,
        cases=cases_of(STUDY.fitting),
    script:
        "../scripts/inject.py"
