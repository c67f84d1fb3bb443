"""A cohort's result files, drawn: over-confident on ET, fine on WT."""

import math

import numpy as np
import pandas as pd
import pyarrow as pa

from segtrust.files import write_json, write_parquet
from segtrust.masks import BANDS
from segtrust.measures import BETWEEN_MEMBERS, WITHIN_MEMBERS
from segtrust.patients import Patient
from segtrust.preprocess import preprocess, write_preprocessed
from segtrust.regions import REGIONS, codes_of, overlay
from segtrust.rows import CURVES_SCHEMA, METRICS_SCHEMA
from segtrust.slices import showcase
from segtrust.volumes import Geometry, write_volume

SETTINGS = {"title": "Can the confidence be trusted?", "background": "t1ce", "n_bins": 15}
N_BINS = 15
PASSES = 20

METRIC_COLUMNS = METRICS_SCHEMA.names
PARTS = ("expected_entropy", WITHIN_MEMBERS, BETWEEN_MEMBERS)

# what the tables of the drawn cohort say: over-confident on ET, fine on WT
DICE = {"WT": 0.91, "TC": 0.86, "ET": 0.73}
AUROC = {"WT": 0.991, "TC": 0.982, "ET": 0.971}
GAP = {"WT": 0.012, "TC": 0.061, "ET": 0.312}


# --- a small cohort, drawn ---


def metric(model, region, name, value, pooling, n_cases, measure=None, mask=None, n_bins=None, passes=PASSES):
    row = dict.fromkeys(METRIC_COLUMNS)
    bounded = n_cases >= 6 and value is not None
    n_voxels = 0 if value is None else 1_000 * n_cases
    row |= {
        "model": model,
        "region": region,
        "metric": name,
        "value": value,
        "pooling": pooling,
        "measure": measure,
        "mask": mask,
        "n_bins": n_bins,
        "passes": passes,
        "recalibration": "none",
        "n_cases": n_cases,
        "n_voxels": None if mask is None else n_voxels,
        "ci_low": value - 0.0123 if bounded else None,
        "ci_high": value + 0.0123 if bounded else None,
        "interval": "envelope" if bounded else "none: fewer than 6 subjects",
        "conditional_on_reference": False,
        "mask_depends_on_model": mask == "predicted_5mm",
    }
    return row


def metrics_table(model, n_cases, missing=(), early=(), members=False):
    """Return metrics of a model; regions in `missing` are empty everywhere. Distractors differ in one key each.

    early : numbers of passes that AUROC and calibration errors are given after, too
    members : whether entropy is given in parts
    """
    rows = []
    for region in REGIONS:
        gone = region in missing

        def add(name, value, pooling, region=region, gone=gone, **keys):
            rows.append(metric(model, region, name, None if gone else value, pooling, n_cases, **keys))

        add("dice", DICE[region], "patient_mean")
        add("dice_deterministic", DICE[region] + 0.004, "patient_mean")
        for name, value in (("delta_dice", -0.004), ("absolute_delta_dice", 0.006)):
            add(name, value, "patient_mean")
        for mask in ("brain", "volume"):
            for shift, measure in ((0, "entropy"), (-0.015, "deterministic_entropy"), (0.002, "boundary_proximity")):
                add("auroc", AUROC[region] + shift + 0.001 * (mask == "volume"), "pooled", measure=measure, mask=mask)
                add("auroc", AUROC[region] - 0.05, "patient_mean", measure=measure, mask=mask)
        for mask, share in (("predicted_5mm", 1), ("brain", 0.05), ("union", 3)):
            add("mean_uncertainty", 0.31 * share / 3, "pooled", measure="entropy", mask=mask)
            for bins in (10, 15, 20):
                for kind, factor in (("class_probability", 0.8), ("top_label", 1.0)):
                    value = GAP[region] * share * factor + bins / 1e4
                    add(f"ece_{kind}", value, "pooled", measure="probability", mask=mask, n_bins=bins)
            for bins in (10, 15, 20):
                keys = {"measure": "probability", "mask": mask, "n_bins": bins}
                add("mce_class_probability", 0.1 + GAP[region] * share + bins / 1e4, "pooled", **keys)
            add("gap", GAP[region] * share, "pooled", measure="probability", mask=mask)
        for place, band in enumerate(BANDS):
            for name, value in (("error_rate", 0.4 / (1 + place % 6)), ("mean_uncertainty", 0.6 / (1 + place % 6))):
                add(name, value, "pooled", measure="entropy", mask=band)
        add("dice", 0.1, "patient_mean", passes=5)
        for passes in early:
            add("auroc", AUROC[region] - 0.2 / passes, "pooled", measure="entropy", mask="brain", passes=passes)
            for kind in ("class_probability", "top_label"):
                keys = {"measure": "probability", "mask": "predicted_5mm", "n_bins": 15, "passes": passes}
                add(f"ece_{kind}", GAP[region] + 0.1 / passes, "pooled", **keys)
        for measure, part in zip(PARTS, (0.2, 0.07, 0.04), strict=True) if members else ():
            add("mean_uncertainty", part, "pooled", measure=measure, mask="predicted_5mm")
    return pd.DataFrame(rows, columns=METRIC_COLUMNS)


