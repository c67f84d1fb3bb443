"""Write the maps of one patient under one model."""

from segtrust.jobs import job
from segtrust.maps import map_paths, write_maps
from segtrust.moments import read_and_merge

with job(snakemake, "maps"):
    moments, provenance = read_and_merge(snakemake.input.moments)
    write_maps(
        map_paths(snakemake.output.maps, snakemake.wildcards.patient),
        moments,
        snakemake.params.passes,
        snakemake.params.coding,
        {**provenance, "maps": {"code": snakemake.params.code}},
    )
