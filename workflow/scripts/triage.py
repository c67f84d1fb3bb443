"""Write the list of a model's patients, and their order."""

import json

from segtrust.html import write_html
from segtrust.jobs import job
from segtrust.order import order_of, write_order
from segtrust.patients import Patient
from segtrust.triage import cases_of_patients, read_patients, read_scores, triage

with job(snakemake, "triage"):
    people = [Patient(**row) for row in json.loads(snakemake.params.patients)]
    scores = read_scores(snakemake.input.scores, snakemake.params.scored)
    cases = cases_of_patients(people, read_patients(snakemake.input.get("patients")), scores)
    order = order_of(cases, json.loads(snakemake.params.pages))
    write_order(snakemake.output.order, order)
    write_html(snakemake.output.triage, triage(cases, order, model=snakemake.wildcards.model))
