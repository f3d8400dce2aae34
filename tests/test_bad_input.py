"""Bad input gets one clear error, before anything saved is touched."""

import io
import shutil
import subprocess

import execute
import pytest
import torch

BAD = [
    ("K", 0),
    ("K", 1025),
    ("EPOCHS", 0),
    ("BATCH_SIZE", -1),
    ("PATIENCE", 0),
    ("LEARNING_RATE", float("nan")),
    ("SEED", "zero"),
    ("DATA_DIR", None),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_parameter_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value!r} is not allowed"):
        execute.run_cells("check", **{name: value})


def copy_of_data(folder):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (execute.ROOT / "data" / "FashionMNIST" / "raw").glob("*-ubyte"):
        shutil.copy(path, raw)
    return raw


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_corrupt_data_is_named(tmp_path, data, damage):
    path = copy_of_data(tmp_path) / "t10k-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:5000])
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte is corrupt"):
        execute.run_cells("fetch", DATA_DIR=str(tmp_path))


def no_answer(*_, **__):
    raise OSError("no answer")


def test_missing_data_without_any_source(tmp_path, data, monkeypatch):
    raw = copy_of_data(tmp_path)
    (raw / "train-labels-idx1-ubyte").unlink()
    namespace = execute.run_cells("sources", DATA_DIR=str(tmp_path))
    namespace["installed_package"] = namespace["torchvision_mirror"] = no_answer
    monkeypatch.setattr(subprocess, "run", no_answer)
    namespace["no_answer"] = no_answer
    with pytest.raises(RuntimeError, match="train-labels-idx1-ubyte missing"):
        execute.run_cells("fetch", namespace, after="sources", DATA_DIR=str(tmp_path))
    assert not list(raw.glob(".fetch-*"))


@pytest.fixture(scope="module")
def defined(data):
    """Everything that the notebook defines up to its training loop."""
    return execute.run_cells("train", DATA_DIR=str(execute.ROOT / "data"), EPOCHS=1)


def test_loss_that_is_not_finite(defined):
    images = torch.full((300, 784), float("nan"))
    model = defined["KSparseAutoencoder"](
        defined["start_atoms"](defined["images"]["validation"], 0), images[0]
    )
    loader = defined["batches"](images, torch.zeros(300), seed=0)
    with pytest.raises(FloatingPointError, match="epoch 1, step 1"):
        defined["train"](model, loader, images, 1)


def test_file_of_another_shape(defined):
    namespace = execute.run_cells(
        "files", {**defined, "encoder": None}, after="pairs", EPOCHS=1
    )
    file = io.BytesIO(namespace["to_bytes"](torch.nn.Linear(784, 512)))
    with pytest.raises(ValueError, match=r"nn.Linear\(784, 1024\) needs"):
        namespace["load_layer"](file, 784, 1024)
