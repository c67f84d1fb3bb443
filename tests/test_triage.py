"""The list of patients and their order: what is in them, and how a reader sorts and filters."""

import numpy as np
import pandas as pd
import pytest
from browser import PHONE, opened

from segtrust.order import SCORE, order_of, read_order, with_page, write_order
from segtrust.patients import Patient
from segtrust.regions import REGIONS
from segtrust.triage import NO_REFERENCE, cases_of_patients, table_of, triage

MARKUP = "<script>alert(1)</script>"


def person(name, subject=None, **extra):
    return Patient(name, subject or name, "test", "brats2021", {}, None, extra)


def rows_of(patient, dice, score, volume=10.0, missing=(), absent=()):
    """Return the rows of the table `patients` of one patient; dice, score : one number for all regions."""
    rows = []
    for region in REGIONS:
        gone = region in missing or region in absent
        rows.append(
            {
                "patient": patient,
                "region": region,
                "dice": 1.0 if region in absent else 0.0 if region in missing else dice,
                SCORE: None if gone else score,
                "volume_ml": 0.0 if gone else volume,
                "missing_region": gone,
                "both_empty": region in absent,
            }
        )
    return rows


def scores_of(score, missing=()):
    return {
        region: {
            SCORE: None if region in missing else score,
            "volume_ml": 0.0 if region in missing else 12.0,
            "missing_region": region in missing,
        }
        for region in REGIONS
    }


def cases():
    """Return the cases of five patients: two ordinary ones, one missed, one absent, one without a reference."""
    people = [person("good", site="A"), person("bad", site=MARKUP), person("missed"), person("absent"), person("none")]
    rows = [
        *rows_of("good", 0.9, 0.2),
        *rows_of("bad", 0.4, 0.6),
        *rows_of("missed", 0.9, 0.3, missing=["ET"]),
        *rows_of("absent", 0.8, 0.4, absent=["ET"]),
    ]
    return cases_of_patients(people, pd.DataFrame(rows), {"none": scores_of(0.5, missing=["TC"])})


def written(folder, cases, pages="all"):
    """Write the list as a study has it, and return its path."""
    path = folder / "triage" / "m.html"
    path.parent.mkdir()
    path.write_text(triage(cases, order_of(cases, pages), model="m"), encoding="utf-8")
    return path


def many(n, n_columns=0):
    """Return the cases of n patients with further columns, some of them with very long ids."""
    generator = np.random.default_rng(0)
    people, rows = [], []
    for number in range(n):
        name = f"P{number:05d}" if number % 100 else f"P{number:05d}-{'long_' * 18}"
        extra = {f"column_{column}": f"{generator.normal():.2f}" for column in range(n_columns)}
        people.append(person(name, **extra))
        rows += rows_of(name, generator.random(), generator.random())
    return cases_of_patients(people, pd.DataFrame(rows), {})


# --- order and table ---


def test_means_are_over_the_regions_that_have_the_number():
    by_name = {case["patient"]: case for case in cases()}
    assert by_name["missed"]["dice"]["mean"] == pytest.approx(0.6)
    assert by_name["missed"][SCORE]["mean"] == pytest.approx(0.3)
    assert by_name["none"]["dice"]["mean"] is None


def test_what_is_missing_is_noted():
    notes = {case["patient"]: case["notes"] for case in cases()}
    assert notes["good"] == notes["bad"] == []
    assert notes["missed"] == ["ET missed"]
    assert notes["absent"] == ["ET absent"]
    assert notes["none"] == [NO_REFERENCE, "TC not predicted"]


def test_patients_are_in_order_by_dice_and_by_uncertainty():
    order = order_of(cases(), "all")
    ranked = {one["name"]: [order["patients"][place] for place in one["ranks"]] for one in order["orders"]}
    assert ranked["Dice, mean of the regions"] == ["bad", "missed", "absent", "good"]
    assert ranked["Dice, ET"] == ["missed", "bad", "good", "absent"]
    assert ranked["entropy, mean of the regions"] == ["bad", "none", "absent", "missed", "good"]
    assert ranked["entropy, TC"] == ["bad", "absent", "missed", "good"]


