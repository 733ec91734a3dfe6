"""The report in a browser: it opens from a file, its table sorts and filters, a click shows a run.

The page and its charts change some time after an action. So each assertion on the page goes through `expect`, which
waits until the page shows the expected state.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from harness.records.folder import load_records, select, table_of
from harness.reports.html import page
from tests.conftest import ROOT
from tests.reports.test_report import HOSTILE, analysed

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
LIMIT_S = 60  # the longest wait for a state: far more than a busy machine needs
POLL_S = 0.05
PERPLEXITY_IS_SEEN = """const heads = [...document.querySelectorAll('#table thead tr:first-child th')];
    const head = heads.find((item) => item.textContent.trim().startsWith('perplexity'));
    return head.getBoundingClientRect().right <= window.innerWidth"""
# Pairs of texts in one chart, ticks or names, that overlap by more than their margins; the halo of a name is that name.
COVERED_TEXTS = """return [...document.querySelectorAll('#plots .chart')].flatMap((chart) => {
    const shown = (text) => text.textContent && text.getAttribute('opacity') !== '0';
    const boxes = [...chart.querySelectorAll('text')].filter(shown).map((text) => [text.textContent,
        text.getBoundingClientRect()]);
    const cover = (p, q) => Math.min(p.right, q.right) - Math.max(p.left, q.left) > 2
        && Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 4;
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) => a !== b && cover(p, q))
        .map(([b]) => a + ' and ' + b));
})"""

pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="chromium or chromedriver is not installed")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The HTML of the report on the records of `analysed`."""
    return page.html(analysed(), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium without a page."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    try:
        yield session
    finally:
        session.quit()


@pytest.fixture
def report(browser: webdriver.Chrome, tmp_path: Path, text: str) -> webdriver.Chrome:
    """The browser with a fresh page of `text`, its charts and its table drawn."""
    return show(browser, tmp_path, text)


def expect(browser: webdriver.Chrome, read: Callable[[], Any], expected: Any) -> None:
    """Wait until `read()` returns `expected`; fail with its last value otherwise."""
    wait = WebDriverWait(browser, LIMIT_S, POLL_S, ignored_exceptions=[StaleElementReferenceException])
    with suppress(TimeoutException):
        wait.until(lambda _: read() == expected)
    assert read() == expected


def show(browser: webdriver.Chrome, folder: Path, text: str) -> webdriver.Chrome:
    """Open `text` as a file, and wait until the table and the marks of all charts are drawn.

    A chart handles clicks as soon as its marks are in the page: both happen in one task of the browser.
    """
    (folder / "report.html").write_text(text, encoding="utf-8")
    resize(browser, 1280, 1000)
    browser.get((folder / "report.html").as_uri())
    undrawn = """return [...document.querySelectorAll('.chart')]
        .filter((chart) => !chart.querySelector('path[aria-label]')).length"""
    expect(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"), "true")
    expect(browser, lambda: browser.execute_script(undrawn), 0)
    return browser


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    browser.set_window_size(width, height)
    expect(browser, lambda: browser.execute_script("return window.innerWidth"), width)


def severe(browser: webdriver.Chrome) -> list[dict[str, Any]]:
    """The errors in the browser's log since the last call."""
    entries: list[dict[str, Any]] = browser.get_log("browser")  # type: ignore[no-untyped-call]
    return [entry for entry in entries if entry["level"] == "SEVERE"]


def column(browser: webdriver.Chrome, heading: str) -> list[str]:
    """The visible cells of a column, without the small text below each figure."""
    cells: list[str] = browser.execute_script(
        """const heads = [...document.querySelectorAll('#table thead tr:first-child th')];
        const place = heads.findIndex((head) => head.textContent.trim().startsWith(arguments[0]));
        return [...document.querySelectorAll('#table tbody tr')]
          .map((row) => row.cells[place].firstChild?.textContent ?? '');""",
        heading,
    )
    return cells


def figures(browser: webdriver.Chrome, heading: str) -> list[float]:
    """The visible figures of a column; runs without one are left out."""
    return [float(cell) for cell in column(browser, heading) if cell != "-"]


def run_ids(browser: webdriver.Chrome) -> list[str]:
    """The runs in the table, in its order."""
    script = "return [...document.querySelectorAll('#table tbody tr')].map((row) => row.dataset.run)"
    ids: list[str] = browser.execute_script(script)
    return ids


def faint_points(browser: webdriver.Chrome) -> int:
    """The number of points in the first chart that are dimmed."""
    script = """return [...document.querySelector('#plots .chart').querySelectorAll('path[aria-label]')]
        .filter((path) => Number(path.getAttribute('opacity') ?? 1) < 0.5).length"""
    number: int = browser.execute_script(script)
    return number


def click(browser: webdriver.Chrome, selector: str) -> None:
    element = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def click_heading(browser: webdriver.Chrome, heading: str) -> None:
    names = browser.execute_script(
        "return [...document.querySelectorAll('#table thead tr:first-child th')].map((head) => head.textContent.trim())"
    )
    place = next(i for i, name in enumerate(names, 1) if name.startswith(heading))
    click(browser, f"#table thead tr:first-child th:nth-child({place})")


def type_filter(browser: webdriver.Chrome, heading: str, words: str) -> None:
    field = browser.find_element(By.CSS_SELECTOR, f"input[aria-label='filter {heading}']")
    field.clear()
    field.send_keys(words)


def text_of(browser: webdriver.Chrome, element_id: str) -> str:
    """The visible text of an element; empty for a hidden one."""
    return browser.find_element(By.ID, element_id).text


def test_it_opens_from_a_file_without_an_error_and_without_network(report: webdriver.Chrome) -> None:
    assert severe(report) == []
    names = report.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in names if not name.startswith(("blob:", "data:"))] == []
    assert report.title.startswith("ptqbench")


def test_a_filter_changes_the_rows_and_dims_the_points(report: webdriver.Chrome) -> None:
    expect(report, lambda: len(run_ids(report)), 7)
    expect(report, lambda: faint_points(report), 0)
    type_filter(report, "method", "gptq|awq")
    expect(report, lambda: set(run_ids(report)), {"r0", "r1", "r3"})
    expect(report, lambda: faint_points(report), 2)  # the float model is a line
    type_filter(report, "perplexity", "<12")
    expect(report, lambda: set(run_ids(report)), {"r0", "r1"})
    expect(report, lambda: faint_points(report), 3)


def test_perplexity_sorts_as_a_number(report: webdriver.Chrome) -> None:
    perplexities = [10.0, 10.5, 11.5, 13.5, 17.5, 1e5]
    click_heading(report, "perplexity")
    expect(report, lambda: figures(report, "perplexity"), perplexities)
    click_heading(report, "perplexity")
    expect(report, lambda: figures(report, "perplexity"), perplexities[::-1])


def test_a_click_on_a_point_or_a_row_shows_its_run(report: webdriver.Chrome) -> None:
    click(report, "#plots path[aria-label^='gptq group64 4 bits']")
    expect(report, lambda: "r1, ok" in text_of(report, "drawer").splitlines(), True)
    expect(report, lambda: "packages.torch" in text_of(report, "drawer"), True)
    click(report, "#drawer .close")
    expect(report, lambda: report.find_element(By.ID, "drawer").is_displayed(), False)
    click(report, "#table tr[data-run=r0]")
    expect(report, lambda: HOSTILE in text_of(report, "drawer"), True)
    assert report.title.startswith("ptqbench")


def test_a_run_and_a_figure_of_the_layers_can_be_chosen(report: webdriver.Chrome) -> None:
    expect(report, lambda: "0.5" in text_of(report, "layers-top"), True)
    Select(report.find_element(By.ID, "layers-figure")).select_by_value("weight_error")
    largest = "Largest: model.layers.1.mlp.down_proj 0.110"
    expect(report, lambda: text_of(report, "layers-top").startswith(largest), True)
    expect(report, lambda: "160 of 400 channels" in text_of(report, "outliers-note"), True)


@pytest.mark.parametrize("name", ["bench", "survey"])
def test_the_reference_report_opens_and_fits_a_phone(name: str, browser: webdriver.Chrome, tmp_path: Path) -> None:
    folder = ROOT / "results/reference"
    records = select(load_records(folder), table_of(folder, name), folder)
    show(browser, tmp_path, page.html(records, folder))
    assert severe(browser) == []
    expect(browser, lambda: len(run_ids(browser)), len(records))
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        fits = "return document.documentElement.scrollWidth <= window.innerWidth"
        expect(browser, lambda: browser.execute_script(fits), True)
        expect(browser, lambda: browser.execute_script(PERPLEXITY_IS_SEEN), True)
        expect(browser, lambda: browser.execute_script(COVERED_TEXTS), [])
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
