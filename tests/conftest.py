"""What several files of tests use, and a last line on results older than the code."""

from types import SimpleNamespace

import execute
import nbformat
import pytest


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """The folder of the four unpacked files, fetched if they are not there."""
    execute.fetch_data()
    models = str(tmp_path_factory.mktemp("models"))
    execute.load("data", DATA_DIR=str(execute.DATA), MODELS_DIR=models)
    return execute.DATA / "FashionMNIST" / "raw"


@pytest.fixture(scope="session")
def committed():
    """The full run: its notebook, metrics, and folder of layers, if of this code."""
    if execute.older_results():
        pytest.skip("what is committed is older than the code")
    return SimpleNamespace(
        notebook=nbformat.read(execute.NOTEBOOK, as_version=4),
        metrics=execute.json_of(execute.MODELS / "metrics.json"),
        saved=execute.MODELS,
    )


def pytest_terminal_summary(terminalreporter, exitstatus):
    if exitstatus == 0 and execute.older_results():
        terminalreporter.write_line(execute.older_results())