def test_equal_patients_are_in_order_by_id():
    people = [person("b"), person("a")]
    rows = pd.DataFrame([*rows_of("b", 0.5, 0.5), *rows_of("a", 0.5, 0.5)])
    order = order_of(cases_of_patients(people, rows, {}), "all")
    assert all([order["patients"][place] for place in one["ranks"]] == ["a", "b"] for one in order["orders"])


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        ("all", ["good", "bad", "missed", "absent", "none"]),
        ("none", []),
        ({"worst": 2}, ["bad", "missed"]),
        ({"worst": 5}, ["bad", "missed", "absent", "good", "none"]),
        ({"worst": 99}, ["bad", "missed", "absent", "good", "none"]),
    ],
)
def test_the_worst_have_pages(pages, expected):
    assert with_page(order_of(cases(), pages)) == expected


def test_without_any_reference_the_most_uncertain_are_the_worst():
    people = [person("a"), person("b"), person("c")]
    scores = {"a": scores_of(0.1), "b": scores_of(0.9), "c": scores_of(0.5)}
    order = order_of(cases_of_patients(people, None, scores), {"worst": 2})
    assert with_page(order) == ["b", "c"]
    assert not any(one["name"].startswith("Dice") for one in order["orders"])


def test_the_order_is_read_as_it_was_written(tmp_path):
    order = order_of(cases(), {"worst": 1})
    write_order(tmp_path / "order.js", order)
    assert read_order(tmp_path / "order.js") == order


def test_columns_of_a_sheet_are_numbers_where_every_value_is_one():
    people = [person("a", age="61", grade="IV", empty=""), person("b", age="", grade="3", empty="")]
    rows = pd.DataFrame([*rows_of("a", 0.5, 0.5), *rows_of("b", 0.6, 0.4)])
    columns, table = table_of(cases_of_patients(people, rows, {}))
    kinds = {column["name"]: column["kind"] for column in columns if column["further"]}
    assert kinds == {"age": "number", "grade": "text", "empty": "text"}
    assert [row[-3] for row in table] == ["61", ""]


def test_columns_that_nobody_has_are_left_out():
    columns, _ = table_of(cases_of_patients([person("a")], None, {"a": scores_of(0.1)}))
    assert {column["group"] for column in columns} == {"", "Entropy, bits", "Predicted, ml"}


def test_subjects_are_a_column_where_they_are_not_the_patients():
    rows = pd.DataFrame([*rows_of("a1", 0.5, 0.5), *rows_of("a2", 0.6, 0.4)])
    columns, table = table_of(cases_of_patients([person("a1", "a"), person("a2", "a")], rows, {}))
    assert columns[-1]["name"] == "subject"
    assert [row[-1] for row in table] == ["a", "a"]


# --- in a browser ---


def ids(shown):
    return shown.locator("#list tbody th").all_inner_texts()


def heading(group, name):
    return f"#list thead button[title='{f'{group}: {name}' if group else name}']"


def filter_of(group, name):
    return f"#list thead input[aria-label='filter {group} {name}']"


@pytest.fixture
def shown(chromium, tmp_path):
    with opened(chromium, written(tmp_path, cases())) as (page, seen):
        page.seen = seen
        yield page


def test_the_list_opens_with_the_most_uncertain_first(shown):
    assert ids(shown) == ["bad", "none", "absent", "missed", "good"]
    assert shown.locator("[aria-sort=descending]").count() == 1
    assert shown.seen.complaints == []
    assert shown.seen.network == []


def test_a_heading_sorts_and_says_so(shown):
    shown.click(heading("Dice", "mean"))
    assert ids(shown) == ["bad", "missed", "absent", "good", "none"]
    assert shown.get_attribute("#list th:has(button:focus)", "aria-sort") == "ascending"
    shown.click(heading("Dice", "mean"))
    # whoever has no Dice stays last
    assert ids(shown) == ["good", "absent", "missed", "bad", "none"]
    assert shown.get_attribute("#list th:has(button:focus)", "aria-sort") == "descending"
    assert shown.locator("[aria-sort]").count() == 1


