"""The full run, and a last line on results that are older than the code."""

from types import SimpleNamespace

import execute
import nbformat
import pytest


@pytest.fixture(scope="session")
def committed():
    """The full run: its notebook, metrics, and folder of layers, if of this code."""
    if execute.older_results():
        pytest.skip("what is committed is older than the code")
    execute.fetch_data()
    notebook = nbformat.read(execute.NOTEBOOK, as_version=4)
    metrics = execute.json_of(execute.MODELS / "metrics.json")
    return SimpleNamespace(notebook=notebook, metrics=metrics, saved=execute.MODELS)


def pytest_terminal_summary(terminalreporter, exitstatus):
    if exitstatus == 0 and execute.older_results():
        terminalreporter.write_line(execute.older_results())
