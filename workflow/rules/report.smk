"""Show what was found: one HTML folder that opens from disk.

in:   results/{model}/cohort/, results/comparison/, results/{model}/maps/, results/preprocessed/, the references of the
      patients shown
out:  results/report/index.html; assets/, figures/ and tables/ beside it
"""


# what `snakemake --report` begins with
report: "../report/workflow.rst"


rule report:
    input:
        cohorts=every_cohort,
        comparison=every_comparison,
        triage=every_triage,
        maps=every_map,
        scans=sampled_scans,
    output:
        report="results/report/index.html",
    log:
        "logs/report.log",
    benchmark:
        "logs/benchmark/report.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(3000),
        runtime=each_attempt(30),
    params:
        settings=STUDY.report_settings(),
        models=list(STUDY.models),
        patients=sampled_rows,
        left_out=canonical_json(STUDY.not_evaluated),
        sources=sources_of_models(),
        code=code("report"),
        templates=templates("index.html", "index.js", "style.css"),
    script:
        "../scripts/report.py"