def test_a_heading_sorts_by_keyboard(shown):
    shown.focus(heading("", "Patient"))
    shown.keyboard.press("Enter")
    assert ids(shown) == ["absent", "bad", "good", "missed", "none"]
    shown.keyboard.press("Enter")
    assert ids(shown) == ["none", "missed", "good", "bad", "absent"]


@pytest.mark.parametrize(
    ("field", "typed", "expected"),
    [
        (("Dice", "mean"), "< 0.7", ["bad", "missed"]),
        (("Dice", "mean"), ">=0.9", ["good"]),
        (("Dice", "mean"), "0.5-0.85", ["missed"]),
        (("Dice", "mean"), "<", ["bad", "none", "absent", "missed", "good"]),
        (("", "Notes"), "missed", ["missed"]),
        (("", "Notes"), "TC NOT", ["none"]),
        (("Patient sheet", "site"), "<script", ["bad"]),
        (("", "Patient"), "nobody", []),
    ],
)
def test_a_field_filters(shown, field, typed, expected):
    shown.fill(filter_of(*field), typed)
    # absent in one region: (0.8 + 0.8 + 1) / 3
    assert ids(shown) == expected
    if len(expected) < 5:
        assert shown.inner_text("#count") == f"{len(expected)} of 5 patients"


def test_filters_work_together_and_are_reset(shown):
    shown.check("#noted")
    assert ids(shown) == ["none", "absent", "missed"]
    shown.fill("#anywhere", "et ")
    assert ids(shown) == ["absent", "missed"]
    shown.click("#start-again")
    assert len(ids(shown)) == 5
    assert shown.input_value("#anywhere") == ""


def test_text_of_the_sheet_is_shown_as_text(shown):
    assert shown.locator("#list tbody td", has_text=MARKUP).count() == 1
    assert shown.seen.complaints == []


def test_names_open_pages_where_there_are_any(chromium, tmp_path):
    with opened(chromium, written(tmp_path, cases(), {"worst": 1})) as (shown, _):
        links = shown.locator("#list tbody a")
        assert links.count() == 1
        assert links.get_attribute("href") == "../patients/m/bad.html"
        assert "1 patient has a page" in shown.inner_text(".lede")


def test_markup_in_an_id_runs_nothing(chromium, tmp_path):
    held = cases_of_patients([person(MARKUP)], pd.DataFrame(rows_of(MARKUP, 0.5, 0.5)), {})
    with opened(chromium, written(tmp_path, held)) as (shown, seen):
        assert ids(shown) == [MARKUP]
        assert seen.complaints == []


def test_a_single_patient_is_listed(chromium, tmp_path):
    held = cases_of_patients([person("only")], pd.DataFrame(rows_of("only", 0.5, 0.5)), {})
    with opened(chromium, written(tmp_path, held)) as (shown, seen):
        assert ids(shown) == ["only"]
        assert "1 test patient under m" in shown.inner_text(".lede")
        assert seen.complaints == []


@pytest.mark.parametrize("size", [PHONE, (1280, 900)])
def test_1251_patients_and_40_columns_are_drawn_some_at_a_time(chromium, tmp_path, size):
    with opened(chromium, written(tmp_path, many(1251, 40)), size) as (shown, seen):
        assert len(ids(shown)) == 200
        assert shown.locator(filter_of("Patient sheet", "column_7")).count() == 0
        shown.check("#further")
        shown.fill(filter_of("Patient sheet", "column_7"), "> 0")
        n_found = int(shown.inner_text("#count").split()[0])
        assert 500 < n_found < 750
        shown.click("#more")
        assert len(ids(shown)) == n_found
        # wide tables scroll within the page
        assert shown.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert seen.complaints == []
