"""A reduced run of the whole notebook, and its numbers recomputed with NumPy."""

import copy
import gzip
import hashlib
from types import SimpleNamespace

import execute
import nbformat
import numpy as np
import pytest
import torch

NEAR = {"abs": 3e-3}  # NumPy sums in another order: a few images near a border change
REDUCED = {"EPOCHS": 2, "PROBE_EPOCHS": 2, "CUE_EPOCHS": 1, "MAP_IMAGES": 4}
REDUCED["DATA_DIR"] = str(execute.DATA)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory, raw):
    """The whole notebook with few epochs; then, but for heavy cells, last to first."""
    folder = tmp_path_factory.mktemp("reduced")
    notebook = execute.inject(execute.read(), **REDUCED)
    again = copy.deepcopy(execute.code_cells(notebook, without="heavy")[::-1])
    saving = "import shutil\n\nshutil.copytree(MODELS, 'saved')"  # before saving anew
    n = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(saving), *again]
    execute.execute(notebook, folder)
    notebook.cells, again = notebook.cells[:n], notebook.cells[n + 1 :]
    return SimpleNamespace(notebook=notebook, again=again, saved=folder / "saved")


def metrics_in(folder):
    return execute.json_of(folder / "metrics.json")


def check_outputs(notebook):
    """Nothing on stderr; each figure's text alternative is also shown below it."""
    shown = [out for cell in execute.code_cells(notebook) for out in cell.outputs]
    assert not [out for out in shown if out.get("name") == "stderr"]
    data = [out.data for out in shown if "data" in out]
    assert not [one for one in data if execute.WIDGET in one]
    texts = [one["text/markdown"] for one in data if "text/markdown" in one]
    figures = [o.metadata for o in shown if "image/png" in o.get("data", {})]
    assert [metadata["image/png"]["alt"] for metadata in figures] == texts
    assert len(figures) >= 15


