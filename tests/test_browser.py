"""The notebook as a person meets it: JupyterLab in Chromium, Run All, a slider."""

import contextlib
import shutil
import socket
import subprocess
import sys
import time

import execute
import nbformat
import pytest
from test_run import reduced_copy

END = "Done: all files are in models."
PROBLEMS = "[data-mime-type$='jupyter.stderr'], [data-mime-type$='jupyter.error']"


def wait_until(condition):
    """Until a condition holds, for two minutes; it may raise before."""
    for _ in range(400):
        with contextlib.suppress(Exception):
            if condition():
                return
        time.sleep(0.3)
    raise AssertionError("not within two minutes")


@pytest.fixture
def page(tmp_path):
    """A page of headless Chromium; at its base a JupyterLab that serves a folder."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or pytest.skip("Chromium is not installed")
    settings = tmp_path / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    shown = {"windowingMode": "none"}  # all cells on the page
    execute.write_whole(settings / "tracker.jupyterlab-settings", shown)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"-m jupyterlab --allow-root --no-browser --ServerApp.port={port}".split()
    command += ["--IdentityProvider.token=test", f"--ServerApp.root_dir={tmp_path}"]
    command += [f"--LabApp.user_settings_dir={tmp_path}"]
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with open(tmp_path / "log", "wb") as log, sync_api.sync_playwright() as driver:
        server = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log)
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        yield browser.new_page(base_url=f"http://127.0.0.1:{port}")
        browser.close()
        server.kill()  # asked politely, it waits for its kernels
        server.wait()


@pytest.mark.browser
def test_run_all_and_slider(page, tmp_path):
    path, address = tmp_path / "a.ipynb", "/lab/tree/a.ipynb?token=test"
    nbformat.write(reduced_copy(tmp_path), path)
    page.set_default_timeout(120_000)

    def kernel_is_ready():  # the page itself calls it idle too early
        kernels = page.request.get("/api/kernels?token=test").json()
        return any(k["connections"] and k["execution_state"] == "idle" for k in kernels)

    wait_until(lambda: page.goto(address))
    wait_until(kernel_is_ready)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.get_by_text(END).or_(page.locator(PROBLEMS)).first.wait_for(timeout=1_500_000)
    assert page.locator(PROBLEMS).count() == 0
    page.keyboard.press("Control+s")
    wait_until(lambda: END in path.read_text("utf-8"))
    assert execute.WIDGET not in path.read_text("utf-8")
    page.locator(".jp-CodeCell .cm-content").last.click()
    for key in ("Escape", "b", "Enter"):
        page.keyboard.press(key)
    page.keyboard.type("live_units()")
    page.keyboard.press("Shift+Enter")
    picture = page.locator(".widget-interact img")
    picture.wait_for()
    before = picture.get_attribute("src")
    page.locator(".noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    wait_until(lambda: picture.count() and picture.get_attribute("src") != before)
