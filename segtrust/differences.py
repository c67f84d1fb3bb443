"""What the report says of the differences between models: one family of tests, and the patients they disagree on."""

import numpy as np
import pandas as pd

from segtrust import charts
from segtrust.figures import Figure, Panel
from segtrust.numerals import number
from segtrust.regions import REGIONS

# the confirmatory family (definitions, section 9): label → which rows of the comparison
FAMILY = {
    "Dice": {"metric": "dice", "pooling": "patient_mean", "mask": None},
    "ece_class_probability, predicted_5mm": {
        "metric": "ece_class_probability",
        "pooling": "pooled",
        "mask": "predicted_5mm",
        "measure": "probability",
        "n_bins": 15,
    },
    "Brier score, brain": {"metric": "brier", "pooling": "patient_mean", "mask": "brain", "measure": "probability"},
    "AUPR of entropy, tumour_5mm": {
        "metric": "aupr",
        "pooling": "pooled",
        "mask": "tumour_5mm",
        "measure": "entropy",
    },
    "Q4 − Q1, median Dice": {"metric": "q4_minus_q1", "measure": "entropy", "aggregation": "predicted_5mm_mean"},
}
# what follows from a significant difference: which side is better, or what else
BETTER = {"Dice": "higher", "ece_class_probability, predicted_5mm": "lower", "Brier score, brain": "lower"}
SEPARATES, AUPR = "Q4 − Q1, median Dice", "AUPR of entropy, tumour_5mm"
MOST_DISAGREEING = 10
# more pairs are in the tables alone
MOST_PAIRS_DRAWN = 6


def family_rows(metrics):
    """Return the tests of the confirmatory family, a row per pair of models, quantity and region.

    metrics : DataFrame of the comparison

    Columns: `model`, `reference_model`, `quantity`, `region`, `value`, `low`, `high`, `interval`, `p_value`,
    `p_value_holm`, `n_cases`.
    """
    parts = []
    whole = metrics[metrics["region"].isin(REGIONS) & metrics["group"].isna()]
    for quantity, wanted in FAMILY.items():
        rows = whole
        for column, value in wanted.items():
            rows = rows[rows[column].isna() if value is None else rows[column] == value]
        parts.append(rows.assign(quantity=quantity))
    rows = pd.concat(parts).rename(columns={"ci_low": "low", "ci_high": "high"})
    columns = ["model", "reference_model", "quantity", "region", "value", "low", "high"]
    columns += ["interval", "p_value", "p_value_holm", "n_cases"]
    for column, order in (("region", list(REGIONS)), ("quantity", list(FAMILY))):
        rows = rows.sort_values(column, key=lambda held, order=order: held.map(order.index), kind="stable")
    return rows[columns].reset_index(drop=True)


def sentences(rows):
    """Return what the tests of one pair show, a list of text.

    rows : of `family_rows`, of one pair
    """
    first, second = rows["model"].iloc[0], rows["reference_model"].iloc[0]
    said = []
    for row in rows[rows["p_value_holm"] < 0.05].itertuples():
        size = f"{number(abs(row.value))} {'more' if row.value > 0 else 'less'}"
        head = (
            f"{row.region}: {row.quantity} is {size} under {first} than under {second} (p = {row.p_value_holm:.3g} "
            "after Holm)"
        )
        if row.quantity in BETTER:
            good = (row.value > 0) == (BETTER[row.quantity] == "higher")
            said.append(f"{head}, so {first if good else second} is better there.")
        elif row.quantity == SEPARATES:
            more = first if row.value < 0 else second
            said.append(f"{head}: the uncertainty of {more} separates good from bad patients more.")
        else:
            said.append(f"{head}; it also follows the error rate, which differs between models.")
    if said:
        return said
    if rows["p_value"].isna().all():
        return ["There are too few patients for a test (6 are needed)."]
    return [
        "No difference is significant after Holm's correction. With few patients that shows little: look at the "
        "intervals, which say how large a difference may be."
    ]


def disagreements(patients, first, second):
    """Return the patients whose Dice differs most between two models, the largest difference first.

    patients : {model: DataFrame with `patient`, `region`, `dice`}

    Returns a DataFrame with `patient`, `region`, `first`, `second`, `difference`; a row per patient, of the region in
    which it differs most.
    """
    sides = [
        patients[name].set_index(["patient", "region"])["dice"].rename(side)
        for name, side in ((first, "first"), (second, "second"))
    ]
    both = pd.concat(sides, axis=1, join="inner").dropna().reset_index()
    both["difference"] = both["first"] - both["second"]
    both = both[both["difference"] != 0]
    both["size"] = both["difference"].abs()
    both = both.sort_values(["size", "patient", "region"], ascending=[False, True, True], kind="stable")
    return both.drop_duplicates("patient").head(MOST_DISAGREEING).drop(columns="size").reset_index(drop=True)


def figures_of_pair(rows, patients, first, second, pages):
    """Return the Figures of two models: differences with intervals, and the Dice of every patient under both.

    rows : of `family_rows`, of this pair; patients : as of `disagreements`; pages : {patient: address} under `first`
    """
    key = f"{first}_against_{second}"
    n_cases = int(rows["n_cases"].max())
    drawable = rows.dropna(subset="value")
    found = []
    if len(drawable):
        chart = charts.differences(drawable, f"{first} − {second}")
        caption = (
            f"{first} minus {second} on the same patients, with 95 % intervals from paired resamples of subjects. "
            "Intervals stand for themselves, uncorrected for the number of tests; what is significant after Holm's "
            "correction is said above. Higher is better for Dice; lower is better for the calibration error and the "
            "Brier score. Q4 − Q1 is the fall of the median Dice from the certain to the uncertain quarter. "
            "`predicted_5mm` and `tumour_5mm` hold other voxels under each model, and AUPR grows with the error rate. "
            f"{n_cases:,} patients."
        )
        panels = [Panel(f"{key}_differences", "", chart)]
        found.append(Figure(f"{key}_differences", "What differs, and by how much?", caption, panels))
    panels = []
    for region in REGIONS:
        sides = [
            patients[name][patients[name]["region"] == region].set_index("patient")["dice"] for name in (first, second)
        ]
        points = pd.concat(sides, axis=1, keys=["x", "y"], join="inner").dropna().reset_index()
        name = f"{key}_dice_{region}"
        if points.empty:
            panels.append(Panel(name, region, reason=f"{region}: no patient has a Dice under both models."))
            continue
        points = points.assign(href=points["patient"].map(pages))
        chart = charts.agreement(points, region, first, second)
        above = int(np.sum(points["y"] > points["x"]))
        panels.append(
            Panel(name, region, chart, f"{above} of {len(points)} patients have a higher Dice under {second}")
        )
    caption = (
        f"Every point is a patient: its Dice under {first} (across) and under {second} (up). On the dotted line both "
        "are equal. Points far from it are patients that one model fails on and the other does not."
    )
    found.append(Figure(f"{key}_dice", "On which patients do they disagree?", caption, panels))
    return [figure for figure in found if figure.drawn]
