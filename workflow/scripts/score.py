"""Score one patient without a reference."""

from segtrust.files import write_json
from segtrust.jobs import job
from segtrust.moments import read_and_merge
from segtrust.preprocess import read_preprocessed
from segtrust.score import score

with job(snakemake, "score"):
    patient = snakemake.wildcards.patient
    moments, provenance = read_and_merge(snakemake.input.moments)
    scan, _ = read_preprocessed(snakemake.input.scan)
    numbers = score(
        moments.summary(snakemake.params.passes).on(moments.place),
        scan.brain,
        scan.brain_t1,
        spacing_mm=scan.geometry.spacing_mm,
        patient=patient,
    )
    provenance = {**provenance, "patient": patient, "score": {"code": snakemake.params.code}}
    write_json(snakemake.output.numbers, {"regions": numbers, "provenance": provenance})
