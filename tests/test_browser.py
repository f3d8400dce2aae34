"""The notebook as a person meets it: JupyterLab in Chromium, Run All, a slider."""

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
from test_run import REDUCED


def wait_until(condition, seconds=120):
    """Until a condition holds; it may raise OSError before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds} s")


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab that serves a reduced copy of the notebook."""
    notebook = execute.inject(execute.read(), **REDUCED)
    nbformat.write(notebook, tmp_path / "fashion_sae.ipynb")
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    shown = {"windowingMode": "none"}  # all cells on the page
    execute.write_whole(settings / "tracker.jupyterlab-settings", shown)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser"]
    command += [f"--ServerApp.port={port}", f"--ServerApp.root_dir={tmp_path}"]
    command += [f"--LabApp.user_settings_dir={tmp_path / 'settings'}"]
    command += ["--IdentityProvider.token=test"]
    with open(tmp_path / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    server.kill()  # asked politely, it waits for its kernels
    server.wait()


@pytest.fixture
def page():
    """A page of headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        yield page
        browser.close()


@pytest.mark.browser
def test_run_all_slider_and_reopening(lab, page, tmp_path):
    path, address = tmp_path / "fashion_sae.ipynb", f"{lab}/lab/tree/fashion_sae.ipynb"

    def kernel_is_ready():  # the page itself calls it idle too early
        with urllib.request.urlopen(f"{lab}/api/kernels?token=test") as answer:
            kernels = json.load(answer)
        return any(k["connections"] and k["execution_state"] == "idle" for k in kernels)

    def has_ended():
        assert page.locator("[data-mime-type$='jupyter.stderr']").count() == 0
        return (tmp_path / "models" / "metrics.json").exists() and kernel_is_ready()

    wait_until(lambda: urllib.request.urlopen(f"{lab}/api?token=test"))
    page.goto(f"{address}?token=test")
    page.locator(".jp-CodeCell").first.wait_for(timeout=120_000)
    wait_until(kernel_is_ready)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    wait_until(has_ended, 1500)
    page.keyboard.press("Control+s")
    wait_until(lambda: "All files are in models." in execute.text_of(path))
    assert execute.WIDGET not in execute.text_of(path)
    page.goto("about:blank")
    page.goto(f"{address}?token=test")
    page.locator(".jp-OutputArea img").nth(14).wait_for(timeout=120_000)
    assert "model not found" not in page.inner_text("body").lower()

    wait_until(kernel_is_ready)
    page.locator(".jp-CodeCell .cm-content").last.click()
    for key in ("Escape", "b", "Enter"):
        page.keyboard.press(key)
    page.keyboard.type("live_units()")
    page.keyboard.press("Shift+Enter")
    picture = page.locator(".widget-interact img")
    picture.wait_for(timeout=120_000)
    before = picture.get_attribute("src")
    page.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    wait_until(lambda: picture.count() and picture.get_attribute("src") != before)