def patients_table(model, ids, generator, missing=()):
    rows = []
    for place, patient in enumerate(ids):
        for region in REGIONS:
            absent = region in missing or (region == "ET" and place % 9 == 4)
            missed = region == "ET" and place % 9 == 7
            score = generator.beta(3, 9)
            dice = float(np.clip(DICE[region] - 1.2 * (score - 0.25) + generator.normal(0, 0.05), 0, 1))
            rows.append(
                {
                    "model": model,
                    "patient": patient,
                    "subject": patient,
                    "split": "test",
                    "region": region,
                    "dice": 1.0 if absent else 0.0 if missed else dice,
                    "hd95": 4.0 + 10 * score,
                    "volume_ml": 0.0 if absent or missed else 30 * (1 + place % 5),
                    "both_empty": absent,
                    "score_predicted_5mm_mean_entropy": math.nan if absent or missed else score,
                    "site": "A",
                }
            )
    return pd.DataFrame(rows)


def strata_table(model, patients):
    rows = []
    for region in REGIONS:
        people = patients[patients["region"] == region]
        score = people["score_predicted_5mm_mean_entropy"]
        names = ("Q1", "Q2", "Q3", "Q4") if score.notna().sum() >= 8 else ("H1", "H2")
        rank = (score.rank() - 1) * len(names) // max(score.notna().sum(), 1)
        groups = {name: rank == place for place, name in enumerate(names)}
        groups["missing_region"] = score.isna()
        groups["missing_region_missed"] = score.isna() & ~people["both_empty"]
        groups["missing_region_absent"] = score.isna() & people["both_empty"]
        for name, inside in groups.items():
            dice = people.loc[inside, "dice"]
            enough = len(dice) >= 6
            rows.append(
                {
                    "model": model,
                    "region": region,
                    "measure": "entropy",
                    "aggregation": "predicted_5mm_mean",
                    "scheme": "quartiles" if len(names) == 4 else "halves",
                    "stratum": name,
                    "cutoff_source": "in_sample",
                    "n_cases": len(dice),
                    "median_dice": dice.median(),
                    "ci_low": dice.quantile(0.2) if enough else math.nan,
                    "ci_high": dice.quantile(0.8) if enough else math.nan,
                    "score_low": score[inside].min(),
                    "score_high": score[inside].max(),
                    "group": None,
                    "group_value": None,
                }
            )
    return pd.DataFrame(rows)


