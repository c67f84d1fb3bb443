"""Write the page of one patient."""

import json

from segtrust.html import write_html
from segtrust.jobs import job
from segtrust.page import page, read_labels, read_numbers, read_probability
from segtrust.patients import Patient
from segtrust.preprocess import read_preprocessed

with job(snakemake, "page"):
    (row,) = json.loads(snakemake.params.patient)
    person = Patient(**row)
    scan, _ = read_preprocessed(snakemake.input.scan)
    numbers, provenance = read_numbers(snakemake.input.numbers)
    text = page(
        scan,
        read_probability(snakemake.input.probability),
        read_labels(person, scan.geometry),
        person,
        numbers,
        model=snakemake.wildcards.model,
        background=snakemake.params.background,
        provenance={**provenance, "page": {"code": snakemake.params.code}},
    )
    write_html(snakemake.output.page, text)
