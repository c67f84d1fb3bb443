"""The report as a reader sees it: in a browser, wide and narrow, light and dark, and on paper."""

import re

import pytest
from browser import DESKTOP, PHONE, alive, every_chart_alive, opened, unresolved
from drawn_cohorts import SETTINGS, draw_cohort, person

from segtrust import report
from segtrust.order import write_order

EVIL = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\">"
MODELS = ("SegResNet", "UNet")


def with_pages(results, models, sheet):
    """Write a page of every patient and their order, so that points and tables lead there."""
    for model in models:
        folder = results / "report" / "patients" / model
        folder.mkdir(parents=True)
        write_order(folder / "order.js", {"patients": [one.patient for one in sheet], "orders": [], "pages": None})
        for one in sheet:
            (folder / f"{one.patient}.html").write_text(f"<title>{one.patient}</title><body data-ready>")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of a report of two models; nobody has ET in the second; ids and messages are markup."""
    alarms = [
        {"alarm": "odd", "severity": "error", "model": EVIL, "region": None, "message": EVIL},
        {"alarm": "region_empty", "severity": "note", "model": "UNet", "region": "ET", "message": "ET is small."},
    ]
    results, sheet, _ = draw_cohort(
        tmp_path_factory.mktemp("report"), models=MODELS, alarms=alarms, missing={"UNet": ("ET",)}
    )
    with_pages(results, MODELS, sheet)
    sheet += [person(EVIL, None)]
    report.report(list(MODELS), results, results / "report", SETTINGS, sheet, {"x" * 200: EVIL})
    return results / "report" / "index.html"


@pytest.fixture
def shown(chromium, path):
    with opened(chromium, path) as (page, seen):
        yield page, seen


def test_every_chart_comes_alive_without_complaint_and_without_network(shown):
    page, seen = shown
    every_chart_alive(page)
    assert page.locator("[data-live] .live svg").count() == page.locator("[data-chart]").count() == 60
    assert seen.complaints == []
    assert seen.network == []


def test_every_link_and_image_resolves(shown, path):
    assert unresolved(shown[0], path) == []
    broken = shown[0].evaluate("() => [...document.images].filter((one) => one.complete && !one.naturalWidth).length")
    assert broken == 0


def test_links_within_the_page_lead_somewhere(shown):
    lost = shown[0].evaluate(
        "() => [...document.querySelectorAll('a[href^=\"#\"]')].map((one) => one.getAttribute('href').slice(1))"
        ".filter((id) => !document.getElementById(id))"
    )
    assert lost == []


def test_the_first_screen_says_which_model_to_trust(shown):
    page, _ = shown
    assert page.locator("#alarms").bounding_box()["y"] < page.locator("#verdict").bounding_box()["y"]
    cards = page.locator(".verdict")
    assert cards.count() == 3
    for place in range(3):
        box = cards.nth(place).bounding_box()
        assert box["y"] + box["height"] < DESKTOP[1]
    enhancing = cards.nth(2).inner_text()
    assert "Do not read as probabilities: SegResNet (too high by 0.31 [0.30–0.32])." in enhancing
    assert "Cannot be told: UNet." in enhancing


def test_a_sentence_leads_to_the_figure_that_shows_it(shown):
    page, _ = shown
    row = page.locator('tr[data-model="SegResNet"][data-region="ET"] + tr.words')
    row.locator("li", has_text="do not read ET probabilities").locator("a.see").click()
    figure = page.locator("#SegResNet-reliability_top_label")
    page.wait_for_function("(one) => Math.abs(one.getBoundingClientRect().top) < 60", arg=figure.element_handle())


def test_another_mask_is_drawn_in_every_region_of_its_figure_alone(shown):
    page, _ = shown
    drawn = {name: alive(page, f"SegResNet_{name}_WT") for name in ("roc", "precision_recall")}
    before = {name: plot.locator("svg").inner_html() for name, plot in drawn.items()}
    page.locator("#SegResNet-roc select").select_option("predicted_5mm")
    page.wait_for_function(
        "([one, old]) => one.innerHTML !== old",
        arg=[drawn["roc"].locator("svg").element_handle(), before["roc"]],
    )
    assert drawn["precision_recall"].locator("svg").inner_html() == before["precision_recall"]


def test_a_mask_that_a_region_lacks_is_said(shown):
    page, _ = shown
    plot = alive(page, "UNet_reliability_top_label_WT")
    plot.evaluate("(one) => { one.dataset.masks = 'predicted_5mm brain'; }")
    select = page.locator("#UNet-reliability_top_label select")
    select.select_option("union")
    assert not plot.locator(".live svg").is_visible()
    assert "no voxels in union" in plot.locator(".live").get_attribute("aria-label")
    select.select_option("predicted_5mm")
    assert plot.locator(".live svg").is_visible()
    assert "mask predicted_5mm" in plot.locator(".live").get_attribute("aria-label")


def test_a_point_tells_its_patient_and_opens_its_page(shown):
    page, _ = shown
    point = alive(page, "SegResNet_scatter_WT").locator(".mark-symbol a path, .mark-symbol path").first
    point.hover(force=True)
    tooltip = page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    patient = re.search(r"BraTS2021_\d+", tooltip.inner_text())[0]
    point.click(force=True)
    page.wait_for_url(f"**/patients/SegResNet/{patient}.html")
    assert page.title() == patient


def test_notes_are_folded_and_open_by_keyboard(shown):
    page, _ = shown
    note = page.get_by_text("ET is small.")
    assert not note.is_visible()
    page.locator("#alarms summary").press("Enter")
    assert note.is_visible()


def test_markup_in_ids_messages_and_reasons_runs_nothing(shown):
    page, seen = shown
    assert page.title() != "ran"
    assert page.get_by_text(EVIL).count() >= 3
    assert page.locator("img[src=x]").count() == 0
    assert seen.complaints == []


@pytest.mark.parametrize("size", [DESKTOP, PHONE, (320, 600)])
def test_nothing_is_wider_than_the_screen(chromium, path, size):
    with opened(chromium, path, size) as (page, _):
        alive(page, "SegResNet_roc_WT")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= size[0]


def test_on_dark_pages_charts_have_light_ink(chromium, path):
    colours = {}
    for scheme in ("light", "dark"):
        with opened(chromium, path, color_scheme=scheme) as (page, _):
            text = alive(page, "SegResNet_roc_WT").locator(".role-axis-label text").first
            colours[scheme] = text.evaluate("(one) => getComputedStyle(one).fill")
    assert colours == {"light": "rgb(27, 31, 36)", "dark": "rgb(232, 234, 237)"}


def test_paper_has_every_chart_as_a_picture_in_light_colours(chromium, path):
    with opened(chromium, path, color_scheme="dark") as (page, _):
        alive(page, "SegResNet_roc_WT")
        page.emulate_media(media="print", color_scheme="dark")
        assert not page.locator('[data-chart="SegResNet_roc_WT"] .live').is_visible()
        picture = page.locator('[data-chart="SegResNet_roc_WT"] img')
        assert picture.is_visible()
        assert picture.evaluate("(one) => one.currentSrc").endswith("SegResNet_roc_WT.svg")
        pdf = page.pdf()
    assert 5 < len(re.findall(rb"/Type\s*/Page\b", pdf)) < 60


def test_without_scripts_the_page_shows_pictures_of_its_charts(chromium, path):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.resolve().as_uri())
    assert page.locator('[data-chart="SegResNet_roc_WT"] img').is_visible()
    context.close()


@pytest.mark.parametrize("case", ["one patient", "no reference", "long ids"])
def test_odd_cohorts_open_without_complaint(chromium, tmp_path, case):
    options = {"n_patients": 1} if case == "one patient" else {"n_patients": 4, "references": case != "no reference"}
    results, sheet, _ = draw_cohort(tmp_path, **options)
    if case == "long ids":
        sheet += [person("x" * 180, None)]
    report.report(["SegResNet"], results, results / "report", SETTINGS, sheet)
    path = results / "report" / "index.html"
    for size in (DESKTOP, PHONE):
        with opened(chromium, path, size) as (page, seen):
            every_chart_alive(page)
            assert seen.complaints == []
            assert unresolved(page, path) == []
            assert page.evaluate("() => document.documentElement.scrollWidth") <= size[0]


def test_a_cohort_of_1251_patients_is_painted_soon_and_can_be_pointed_at(chromium, tmp_path):
    results, sheet, _ = draw_cohort(tmp_path, n_patients=1251)
    report.report(["SegResNet"], results, results / "report", SETTINGS, sheet)
    with opened(chromium, results / "report" / "index.html") as (page, seen):
        assert len(page.content()) < 1_000_000
        points = alive(page, "SegResNet_strata_WT").locator(".mark-symbol path")
        assert points.count() == 1251
        assert seen.complaints == []
