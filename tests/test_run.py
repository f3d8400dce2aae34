"""A reduced run of the whole notebook, and its numbers recomputed with NumPy."""

import copy
import functools
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
STRICT = "\nimport warnings\n\nwarnings.simplefilter('error', DeprecationWarning)"
SAVING = "import shutil\n\nshutil.copytree(MODELS, 'saved')"
CLAIMS = """
the probe reads codes better than the simpler features that are best on validation images
zeroing the ten costs a class more than zeroing the ten of dealt weights
zeroing the ten costs a class more than zeroing the ten of gradients
setting the ten to their mean costs a class more than with the ten of the class contrast
the tens alone classify better than those of dealt weights
the tens alone classify better than those of the class contrast
the formula finds more of a teacher's influence than the weight alone
the formula finds more of a raw teacher's influence than the weight alone
the formula parts a cue's unit from the decoy's better than the weight alone
occlusion peaks on a cue more often than on a decoy that is as frequent
judges misread more images without what the ten draw than without what dealt tens draw, at equal energy
judges misread more images without what the ten draw than without the class mean, at equal energy
judges misread more images without what the ten draw than without what the untrained study's tens draw, at equal energy
important units are found again more often than other busy units
"""
CLAIMS = CLAIMS.strip().split("\n")
OUTCOMES = [("yes", 50), ("no", -50), ("open", 0)] * 5  # by invented differences
METRICS = """
ablation: zeroed kept zeroed_by_class
ablation/zeroed ablation/kept: formula mean_activation weight dealt
another_training/found: important other_busy all
importance: top_units
judges: accuracy erased pixel_change
judges/accuracy judges/erased/equal/dealt: cnn perceptron
judges/erased/own judges/pixel_change: formula signed dealt class_mean untrained
planted: cue_places decoy_places peaks energy_on_square
planted/cue_places planted/decoy_places: formula weight mean_activation
planted/peaks/cue planted/peaks/decoy: occlusion occlusion_by_mean overlay
probe: test_accuracy per_class_accuracy baselines
probe/baselines: raw_pixels pca untrained_dense untrained_top_k
ranking: zeroed mean_ablated kept refitted
ranking/zeroed ranking/kept: formula signed gradient contrast spread weight mean_activation dealt
reconstruction: test_mse test_fvu pca_test_fvu untrained_test_fvu
sparsity: l0_mean dead_units_train rare_units_train
teacher teacher_raw: formula signed weight positive_weight mean_activation
training: best_epoch epochs_run seconds
"""
OTHERS = "comparisons config data_sha256 environment models_sha256 seconds".split()


def reduced_copy(folder):
    """The notebook with few epochs, and in its folder five invented trainings that fit."""
    (folder / "models").mkdir()
    config, runs = {**execute.parameters_of(execute.read()), **REDUCED}, []
    for x in range(-2, 3):
        rows = [{"ours": 3, "rival": 2, "difference": y + x} for _, y in OUTCOMES]
        runs.append({"config": config, "comparisons": dict(zip(CLAIMS[1:], rows))})
    execute.write_whole(folder / "models" / "replication.json", {"runs": runs})
    return execute.inject(execute.read(), **REDUCED)


def run_reduced(folder):
    """A run of it, after which its cells but for heavy ones run from last to first."""
    notebook, saved = reduced_copy(folder), folder / "saved"
    execute.tagged(notebook, execute.INJECTED).source += STRICT
    n, again = len(notebook.cells), execute.code_cells(notebook, without="heavy")[::-1]
    saving = nbformat.v4.new_code_cell(SAVING)  # before all is saved anew
    notebook.cells += [saving, *copy.deepcopy(again)]
    execute.execute(notebook, folder)
    notebook.cells, again = notebook.cells[:n], notebook.cells[n + 1 :]
    metrics = execute.json_of(saved / "metrics.json")
    return SimpleNamespace(notebook=notebook, again=again, saved=saved, metrics=metrics)


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    execute.fetch_data()
    return run_reduced(tmp_path_factory.mktemp("reduced"))


def outputs_of(notebook):
    return [out for cell in execute.code_cells(notebook) for out in cell.outputs]


