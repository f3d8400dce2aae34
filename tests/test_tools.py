"""The tools of this folder, on a project whose notebook has two small cells."""

import shutil
import subprocess
import sys

import execute
import nbformat
import pytest

PARAMETERS = "SEED = 0\nHELD_OUT = 0\nDATA_DIR = 'data'"
RUN = """
import json, pathlib
from IPython.display import Image
row = {"ours": 3, "rival": 1, "difference": 2, "low": 1, "high": 3, "six": None}
metrics = {"config": {"SEED": SEED, "HELD_OUT": HELD_OUT, "DATA_DIR": DATA_DIR}}
metrics.update(comparisons={"a claim": row}, environment={"python": 3}, seconds=7)
pathlib.Path("models").mkdir(exist_ok=True)
pathlib.Path("models/metrics.json").write_text(json.dumps(metrics))
path = pathlib.Path(DATA_DIR, "../fashion_sae.ipynb")  # edited while it runs:
path.write_text(path.read_text().replace("before", "after"))
print("before")
display({"text/plain": " "}, raw=True)  # as a progress bar leaves it
Image(data=b"", format="png")
"""
CODE = 'x = 1\ndef f(a):\n    return not a, "b", None'
SAME = "x = (1)  # one\n\n\ndef f(a,):\n    'Text.'\n    return not(a), 'b', None"
OTHERS = [CODE.replace("None", "1"), "%pip install this", "%pip install that"]


def notebook_of(*cells):
    """A notebook of code cells, each given as its source and tags."""
    make = nbformat.v4.new_code_cell
    cells = [make(source, metadata={"tags": tags}) for source, *tags in cells]
    return nbformat.v4.new_notebook(cells=cells)


def test_hash_is_of_what_the_code_means():
    hashes = [execute.code_sha256(notebook_of([x])) for x in (CODE, SAME, *OTHERS)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 1 + len(OTHERS)


@pytest.fixture
def run(tmp_path):
    """Runs a command in a folder like that of the project, but for notebook and data."""
    for name in ("tests", "models"):
        shutil.copytree(execute.ROOT / name, tmp_path / name)
    for name in (".pytest.ini", "README.md", "requirements.txt"):
        shutil.copy(execute.ROOT / name, tmp_path)
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in execute.FILES:
        (raw / name).touch()
    cells = [(PARAMETERS, "parameters"), (RUN, *execute.PICTURES.values())]
    nbformat.write(notebook_of(*cells), tmp_path / "fashion_sae.ipynb")
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    return lambda *command: subprocess.run([sys.executable, *command], **options)


def test_edit_while_it_runs(run, tmp_path):
    """It is kept, with the run beside it; the next run is of what was edited."""
    path, beside = [tmp_path / f"fashion_sae{x}.ipynb" for x in ("", ".executed")]
    before = path.read_text("utf-8")
    done = run("tests/execute.py")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "was edited while it ran" in done.stderr
    assert path.read_text("utf-8") == before.replace("before", "after")
    metrics = execute.json_of(tmp_path / "models" / "metrics.json")
    assert metrics["code_sha256"] == execute.code_sha256(execute.read(beside))
    done = run("tests/execute.py")
    assert (done.returncode, done.stderr) == (0, "")
    for place, said in ((beside, "before\n"), (path, "after\n")):
        text, picture = nbformat.read(place, as_version=4).cells[1].outputs
        assert text.text == said and "image/png" in picture.data
    assert "| a claim | 3.000 | 1.000 |" in (tmp_path / "README.md").read_text("utf-8")


def test_replications_are_of_one_code_and_older_than_the_next(run, tmp_path):
    code = execute.code_sha256(execute.read(tmp_path / "fashion_sae.ipynb"))
    done = run("tests/replicate.py")
    assert done.returncode == 0, done.stderr
    found = execute.json_of(tmp_path / "models" / "replication.json")
    assert found["code_sha256"] == code  # and not of the edit during the first run
    wanted = [{"SEED": i, "HELD_OUT": i, "DATA_DIR": "data"} for i in range(1, 6)]
    assert [one["config"] for one in found["runs"]] == wanted
    quick = run("-m", "pytest", "tests/test_tools.py", "-k", "test_hash")
    release = run("-m", "pytest", "tests", "-m", "release")
    for suite, outcome in ((quick, "1 passed"), (release, "1 failed")):
        assert "\nOlder than the code, until made anew" in suite.stdout
        assert outcome in suite.stdout and "def test" not in suite.stdout
