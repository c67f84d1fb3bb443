"""What the numbers of a region mean, in plain words, by stated rules."""

import math
from dataclasses import dataclass, replace

from segtrust.main_table import KINDS
from segtrust.numerals import interval_text, number

AUROC_WELL = 0.90
AUROC_MODERATE = 0.75
BASELINE_MARGIN = 0.01
ERROR_SMALL = 0.05
ERROR_LARGE = 0.10
ERROR_OF_A_BIN = 0.15
GAP_SHARE = 0.5

LEVELS = ("good", "caution", "bad", "unknown")
# what to do with a model's probabilities, in the order it is said
ADVICE = {
    "read": "Read as probabilities: {}.",
    "with care": "Read with care: {}.",
    "do not read": "Do not read as probabilities: {}.",
    "unknown": "Cannot be told: {}.",
}


@dataclass(frozen=True)
class Finding:
    """A sentence of a verdict.

    level : good, caution, bad or unknown; short : the same in a few words; figure : the key of the figure that shows it
    advice : of `ADVICE`, where the finding is about calibration
    """

    level: str
    text: str
    short: str = ""
    figure: str = ""
    advice: str = ""


def verdict_rules():
    """Return the rules of `verdict` in words, for the page."""
    return [
        "Without an interval nothing is marked good or bad.",
        f"Ranking: AUROC of entropy on brain, pooled. From {AUROC_WELL:.2f} it ranks errors well, from "
        f"{AUROC_MODERATE:.2f} moderately, below poorly. A baseline that comes within {BASELINE_MARGIN:.2f} of it, or "
        "above, is named: where that is the entropy of one ordinary pass, more passes add nothing to the ranking; "
        "where it is the distance to the predicted boundary, no probability is needed for it. It is called better than "
        "its baselines when its interval lies wholly above those of both.",
        "Calibration: the larger of ece_class_probability and ece_top_label on predicted_5mm. "
        f"Up to {ERROR_SMALL:.2f}, with an interval that also ends there, probabilities can be read as probabilities, "
        f"unless those of one bin are off by more than {ERROR_OF_A_BIN:.2f} (mce_class_probability): most voxels have "
        f"a probability near 0, and a mean over all says little of the others. Up to {ERROR_LARGE:.2f} with care; "
        "above, they cannot. Confidence is called too high or too low when ece_top_label is itself above "
        f"{ERROR_SMALL:.2f}, the gap at least {GAP_SHARE * 100:.0f} % of the larger error, and 0 outside its interval, "
        "where it has one.",
        "Triage: patients in the most uncertain stratum are called worse when the interval of their median Dice lies "
        "wholly below that of the most certain stratum. Patients without a predicted region have no score; they are "
        "counted beside it.",
        "The cards at the top sort models by these: ✓ probabilities that can be read as such, ! with care, ✕ not; and "
        "name the models whose entropy ranks errors well and better than both baselines.",
    ]


def verdict(region, cells, groups):
    """Say in plain words what the numbers of one region mean.

    region : WT, TC or ET
    cells : dict with the Cells `auroc`, `auroc_deterministic`, `auroc_boundary`, `ece_class_probability`,
        `ece_top_label`, `mce_class_probability` and `gap`
    groups : strata of the region as `stratum_groups` returns them

    Returns a list of Findings: ranking, calibration, triage. The rules are those of `verdict_rules`.
    """
    return [_ranking(cells), _calibration(region, cells), _triage(region, groups)]


def headlines(findings):
    """Say of one region which models to trust and which not, from the verdicts of all; a list of Findings.

    findings : {model: Findings of `verdict`}
    """
    ranking, calibration, _ = ({model: found[place] for model, found in findings.items()} for place in range(3))
    said = []
    for advice, sentence in ADVICE.items():
        for level in LEVELS:
            models = [
                f"{model} ({finding.short})" if finding.short else model
                for model, finding in calibration.items()
                if (finding.advice, finding.level) == (advice, level)
            ]
            said += [Finding(level, sentence.format(", ".join(models)))] if models else []
    better = [model for model, finding in ranking.items() if finding.level == "good"]
    if better:
        said.append(Finding("good", f"Ranks errors better than its baselines: {', '.join(better)}."))
    elif any(finding.level != "unknown" for finding in ranking.values()):
        said.append(Finding("caution", "No model’s entropy is shown to rank errors better than both baselines."))
    return said


def _ranking(cells):
    return replace(_ranking_finding(cells), figure="roc")


def _ranking_finding(cells):
    auroc = cells["auroc"]
    if auroc.value is None:
        return Finding("unknown", f"Whether uncertainty ranks errors cannot be told ({auroc.reason}).")
    quality, level = (
        ("well", "good")
        if auroc.value >= AUROC_WELL
        else ("only moderately", "caution")
        if auroc.value >= AUROC_MODERATE
        else ("poorly", "bad")
    )
    if auroc.low is None:
        level = "caution"
    head = f"Uncertainty ranks errors {quality} (AUROC {number(auroc.value, 2)})"
    named = {
        "distance to the predicted boundary": cells["auroc_boundary"],
        "the entropy of one ordinary pass": cells["auroc_deterministic"],
    }
    baselines = {name: cell for name, cell in named.items() if cell.value is not None}
    if not baselines:
        return Finding("caution", f"{head}; without a baseline beside it, that number cannot be judged.")
    rivals = {name: cell for name, cell in baselines.items() if cell.value >= auroc.value - BASELINE_MARGIN}
    if rivals and quality != "well":
        return Finding(level, f"{head}, and no better than {_listed(rivals, auroc)}.")
    if rivals:
        verb = "do" if len(rivals) > 1 else "does"
        return Finding("caution", f"{head}, but so {verb} {_listed(rivals, auroc)}.")
    if len(baselines) < len(named):
        return Finding("caution", f"{head}, above {_listed(baselines, auroc)}; the other baseline has no value.")
    if all(_lies_below(cell, auroc) for cell in baselines.values()):
        return Finding(level, f"{head}, better than {_listed(baselines, auroc)}.")
    level = "bad" if level == "bad" else "caution"
    return Finding(level, f"{head}, above {_listed(baselines, auroc)}, but not shown to be better: intervals overlap.")