def curves_table(model, missing=()):
    """Return the curves of a model; every line falls or rises as it should, none is computed from voxels."""
    rows = []

    def add(curve, region, mask, measure, pooling, x, y, n, n_bins=None, band=None):
        for place, (across, up, count) in enumerate(zip(x, y, n, strict=True)):
            low, high = (None, None) if band is None else (max(up - band, 0), min(up + band, 1))
            values = (model, curve, region, mask, measure, pooling, n_bins, place, across, up, low, high, int(count))
            rows.append(dict(zip(CURVES_SCHEMA.names, values, strict=True)))

    line = np.linspace(0, 1, 21)
    for region in (name for name in REGIONS if name not in missing):
        for kind in ("class_probability", "top_label"):
            for mask in ("predicted_5mm", "brain", "union"):
                n_drawn = N_BINS if kind == "class_probability" else 8
                start = 0 if kind == "class_probability" else 0.5
                middle = start + (np.arange(n_drawn) + 0.5) * (1 - start) / n_drawn
                bent = middle - GAP[region] * 1.5 * middle * (1.2 - middle) + 0.02 * (mask == "brain")
                n = np.full(n_drawn, 700 * (21 if mask == "brain" else 1))
                add(f"reliability_{kind}", region, mask, "probability", "pooled", middle, bent, n, N_BINS, band=0.03)
        for mask in ("brain", "predicted_5mm", "outside_0_1mm"):
            for place, measure in enumerate(("entropy", "mutual_information", "deterministic_entropy")):
                add("roc", region, mask, measure, "pooled", line, line ** (0.2 + 0.1 * place), 1000 * line)
                add("pr", region, mask, measure, "pooled", line, 0.6 - 0.5 * line, 1000 * line)
        for outcome, fall in (("wrong", 1), ("correct", 9)):
            share = np.exp(-fall * np.arange(40) / 40)
            share /= share.sum()
            middle = (np.arange(40) + 0.5) / 40
            add(f"distribution_{outcome}", region, "brain", "entropy", "pooled", middle, share, 1e5 * share)
        for place, measure in enumerate(("entropy", "boundary_proximity")):
            rise = 1 - (1 - DICE[region]) * (1 - line) ** (4 - place)
            add("retention", region, "brain", measure, "patient_mean", line, rise, np.full(21, 9), band=0.05)
            risk = (1 - DICE[region]) * (0.4 + 0.6 * line[1:])
            add("risk_coverage", region, "predicted_5mm", measure, "patient_level", line[1:], risk, np.arange(1, 21))
        for part in ("dsc", "ftp", "ftn"):
            tau = np.arange(0, 102.5, 2.5)
            fall = np.exp(-tau / 30) if part != "dsc" else 1 - (1 - DICE[region]) * tau / 100
            add(f"qu_brats_{part}", region, "volume", "entropy", "patient_mean", tau, fall, np.full(41, 9), band=0.02)
    return pd.DataFrame(rows, columns=CURVES_SCHEMA.names)


def comparison_table(models, n_cases, shift=0.05):
    """Return the rows of a comparison of every two models; the first is better in Dice by `shift`."""
    enough = n_cases >= 6
    rows = []
    for place, first in enumerate(models):
        for second in models[place + 1 :]:
            for region in REGIONS:

                def add(name, value, pooling, first=first, second=second, region=region, aggregation=None, **keys):
                    row = metric(first, region, name, value, pooling, n_cases, **keys)
                    p = 0.001 if enough else None
                    row |= {"reference_model": second, "aggregation": aggregation, "p_value": p}
                    rows.append(row | {"p_value_holm": p and 45 * p})

                add("dice", shift, "patient_mean")
                add("dice", shift / 2, "pooled")
                for bins in (10, 15):
                    keys = {"measure": "probability", "mask": "predicted_5mm", "n_bins": bins}
                    add("ece_class_probability", -shift, "pooled", **keys)
                add("brier", -shift / 10, "patient_mean", measure="probability", mask="brain")
                add("brier", -shift / 9, "patient_mean", measure="probability_deterministic", mask="brain")
                add("aupr", shift, "pooled", measure="entropy", mask="tumour_5mm")
                keys = {"measure": "entropy", "aggregation": "predicted_5mm_mean"}
                add("q4_minus_q1", -shift, "patient_level", **keys)
    return pd.DataFrame(rows, columns=METRIC_COLUMNS)


def ball(shape, centre, radius):
    grid = np.indices(shape).T - np.array(centre)
    return np.sqrt((grid**2).sum(axis=-1)).T - radius