def check_outputs(notebook):
    """Nothing on stderr; below each figure another sentence than its text alternative."""
    shown = outputs_of(notebook)
    assert not [out for out in shown if out.get("name") == "stderr"]
    assert not [out for out in shown if execute.WIDGET in out.get("data", {})]
    figures = [i for i, out in enumerate(shown) if "image/png" in out.get("data", {})]
    assert len(figures) >= 20
    for i in figures:
        drawn, reading = shown[i].metadata["image/png"]["alt"], shown[i + 1].data
        assert "" != drawn.strip() != reading["text/markdown"].strip() != ""


def test_everything_came_out(reduced):
    metrics, listed = reduced.metrics, set(OTHERS)
    for line in METRICS.strip().split("\n"):
        paths, names = line.split(": ")
        for path in paths.split():
            part = functools.reduce(dict.get, path.split("/"), metrics)
            assert set(part) == set(names.split()), path
            listed.add(path.split("/")[0])
    assert set(metrics) == listed and "tensor(" not in str(metrics)
    assert set(metrics["config"]) == set(execute.parameters_of(reduced.notebook))
    assert len(list(reduced.saved.iterdir())) == 2 + len(metrics["models_sha256"]) == 5
    for name, digest in metrics["models_sha256"].items():
        content = (reduced.saved / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    check_outputs(reduced.notebook)
    for tag in execute.PICTURES.values():
        assert execute.picture(reduced.notebook, tag)


def test_six_trainings_decide(reduced):
    """In metrics.json and in what is shown; but not of the first claim, which none has."""
    comparisons = reduced.metrics["comparisons"]
    assert list(comparisons) == CLAIMS and comparisons[CLAIMS[0]]["six"] is None
    for row, (outcome, middle) in zip(list(comparisons.values())[1:], OUTCOMES):
        six = [row["difference"], *(middle + x for x in range(-2, 3))]
        assert row["six"]["differences"] == pytest.approx(six)
        assert row["six"]["outcome"] == outcome
    texts = str(outputs_of(reduced.notebook))
    for count in ("14 comparisons: ", "5 yes", "4 no", "4 open", "1 undecided"):
        assert count in texts


def test_cells_run_again_from_the_last_to_the_first(reduced):
    """Nothing is raised, which the fixture would show, and no output changes."""
    first = {cell.id: cell.outputs for cell in execute.code_cells(reduced.notebook)}
    assert len(reduced.again) > 60
    for cell in reduced.again:
        for out in [*cell.outputs, *first[cell.id]]:
            out.pop("execution_count", None)
        assert cell.outputs == first[cell.id], cell.source


def pixels_and_labels(part):
    """Pixels [n, 784] in [0, 1] and labels [n], read by NumPy."""
    raw = execute.DATA / "FashionMNIST" / "raw"
    x = np.fromfile(raw / f"{part}-images-idx3-ubyte", np.uint8, offset=16)
    y = np.fromfile(raw / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
    return x.reshape(-1, 784).astype(np.float32) / 255, y


def layers_in(folder):
    """Weight [n_in, n_out] and bias of encoder, decoder and classifier."""
    layers = []
    for name in ("encoder", "decoder", "classifier"):
        state = torch.load(folder / f"{name}.pth", weights_only=True)
        layers.append((state["weight"].numpy().T, state["bias"].numpy()))
    return layers


def codes_of(x, encoder, k):
    z = np.maximum(x @ encoder[0] + encoder[1], 0)
    z[z < np.sort(z, axis=1)[:, -k, None]] = 0
    return z


RELEASE = pytest.param("committed", marks=pytest.mark.release)


@pytest.mark.parametrize("run", ["reduced", RELEASE])
def test_numbers_follow_from_the_files(run, request):
    """MSE, L0, accuracy, rankings, ablations, and comparisons of section 11."""
    run = request.getfixturevalue(run)
    metrics, config = run.metrics, run.metrics["config"]
    encoder, (atoms, bias), (weight, constant) = layers_in(run.saved)
    x, y = pixels_and_labels("t10k")
    z = codes_of(x, encoder, config["K"])
    l0, mse = (z > 0).sum(1), np.mean((z @ atoms + bias - x) ** 2)
    right = (z @ weight + constant).argmax(1) == y
    assert l0.mean() == pytest.approx(metrics["sparsity"]["l0_mean"], abs=0.01)
    assert mse == pytest.approx(metrics["reconstruction"]["test_mse"], rel=1e-4)
    assert right.mean() == pytest.approx(metrics["probe"]["test_accuracy"], abs=3e-4)

    draws = torch.Generator().manual_seed(config["SEED"])
    train = torch.randperm(60_000, generator=draws).numpy()[6_000:]
    train_x, train_y = (part[train] for part in pixels_and_labels("train"))
    z_train, positive = codes_of(train_x, encoder, config["K"]), np.maximum(weight, 0)
    means = np.stack([z_train[train_y == c].mean(0) for c in range(10)], axis=1)
    average, formula = z_train.mean(0), np.abs(weight) * means
    for c, ten in enumerate(metrics["importance"]["top_units"].values()):
        best = np.sort(formula[:, c])[::-1][:10]
        np.testing.assert_allclose(formula[ten, c], best, rtol=1e-3)

    def ablated(scores, n):
        """Right with the own class's top n of scores at zero, at the mean, and alone."""
        member = np.zeros_like(scores)
        top = np.argsort(-scores, axis=0, kind="stable")[:n]
        np.put_along_axis(member, top, 1, axis=0)
        member *= scores > 0
        zeroed = z * (1 - member.T[y])
        logits = [zeroed @ weight, (zeroed + average * member.T[y]) @ weight]
        logits.append(z @ (weight * member))
        return [(values + constant).argmax(1) == y for values in logits]

    def dealt_scores(draw):
        """Positive weights dealt anew in blocks of ten units of like mean activation."""
        draws.manual_seed(20 * config["SEED"] + draw)
        scores = np.zeros_like(means)
        for c in range(10):
            order = np.argsort(-means[:, c], kind="stable")
            order = order[weight[order, c] > 0]
            for block in np.split(order, range(10, len(order), 10)):
                other = block[torch.randperm(len(block), generator=draws).numpy()]
                scores[block, c] = weight[other, c] * means[block, c]
        return scores

    contrast = positive * (means - (means.sum(1, keepdims=True) - means) / 9)
    rankings = {"formula": [formula], "weight": [positive], "contrast": [contrast]}
    rankings["mean_activation"] = [(weight > 0) * means]
    rankings["dealt"] = [dealt_scores(draw) for draw in range(20)]
    ways, tens = ("zeroed", "mean_ablated", "kept"), {}
    for name, lists in rankings.items():
        tens[name] = dict(zip(ways, np.mean([ablated(x, 10) for x in lists], axis=0)))
        for way, right in tens[name].items():
            accuracy = metrics["ranking"][way][name]
            assert accuracy == pytest.approx(right.mean(), **NEAR), (way, name)
    for way, right in zip(ways[::2], ablated(formula, 50)[::2]):
        accuracy = metrics["ablation"][way]["formula"]["50"]
        assert accuracy == pytest.approx(right.mean(), **NEAR), way
    rows, rivals = list(metrics["comparisons"].values()), ("dealt", "contrast", "dealt")
    for row, way, rival in zip((rows[1], rows[3], rows[4]), ways, rivals):
        ours, theirs = tens["formula"][way], tens[rival][way]
        margin = 1.96 * (ours - theirs).std() / len(ours) ** 0.5
        assert row["ours"] == pytest.approx(ours.mean(), **NEAR)
        assert row["rival"] == pytest.approx(theirs.mean(), **NEAR)
        assert row["high"] - row["low"] == pytest.approx(2 * margin, rel=0.02)


@pytest.mark.slow
def test_run_twice_is_run_once(reduced, tmp_path):
    """Another process finds the same numbers to the last digit, but for the time."""
    once, twice = copy.deepcopy(reduced.metrics), run_reduced(tmp_path).metrics
    for metrics in (once, twice):
        metrics["seconds"] = metrics["training"]["seconds"] = 0.0
    assert once == twice
