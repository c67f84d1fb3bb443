"""What the numbers of a region mean, in plain words, by stated rules."""

import math
from dataclasses import dataclass

from segtrust.main_table import KINDS
from segtrust.numerals import interval_text, number

AUROC_WELL = 0.90
AUROC_MODERATE = 0.75
BASELINE_MARGIN = 0.01
ERROR_SMALL = 0.05
ERROR_LARGE = 0.10
GAP_SHARE = 0.5


@dataclass(frozen=True)
class Finding:
    """A sentence of a verdict. level : good, caution, bad or unknown; short : the same in a few words, if needed."""

    level: str
    text: str
    short: str = ""


def verdict_rules():
    """Return the rules of `verdict` in words, for the page."""
    return [
        "Without an interval nothing is called good or bad, only to be read with care.",
        f"Ranking: AUROC of entropy on brain, pooled. From {AUROC_WELL:.2f} it ranks errors well, from "
        f"{AUROC_MODERATE:.2f} moderately, below poorly. A baseline that comes within {BASELINE_MARGIN:.2f} of it, or "
        "above, is named: then Monte Carlo passes add nothing to the ranking.",
        "Calibration: the larger of ece_class_probability and ece_top_label on predicted_5mm. "
        f"Up to {ERROR_SMALL:.2f}, with an interval that also ends there, probabilities can be read as probabilities; "
        f"up to {ERROR_LARGE:.2f} with care; above, they cannot. Confidence is called too high or too low when the gap "
        f"is at least {GAP_SHARE * 100:.0f} % of that error and its interval excludes 0.",
        "Triage: patients in the most uncertain stratum are called worse when the interval of their median Dice lies "
        "wholly below that of the most certain stratum.",
        "The cards at the top sort models by these: ✓ probabilities that can be read as such, ! with care, ✕ not; and "
        "name the models whose entropy ranks errors well and better than both baselines.",
    ]


def verdict(region, cells, groups):
    """Say in plain words what the numbers of one region mean.

    region : WT, TC or ET
    cells : dict with the Cells `auroc`, `auroc_deterministic`, `auroc_boundary`, `ece_class_probability`,
        `ece_top_label` and `gap`
    groups : strata of the region as `stratum_groups` returns them

    Returns a list of Findings: ranking, calibration, triage. The rules are those of `verdict_rules`.
    """
    return [_ranking(cells), _calibration(region, cells), _triage(groups)]


def headlines(region, findings):
    """Say of a region which models to trust and which not, from the verdicts of all; a list of Findings.

    findings : {model: Findings of `verdict`}
    """
    ranking, calibration, _ = zip(*findings.values(), strict=True)
    sentences = {
        "good": "Read as probabilities: {}.",
        "caution": "Read with care: {}.",
        "bad": "Do not read as probabilities: {}.",
        "unknown": "Cannot be told: {}.",
    }
    said = []
    for level, sentence in sentences.items():
        models = _models(findings, calibration, level)
        said += [Finding(level, sentence.format(", ".join(models)))] if models else []
    better = _models(findings, ranking, "good")
    if better:
        said.append(Finding("good", f"Ranks errors better than its baselines: {', '.join(better)}."))
    elif any(finding.level != "unknown" for finding in ranking):
        said.append(
            Finding("caution", "No model’s passes are shown to rank errors better than the baselines, which need none.")
        )
    return said


def _models(findings, chosen, level):
    return [
        f"{model} ({finding.short})" if finding.short else model
        for model, finding in zip(findings, chosen, strict=True)
        if finding.level == level
    ]


def _ranking(cells):
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
    baselines = [
        (name, cells[key].value)
        for name, key in (
            ("distance to the predicted boundary", "auroc_boundary"),
            ("the entropy of one ordinary pass", "auroc_deterministic"),
        )
        if cells[key].value is not None
    ]
    if not baselines:
        return Finding("caution", f"{head}; without a baseline beside it, that number cannot be judged.")
    rivals = [(name, value) for name, value in baselines if value >= auroc.value - BASELINE_MARGIN]
    if not rivals:
        return Finding(level, f"{head}, better than {_listed(baselines)}.")
    if quality != "well":
        return Finding(level, f"{head}, and no better than {_listed(rivals)}.")
    return Finding("caution", f"{head}, but so {'do' if len(rivals) > 1 else 'does'} {_listed(rivals)}.")


def _listed(baselines):
    return " and ".join(f"{name} ({number(value, 2)})" for name, value in baselines)


def _calibration(region, cells):
    errors = {f"ece_{kind}": cells[f"ece_{kind}"] for kind in KINDS if cells[f"ece_{kind}"].value is not None}
    if not errors:
        return Finding("unknown", f"Calibration on {region} cannot be told ({cells['ece_top_label'].reason}).")
    name, error = max(errors.items(), key=lambda item: item[1].value)
    span = f"{number(error.value, 2)} {_bounds(error)}"
    size = f"{span} ({name})"
    if error.value > ERROR_SMALL:
        large = error.value > ERROR_LARGE
        advice = (
            f"do not read {region} probabilities as probabilities"
            if large
            else f"read {region} probabilities with care"
        )
        gap = cells["gap"]
        if _one_sided(gap, error):
            direction = "high" if gap.value > 0 else "low"
            amount = f"{number(abs(gap.value), 2)} {_bounds(gap)}"
            text, short = (
                f"Confidence on {region} is too {direction} by {amount}: {advice}.",
                f"too {direction} by {amount}",
            )
        else:
            text, short = f"Probabilities on {region} are off by {size} on average: {advice}.", f"off by {span}"
        return Finding("bad" if large and error.low is not None else "caution", text, short)
    if error.high is None:
        return Finding(
            "caution",
            f"Probabilities on {region} are off by {size}; without an interval this is an impression, no proof.",
            f"off by {span}",
        )
    if error.high > ERROR_SMALL:
        text = f"Probabilities on {region} are off by {size}: small, but the interval is wide."
        return Finding("caution", text, f"off by {span}")
    text = f"{region} probabilities can be read as probabilities near the tumour: off by {size}."
    return Finding("good", text, f"off by {span}")


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


def _triage(groups):
    scored = [group for group in groups if not group["apart"]]
    if len(scored) < 2 or not all(math.isfinite(group["median"]) for group in (scored[0], scored[-1])):
        return Finding("unknown", "Whether uncertain patients are worse cannot be told (too few patients).")
    certain, uncertain = scored[0], scored[-1]
    compared = f"{_median_text(uncertain)} against {_median_text(certain)}"
    if uncertain["high"] < certain["low"]:
        return Finding("good", f"Uncertain patients are worse: median Dice {compared}.")
    if certain["high"] < uncertain["low"]:
        return Finding("bad", f"Uncertain patients are better, so uncertainty misleads: median Dice {compared}.")
    return Finding("caution", f"It is not shown that uncertain patients are worse: median Dice {compared}.")


def _median_text(group):
    bounds = [value if math.isfinite(value) else None for value in (group["low"], group["high"])]
    return " ".join(
        part for part in (number(group["median"], 2), interval_text(*bounds, 2), f"in {group['label']}") if part
    )