def draw_volumes(results, folder, model, patient, shape=(22, 28, 12)):
    """Write the maps, the preprocessed scan and the reference of a patient on an LPS grid; return the reference."""
    geometry = Geometry(shape, np.diag([-1.0, -1.0, 2.0, 1.0]))
    middle = np.array(shape) / 2
    brain = ball(shape, middle, 10.0) < 0
    texture = np.random.default_rng(len(patient)).normal(0, 4, shape)
    tumour = [ball(shape, middle + np.array([3, 2, 0]), radius) for radius in (5.0, 3.4, 2.2)]
    scan = np.where(brain, 100 + texture + 30 * (tumour[1] < 0) + 40 * (tumour[2] < 0), 0).astype(np.float32)
    write_preprocessed(
        results / "preprocessed" / f"{patient}.safetensors", preprocess(np.stack([scan] * 4), geometry), {"code": "0"}
    )
    probability = np.stack([1 / (1 + np.exp(distance * 1.2)) for distance in tumour]).astype(np.float32)
    probability = np.where(brain, probability, 1e-6)
    entropy = -(probability * np.log2(probability) + (1 - probability) * np.log2(1 - probability))
    maps = results / model / "maps"
    write_volume(maps / f"{patient}_probability.nii.gz", probability.astype(np.float32), geometry, "probability")
    write_volume(maps / f"{patient}_entropy.nii.gz", entropy.astype(np.float32), geometry, "entropy")
    labels = codes_of(overlay(probability >= 0.5), "brats2021")
    write_volume(maps / f"{patient}_segmentation.nii.gz", labels, geometry, "labels")
    truth = np.stack([ball(shape, middle + np.array([2, 3, 0]), radius) < 0 for radius in (4.6, 3.0, 1.8)])
    write_volume(folder / f"{patient}_seg.nii.gz", codes_of(overlay(truth), "brats2021"), geometry, "reference")
    return str(folder / f"{patient}_seg.nii.gz")


def draw_cohort(
    folder, n_patients=18, models=("SegResNet",), missing=None, references=True, alarms=(), early=(), members=False
):
    """Write the result files of a run and return (results, sheet, metrics by model).

    missing : {model: regions that nobody has}; alarms : those of the first model
    early, members : as of `metrics_table`
    """
    results, generator = folder / "results", np.random.default_rng(7)
    ids = [f"BraTS2021_{place:05d}" for place in range(n_patients)]
    paths, tables = {}, {}
    for model in models:
        gone = (missing or {}).get(model, ())
        patients = patients_table(model, ids, generator, gone)
        shown = [patient for _, patient in showcase(patients if references else None, ids)]
        for patient in shown:
            paths[patient] = draw_volumes(results, folder, model, patient)
        if not references:
            continue
        metrics = metrics_table(model, n_patients, gone, early, members)
        tables[model] = metrics
        written = {"metrics": metrics, "patients": patients, "strata": strata_table(model, patients)}
        written["curves"] = curves_table(model, gone)
        provenance = {
            "settings": "5f2c" * 16,
            "seed": 1,
            "versions": {"segtrust": "0.1", "torch": "2.13"},
            "cohort": {"n_resamples": 2000, "failure_dice": 0.8, "n_bins": [10, 15, 20]},
        }
        for name, table in written.items():
            rows = pa.Table.from_pandas(table, preserve_index=False)
            write_parquet(results / model / "cohort" / f"{name}.parquet", rows, provenance)
        write_json(results / model / "cohort" / "alarms.json", list(alarms) if model == models[0] else [])
    if references and len(models) > 1:
        rows = pa.Table.from_pandas(comparison_table(models, n_patients), preserve_index=False)
        write_parquet(results / "comparison" / "metrics.parquet", rows, {})
    sheet = [person(patient, paths.get(patient, "elsewhere.nii.gz") if references else None) for patient in ids]
    return results, sheet, tables


def person(patient, seg, split="test"):
    return Patient(patient, patient, split, "brats2021", {}, seg)
