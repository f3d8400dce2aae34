"""What several tests share: the data, and one reduced run of the whole notebook."""

import json
from types import SimpleNamespace

import execute
import matplotlib
import nbformat
import numpy as np
import pytest
import torch

matplotlib.use("agg")

REDUCED = {
    "EPOCHS": 2,
    "PROBE_EPOCHS": 2,
    "CONTROL_EPOCHS": 1,
    "MAP_IMAGES": 4,
    "BOOTSTRAPS": 100,
    "DATA_DIR": str(execute.ROOT / "data"),
}


def read_idx(path):
    """The array in an IDX file, the format of MNIST, read by NumPy alone."""
    data = path.read_bytes()
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


class Artifacts:
    """The saved files of one run, as NumPy arrays, and what follows from them."""

    def __init__(self, folder, data):
        self.metrics = json.loads((folder / "metrics.json").read_text())
        for name in ("encoder", "decoder", "classifier"):
            state = torch.load(folder / f"{name}.pth", weights_only=True)
            setattr(self, name, {key: x.numpy() for key, x in state.items()})
        self.k = self.metrics["config"]["K"]
        self.data = data

    def codes(self, x):
        """Codes [n, n_units] of pixels x [n, 784] in [0, 1], by sorting."""
        z = np.maximum(x @ self.encoder["weight"].T + self.encoder["bias"], 0)
        z[z < np.sort(z, axis=1)[:, -self.k, None]] = 0
        return z

    def logits(self, z):
        return z @ self.classifier["weight"].T + self.classifier["bias"]

    def train_means(self):
        """Mean code of each class over the 54,000 training images, [10, n_units]."""
        x, y = self.data.train
        draws = torch.Generator().manual_seed(self.metrics["config"]["SEED"])
        order = torch.randperm(60_000, generator=draws).numpy()[6_000:]
        z = self.codes(x[order])
        return np.stack([z[y[order] == c].mean(0) for c in range(10)])


@pytest.fixture(scope="session")
def data():
    """The official images [n, 784] in [0, 1] and labels, fetched by the notebook."""
    execute.run_cells("verify", DATA_DIR=REDUCED["DATA_DIR"])
    raw = execute.ROOT / "data" / "FashionMNIST" / "raw"
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(raw / f"{prefix}-images-idx3-ubyte").reshape(-1, 784)
        labels = read_idx(raw / f"{prefix}-labels-idx1-ubyte")
        parts[part] = (images.astype(np.float32) / 255, labels)
    return SimpleNamespace(**parts)


# what a reader does at the end: other images, and one that is none
TRY_IT = """
seconds = []
for i in (1, 2, 3):
    begun = time.perf_counter()
    look_at(images["test"][i])
    seconds.append(time.perf_counter() - begun)
try:
    look_at(255 * images["test"][0])
except ValueError as error:
    print(json.dumps({"seconds": seconds, "error": str(error)}))
"""


@pytest.fixture(scope="session")
def reduced(tmp_path_factory, data):
    """The whole notebook, run in an empty folder with few epochs, and what it saved."""
    folder = tmp_path_factory.mktemp("reduced")
    notebook = execute.inject(execute.read(), **REDUCED)
    notebook.cells.append(nbformat.v4.new_code_cell(TRY_IT))
    execute.execute(notebook, folder)
    *_, said = notebook.cells.pop().outputs
    return SimpleNamespace(
        notebook=notebook,
        folder=folder,
        saved=Artifacts(folder / "models", data),
        try_it=json.loads(said.text),
    )


@pytest.fixture(scope="session")
def committed(data):
    """The artifacts in the repository."""
    return Artifacts(execute.ROOT / "models", data)
