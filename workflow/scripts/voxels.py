"""Lay moments and reference of one patient side by side."""

from segtrust.convergence import convergence
from segtrust.jobs import job
from segtrust.moments import read_and_merge
from segtrust.preprocess import read_preprocessed
from segtrust.volumes import read_reference
from segtrust.voxels import voxels, write_voxels

with job(snakemake, "voxels"):
    patient = snakemake.wildcards.patient
    moments, provenance = read_and_merge(snakemake.input.moments)
    scan, _ = read_preprocessed(snakemake.input.scan)
    reference = read_reference(snakemake.input.reference, snakemake.params.coding, patient, scan.geometry)
    passes, spacing_mm = snakemake.params.passes, scan.geometry.spacing_mm
    table = voxels(
        moments.summary(passes).on(moments.place),
        reference.labels,
        scan.brain,
        scan.brain_t1,
        spacing_mm=spacing_mm,
        patient=patient,
        cavity=reference.cavity,
        convergence=convergence(moments, passes, reference.labels, scan.brain, spacing_mm),
    )
    write_voxels(
        snakemake.output.voxels, table, {**provenance, "patient": patient, "voxels": {"code": snakemake.params.code}}
    )
