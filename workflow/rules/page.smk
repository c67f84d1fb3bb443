"""Show one patient under one model: slices to look through, and numbers, in one file that opens from disk.

in:   results/preprocessed/{patient}.safetensors, results/{model}/maps/{patient}_probability.nii.gz, the reference, and
      results/{model}/tally/{patient}.parquet (without a reference results/{model}/scores/{patient}.json)
out:  results/report/patients/{model}/{patient}.html
"""


rule page:
    input:
        unpack(known_of),
        scan="results/preprocessed/{patient}.safetensors",
        probability="results/{model}/maps/{patient}_probability.nii.gz",
    output:
        page="results/report/patients/{model}/{patient}.html",
    log:
        "logs/page/{model}/{patient}.log",
    benchmark:
        "logs/benchmark/page/{model}/{patient}.tsv"
    conda:
        "../../envs/segtrust.yaml"
    resources:
        mem_mb=each_attempt(2500),
        runtime=each_attempt(10),
    params:
        background=STUDY.config["report"]["background"],
        patient=row_of,
        reference=reference_size_of,
        code=code("page"),
        templates=templates("page.html", "page.css", "page.js", "style.css"),
    script:
        "../scripts/page.py"
