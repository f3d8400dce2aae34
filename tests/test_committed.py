"""What is committed belongs together: `python -m pytest tests -m release`."""

import hashlib
import re

import execute
import nbformat
import pytest
import torch
from test_run import check_outputs, codes_of, layers_in, outputs_of, pixels_and_labels

pytestmark = pytest.mark.release
FULL_RUN = "python tests/execute.py"


def need(holds, said):
    """Fail with one sentence, and without a traceback, where something does not hold."""
    if not holds:
        pytest.fail(said, pytrace=False)


def test_results_are_of_this_code():
    need(not execute.older_results(), execute.older_results())


def test_layers_and_pictures_are_of_the_run(committed):
    files = dict(committed.metrics["models_sha256"])
    for name, tag in execute.PICTURES.items():
        picture = execute.picture(committed.notebook, tag)
        files[name] = hashlib.sha256(picture).hexdigest()
    for name, digest in files.items():
        here = hashlib.sha256((committed.saved / name).read_bytes()).hexdigest()
        need(here == digest, f"models/{name} is of another run: {FULL_RUN} renews it.")


def test_notebook_is_clean(committed):
    cells = execute.code_cells(committed.notebook)
    whole = [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    need(whole, f"The outputs are not of one run of all cells: {FULL_RUN} renews them.")
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
        same = run["config"] == {**config, "SEED": i, "HELD_OUT": i}
        same = same and list(run["comparisons"]) == list(claims)
        need(
            same, f"Replication {i} is of another study: tests/replicate.py renews it."
        )
    for claim, row in claims.items():
        six = [row, *(run["comparisons"][claim] for run in runs)]
        six = pytest.approx([one["difference"] for one in six])
        same = row["six"] and row["six"]["differences"] == six
        need(same, f"The six of {claim!r} are others: {FULL_RUN} renews them.")


def test_readme_shows_what_was_measured(committed):
    for path, text in execute.texts().items():
        said = f"{path.name} is not as models/ has it: {FULL_RUN} texts renews it."
        need(path.read_text("utf-8") == text, said)
    readme = execute.README.read_text("utf-8")
    for link in re.findall(r"\]\(([^)#:]+\.\w+)\)", readme):
        assert (execute.ROOT / link).exists(), link
    workflow = (execute.ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    commands = re.findall(r"^python -m pip install -r .*$", readme, re.M)
    run = re.findall(r"- run: (python -m pip install -r .+)", workflow)
    assert sorted(run) == sorted(commands)


def test_readme_snippet_reads_images_as_the_probe_does(committed, monkeypatch):
    """One, and the first hundred test images; the probe's own by NumPy."""
    monkeypatch.chdir(execute.ROOT)
    x, y = pixels_and_labels("t10k")
    encoder, _, (weight, bias) = layers_in(committed.saved)
    codes = codes_of(x[:100], encoder, committed.metrics["config"]["K"])
    right = (codes @ weight + bias).argmax(1) == y[:100]
    readme, yours = execute.README.read_text("utf-8"), "torch.rand(1, 784)"
    before, after = re.search(r"```python\n(.*?)```", readme, re.S)[1].split(yours)
    for n in (1, 100):
        names = {"test_images": torch.from_numpy(x[:n])}
        exec(f"{before}test_images{after}", names)
        accuracy = (names["logits"].argmax(1).numpy() == y[:n]).mean()
        assert accuracy == right[:n].mean()
