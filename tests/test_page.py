"""The page of a patient: what travels in it, and what a reader sees and does in a browser."""

import base64
import gzip
import json
import re
from io import BytesIO

import numpy as np
import pytest
import yaml
from browser import PHONE, complaints_of, opened
from drawn_pages import SHAPE, drawn, renamed
from PIL import Image
from small_studies import GIVEN, ONCE, changed, draw_study, planned, snakemake

from segtrust import page
from segtrust.measures import binary_entropy
from segtrust.order import read_order, write_order
from segtrust.regions import REGIONS, region_masks

MARKUP = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def patient():
    return drawn(site=MARKUP, age="61")


@pytest.fixture(scope="module")
def text(patient):
    return patient.page()


def part(text, name):
    """Return what a data block of a page holds."""
    return re.search(rf'<script type="[a-z/]+" id="{name}">(.*?)</script>', text, flags=re.DOTALL)[1]


def about(text):
    return json.loads(part(text, "about"))


def volume(text, name):
    """Return a volume of a page, uint8 (x, y, z)."""
    packed = gzip.decompress(base64.b64decode(part(text, name)))
    return np.frombuffer(packed, np.uint8).reshape(about(text)["shape"], order="F")


def in_box(patient, array):
    """Return an array on the patient's own grid as the page sees it: canonical, in the brain box."""
    return patient.scan.geometry.to_canonical(array)[(..., *patient.scan.box)]


# --- what travels in a page ---


def test_a_byte_tells_a_probability_and_its_entropy():
    probability = np.linspace(0, 1, 100_001)
    again = np.sin(np.pi * page.angles(probability) / 510) ** 2
    assert np.abs(again - probability).max() < 0.0031
    assert np.abs(binary_entropy(again) - binary_entropy(probability)).max() < 0.006


def test_bits_are_the_predicted_and_the_true_regions_in_canonical_orientation(patient, text):
    bits = volume(text, "bits")
    predicted = in_box(patient, patient.summary.probability >= 0.5)
    reference = region_masks(in_box(patient, patient.labels))
    for place in range(3):
        assert np.array_equal(bits >> place & 1, predicted[place])
        assert np.array_equal(bits >> (3 + place) & 1, reference[place])
    assert predicted.any()
    assert (predicted != reference).any()


def test_probabilities_are_those_of_the_map(patient, text):
    probability = in_box(patient, patient.summary.probability)
    for place, region in enumerate(REGIONS):
        assert np.array_equal(volume(text, f"probability-{region}"), page.angles(probability[place]))


