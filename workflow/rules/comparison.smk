"""Compare every two models on the patients they share: paired differences, with one family of tests.

in:   results/{model}/tally/{patient}.parquet of every model and every patient with a reference
out:  results/comparison/metrics.parquet (+ .csv)
"""


rule comparison:
    input:
        tallies=tallies_of_models,
    output:
        metrics="results/comparison/metrics.parquet",
        metrics_csv=report(
            "results/comparison/metrics.csv",
            caption="../report/comparison.rst",
            category="Comparison",
            labels={"table": "paired differences"},
        ),
    log:
        "logs/comparison.log",
    benchmark:
        "logs/benchmark/comparison.tsv"
    conda:
        "../../envs/segtrust.yaml"
    threads: 2
    resources:
        cpu=all_threads,
        mem_mb=each_attempt(5000),
        runtime=each_attempt(60 * len(STUDY.models)),
    params:
        settings=STUDY.comparison_settings(),
        patients=evaluated_rows,
        models=list(STUDY.models),
        code=code("comparison"),
    script:
        "../scripts/comparison.py"
