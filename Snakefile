"""segtrust: can the confidence of a brain-tumour segmentation model be trusted, region by region?

patients.tsv                              checkpoints, bundle or training settings
    │                                               │
preprocess ──► train (where a model is trained here)│
    ├────────► inject (where dropout is added)      │
    └────────► sample ◄─────────────────────────────┘     gather ◄── predictions made elsewhere
                  └────────────► moments ◄───────────────────┘
                  ┌─────────────────┼─────────────────┐
                score             maps             voxels ──► tally ──► cohort ───────► report
         (without reference)        │                           │          └──► triage ───┘
                                    └───────► page ◄────────────┴─────► comparison ───────┘
"""

if not workflow.overwrite_configfiles:

    configfile: "config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/preprocess.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/inject.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/gather.smk"
include: "workflow/rules/maps.smk"
include: "workflow/rules/voxels.smk"
include: "workflow/rules/tally.smk"
include: "workflow/rules/score.smk"
include: "workflow/rules/cohort.smk"
include: "workflow/rules/comparison.smk"
include: "workflow/rules/triage.smk"
include: "workflow/rules/page.smk"
include: "workflow/rules/report.smk"


onstart:
    remove_leftovers("results")


onerror:
    print("\n".join(filter(None, (STUDY.advice(), words_of(log)))))


rule all:
    default_target: True
    input:
        every_map,
        every_cohort,
        every_comparison,
        every_triage,
        every_page,
        "results/report/index.html",
