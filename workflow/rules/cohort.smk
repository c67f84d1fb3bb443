"""Pool the tallies of all patients of one model into metrics, strata, curves and alarms; no voxel is touched.

in:   results/{model}/tally/{patient}.parquet of every patient with a reference, results/{model}/inject/rate.json where
      dropout was injected with a rate chosen here
out:  results/{model}/cohort/{metrics,patients,strata}.parquet (+ .csv), curves.parquet, alarms.json
"""


rule cohort:
    input:
        unpack(scale_of),
        tallies=tallies_of,
    output:
        metrics="results/{model}/cohort/metrics.parquet",
        metrics_csv=report(
            "results/{model}/cohort/metrics.csv",
            caption="../report/metrics.rst",
            category="Cohort",
            subcategory="{model}",
            labels={"model": "{model}", "table": "metrics"},
        ),
        patients="results/{model}/cohort/patients.parquet",
        patients_csv=report(
            "results/{model}/cohort/patients.csv",
            caption="../report/patients.rst",
            category="Cohort",
            subcategory="{model}",
            labels={"model": "{model}", "table": "patients"},
        ),
        strata="results/{model}/cohort/strata.parquet",
        strata_csv=report(
            "results/{model}/cohort/strata.csv",
            caption="../report/strata.rst",
            category="Cohort",
            subcategory="{model}",
            labels={"model": "{model}", "table": "strata"},
        ),
        curves="results/{model}/cohort/curves.parquet",
        alarms=report(
            "results/{model}/cohort/alarms.json",
            caption="../report/alarms.rst",
            category="Cohort",
            subcategory="{model}",
            labels={"model": "{model}", "table": "alarms"},
        ),
    log:
        "logs/cohort/{model}.log",
    benchmark:
        "logs/benchmark/cohort/{model}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    threads: 2
    resources:
        cpu=all_threads,
        mem_mb=each_attempt(4000),
        runtime=each_attempt(60),
    params:
        settings=STUDY.cohort_settings(),
        patients=evaluated_rows,
        code=code("cohort"),
    script:
        "../scripts/cohort.py"
