"""The report in a browser: it opens from a file, its table sorts and filters, a click shows a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")
pytest.importorskip("itables")

from harness.cli.table import load
from harness.reports.html import page
from tests.conftest import ROOT
from tests.test_report import HOSTILE, analysed


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page.html(analysed(), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium with the page of `analysed` open, and with the reference page's address."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra dev)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={profile}", "window-size=1280,1000",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield session
    finally:
        session.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path, text: str) -> Any:
    """The browser with a fresh page, once its charts and its table are there."""
    return show(browser, tmp_path, text)


def show(browser: Any, folder: Path, text: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    (folder / "report.html").write_text(text, encoding="utf-8")
    browser.get((folder / "report.html").as_uri())
    drawn = """return document.documentElement.dataset.ready
        && [...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('svg'))"""
    WebDriverWait(browser, 40).until(lambda session: session.execute_script(drawn))
    return browser


def column(browser: Any, heading: str) -> list[str]:
    """The visible cells of a column, without what stands below their figures."""
    return browser.execute_script(  # type: ignore[no-any-return]
        """const heads = [...document.querySelectorAll('#table thead tr:first-child th')];
        const place = heads.findIndex((head) => head.textContent.trim().startsWith(arguments[0]));
        return [...document.querySelectorAll('#table tbody tr')]
          .map((row) => row.cells[place].firstChild?.textContent ?? '');""",
        heading,
    )


def runs_of(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#table tbody tr')].map((row) => row.dataset.run)"
    return browser.execute_script(script)  # type: ignore[no-any-return]


def click(browser: Any, element: Any) -> None:
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


def type_filter(browser: Any, heading: str, words: str) -> None:
    field = browser.find_element("css selector", f"input[aria-label='filter {heading}']")
    field.clear()
    field.send_keys(words)


def test_it_opens_from_a_file_without_an_error_and_without_network(opened: Any) -> None:
    assert [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"] == []
    names = opened.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in names if not name.startswith(("blob:", "data:"))] == []
    assert "owned" not in opened.title


def test_a_filter_changes_the_rows_and_dims_the_points(opened: Any) -> None:
    assert len(runs_of(opened)) == 7
    type_filter(opened, "method", "gptq|awq")
    assert set(runs_of(opened)) == {"r0", "r1", "r3"}
    type_filter(opened, "perplexity", "<12")
    assert set(runs_of(opened)) == {"r0", "r1"}
    faint = opened.execute_async_script(
        """const done = arguments[0];
        setTimeout(() => done([...document.querySelectorAll('#plots .chart')[0].querySelectorAll('path[aria-label]')]
          .filter((path) => Number(path.getAttribute('opacity')) < 0.5).length), 500);"""
    )
    assert faint == 4


def test_perplexity_sorts_as_a_number(opened: Any) -> None:
    heads = opened.find_elements("css selector", "#table thead tr:first-child th")
    click(opened, next(head for head in heads if head.text.startswith("perplexity")))
    shown = [float(cell) for cell in column(opened, "perplexity") if cell != "-"]
    assert shown == [10.0, 10.5, 11.5, 13.5, 17.5, 1e5]


def test_a_click_on_a_point_or_a_row_shows_its_run(opened: Any) -> None:
    point = opened.find_element("css selector", "#plots path[aria-label^='gptq group64 4 bits']")
    click(opened, point)
    drawer = opened.find_element("id", "drawer")
    assert "r1" in drawer.text
    assert "packages.torch" in drawer.text
    opened.find_element("css selector", "#drawer .close").click()
    assert not drawer.is_displayed()
    click(opened, opened.find_element("css selector", "#table tr[data-run=r0]"))
    assert HOSTILE in drawer.text
    assert "owned" not in opened.title


def test_a_run_and_a_figure_of_the_layers_can_be_chosen(opened: Any) -> None:
    note = opened.find_element("id", "layers-top")
    assert "0.5" in note.text
    from selenium.webdriver.support.ui import Select

    Select(opened.find_element("id", "layers-figure")).select_by_value("weight_error")
    assert note.text.startswith("Largest: model.layers.1.mlp.down_proj 0.110")
    assert "160 of 400 channels" in opened.find_element("id", "outliers-note").text


@pytest.mark.parametrize("name", ["", "survey"])
def test_the_reference_report_opens_and_fits_a_phone(name: str, browser: Any, tmp_path: Path) -> None:
    folder = ROOT / "results/reference" / name
    browser.set_window_size(1280, 1000)
    show(browser, tmp_path, page.html(load(folder), folder))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert len(runs_of(browser)) == len(load(folder))
    browser.set_window_size(500, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