def test_a_picture_has_a_tile_per_axial_slice(patient, text):
    nx, ny, nz = about(text)["shape"]
    columns = about(text)["columns"]
    tiles = np.asarray(Image.open(BytesIO(base64.b64decode(part(text, "scan-t2")))).convert("L")).astype(int)
    levels = page.grey(patient.scan.image[2], patient.scan.nonzero >> 2 & 1 > 0).astype(int)
    assert tiles.shape == (-(-nz // columns) * ny, columns * nx)
    seen = np.stack([tiles[k // columns * ny :, k % columns * nx :][:ny, :nx].T for k in range(nz)], axis=-1)
    # noise is what a picture keeps worst; a wrong order would leave no likeness
    assert np.corrcoef(seen.ravel(), levels.ravel())[0, 1] > 0.9


def test_grey_levels_are_black_outside_the_brain_alone():
    values = np.array([[[-3.0, 0.0, 2.0, 9.0]]])
    levels = page.grey(values, np.array([[[True, False, True, True]]]))
    assert levels[0, 0, 1] == 0
    assert levels[0, 0, 0] == 1
    assert levels[0, 0, 3] == 255
    assert not page.grey(values, np.zeros(values.shape, bool)).any()


def test_views_begin_where_most_voxels_are_wrong(patient, text):
    wrong = in_box(patient, patient.summary.probability >= 0.5) != region_masks(in_box(patient, patient.labels))
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        sums = wrong.sum(axis=0).sum(axis=others)
        assert sums[about(text)["start"][axis]] == sums.max()
        sums = wrong[2].sum(axis=others)
        assert sums[about(text)["starts"]["ET"][axis]] == sums.max()


def test_without_a_reference_views_begin_where_most_entropy_is():
    patient = drawn(reference=False)
    entropy = binary_entropy(in_box(patient, patient.summary.probability)).sum(axis=0)
    assert about(patient.page())["start"][2] == entropy.sum(axis=(0, 1)).argmax()


def test_an_empty_volume_begins_in_the_middle():
    assert page.fullest(np.zeros((5, 8, 3), bool)) == (2, 4, 1)


def test_coarse_probabilities_are_means_over_cubes_cut_off_at_the_far_side():
    fine = np.random.default_rng(0).random((5, 4, 3)).astype(np.float32)
    small = page.coarse(fine, 2)
    assert small.shape == (3, 2, 2)
    assert small[0, 0, 0] == pytest.approx(fine[:2, :2, :2].mean())
    assert small[2, 1, 1] == pytest.approx(fine[4:, 2:, 2:].mean())
    assert page.coarse(fine, 1) is fine


def test_a_scan_that_browsers_could_not_draw_is_thinned():
    assert page.thinning((240, 240, 155)) == 1
    assert page.thinning((512, 512, 300)) == 2


@pytest.mark.slow
def test_noise_all_over_a_brain_of_full_size_fits_into_4_mb():
    generator = np.random.default_rng(0)
    shape = (140, 175, 140)
    grey = generator.integers(1, 256, shape, np.uint8)
    noisy = generator.random((3, *shape), np.float32)
    bits = (noisy >= 0.5).astype(np.uint8)[0]
    scans = {name: np.sort(grey, axis=2) for name in page.MODALITIES}
    volumes = page.Volumes(scans, noisy, bits, (1, 1, 1), np.eye(4), (0, 0, 0), {}, 0)
    _, parts, step = volumes.coded()
    assert step > 1
    assert sum(map(len, parts.values())) <= page.LONGEST_VOLUMES < 4_000_000


def test_the_same_patient_gives_the_same_bytes(patient, text):
    assert patient.page() == text


# --- what it says ---


def test_every_number_is_that_of_the_score(patient, text):
    for name, digits in (("dice", 3), ("hd95", 1), ("auroc", 3), ("gap", 3)):
        row = re.search(rf'<tr data-quantity="{name}">(.*?)</tr>', text, flags=re.DOTALL)[1]
        shown = [cell.replace("−", "-") for cell in re.findall(r'<td class="n">(.*?)</td>', row)]
        assert [float(cell) for cell in shown] == [
            round(patient.numbers[region][name] + 0.0, digits) for region in REGIONS
        ]


def test_without_a_reference_the_page_says_so_and_shows_no_agreement():
    text = drawn(reference=False).page()
    assert "This patient has no reference" in text
    assert 'data-quantity="score_predicted_5mm_mean_entropy"' in text
    for name in ("dice", "auroc", "gap", "reference_ml"):
        assert f'data-quantity="{name}"' not in text
    assert 'value="errors"' not in text


def test_a_missed_region_is_told_at_the_top():
    assert re.search(r'class="error"><p>ET: missed\. The reference has 0\.027 ml', drawn(without=[2]).page())


def test_a_region_that_is_nowhere_is_told_and_the_page_made():
    assert "ET: absent in prediction and reference" in drawn(without=[2], empty=[3]).page()


def test_a_patient_without_any_prediction_has_a_page():
    text = drawn(without=[0, 1, 2]).page()
    assert text.count("missed. The reference has") == 3


def test_text_of_the_sheet_and_of_ids_is_shown_as_text(patient, text):
    assert MARKUP not in text
    assert "&lt;script&gt;alert(1)" in text
    assert MARKUP not in renamed(patient, MARKUP).page()


def test_forty_columns_of_a_sheet_are_listed():
    text = drawn(**{f"column_{number}": f"value {number}" for number in range(40)}).page()
    assert all(f"<dd>value {number}</dd>" in text for number in range(40))


def test_a_page_names_no_network_address(text):
    assert not re.findall(r"https?://[^\s\"'<]+", text)


# --- in a browser ---


def at_cross(shown, region):
    return shown.locator(f"#at-{region} td").all_inner_texts()


def cross(shown):
    """Return the voxel of the cross, (x, y, z), as the sliders say."""
    return tuple(int(shown.input_value(f"#slice-{plane}")) for plane in ("sagittal", "coronal", "axial"))


def picture_of(shown, plane):
    """Return what is drawn of a plane, as text that is equal for equal pictures."""
    return shown.evaluate(f"document.querySelector('canvas[data-plane={plane}]').toDataURL()")


def brightest(shown, plane):
    """Return the place of the brightest part of a plane's picture, (from left, from top) as shares."""
    return shown.evaluate(
        f"""() => {{
          const canvas = document.querySelector('canvas[data-plane={plane}]'), w = canvas.width, h = canvas.height;
          const bytes = canvas.getContext('2d').getImageData(0, 0, w, h).data;
          let sx = 0, sy = 0, n = 0;
          for (let i = 0; i < w * h; i++) if (bytes[4 * i] > 200) {{ sx += i % w; sy += Math.floor(i / w); n++; }}
          return [sx / n / w, sy / n / h];
        }}"""
    )


@pytest.fixture
def shown(chromium, patient, tmp_path):
    """The patient's page as it opens, with its order, and what it did."""
    order = {"name": "Dice, WT", "first": "lowest", "ranks": [1, 0, 2]}
    other = {"name": "entropy, WT", "first": "most uncertain", "ranks": [2, 1]}
    content = {"patients": ["p0", "p1", "p2"], "orders": [order, other], "pages": None}
    write_order(tmp_path / "order.js", content)
    with opened(chromium, patient.written(tmp_path)) as (page_, seen):
        page_.seen = seen
        yield page_


def test_a_page_opens_without_complaint_and_without_network(shown):
    assert shown.seen.complaints == []
    assert shown.seen.network == []
    assert shown.locator("canvas").count() == 3
    assert shown.is_hidden("#waiting") or shown.locator("#waiting").count() == 0


def test_the_cross_tells_what_the_map_says_there(shown, patient, text):
    start = tuple(about(text)["start"])
    assert cross(shown) == start
    probability = in_box(patient, patient.summary.probability)[(slice(None), *start)]
    labels = region_masks(in_box(patient, patient.labels))[(slice(None), *start)]
    for place, region in enumerate(REGIONS):
        told = at_cross(shown, region)
        assert float(told[0]) == pytest.approx(probability[place], abs=0.009)
        assert float(told[1]) == pytest.approx(binary_entropy(probability[place]), abs=0.011)
        predicted = probability[place] >= 0.5
        assert told[2:4] == ["in" if predicted else "out", "in" if labels[place] else "out"]
        assert told[4] == ("right" if predicted == labels[place] else "missed" if labels[place] else "false alarm")


def test_a_click_moves_the_cross_to_that_voxel(shown, text):
    nx, ny, _ = about(text)["shape"]
    before, canvas = picture_of(shown, "sagittal"), shown.locator("canvas[data-plane=axial]")
    box = canvas.bounding_box()
    # the third voxel from the right of the picture, the second from its top: x = 2, y = ny - 2
    canvas.click(position={"x": box["width"] * (nx - 2.5) / nx, "y": box["height"] * 1.5 / ny})
    shown.wait_for_function("document.getElementById('slice-sagittal').value === '2'")
    assert cross(shown)[:2] == (2, ny - 2)
    assert picture_of(shown, "sagittal") != before


@pytest.mark.parametrize(
    ("key", "step"),
    [("ArrowRight", (-1, 0, 0)), ("ArrowUp", (0, 1, 0)), ("PageUp", (0, 0, 1)), ("Shift+ArrowLeft", (10, 0, 0))],
)
def test_keys_move_the_cross(shown, text, key, step):
    start, shape = about(text)["start"], about(text)["shape"]
    shown.focus("canvas[data-plane=axial]")
    shown.keyboard.press(key)
    expected = tuple(min(max(a + b, 0), size - 1) for a, b, size in zip(start, step, shape, strict=True))
    shown.wait_for_function(f"document.getElementById('slice-axial').value === '{expected[2]}'")
    shown.wait_for_function(f"document.getElementById('slice-sagittal').value === '{expected[0]}'")
    assert cross(shown) == expected


def test_a_slider_changes_the_slice(shown):
    before = picture_of(shown, "axial")
    shown.fill("#slice-axial", "0")
    shown.wait_for_function("document.getElementById('slice-axial-said').textContent.startsWith('1 of')")
    assert picture_of(shown, "axial") != before
    assert shown.get_attribute("canvas[data-plane=axial]", "aria-label").endswith(f"slice 1 of {SHAPE[2] - 5}")


@pytest.mark.parametrize(
    ("control", "value"),
    [("overlay", "probability"), ("overlay", "errors"), ("overlay", "segmentation"), ("overlay", "reference"),
     ("overlay", "none"), ("modality", "flair")],
)  # fmt: skip
def test_what_is_chosen_is_drawn(shown, control, value):
    before = picture_of(shown, "axial")
    shown.select_option(f"#{control}", value)
    shown.wait_for_function(
        "before => document.querySelector('canvas[data-plane=axial]').toDataURL() !== before", arg=before
    )
    assert shown.seen.complaints == []


def test_side_by_side_shows_five_pictures_of_each_plane(shown):
    shown.click("text=side by side")
    assert shown.locator("canvas").count() == 15
    kinds = shown.evaluate("[...document.querySelectorAll('canvas[data-plane=axial]')].map((one) => one.dataset.kind)")
    assert kinds == ["scan", "segmentation", "reference", "probability", "entropy"]
    shown.select_option("#planes", "coronal")
    assert shown.locator("canvas").count() == 5
    assert shown.seen.complaints == []


def test_a_region_is_chosen_by_keyboard_alone(shown):
    before = picture_of(shown, "axial")
    shown.focus("input[name=region]")
    shown.keyboard.press("ArrowRight")
    assert shown.is_checked("input[name=region][value=TC]")
    assert picture_of(shown, "axial") != before
    assert "TC" in shown.locator("canvas[data-plane=axial]").get_attribute("aria-label")


def test_neighbours_are_those_by_rank(shown):
    assert shown.inner_text("#rank") == "2 of 3, lowest first"
    assert shown.get_attribute("#previous", "href") == "p1.html#0"
    assert shown.get_attribute("#next", "href") == "p2.html#0"
    shown.select_option("#order", label="entropy, WT")
    assert "no rank" in shown.inner_text("#rank")
    assert shown.get_attribute("#next", "href") is None


def test_neighbours_without_a_page_are_passed_over(chromium, patient, tmp_path):
    order = {"name": "Dice, WT", "first": "lowest", "ranks": [0, 1, 2]}
    write_order(tmp_path / "order.js", {"patients": ["p0", "p1", "p2"], "orders": [order], "pages": [0, 2]})
    with opened(chromium, patient.written(tmp_path)) as (shown, _):
        assert shown.get_attribute("#next", "href") == "p2.html#0"


def test_a_page_without_its_order_shows_no_neighbours(chromium, patient, tmp_path):
    with opened(chromium, patient.written(tmp_path)) as (shown, _):
        assert shown.is_hidden("#neighbours")
        assert shown.locator("canvas").count() == 3


def test_the_patients_right_front_and_top_are_where_the_letters_say(chromium, patient, tmp_path):
    image = np.zeros_like(patient.scan.image)
    image[1, 9:, 10:, 8:] = 1  # right, anterior, superior
    marked = drawn()
    object.__setattr__(marked.scan, "image", image)
    object.__setattr__(marked.scan, "nonzero", np.full(image.shape[1:], 15, np.uint8))
    write_order(tmp_path / "order.js", {"patients": [], "orders": [], "pages": None})
    with opened(chromium, marked.written(tmp_path)) as (shown, _):
        shown.select_option("#overlay", "none")
        shown.uncheck("#outline-predicted")
        shown.uncheck("#outline-reference")
        for plane, bounds in (("axial", (0.5, 0.5)), ("coronal", (0.5, 0.5)), ("sagittal", (0.5, 0.5))):
            shown.fill("#slice-axial", "12")
            shown.fill("#slice-coronal", "15")
            shown.fill("#slice-sagittal", "13")
            shown.wait_for_function("document.getElementById('slice-sagittal-said').textContent.startsWith('14')")
            left, top = brightest(shown, plane)
            assert left < bounds[0], plane  # right of the patient, or front in the sagittal plane
            assert top < bounds[1], plane


@pytest.mark.parametrize("case", [{"reference": False}, {"without": [0, 1, 2]}, {"without": [2], "empty": [3]}])
def test_pages_of_odd_patients_open_without_complaint(chromium, tmp_path, case):
    write_order(tmp_path / "order.js", {"patients": ["p0"], "orders": [], "pages": None})
    with opened(chromium, drawn(**case).written(tmp_path)) as (shown, seen):
        shown.click("text=side by side")
        for region in REGIONS:
            shown.check(f"input[name=region][value={region}]", force=True)
            shown.click("#to-region")
        assert seen.complaints == []
        assert shown.locator("canvas").count() == (12 if case.get("reference") is False else 15)


@pytest.mark.parametrize("size", [PHONE, (1280, 900)])
def test_nothing_is_wider_than_the_screen(chromium, tmp_path, size):
    patient = drawn(patient="A." + 98 * "x")
    write_order(tmp_path / "order.js", {"patients": [], "orders": [], "pages": None})
    with opened(chromium, patient.written(tmp_path), size) as (shown, _):
        assert shown.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_markup_in_an_id_runs_nothing(chromium, patient, tmp_path):
    named = renamed(patient, MARKUP)
    path = tmp_path / "named.html"
    path.write_text(named.page(), encoding="utf-8")
    write_order(tmp_path / "order.js", {"patients": [MARKUP], "orders": [], "pages": None})
    with opened(chromium, path) as (shown, seen):
        assert shown.inner_text("h1") == MARKUP
        assert seen.complaints == []


# --- in a study ---


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study of two models and four patients, one of whom has no reference and one is not of split test."""
    folder = tmp_path_factory.mktemp("pages")
    draw_study(folder, {"given": GIVEN, "once": ONCE}, ["calibration", "test", "test", "test"], without_reference=[3])
    snakemake(folder)
    return folder


def pages_of(study, model):
    return sorted(path.name for path in (study / f"results/report/patients/{model}").glob("*.html"))


@pytest.mark.slow
def test_every_test_patient_has_a_page_and_nothing_is_left_to_do(study):
    for model in ("given", "once"):
        assert pages_of(study, model) == ["p1.html", "p2.html", "p3.html"]
    assert planned(study) == {}


@pytest.mark.slow
def test_every_page_of_a_study_opens_and_its_links_resolve(study, chromium):
    report = study / "results/report"
    assert complaints_of(chromium, report) == []
    assert 'href="triage/given.html"' in (report / "index.html").read_text()


@pytest.mark.slow
def test_the_other_modality_redoes_pages_and_report(study):
    jobs = planned(study, *changed(study, report={"background": "flair"}))
    assert jobs == {"page": 6, "report": 1, "all": 1}


@pytest.mark.slow
def test_a_title_redoes_no_page(study):
    assert set(planned(study, *changed(study, report={"title": "other"}))) == {"report", "all"}


@pytest.mark.slow
def test_a_map_that_pages_show_must_be_written(study):
    output = snakemake(study, "-n", *changed(study, maps={"write": ["entropy"]}), expect=1)
    assert "report.pages shows the map `probability`" in output
    assert "page" not in planned(study, *changed(study, maps={"write": ["entropy"]}, report={"pages": "none"}))


@pytest.mark.slow
def test_a_new_patient_makes_its_own_page_alone(tmp_path):
    draw_study(tmp_path, {"given": GIVEN}, ["test", "test", "test"])
    sheet = tmp_path / "patients.tsv"
    rows = sheet.read_text()
    sheet.write_text("\n".join(rows.splitlines()[:-1]) + "\n")
    snakemake(tmp_path)
    before = {
        name: (tmp_path / f"results/report/patients/given/{name}").read_bytes() for name in ("p0.html", "p1.html")
    }
    sheet.write_text(rows)
    assert planned(tmp_path)["page"] == 1
    snakemake(tmp_path)
    for name, content in before.items():
        assert (tmp_path / f"results/report/patients/given/{name}").read_bytes() == content
    assert planned(tmp_path) == {}


@pytest.mark.slow
def test_the_worst_patients_alone_have_pages_after_one_command(tmp_path):
    draw_study(tmp_path, {"given": GIVEN}, ["test"] * 4, report={"pages": {"worst": 2}})
    snakemake(tmp_path)
    order = read_order(tmp_path / "results/report/patients/given/order.js")
    worst = [order["patients"][place] for place in order["orders"][0]["ranks"][:2]]
    assert pages_of(tmp_path, "given") == sorted(f"{patient}.html" for patient in worst)
    assert planned(tmp_path) == {}
    listed = (tmp_path / "results/report/triage/given.html").read_text()
    assert json.loads(part(listed, "content"))["pages"].count(True) == 2
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "report": {"pages": "none"}}))
    assert "page" not in planned(tmp_path)
