"""What is committed tells one story: notebook, metrics, models and README."""

import hashlib
import html
import json
import re
import subprocess
import sys

import execute
import nbformat
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(execute.NOTEBOOK, as_version=4)


def test_outputs_are_of_this_code(notebook, committed):
    assert committed.metrics["code_sha256"] == execute.code_sha256(notebook)


def test_models_are_of_this_run(committed):
    for name, digest in committed.metrics["models_sha256"].items():
        data = (execute.ROOT / "models" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest, name


def test_was_run_in_order(notebook):
    counts = [cell.execution_count for cell in execute.code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {
        out.output_type for cell in execute.code_cells(notebook) for out in cell.outputs
    }
    assert kinds <= {"display_data", "execute_result"}  # no error, no stream


def test_is_clean(notebook):
    outputs = json.dumps([cell.outputs for cell in execute.code_cells(notebook)])
    assert not re.search(r"/(home|root|tmp|work|Users|mnt|private)/", outputs)
    assert execute.WIDGET not in outputs and "widgets" not in notebook.metadata
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert execute.NOTEBOOK.stat().st_size < 2_000_000
    nbformat.validate(notebook)


def test_was_a_full_run(notebook, committed):
    parameters = {}
    exec(next(c for c in notebook.cells if c["id"] == "parameters").source, parameters)
    for name, value in committed.metrics["config"].items():
        assert parameters[name] == value, name


def test_html_page_can_be_read(notebook):
    """As the README converts it: figures have text alternatives, tables are tables."""
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--stdout"]
    page = subprocess.run(
        [*command, execute.NOTEBOOK.name],
        cwd=execute.ROOT,
        check=True,
        capture_output=True,
        encoding="utf-8",
    ).stdout
    shown = [o for cell in execute.code_cells(notebook) for o in cell.outputs]
    figures = [o.metadata["image/png"]["alt"] for o in shown if "image/png" in o.data]
    texts = re.findall(r'<img alt="([^"]*)"', page)
    assert [html.unescape(text) for text in texts] == figures
    assert page.count("<table") == sum("text/html" in o.data for o in shown) > 0


def test_notebook_shows_what_was_measured(notebook, committed):
    """The verdict's table, made again from metrics.json, is the one on display."""
    cell = next(cell for cell in notebook.cells if cell["id"] == "verdict")
    namespace = {"pd": pd, "metrics": committed.metrics}
    exec(cell.source, namespace)
    (output,) = cell.outputs
    assert output.data["text/html"] == namespace["verdict"]._repr_html_()
    for text in ("test MSE", "probe, test accuracy"):
        assert text in output.data["text/html"]


def test_readme_says_what_was_measured(notebook, committed):
    assert execute.results_table(committed.metrics) in execute.README.read_text()
    assert execute.PICTURE.read_bytes() == execute.picture(notebook, "cue-figure")


def test_readme_snippet_runs(committed, monkeypatch, capsys):
    """The lines that load the three files in plain PyTorch print a class."""
    monkeypatch.chdir(execute.ROOT)
    snippet = re.search(r"```python\n(.*?)```", execute.README.read_text(), re.S)[1]
    namespace = {}
    exec(snippet, namespace)
    assert namespace["logits"].shape == (1, 10)
    assert capsys.readouterr().out.strip() in namespace["classes"]
    assert namespace["classes"] == list(committed.metrics["importance"]["top_units"])
