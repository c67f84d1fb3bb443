"""The study: its checked configuration and patients, and what rules ask about them.

in:   config.yaml, patients.tsv
"""

import os
import re
from functools import cache

from snakemake.exceptions import WorkflowError

from segtrust.files import canonical_json
from segtrust.gather import find_passes
from segtrust.provenance import code_digest, file_digest
from segtrust.study import study_or_message

STUDY = study_or_message(config, workflow.is_main_process, WorkflowError)
config.update(STUDY.config)
GPU = 0 if STUDY.config["sample"]["device"] == "cpu" else 1
SCRIPTS = f"{workflow.basedir}/workflow/scripts"


wildcard_constraints:
    patient=r"[A-Za-z0-9][A-Za-z0-9_.-]*",
    model="|".join(map(re.escape, STUDY.models)),
    first=r"\d+",
    last=r"\d+",


def code(stage):
    return code_digest(f"{SCRIPTS}/{stage}.py")


def model_of(wildcards):
    return STUDY.models[wildcards.model]


def patient_of(wildcards):
    return STUDY.patients[wildcards.patient]


def only(names):
    """Return a wildcard constraint that some names fit, and nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


# one checkpoint serves many patients: it is read once
digest_of_checkpoint = cache(file_digest)


def checkpoint_digest(wildcards):
    """Return the digest of given weights; those trained here have theirs in a file of their own."""
    path = model_of(wildcards).checkpoint
    return digest_of_checkpoint(path) if path else "trained here"


def chunks_of(wildcards):
    return STUDY.chunks(wildcards.model, wildcards.patient)


def with_sizes(files):
    """Return files by column, and their sizes: a file put back with an old date is seen by its size."""
    return canonical_json({column: [path, os.path.getsize(path)] for column, path in files.items()})


def every_map():
    return expand(
        "results/{model}/maps/{patient}_{map}.nii.gz",
        model=STUDY.models,
        patient=STUDY.sampled,
        map=STUDY.config["maps"]["write"],
    )


def every_cohort():
    models = STUDY.models if STUDY.has_cohort else []
    return expand("results/{model}/cohort/metrics.parquet", model=models)


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


# --- sample ---


def weights_of(wildcards):
    """Return the weights; their date does not count, their digest does."""
    model = model_of(wildcards)
    if model.checkpoint:
        return {"checkpoint": ancient(model.checkpoint)}
    trained = f"results/{model.trained_as}/train"
    return {
        "checkpoint": ancient(f"{trained}/checkpoint.pt"),
        "digest": f"{trained}/checkpoint.sha256",
    }


def sample_settings(wildcards):
    return canonical_json(model_of(wildcards).settings)


# --- gather ---


def predictions_of(wildcards):
    return list(find_passes(model_of(wildcards).predictions, wildcards.patient).values())


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
    return with_sizes({"seg": patient_of(wildcards).seg})
