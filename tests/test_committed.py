"""What is committed belongs together: `python -m pytest tests -m release`."""

import hashlib
import json
import re

import execute
import nbformat
import pytest
import torch
from test_run import check_outputs, pixels_and_labels

pytestmark = pytest.mark.release
FULL_RUN, TEXTS = "python tests/execute.py", "python tests/execute.py texts"
REPLICATE = "python tests/replicate.py"


def need(holds, said):
    """Fail with one sentence, and without a traceback, where something does not hold."""
    if not holds:
        pytest.fail(said, pytrace=False)


def test_results_are_of_this_code():
    older = execute.older_results()
    need(not older, older)


def test_layers_and_pictures_are_of_the_run(committed):
    files = dict(committed.metrics["models_sha256"])
    for name, tag in execute.PICTURES.items():
        picture = execute.picture(committed.notebook, tag)
        files[name] = hashlib.sha256(picture).hexdigest()
    for name, digest in files.items():
        content = (committed.saved / name).read_bytes()
        here = hashlib.sha256(content).hexdigest()
        need(here == digest, f"models/{name} is of another run: {FULL_RUN} renews it.")


def test_notebook_is_clean(committed):
    cells = execute.code_cells(committed.notebook)
    counts = [cell.execution_count for cell in cells]
    whole = counts == list(range(1, len(cells) + 1))
    need(whole, f"The outputs are not of one run of all cells: {FULL_RUN} renews them.")
    check_outputs(committed.notebook)
    outputs = json.dumps([cell.outputs for cell in cells])
    assert not re.search(r"/(home|root|tmp|work|Users|mnt|private)/", outputs)
    assert "version" not in committed.notebook.metadata["language_info"]
    assert execute.NOTEBOOK.stat().st_size < 3_000_000
    nbformat.validate(committed.notebook)


def test_six_trainings_are_this_one_and_the_replications(committed):
    config, claims = committed.metrics["config"], committed.metrics["comparisons"]
    runs = execute.json_of(committed.saved / "replication.json")["runs"]
    for i, run in enumerate(runs, 1):
        same = run["config"] == {**config, "SEED": i, "HELD_OUT": i}
        same = same and list(run["comparisons"]) == list(claims)
        need(same, f"Replication {i} is of another study: {REPLICATE} renews it.")
    for claim, row in claims.items():
        rows = [row, *(run["comparisons"][claim] for run in runs)]
        differences = sorted(one["difference"] for one in rows)
        six = row["six"] and sorted(row["six"]["differences"])
        said = f"The six of {claim!r} are not those replicated: {FULL_RUN} renews them."
        need(len(rows) == 6 and six == pytest.approx(differences), said)


def test_readme_shows_what_was_measured(committed):
    for path, text in execute.texts().items():
        said = f"{path.name} is not as models/ has it: {TEXTS} renews it."
        need(execute.text_of(path) == text, said)
    readme = execute.text_of(execute.README)
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (execute.ROOT / link).exists(), link
    workflow = execute.text_of(execute.ROOT / ".github" / "workflows" / "ci.yml")
    commands = re.findall(r"^python -m pip install -r .*$", readme, re.M)
    run = re.findall(r"- run: (python -m pip install -r .+)", workflow)
    assert sorted(run) == sorted(commands)


def test_readme_snippet_reads_images(committed, raw, monkeypatch):
    """One, and a hundred test images, about as well as the probe reads all of them."""
    monkeypatch.chdir(execute.ROOT)
    x, y = pixels_and_labels(raw, "t10k")
    readme = execute.text_of(execute.README)
    snippet = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert "torch.rand(1, 784)" in snippet
    for n in (1, 100):
        names = {"test_images": torch.from_numpy(x[:n])}
        exec(snippet.replace("torch.rand(1, 784)", "test_images"), names)
    right = (names["logits"].argmax(1).numpy() == y[:100]).mean()
    accuracy = committed.metrics["probe"]["test_accuracy"]
    assert right == pytest.approx(accuracy, abs=0.1)
