"""A headless Chromium that opens pages from disk, as a reader does."""

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# no sandbox: tests may run as root; no /dev/shm: containers have a small one
OPTIONS = ["--no-sandbox", "--disable-dev-shm-usage"]
DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def started():
    """Start a Chromium; skips, or with SEGTRUST_REQUIRE=1 fails, where there is none."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"no Chromium: none of {', '.join(NAMES)} is on PATH; on Debian: apt-get install chromium"
        if os.environ.get("SEGTRUST_REQUIRE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield chromium
        chromium.close()


@dataclass
class Seen:
    """What a page did besides being shown.

    complaints : errors and warnings of its console, and errors that nothing caught; asked : addresses it asked for
    """

    complaints: list = field(default_factory=list)
    asked: list = field(default_factory=list)

    @property
    def network(self):
        """Return the addresses that are not on disk or in the page itself."""
        return [address for address in self.asked if not address.startswith(("file:", "data:", "blob:"))]


@contextmanager
def opened(chromium, path, size=DESKTOP, **options):
    """Yield (page, Seen) of an HTML file once its program says that it is ready.

    options : of a context of the browser, such as color_scheme="dark"
    """
    context = chromium.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), **options)
    page, seen = context.new_page(), Seen()
    page.on("console", lambda said: said.type in ("error", "warning") and seen.complaints.append(said.text))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.asked.append(request.url))
    page.goto(path.resolve().as_uri())
    page.wait_for_selector("body[data-ready]", state="attached")
    try:
        yield page, seen
    finally:
        context.close()


def unresolved(page, path):
    """Return the links and images of an opened page that lead to no file; path : Path of the page."""
    found = page.evaluate(
        "() => [...document.querySelectorAll('a[href], img[src], link[href], script[src]')]"
        ".map((one) => one.getAttribute('href') ?? one.getAttribute('src'))"
    )
    files = {link.split("#")[0] for link in found if not link.startswith(("data:", "blob:"))}
    return sorted(link for link in files if link and not (path.parent / link).exists())


def alive(page, chart):
    """Scroll to a chart of the report, wait until it can be pointed at, and return it."""
    plot = page.locator(f'[data-chart="{chart}"]')
    plot.scroll_into_view_if_needed()
    page.wait_for_selector(f'[data-chart="{chart}"][data-live]')
    return plot


def every_chart_alive(page):
    """Scroll through all charts of the report; return how many there are."""
    charts = page.eval_on_selector_all("[data-chart]", "(all) => all.map((one) => one.dataset.chart)")
    for chart in charts:
        alive(page, chart)
    return len(charts)


def complaints_of(chromium, report):
    """Open all pages of a report, wide and narrow; return what is wrong with any, a list of text.

    report : Path of its folder
    """
    paths = [report / "index.html", *sorted(report.glob("triage/*.html")), *sorted(report.glob("patients/*/*.html"))]
    found = []
    for path in paths:
        for size in (DESKTOP, PHONE):
            with opened(chromium, path, size) as (page, seen):
                every_chart_alive(page)
                wide = page.evaluate("() => document.documentElement.scrollWidth") > size[0]
                said = [*seen.complaints, *seen.network, *unresolved(page, path)] + ["wider than the screen"] * wide
                found += [f"{path.relative_to(report)} at {size[0]} pixels: {one}" for one in said]
    return found