def test_everything_came_out(reduced):
    metrics = metrics_in(reduced.saved)
    assert set(metrics) == set(metrics_in(execute.MODELS)) - {"code_sha256"}
    assert metrics["config"]["EPOCHS"] == 2
    assert len(metrics["comparisons"]) == 18
    assert len(list(reduced.saved.iterdir())) == 4
    for name, digest in metrics["models_sha256"].items():
        content = (reduced.saved / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    check_outputs(reduced.notebook)
    for tag in execute.PICTURES.values():
        assert execute.picture(reduced.notebook, tag)


def test_cells_run_again_from_the_last_to_the_first(reduced):
    """Nothing is raised, which the fixture would show, and no output changes."""

    def shown_by(cell):
        return [{**out, "execution_count": None} for out in cell.outputs]

    first = {c.source: shown_by(c) for c in execute.code_cells(reduced.notebook)}
    assert len(reduced.again) > 100
    for cell in reduced.again:
        assert shown_by(cell) == first[cell.source], cell.source


def pixels_and_labels(raw, part):
    """Pixels [n, 784] in [0, 1] and labels [n], read by NumPy, plain or as .gz."""
    arrays = []
    for name, header in ((f"{part}-images-idx3", 16), (f"{part}-labels-idx1", 8)):
        (path,) = sorted(raw.glob(f"{name}-ubyte*"))[:1]
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        arrays.append(np.frombuffer(content, np.uint8, offset=header))
    return arrays[0].reshape(-1, 784).astype(np.float32) / 255, arrays[1]


def check_comparison(row, ours, rival):
    """A row of metrics.json against paired values [n], computed here."""
    difference, n = ours.astype(float) - rival, len(ours)
    student = 1.96 + 2.37 / (n - 1) + 2.82 / (n - 1) ** 2
    margin = student * difference.std(ddof=1) / n**0.5
    assert row["ours"] == pytest.approx(ours.mean(), **NEAR)
    assert row["rival"] == pytest.approx(rival.mean(), **NEAR)
    assert row["high"] - row["difference"] == pytest.approx(margin, rel=0.02)


RELEASE = pytest.param("committed", marks=pytest.mark.release)


@pytest.mark.parametrize("run", ["reduced", RELEASE])
def test_numbers_follow_from_the_files(run, request):
    """MSE, L0, accuracy, ranking, ablation, and the comparisons of section 9."""
    folder = request.getfixturevalue(run).saved
    raw = request.getfixturevalue("raw")
    metrics, layers = metrics_in(folder), []
    for name in ("encoder", "decoder", "classifier"):
        state = torch.load(folder / f"{name}.pth", weights_only=True)
        layers.append((state["weight"].numpy().T, state["bias"].numpy()))
    (rows, offset), (atoms, bias), (weight, constant) = layers

    def codes_of(x):
        z = np.maximum(x @ rows + offset, 0)
        z[z < np.sort(z, axis=1)[:, -metrics["config"]["K"], None]] = 0
        return z

    x, y = pixels_and_labels(raw, "t10k")
    z = codes_of(x)
    l0, mse = (z > 0).sum(1), np.mean((z @ atoms + bias - x) ** 2)
    right = (z @ weight + constant).argmax(1) == y
    assert l0.max() == metrics["sparsity"]["l0_max"] <= metrics["config"]["K"]
    assert l0.mean() == pytest.approx(metrics["sparsity"]["l0_mean"], abs=0.01)
    assert mse == pytest.approx(metrics["reconstruction"]["test_mse"], rel=1e-4)
    assert right.mean() == pytest.approx(metrics["probe"]["test_accuracy"], abs=3e-4)

    draws = torch.Generator().manual_seed(metrics["config"]["SEED"])
    train = torch.randperm(60_000, generator=draws).numpy()[6_000:]
    train_x, train_y = (part[train] for part in pixels_and_labels(raw, "train"))
    train_z, size = codes_of(train_x), np.abs(weight)
    means = np.stack([train_z[train_y == c].mean(0) for c in range(10)], axis=1)
    for c, ten in enumerate(metrics["importance"]["top_units"].values()):
        best = np.sort(size[:, c] * means[:, c])[::-1][:10]
        np.testing.assert_allclose(size[ten, c] * means[ten, c], best, rtol=1e-3)

    def ablated(scores, n):
        """Right without the own class's top n of scores, and by all top n alone."""
        member = np.zeros_like(scores)
        top = np.argsort(-scores, axis=0, kind="stable")[:n]
        np.put_along_axis(member, top, 1, axis=0)
        without = (z * (1 - member.T[y])) @ weight + constant
        alone = z @ (weight * member) + constant
        return without.argmax(1) == y, alone.argmax(1) == y

    rankings = {"formula": size * means, "mean_activation": means}
    rankings["weight"] = size * (means > 0)
    for name, scores in rankings.items():
        for n in (1, 10, 50):
            for key, right in zip(("zeroed", "kept"), ablated(scores, n)):
                measured = metrics["ablation"][key][name][str(n)]
                assert measured == pytest.approx(right.mean(), **NEAR), (key, name, n)

    tens = []
    for i in range(20):
        draws.manual_seed(20 * metrics["config"]["SEED"] + i)
        shuffled = np.zeros_like(means)
        for c in range(10):
            order = np.argsort(-means[:, c], kind="stable")
            for block in np.split(order, range(10, len(order), 10)):
                other = block[torch.randperm(len(block), generator=draws).numpy()]
                shuffled[block, c] = size[other, c] * means[block, c]
        tens.append(ablated(shuffled, 10))
    (zeroed, kept), own = np.mean(tens, axis=0), ablated(size * means, 10)
    claims = metrics["comparisons"]
    row = claims["zeroing the ten costs a class more than zeroing shuffled tens"]
    check_comparison(row, 1.0 - own[0], 1 - zeroed)
    row = claims["the ten alone classify better than shuffled tens alone"]
    check_comparison(row, own[1], kept)
    for row in claims.values():
        signs = (row["low"] > 0, row["high"] > 0)
        outcomes = {(True, True): "yes", (False, False): "no", (False, True): "open"}
        assert row["outcome"] == outcomes[signs]
        assert row["difference"] == pytest.approx(row["ours"] - row["rival"], abs=1e-6)


@pytest.mark.slow
def test_run_twice_is_run_once(reduced, tmp_path):
    """Another process finds the same numbers to the last digit, but for the time."""
    execute.execute(execute.inject(execute.read(), **REDUCED), tmp_path)
    once, twice = metrics_in(reduced.saved), metrics_in(tmp_path / "models")
    for metrics in (once, twice):
        metrics["seconds"] = metrics["training"]["seconds"] = 0.0
    assert once == twice
