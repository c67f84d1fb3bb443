"""Methods: the text that a paper needs, from the settings and versions of a run, with the works to cite."""

from collections import Counter

CROPS = {
    "foreground": "cropped to the box around the brain",
    "center": "cropped at the centre",
    "none": "not cropped",
}
MASKS = {
    "independent": "drawn anew for every pass and held for all windows of a volume",
    "balanced": "balanced within blocks of passes, so that every channel is dropped equally often, and held for all "
    "windows of a volume",
    "per_window": "drawn anew for every sliding window",
}
LIBRARIES = {
    "segtrust": "segtrust",
    "python": "Python",
    "torch": "PyTorch",
    "monai": "MONAI",
    "openvino": "OpenVINO",
    "snakemake": "Snakemake",
}
CODINGS = {
    "brats2021": "BraTS 2021",
    "brats2023": "BraTS 2023",
    "brats2024": "BraTS 2024",
    "msd": "the Medical Segmentation Decathlon",
}

WORKS = {
    "dropout": "Gal Y, Ghahramani Z. Dropout as a Bayesian approximation: representing model uncertainty in deep "
    "learning. ICML 2016. arXiv:1506.02142",
    "injected": "Ledda E, Fumera G, Roli F. Dropout injection at test time for post hoc uncertainty quantification in "
    "neural networks. Information Sciences 645:119356, 2023",
    "ensemble": "Lakshminarayanan B, Pritzel A, Blundell C. Simple and scalable predictive uncertainty estimation "
    "using deep ensembles. NeurIPS 2017. arXiv:1612.01474",
    "flips": "Wang G, Li W, Aertsen M, Deprest J, Ourselin S, Vercauteren T. Aleatoric uncertainty estimation with "
    "test-time augmentation for medical image segmentation with convolutional neural networks. Neurocomputing "
    "338:34–45, 2019",
    "brats2021": "Baid U, et al. The RSNA-ASNR-MICCAI BraTS 2021 benchmark on brain tumor segmentation and "
    "radiogenomic classification. 2021. arXiv:2107.02314",
    "calibration": "Guo C, Pleiss G, Sun Y, Weinberger KQ. On calibration of modern neural networks. ICML 2017. "
    "arXiv:1706.04599",
    "monai": "Cardoso MJ, et al. MONAI: an open-source framework for deep learning in healthcare. 2022. "
    "arXiv:2211.02701",
    "snakemake": "Mölder F, et al. Sustainable data analysis with Snakemake. F1000Research 10:33, 2021",
}

_COHORT = (
    "Segmentation uncertainty was evaluated on {patients}{sessions} with reference labels as in {labels}, for whole "
    "tumour (WT), tumour core (TC) and enhancing tumour (ET).{missing}{fitted} Each of the four modalities (T1, "
    "contrast-enhanced T1, T2, FLAIR) was standardised over its own non-zero voxels."
)
_EVALUATION = (
    "A region was predicted where its mean probability was at least 0.5. Uncertainty is the entropy of the mean "
    "probability in bits. Whether it ranks errors was measured by the AUROC of entropy for wrongly labelled voxels in "
    "the brain (where any modality is non-zero), all patients pooled, beside two baselines: the entropy of the "
    "deterministic pass, and proximity to the predicted boundary. Calibration was measured by the expected calibration "
    "error in {n_bins} bins of equal width, of the probability of the region and of the confidence of the chosen "
    "label, in the brain and within 5 mm of the predicted region. Patients were stratified by quartiles (fewer than 8 "
    "patients: halves) of their mean entropy within 5 mm of the predicted region; a Dice below {failure_dice:g} counts "
    "as a failure. Intervals are 95 % intervals over subjects ({n_resamples:,} bootstrap resamples, or the method "
    "named beside the number).{compared} Software: {used}."
)
_COMPARED = (
    " Models were compared on the patients they share, p-values of the confirmatory family adjusted by Holm's method."
)


def methods(runs, sheet, sources, n_bins):
    """Return (list of paragraphs, list of works to cite), all str, about the models of a run that were evaluated.

    runs : list of objects with `name`, `patients` (DataFrame with `patient` and `subject`) and `provenance`, the dict
        that the cohort's tables carry
    sheet : list of `segtrust.patients.Patient`
    sources : {model: where its passes come from, in words}
    n_bins : bins of the calibration errors that are reported

    Both are empty where nothing was evaluated.
    """
    if not runs:
        return [], []
    models = [_model(run, sources.get(run.name)) for run in runs]
    paragraphs = [_cohort(runs, sheet), *models, _evaluation(runs, n_bins)]
    works = ["calibration", "snakemake"]
    works += ["brats2021"] if any(person.coding == "brats2021" for person in sheet) else []
    works += [work for run in runs for work in _works(run.provenance.get("model", {}), sources.get(run.name, ""))]
    return paragraphs, [text for work, text in WORKS.items() if work in works]