def _lies_below(baseline, auroc):
    return baseline.high is not None and auroc.low is not None and baseline.high < auroc.low


def _listed(baselines, auroc):
    """Return baselines with their values; and with their patients, where these are not those of the AUROC."""
    said = []
    for name, cell in baselines.items():
        fewer = f", for {cell.n_cases:,} of {auroc.n_cases:,} patients" if _other_cases(cell, auroc) else ""
        said.append(f"{name} ({number(cell.value, 2)}{fewer})")
    return " and ".join(said)


def _other_cases(cell, auroc):
    return None not in (cell.n_cases, auroc.n_cases) and cell.n_cases != auroc.n_cases


def _calibration(region, cells):
    errors = {f"ece_{kind}": cells[f"ece_{kind}"] for kind in KINDS if cells[f"ece_{kind}"].value is not None}
    if not errors:
        text = f"Calibration on {region} cannot be told ({cells['ece_top_label'].reason})."
        return Finding("unknown", text, advice="unknown")
    name, error = max(errors.items(), key=lambda item: item[1].value)
    span = f"{_size(error.value)} {_bounds(error)}"
    size, short, figure = f"{span} ({name})", _short(f"off by {span}"), f"reliability_{name.removeprefix('ece_')}"
    if error.value > ERROR_SMALL:
        large = error.value > ERROR_LARGE
        advice = (
            f"do not read {region} probabilities as probabilities"
            if large
            else f"read {region} probabilities with care"
        )
        text = f"Probabilities on {region} are off by {size} on average: {advice}."
        gap, top_label = cells["gap"], cells["ece_top_label"].value
        if top_label is not None and top_label > ERROR_SMALL and _one_sided(gap, error):
            direction = "high" if gap.value > 0 else "low"
            amount = f"{number(abs(gap.value), 2)} {_bounds(gap)}"
            text = f"Confidence on {region} is too {direction} by {amount}: {advice}."
            short = _short(f"too {direction} by {amount}")
            figure = "reliability_top_label"
        level = "bad" if large and error.low is not None else "caution"
        return Finding(level, text, short, figure, "do not read" if large else "with care")
    if error.high is None:
        text = f"Probabilities on {region} are off by {size}; without an interval this is an impression, no proof."
        return Finding("caution", text, short, figure, "with care")
    if error.high > ERROR_SMALL:
        text = f"Probabilities on {region} are off by {size}: small, but the interval is wide."
        return Finding("caution", text, short, figure, "with care")
    worst = cells["mce_class_probability"].value
    if worst is not None and worst > ERROR_OF_A_BIN:
        text = (
            f"Probabilities on {region} are off by {size} on average, but by up to {number(worst, 2)} in a bin "
            f"(mce_class_probability): read {region} probabilities with care."
        )
        short = f"off by up to {number(worst, 2)} in a bin"
        return Finding("caution", text, short, "reliability_class_probability", "with care")
    text = f"{region} probabilities can be read as probabilities near the tumour: off by {size}."
    return Finding("good", text, short, figure, "read")


def _short(text):
    """Return words that stand in brackets, without brackets of their own."""
    return text.replace(" (no interval)", ", no interval")


def _size(error):
    """Return an error with two decimals, or three where two would not tell on which side of a limit it lies."""
    return number(error, 3 if round(error, 2) in (ERROR_SMALL, ERROR_LARGE) else 2)


def _one_sided(gap, error):
    if gap.value is None or abs(gap.value) < GAP_SHARE * error.value:
        return False
    return gap.low is None or gap.high is None or gap.low > 0 or gap.high < 0


def _bounds(quantity):
    """Return the interval of a Cell; of its absolute value where it lies wholly below zero."""
    if quantity.low is None or quantity.high is None:
        return "(no interval)"
    if quantity.high < 0:
        return interval_text(-quantity.high, -quantity.low, 2)
    return interval_text(quantity.low, quantity.high, 2)


def _triage(region, groups):
    scored = [group for group in groups if not group["apart"]]
    apart = {group["label"]: len(group["patients"]) for group in groups if group["apart"]}
    n_apart = sum(apart.values())
    rest = (
        f"; {n_apart:,} without a predicted {region} ({apart.get('missed', 0):,} missed) not counted" if n_apart else ""
    )
    if len(scored) < 2 or not all(math.isfinite(group["median"]) for group in (scored[0], scored[-1])):
        text = f"Whether uncertain patients are worse cannot be told (too few patients with a score{rest})."
        return Finding("unknown", text, figure="strata")
    certain, uncertain = scored[0], scored[-1]
    compared = f"{_median_text(uncertain)} against {_median_text(certain)}{rest}"
    if uncertain["high"] < certain["low"]:
        return Finding("good", f"Uncertain patients are worse: median Dice {compared}.", figure="strata")
    if certain["high"] < uncertain["low"]:
        text = f"Uncertain patients are better, so uncertainty misleads: median Dice {compared}."
        return Finding("bad", text, figure="strata")
    text = f"It is not shown that uncertain patients are worse: median Dice {compared}."
    return Finding("caution", text, figure="strata")


def _median_text(group):
    bounds = [value if math.isfinite(value) else None for value in (group["low"], group["high"])]
    return " ".join(
        part for part in (number(group["median"], 2), interval_text(*bounds, 2), f"in {group['label']}") if part
    )
