"""List the test patients of a model, and put them in order, for the eye and for the pages.

A checkpoint, because `report.pages: {worst: N}` takes the pages to make from the order.

in:   results/{model}/cohort/patients.parquet, results/{model}/scores/{patient}.json of patients without a reference
out:  results/report/triage/{model}.html, results/report/patients/{model}/order.js
"""


checkpoint triage:
    input:
        unpack(patients_of_cohort),
        scores=scores_of,
    output:
        triage="results/report/triage/{model}.html",
        order="results/report/patients/{model}/order.js",
    log:
        "logs/triage/{model}.log",
    benchmark:
        "logs/benchmark/triage/{model}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(2000),
        runtime=each_attempt(10),
    params:
        pages=canonical_json(STUDY.config["report"]["pages"]),
        patients=tested_rows,
        scored=STUDY.scored,
        code=code("triage"),
        templates=templates("triage.html", "triage.css", "triage.js", "style.css"),
    script:
        "../scripts/triage.py"
