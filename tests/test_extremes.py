"""Parameters at the ends of what is allowed run through."""

import execute
import pytest
from conftest import REDUCED, Artifacts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "extreme",
    [
        {"K": 1, "EPOCHS": 1},
        {"N_UNITS": 64, "K": 64, "BATCH_SIZE": 1000},
        {"N_UNITS": 4096, "EPOCHS": 1},
    ],
    ids=lambda extreme: ", ".join(f"{k}={v}" for k, v in extreme.items()),
)
def test_runs_through(extreme, tmp_path, data):
    notebook = execute.inject(execute.read(), **(REDUCED | extreme))
    execute.execute(notebook, tmp_path)
    saved = Artifacts(tmp_path / "models", data)
    assert (saved.codes(data.test[0][:500]) > 0).sum(1).max() <= saved.k
