"""The study: its checked configuration and patients, and what rules ask about them.

Every job on a cluster reads this again, for itself alone: what depends on all patients, or on the code of a stage, is a
function that is called only where such a job is planned.

in:   config.yaml, patients.tsv
"""

import os
import re
import sys
from functools import cache

from snakemake.exceptions import WorkflowError

from segtrust.clusters import raise_if_absent, words_of
from segtrust.files import canonical_json, remove_leftovers
from segtrust.gather import companions, find_passes
from segtrust.gpus import SHARES
from segtrust.order import read_order, with_page
from segtrust.planning import quicken_plans
from segtrust.provenance import code_digest, file_digest
from segtrust.sources import PATTERN as SOURCES
from segtrust.study import study_or_message

quicken_plans()
STUDY = study_or_message(config, workflow.is_main_process, WorkflowError)
config.update(STUDY.config)
# Snakemake ends a job whose node does not see its inputs as if it were done, and forgets what it said
raise_if_absent([] if workflow.is_main_process else sys.argv, WorkflowError)
GPU = 0 if STUDY.config["sample"]["device"] == "cpu" else 1
SCRIPTS = f"{workflow.basedir}/workflow/scripts"


wildcard_constraints:
    patient=r"[A-Za-z0-9][A-Za-z0-9_.-]*",
    model="|".join(map(re.escape, STUDY.models)),
    source=SOURCES,
    first=r"\d+",
    last=r"\d+",


def code(stage):
    """Return the digest of a stage's code; for a job, which needs one stage's, a function of wildcards that gives it."""
    script = f"{SCRIPTS}/{stage}.py"
    if workflow.is_main_process:
        return code_digest(script)

    def code_of(wildcards):
        return code_digest(script)

    return code_of


def each_attempt(amount):
    """Return the function that gives memory or time of a job: an amount that grows with its attempts."""

    def amount_of(wildcards, attempt):
        return amount * attempt

    return amount_of


def all_threads(wildcards, threads):
    return threads


def model_of(wildcards):
    return STUDY.models[wildcards.model]


def patient_of(wildcards):
    return STUDY.patients[wildcards.patient]


def row_of(wildcards):
    return STUDY.rows([wildcards.patient])


def templates(*names):
    """Return the digests of templates of the report's pages."""
    return [file_digest(f"{workflow.basedir}/segtrust/templates/{name}") for name in names]


def only(names):
    """Return a wildcard constraint that some names fit, and nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


# one checkpoint serves many patients: it is read once
digest_of_checkpoint = cache(file_digest)


def chunks_of(wildcards):
    return STUDY.chunks(wildcards.model, wildcards.patient)


def with_sizes(files):
    """Return files by column, and their sizes: a file put back with an old date is seen by its size."""
    return canonical_json({column: [path, os.path.getsize(path)] for column, path in files.items()})


def every_map(wildcards):
    return expand(
        "results/{model}/maps/{patient}_{map}.nii.gz",
        model=STUDY.models,
        patient=STUDY.sampled,
        map=STUDY.config["maps"]["write"],
    )


def every_cohort(wildcards):
    models = STUDY.models if STUDY.has_cohort else []
    return expand("results/{model}/cohort/metrics.parquet", model=models)


def every_comparison(wildcards):
    """Return the comparison of the models; there is none of a single model, nor without a cohort."""
    return ["results/comparison/metrics.parquet"] if STUDY.has_cohort and len(STUDY.models) > 1 else []


def every_triage(wildcards):
    return expand("results/report/triage/{model}.html", model=STUDY.models) if STUDY.tested else []


def every_page(wildcards):
    """Return the pages of all test patients, or of the worst, which are known once a model's patients are in order."""
    pages, wanted = STUDY.config["report"]["pages"], []
    for model in STUDY.models if pages != "none" else ():
        ordered = isinstance(pages, dict)
        patients = with_page(read_order(checkpoints.triage.get(model=model).output.order)) if ordered else STUDY.tested
        wanted += expand("results/report/patients/{model}/{patient}.html", model=model, patient=patients)
    return wanted


# --- preprocess ---


def scan_of(wildcards):
    return patient_of(wildcards).scan


def modalities_of(wildcards):
    """Return which file is which modality; exchanged columns leave the set of inputs as it is."""
    return with_sizes(patient_of(wildcards).scan)


# --- train ---


def train_settings(wildcards):
    return canonical_json(model_of(wildcards).train_settings)


