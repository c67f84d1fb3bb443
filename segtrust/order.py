"""The order of a model's patients: by Dice and by uncertainty, as all pages of the model share it.

It stands in a file of its own, so that a new patient does not change the pages of the others.
"""

import json

from segtrust.files import canonical_json, replacing
from segtrust.regions import REGIONS

SCORE = "score_predicted_5mm_mean_entropy"

_BEGINS, _ENDS = "window.segtrustOrder=", ";\n"


def order_of(cases, pages):
    """Return the order of the patients, a JSON-able dict that all pages of a model share.

    cases : of `segtrust.triage.cases_of_patients`
    pages : `report.pages` of the configuration

    `patients` : ids; `orders` : list of dicts with `name`, `first` (what comes first), and `ranks`, places in
    `patients` of those that have the number; `pages` : places of the patients with a page, None where all have one.
    Ties go by id.
    """
    orders = []
    for name, label, first, sign in (("dice", "Dice", "lowest", 1), (SCORE, "entropy", "most uncertain", -1)):
        for part in ("mean", *REGIONS):
            known = [place for place, case in enumerate(cases) if case[name][part] is not None]
            ranks = sorted(known, key=lambda place: (sign * cases[place][name][part], cases[place]["patient"]))
            said = f"{label}, {'mean of the regions' if part == 'mean' else part}"
            if ranks:
                orders.append({"name": said, "first": first, "ranks": ranks})
    chosen = None
    if pages != "all":
        most = 0 if pages == "none" else pages["worst"]
        chosen = sorted(range(len(cases)), key=lambda place: _badness(cases[place]))[:most]
    return {"patients": [case["patient"] for case in cases], "orders": orders, "pages": chosen}


def _badness(case):
    """Return a key that sorts the worst first: by Dice; then those without, the most uncertain first; ties by id."""
    dice, score = case["dice"]["mean"], case[SCORE]["mean"]
    return dice is None, dice if dice is not None else -(score or 0), case["patient"]


def with_page(order):
    """Return the ids of the patients that have a page, a list; order : of `order_of`."""
    places = range(len(order["patients"])) if order["pages"] is None else order["pages"]
    return [order["patients"][place] for place in places]


def write_order(path, order):
    """Write the order as a script that pages load from disk."""
    with replacing(path) as partial:
        partial.write_text(_BEGINS + canonical_json(order) + _ENDS, encoding="utf-8")


def read_order(path):
    """Return the order that `write_order` wrote."""
    with open(path, encoding="utf-8") as file:
        return json.loads(file.read().removeprefix(_BEGINS).removesuffix(_ENDS))
