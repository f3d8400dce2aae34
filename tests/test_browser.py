"""The notebook alone in an empty folder, as a person meets it: JupyterLab, Run All."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import execute
import nbformat
import pytest
from conftest import REDUCED
from playwright.sync_api import sync_playwright
from test_committed import convert
from test_run import FIGURES

pytestmark = pytest.mark.browser
WIDTHS = "bars => bars.map(bar => bar.style.width)"
SETTINGS = "@jupyterlab/notebook-extension/tracker.jupyterlab-settings"


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab that serves a reduced copy of the notebook."""
    few = {name: value for name, value in REDUCED.items() if name != "DATA_DIR"}
    notebook = execute.inject(execute.read(), **few)
    nbformat.write(notebook, tmp_path / "fashion_sae.ipynb")
    settings = tmp_path / "settings" / SETTINGS
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))  # all cells on the page
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser"),
            f"--ServerApp.port={port}",
            f"--ServerApp.root_dir={tmp_path}",
            f"--LabApp.user_settings_dir={tmp_path / 'settings'}",
            "--IdentityProvider.token=test",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api?token=test", timeout=5)
            break
        except OSError:
            time.sleep(0.5)
    yield address
    server.kill()  # asked politely, it waits for its kernels
    server.wait()


@pytest.fixture
def page(tmp_path):
    """A page of headless Chromium that keeps to this machine."""
    chromium = shutil.which("chromium") or pytest.skip("Chromium is not installed")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        yield page
        page.screenshot(path=tmp_path / "page.png")  # what a failure looked like
        browser.close()


def wait_for_kernel(lab):
    """Until the server says that a page is connected to its kernel, and that it idles.

    The page itself calls the kernel idle too early; what is run then is lost.
    """
    for _ in range(300):
        with contextlib.suppress(OSError):  # the list fails while a kernel is made
            with urllib.request.urlopen(f"{lab}/api/kernels?token=test") as answer:
                kernels = json.load(answer)
            if any(k["connections"] and k["execution_state"] == "idle" for k in kernels):
                return
        time.sleep(0.2)
    raise AssertionError("no kernel is ready after a minute")


def run_all_cells(page, prompt):
    """Choose Run All Cells; again where the request was lost, which `prompt` tells.

    It is that of the cell of parameters, which runs once the imports are done.
    """
    run = page.get_by_role("menuitem", name="Run", exact=True)
    run_all = page.get_by_role("menuitem", name="Run All Cells", exact=True)
    for _ in range(3):
        run.click()
        run_all.click()
        for _ in range(300):
            if prompt.inner_text().strip("[]: ").isdigit():
                return
            time.sleep(0.2)
    raise AssertionError("the parameters have not run; page.png shows what is there")


def check_saved_and_opened_again(lab, page, tmp_path):
    """Nothing of the bars is left: not in the file, and no red error on the page."""
    page.locator(".jp-CodeCell .jp-InputPrompt").last.click()
    page.keyboard.press("Control+s")
    path = tmp_path / "fashion_sae.ipynb"
    for _ in range(100):
        if (text := path.read_text()).count('"image/png"') >= FIGURES:
            break
        time.sleep(0.2)
    assert text.count('"image/png"') >= FIGURES, "the page was not saved"
    assert execute.WIDGET not in text
    page.goto("about:blank")
    page.goto(f"{lab}/lab/tree/fashion_sae.ipynb?token=test")
    pictures = page.locator(".jp-OutputArea img")
    pictures.nth(FIGURES - 1).wait_for(timeout=60_000)
    time.sleep(2)
    assert "model not found" not in page.inner_text("body").lower()
    assert page.locator(".jp-OutputArea .jupyter-widgets").count() == 0


def check_sliders(page):
    """`live()` in a new cell: a slider moves, and its picture changes."""
    page.locator(".jp-CodeCell .cm-content").last.click()
    for key in ("Escape", "b", "Enter"):
        page.keyboard.press(key)
    page.keyboard.type("live()")
    page.keyboard.press("Shift+Enter")
    handles = page.locator(".jp-OutputArea .noUi-handle")
    handles.nth(1).wait_for(timeout=30_000)
    assert handles.count() == 2
    for i in range(2):  # of look_at, of look_at_unit
        picture = page.locator(".widget-interact").nth(i).locator("img")
        picture.wait_for(timeout=10_000)
        before = picture.get_attribute("src")
        handles.nth(i).focus()
        page.keyboard.press("ArrowRight")
        for _ in range(50):
            if picture.count() == 1 and picture.get_attribute("src") != before:
                break
            time.sleep(0.1)
        assert picture.get_attribute("src") != before, "the picture did not change"


def test_run_all_cells(lab, page, tmp_path):
    page.goto(f"{lab}/lab/tree/fashion_sae.ipynb?token=test")
    cells = page.locator(".jp-CodeCell")
    cells.first.wait_for(timeout=60_000)
    wait_for_kernel(lab)
    parameters = cells.filter(has_text="CONTROL_EPOCHS = ").first
    run_all_cells(page, prompt=parameters.locator(".jp-InputPrompt"))

    prompts, bars = page.locator(".jp-CodeCell .jp-InputPrompt"), set()
    failures = page.locator("[data-mime-type$='jupyter.stderr']")  # errors, warnings
    begun = time.monotonic()
    while not (done := prompts.all_inner_texts())[-1].strip("[]: ").isdigit():
        assert time.monotonic() - begun < 300, f"after 300 s the cells say {done}"
        assert not failures.count(), failures.all_inner_texts()
        bars |= set(page.locator(".progress-bar").evaluate_all(WIDTHS))
        time.sleep(0.2)

    assert not failures.count(), failures.all_inner_texts()
    assert len(bars) > 3, "the progress bar was not seen moving"
    assert page.locator(".jp-OutputArea img").count() == FIGURES
    assert (tmp_path / "models" / "metrics.json").exists()
    check_saved_and_opened_again(lab, page, tmp_path)
    check_sliders(page)


DEAD = """links => links.map(a => decodeURIComponent(a.getAttribute('href').slice(1)))
    .filter(id => !document.getElementById(id))"""
CUT = """tables => tables.filter(table => {
    for (let box = table; box; box = box.parentElement) {
        const scrolls = box === table || getComputedStyle(box).overflowX === 'auto';
        if (scrolls && box.getBoundingClientRect().right <= innerWidth + 1) return false;
    }
    return true;
}).length"""
WIDE = "all => all.filter(x => x.getBoundingClientRect().right > innerWidth + 1).length"


@pytest.mark.parametrize("width", [1400, 700])
def test_html_page_fits(page, tmp_path, width):
    """The page that the README makes: links lead somewhere, nothing runs off the page.

    A table may be wider than the page if what holds it is not, and scrolls.
    """
    path = tmp_path / "page.html"
    path.write_text(convert("html", "--template", "classic"))
    page.set_viewport_size({"width": width, "height": 1000})
    page.goto(path.as_uri())
    links = page.locator("a[href^='#']")
    assert links.count() > 16
    assert links.evaluate_all(DEAD) == []
    assert page.locator("img, .output_area").count() > 70
    assert page.locator("img, .output_area").evaluate_all(WIDE) == 0
    assert page.locator("table").evaluate_all(CUT) == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