def references_of(patients):
    """Return the references of patients; those without one are refused where a model is trained here."""
    return [STUDY.patients[patient].seg for patient in patients if STUDY.patients[patient].seg]


def cases_of(patients):
    """Return what `segtrust.cases.Cases` needs besides the files: ids and codings."""
    return {
        "patients": patients,
        "codings": [STUDY.patients[patient].coding for patient in patients],
    }


# --- inject and sample ---


def inputs_of(weights):
    """Return the files of a member's weights; the date of a checkpoint does not count, its digest does."""
    if weights.path:
        return {"checkpoint": ancient(weights.path)}
    return {"checkpoint": ancient(weights.file), "digest": f"results/{weights.trained_as}/train/checkpoint.sha256"}


def digest_of(weights):
    """Return the digest of given weights; those trained here have theirs in a file of their own."""
    return digest_of_checkpoint(weights.path) if weights.path else "trained here"


def weights_of(wildcards):
    """Return the weights of a source, and the file of the rate of dropout where that is chosen here."""
    model = model_of(wildcards)
    automatic = model.inject and model.inject["rate"] == "auto"
    rate = {"rate": f"results/{wildcards.model}/inject/chosen.json"} if automatic else {}
    return {**inputs_of(model.weights_of(wildcards.source)), **rate}


def weights_digest(wildcards):
    return digest_of(model_of(wildcards).weights_of(wildcards.source))


def first_weights_of(wildcards):
    return inputs_of(model_of(wildcards).members[0])


def first_weights_digest(wildcards):
    return digest_of(model_of(wildcards).members[0])


def sample_settings(wildcards):
    return canonical_json(model_of(wildcards).settings)


# --- gather ---


@cache
def passes_found(model, patient):
    return list(find_passes(STUDY.models[model].predictions, patient).values())


def predictions_of(wildcards):
    return passes_found(wildcards.model, wildcards.patient)


def companions_of(wildcards):
    return [path for prediction in predictions_of(wildcards) for path in companions(prediction)]


def prediction_sizes(wildcards):
    paths = [*predictions_of(wildcards), *companions_of(wildcards)]
    return with_sizes({path: path for path in paths})


def gather_settings(wildcards):
    model = model_of(wildcards)
    deterministic = "{pass}" not in model.predictions
    return canonical_json({**model.settings, "deterministic": deterministic})


# --- maps ---


def coding_of(wildcards):
    return patient_of(wildcards).coding


def passes_wanted(wildcards):
    return STUDY.passes[wildcards.model]


# --- voxels ---


def reference_of(wildcards):
    return patient_of(wildcards).seg


def reference_size_of(wildcards):
    seg = patient_of(wildcards).seg
    return with_sizes({"seg": seg} if seg else {})


# --- cohort and report ---


def scale_of(wildcards):
    """Return the file of the scales of uncertainty, which are fitted where dropout is injected."""
    fitted = model_of(wildcards).inject and STUDY.fitting
    return {"rate": f"results/{wildcards.model}/inject/rate.json"} if fitted else {}


def tallies_of(wildcards):
    return expand("results/{model}/tally/{patient}.parquet", model=wildcards.model, patient=STUDY.evaluated)


def tallies_of_models(wildcards):
    return expand("results/{model}/tally/{patient}.parquet", model=STUDY.models, patient=STUDY.evaluated)


def sampled_scans(wildcards):
    return expand("results/preprocessed/{patient}.safetensors", patient=STUDY.sampled)


def evaluated_rows(wildcards):
    return STUDY.rows(STUDY.evaluated)


def sampled_rows(wildcards):
    return STUDY.rows(STUDY.sampled)


def patients_of_cohort(wildcards):
    """Return the table of a model's patients; there is none without a cohort."""
    return {"patients": f"results/{wildcards.model}/cohort/patients.parquet"} if STUDY.has_cohort else {}


def scores_of(wildcards):
    return expand("results/{model}/scores/{patient}.json", model=wildcards.model, patient=STUDY.scored)


def tested_rows(wildcards):
    return STUDY.rows(STUDY.tested)


def known_of(wildcards):
    """Return the reference of a patient and the file of its numbers."""
    seg = patient_of(wildcards).seg
    if not seg:
        return {"numbers": f"results/{wildcards.model}/scores/{wildcards.patient}.json"}
    return {"reference": seg, "numbers": f"results/{wildcards.model}/tally/{wildcards.patient}.parquet"}


def sources_of_models():
    return canonical_json(STUDY.sources())
