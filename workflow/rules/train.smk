"""Train a network on the patients of split train, choosing the checkpoint on split validation.

in:   results/preprocessed/{patient}.safetensors and the references of both splits
out:  results/{model}/train/checkpoint.pt, checkpoint.sha256, curve.parquet, curve.csv
"""

TRAINING = STUDY.of_split("train")
VALIDATION = STUDY.of_split("validation")


rule train:
    input:
        scans=expand("results/preprocessed/{patient}.safetensors", patient=TRAINING),
        references=references_of(TRAINING),
        validation_scans=expand("results/preprocessed/{patient}.safetensors", patient=VALIDATION),
        validation_references=references_of(VALIDATION),
    output:
        checkpoint="results/{model}/train/checkpoint.pt",
        digest="results/{model}/train/checkpoint.sha256",
        curve="results/{model}/train/curve.parquet",
        curve_csv=report(
            "results/{model}/train/curve.csv",
            caption="../report/curve.rst",
            category="Training",
            labels={"model": "{model}", "table": "curve"},
        ),
    log:
        "logs/train/{model}.log",
    benchmark:
        "logs/benchmark/train/{model}.tsv"
    wildcard_constraints:
        model=only(name for name, model in STUDY.models.items() if model.train is not None),
    conda:
        "../../envs/segtrust.yaml"
    threads: 8
    resources:
        cpu=all_threads,
        gpu=GPU,
        gpu_shares=SHARES * GPU,
        mem_mb=each_attempt(16000),
        runtime=each_attempt(1440),
    params:
        settings=train_settings,
        code=code("train"),
        training=cases_of(TRAINING),
        validation=cases_of(VALIDATION),
        # both splits exchanged would leave the sets of inputs and of settings as they are
        splits=canonical_json({"train": TRAINING, "validation": VALIDATION}),
    script:
        "../scripts/train.py"
