"""What several tests share: the data, and one reduced run of the whole notebook."""

import copy
import functools
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

    @functools.cached_property
    def test_codes(self):
        """Codes of the official test images, [10,000, n_units]."""
        return self.codes(self.data.test[0])

    def class_means(self, values_of):
        """Mean over each class's training images of what is made of them, [10, m]."""
        draws = torch.Generator().manual_seed(self.metrics["config"]["SEED"])
        rows = torch.randperm(60_000, generator=draws).numpy()[6_000:]
        values, y = values_of(self.data.train[0][rows]), self.data.train[1][rows]
        return np.stack([values[y == c].mean(0) for c in range(10)])

    @functools.cached_property
    def train_means(self):
        """Mean code of each class, [10, n_units]."""
        return self.class_means(self.codes)

    def logits(self, z):
        return z @ self.classifier["weight"].T + self.classifier["bias"]

    def units(self, kind):
        """The ten units of each class, [10, 10]: `top_10` or `matched`."""
        groups = {"top_10": ("importance", "top_units")}
        group, key = groups.get(kind, ("ablation", "matched_units"))
        return np.array(list(self.metrics[group][key].values()))

    def right_without(self, units):
        """Test images read rightly without the units of each class, [10, n]."""
        right = []
        for gone in units:
            z = self.test_codes.copy()
            z[:, gone] = 0
            right.append(self.logits(z).argmax(1) == self.data.test[1])
        return np.array(right)


@pytest.fixture(scope="session")
def data():
    """The official images [n, 784] in [0, 1] and labels, fetched by the notebook."""
    execute.run_cells("fetch", DATA_DIR=REDUCED["DATA_DIR"])
    raw = execute.ROOT / "data" / "FashionMNIST" / "raw"
    parts = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(raw / f"{prefix}-images-idx3-ubyte").reshape(-1, 784)
        labels = read_idx(raw / f"{prefix}-labels-idx1-ubyte")
        parts[part] = (images.astype(np.float32) / 255, labels)
    return SimpleNamespace(**parts)


# what a reader does at the end, with what is given and with what is nothing; and what
# the judges are shown, noted by one that answers with the study's logits
ENDING = """
def seconds_of(call, given):
    begun = time.perf_counter()
    call(given)
    return time.perf_counter() - begun


def refusal_of(call, given):
    try:
        call(given)
    except ValueError as error:
        return str(error)


picture = images["test"][0]
gray_255 = (255 * picture).round().to(torch.uint8).reshape(28, 28).cpu()
pillow = PIL.Image.fromarray(gray_255.numpy())
kinds = {
    "tensor": picture,
    "with a gradient": picture.clone().requires_grad_(),
    "batch of one": picture.reshape(1, 1, 28, 28),
    "array": picture.cpu().numpy().astype(np.float64).reshape(28, 28),
    "list": picture.tolist(),
    "uint8": gray_255.numpy(),
    "uint8 tensor": gray_255,
    "PIL": pillow,
    "negative": 1 - picture,
}
spoilt = {
    "above 1": 255 * picture,
    "integers": gray_255.tolist(),
    "short": picture[1:],
    "other shape": picture.reshape(14, 56),
    "empty": [],
    "colours": pillow.convert("RGB"),
    "not a number": picture * math.nan,
    "ragged": [[0.0, 1.0], [0.5]],
    "nothing": None,
    "text": "a shoe",
}
ending = {
    "look_at": [seconds_of(look_at, images["test"][i]) for i in (1, 2, 3)],
    "look_at_unit": [seconds_of(look_at_unit, unit) for unit in (0, 1, N_UNITS - 1)],
    "read": {
        what: ((pixels_of(given)[0] - picture).abs().max().item(), pixels_of(given)[1])
        for what, given in kinds.items()
    },
    "no image": {what: refusal_of(look_at, given) for what, given in spoilt.items()},
    "no unit": {repr(x): refusal_of(look_at_unit, x) for x in (-1, N_UNITS, "3", True, 2.0)},
}
seen = {}
given = images["test"][:500], test_codes[:500], labels["test"][:500]
for kind in ("top_10", "matched", "class_mean"):
    seen[kind] = left_of(study, *given, kind).cpu().numpy()
np.savez("seen.npz", **seen)
import shutil

shutil.copytree(MODELS, "saved")
print(json.dumps(ending))
"""


HEAVY = {"run-training", "baselines", "judges", "plant", "retrain"}  # not run once more


@pytest.fixture(scope="session")
def reduced(tmp_path_factory, data):
    """The whole notebook, run in an empty folder with few epochs, and what it saved.

    After its end, and what a reader does there, its cells are run once more, from the
    last to the first, but for the heavy ones. (Saving anew removes metrics.json, so
    the files are copied before.)
    """
    folder = tmp_path_factory.mktemp("reduced")
    notebook = execute.inject(execute.read(), **REDUCED)
    n, ending = len(notebook.cells), nbformat.v4.new_code_cell(ENDING)
    again = [cell for cell in execute.code_cells(notebook)[::-1] if cell["id"] not in HEAVY]
    notebook.cells += [ending, *map(copy.deepcopy, again)]
    execute.execute(notebook, folder)
    *_, said = notebook.cells[n].outputs
    notebook.cells, backwards = notebook.cells[:n], notebook.cells[n + 1 :]
    return SimpleNamespace(
        notebook=notebook,
        backwards=backwards,
        folder=folder,
        saved=Artifacts(folder / "saved", data),
        ending=json.loads(said.text),
        seen=np.load(folder / "seen.npz"),
    )


@pytest.fixture(scope="session")
def committed(data):
    """The artifacts in the repository."""
    return Artifacts(execute.ROOT / "models", data)
