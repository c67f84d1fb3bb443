import pandas as pd
import pytest
from drawn_cohorts import comparison_table
from test_charts import data_of

from segtrust import differences
from segtrust.drawing import specification
from segtrust.regions import REGIONS


def patients_of(dice):
    """Return a table of patients; dice : {patient: (WT, TC, ET)}."""
    return pd.DataFrame(
        [
            {"patient": patient, "region": region, "dice": value}
            for patient, values in dice.items()
            for region, value in zip(REGIONS, values, strict=True)
        ]
    )


PATIENTS = {
    "a": patients_of({"p1": (0.9, 0.8, 0.7), "p2": (0.9, 0.9, 0.9), "p3": (0.5, 0.5, 0.5), "p4": (0.1, 0.1, 0.1)}),
    "b": patients_of({"p1": (0.9, 0.7, 0.1), "p2": (0.9, 0.9, 0.9), "p3": (0.9, 0.5, 0.5), "p5": (0.1, 0.1, 0.1)}),
}


def test_the_family_is_one_row_a_quantity_and_region():
    rows = differences.family_rows(comparison_table(["a", "b"], 10))
    assert len(rows) == 5 * 3
    assert rows["quantity"].drop_duplicates().tolist() == list(differences.FAMILY)
    assert rows["region"].tolist()[:3] == list(REGIONS)
    assert rows[rows["quantity"] == "Dice"]["value"].tolist() == [0.05] * 3
    assert rows["p_value_holm"].tolist() == pytest.approx([0.045] * 15)


def test_a_significant_difference_names_the_better_model_whichever_way_is_better():
    rows = differences.family_rows(comparison_table(["a", "b"], 10))
    said = differences.sentences(rows)
    assert len(said) == 15
    assert said[0] == "WT: Dice is 0.050 more under a than under b (p = 0.045 after Holm), so a is better there."
    assert "TC: ece_class_probability, predicted_5mm is 0.050 less under a than under b" in said[4]
    assert said[4].endswith("so a is better there.")
    turned = differences.sentences(differences.family_rows(comparison_table(["a", "b"], 10, shift=-0.05)))
    assert ["so b is better there" in sentence for sentence in turned] == [True] * 9 + [False] * 6


def test_what_is_neither_better_nor_worse_is_not_called_so():
    said = differences.sentences(differences.family_rows(comparison_table(["a", "b"], 10)))
    assert all("it also follows the error rate" in sentence for sentence in said[9:12])
    assert all("the uncertainty of a separates good from bad patients more" in sentence for sentence in said[12:])


def test_pairs_keep_their_rows_whatever_their_passes():
    table = comparison_table(["a", "b", "c"], 10)
    table.loc[table["model"] == "b", "passes"] = 10
    assert len(differences.family_rows(table)) == 3 * 15


def test_without_significance_nobody_is_called_better():
    rows = differences.family_rows(comparison_table(["a", "b"], 10)).assign(p_value_holm=0.2)
    (said,) = differences.sentences(rows)
    assert "No difference is significant" in said


def test_too_few_patients_for_a_test_are_said():
    (said,) = differences.sentences(differences.family_rows(comparison_table(["a", "b"], 3)))
    assert "too few patients" in said


def test_patients_are_listed_by_their_largest_difference_and_once():
    rows = differences.disagreements(PATIENTS, "a", "b")
    assert rows[["patient", "region"]].to_numpy().tolist() == [["p1", "ET"], ["p3", "WT"]]
    assert rows["difference"].tolist() == pytest.approx([0.6, -0.4])


def test_figures_of_a_pair_draw_its_rows_and_shared_patients():
    rows = differences.family_rows(comparison_table(["a", "b"], 10))
    pages = {"p1": "patients/a/p1.html"}
    shown, agreed = differences.figures_of_pair(rows, PATIENTS, "a", "b", pages)
    strips = [table for table in data_of(specification(shown.panels[0].chart)) if "value" in table]
    assert len(strips) == len(differences.FAMILY)
    table = pd.concat(strips)
    assert table["value"].to_numpy() == pytest.approx(rows["value"].to_numpy(), rel=1e-4)
    points = data_of(specification(agreed.panels[2].chart))
    (people,) = [table for table in points if "patient" in table]
    assert people[["patient", "x", "y"]].to_numpy().tolist() == [["p1", 0.7, 0.1], ["p2", 0.9, 0.9], ["p3", 0.5, 0.5]]
    assert people["href"].tolist()[0] == "patients/a/p1.html"
