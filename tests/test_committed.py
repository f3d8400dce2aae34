"""What is committed belongs together: `python -m pytest tests -m release`."""

import re
from hashlib import sha256

import execute
import nbformat
import pytest
import torch
from test_run import check_outputs, codes_of, layers_in, outputs_of, pixels_and_labels

pytestmark = pytest.mark.release
AGAIN = "python tests/execute.py makes it anew"


def test_results_are_of_this_code():
    if execute.older_results():
        pytest.fail(execute.older_results(), pytrace=False)


def test_layers_and_pictures_are_of_the_run(committed):
    files = dict(committed.metrics["models_sha256"])
    for name, tag in execute.PICTURES.items():
        files[name] = sha256(execute.picture(committed.notebook, tag)).hexdigest()
    for name, digest in files.items():
        here = sha256((committed.saved / name).read_bytes()).hexdigest()
        assert here == digest, f"models/{name} is of another run: {AGAIN}"


def test_notebook_is_clean(committed):
    cells = execute.code_cells(committed.notebook)
    whole = [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert whole, f"The outputs are not of one run of all cells: {AGAIN}"
    check_outputs(committed.notebook)
    outputs = str(outputs_of(committed.notebook))
    assert not re.search(r"/(home|root|tmp|work|Users|mnt|private)/", outputs)
    assert "version" not in committed.notebook.metadata["language_info"]
    assert execute.NOTEBOOK.stat().st_size < 3_000_000
    nbformat.validate(committed.notebook)


def test_six_trainings_are_this_one_and_the_replications(committed):
    config, claims = committed.metrics["config"], committed.metrics["comparisons"]
    runs = execute.json_of(committed.saved / "replication.json")["runs"]
    for i, run in enumerate(runs, 1):
        assert run["config"] == {**config, "SEED": i, "HELD_OUT": i}
        assert list(run["comparisons"]) == list(claims)
    for claim, row in claims.items():
        six = [row, *(run["comparisons"][claim] for run in runs)]
        six = pytest.approx([one["difference"] for one in six])
        assert row["six"] and row["six"]["differences"] == six, f"{claim}: {AGAIN}"


def test_readme_shows_what_was_measured(committed):
    for path, text in execute.texts().items():
        assert path.read_text("utf-8") == text, "python tests/execute.py texts does it"
    readme = execute.README.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#:]+\.\w+)\)", readme):
        assert (execute.ROOT / link).exists(), link


def test_readme_snippet_reads_images_as_the_probe_does(committed, monkeypatch):
    """The first hundred test images; the probe's own answers by NumPy."""
    monkeypatch.chdir(execute.ROOT)
    x, y = [part[:100] for part in pixels_and_labels(train=False)]
    encoder, _, (weight, bias) = layers_in(committed.saved)
    codes = codes_of(x, encoder, committed.metrics["config"]["K"])
    readme, yours = execute.README.read_text("utf-8"), "torch.rand(1, 784)"
    before, after = re.search(r"```python\n(.*?)```", readme, re.S)[1].split(yours)
    names = {"test_images": torch.from_numpy(x)}
    exec(f"{before}test_images{after}", names)
    accuracy = (names["logits"].argmax(1).numpy() == y).mean()
    assert accuracy == ((codes @ weight + bias).argmax(1) == y).mean(), "K in README?"