def _cohort(runs, sheet):
    evaluated = set().union(*(run.patients["patient"] for run in runs))
    people = [person for person in sheet if person.patient in evaluated]
    subjects = {person.subject for person in people}
    sessions = f" of {_count(len(subjects), 'subject')}" if len(subjects) < len(people) else ""
    codings = Counter(person.coding for person in people)
    labels = _listed([CODINGS.get(coding, coding) for coding in codings])
    asked = sum(person.split == "test" for person in sheet)
    missing = f" {_count(asked - len(people), 'test patient')} of {asked:,} could not be evaluated." * (
        asked > len(people)
    )
    calibration = sum(person.split == "calibration" for person in sheet)
    fitted = f" {_count(calibration, 'further patient')} served to fit thresholds and cut-offs." * (calibration > 0)
    return _COHORT.format(
        patients=_count(len(people), "test patient"), sessions=sessions, labels=labels, missing=missing, fitted=fitted
    )


def _model(run, source):
    described = run.provenance.get("model", {})
    settings = described.get("settings", {})
    passes = f" ({source})" if source else ""
    if "network" not in settings:
        return f"Model {run.name}: {source or 'predictions made elsewhere'}; the probability of a region is their mean."
    network, view = settings["network"], settings["sample"]
    arguments = _listed([f"{key} {_plain(value)}" for key, value in network.items() if key != "name"])
    built = f"{network['name']}" + (f" ({arguments})" if arguments else "")
    windows = ""
    if view["window"]:
        sides = "×".join(map(str, view["window"]))
        windows = f" and predicted in sliding windows of {sides} voxels with an overlap of {view['overlap']:g}"
    dropout = _dropout(settings, described.get("rate"), view["masks"])
    backend = LIBRARIES.get(run.provenance.get("backend"), "PyTorch")
    devices = _listed(["CPU" if device == "cpu" else "GPU" for device in run.provenance.get("device", [])])
    precision = run.provenance.get("precision", settings["precision"])
    weights = described.get("weights")
    digests = _listed([digest[:12] for digest in (weights.values() if isinstance(weights, dict) else [weights])])
    return (
        f"Model {run.name}: {built}, weights with SHA-256 {digests}…; scans were {CROPS[view['crop']]}{windows}. The "
        f"probability of a region is the mean over all passes{passes}.{dropout} Networks were computed in {precision} "
        f"by {backend}{devices and f' on {devices}'}, with seed {view['seed']}."
    )


def _dropout(settings, rate, masks):
    stochastic, inject = settings["stochastic"], settings["stochastic"]["inject"]
    if not inject and not stochastic["dropout"]:
        return " Dropout was off."
    parts = ["the dropout layers that the network has were active"] if stochastic["dropout"] else []
    if inject:
        chosen = ", the rate chosen on the calibration patients" if inject["rate"] == "auto" else ""
        after = _listed(inject["after"])
        parts.append(f"dropout of {inject['kind']}s at rate {rate:g} was injected after {after}{chosen}")
    text = " and ".join(parts)
    return f" {text[0].upper()}{text[1:]}; masks were {MASKS[masks]}."


def _evaluation(runs, n_bins):
    provenance = runs[0].provenance
    settings, versions = provenance["cohort"], provenance.get("versions", {})
    compared = _COMPARED if len(runs) > 1 else ""
    used = ", ".join(f"{label} {versions[name]}" for name, label in LIBRARIES.items() if name in versions)
    numbers = {name: settings[name] for name in ("failure_dice", "n_resamples")}
    return _EVALUATION.format(n_bins=n_bins, compared=compared, used=used, **numbers)


def _works(model, source):
    settings = model.get("settings", {})
    if "network" not in settings:
        return []
    works = ["monai"]
    works += ["dropout"] if settings["stochastic"]["dropout"] or settings["stochastic"]["inject"] else []
    works += ["injected"] if settings["stochastic"]["inject"] else []
    works += ["ensemble"] if isinstance(model.get("weights"), dict) and len(model["weights"]) > 1 else []
    works += ["flips"] if "flips" in source else []
    return works


def _count(n, word):
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _listed(words):
    *first, last = [*map(str, words)] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def _plain(value):
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
