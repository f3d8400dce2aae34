"""A reduced run of the whole notebook, and its numbers recomputed with NumPy."""

import copy
from types import SimpleNamespace

import execute
import nbformat
import numpy as np
import pytest
import torch
from torchvision.datasets import FashionMNIST

NEAR = {"abs": 3e-3}  # NumPy sums in another order: a few images near a border change
REDUCED = {"EPOCHS": 2, "PROBE_EPOCHS": 2, "CUE_EPOCHS": 1, "MAP_IMAGES": 4}
REDUCED["DATA_DIR"] = str(execute.DATA)
STRICT = "\nimport warnings\n\nwarnings.simplefilter('error', DeprecationWarning)"
SAVING = "import shutil\n\nshutil.copytree(MODELS_DIR, 'saved')"
CLAIMS = execute.json_of(execute.MODELS / "metrics.json")["comparisons"]
OUTCOMES = [("yes", 50), ("no", -50), ("open", 0)] * 5  # by invented differences
INVENTED = dict(zip(list(CLAIMS)[1:], OUTCOMES))  # not for the first claim
NAMES = "ablation another_training comparisons config data_sha256 environment "
NAMES += "importance judges models_sha256 planted probe ranking reconstruction seconds "
NAMES += "sparsity teacher teacher_raw training"


def reduced_copy(folder):
    """The notebook with few epochs, and in its folder five invented trainings that fit."""
    (folder / "models").mkdir()
    usual, runs = execute.parameters_of(execute.read()), []
    for i in range(1, 6):
        config = {**usual, **REDUCED, "SEED": i, "HELD_OUT": i}
        rows = {}
        for claim, (_, x) in INVENTED.items():
            rows[claim] = {"ours": 3, "rival": 2, "difference": x + i - 3}
        runs.append({"config": config, "comparisons": rows})
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
    """The names in metrics.json; a level below, those of the committed one are there."""
    metrics, path = reduced.metrics, execute.MODELS / "metrics.json"
    assert set(metrics) == set(NAMES.split()) and "tensor(" not in str(metrics)
    for name, part in execute.json_of(path).items():
        if type(part) is dict and name != "comparisons":  # a claim may be new
            assert set(part) <= set(metrics[name]), name
    assert len(list(reduced.saved.iterdir())) == 2 + len(metrics["models_sha256"]) == 5
    check_outputs(reduced.notebook)


def test_six_trainings_decide(reduced):
    """In metrics.json and in what is shown; but not of a claim that is new to them."""
    comparisons = reduced.metrics["comparisons"]
    known = [claim for claim in INVENTED if claim in comparisons]
    for claim in known:
        (outcome, middle), row = INVENTED[claim], comparisons[claim]
        six = [row["difference"], *(middle + x for x in range(-2, 3))]
        assert row["six"]["differences"] == pytest.approx(six)
        assert row["six"]["outcome"] == outcome
    undecided = f"{len(comparisons) - len(known)} undecided"
    assert len(known) > 5 and undecided in str(outputs_of(reduced.notebook))


def test_cells_run_again_from_the_last_to_the_first(reduced):
    """Nothing is raised, which the fixture would show, and no output changes."""
    first = {cell.id: cell.outputs for cell in execute.code_cells(reduced.notebook)}
    assert len(reduced.again) > 60
    for cell in reduced.again:
        for out in [*cell.outputs, *first[cell.id]]:
            out.pop("execution_count", None)
        assert cell.outputs == first[cell.id], cell.source


def pixels_and_labels(train):
    """Pixels [n, 784] in [0, 1] and labels [n]."""
    data = FashionMNIST(execute.DATA, train=train)
    return data.data.view(-1, 784).numpy() / np.float32(255), data.targets.numpy()


def layers_in(folder):
    """Weight [n_in, n_out] and bias of encoder, decoder and classifier."""
    names = ("encoder", "decoder", "classifier")
    states = [torch.load(folder / f"{name}.pth", weights_only=True) for name in names]
    return [(x["weight"].numpy().T, x["bias"].numpy()) for x in states]


def codes_of(x, encoder, k):
    z = np.maximum(x @ encoder[0] + encoder[1], 0)
    return z * (z >= np.sort(z, axis=1)[:, -k, None])


RELEASE = pytest.param("committed", marks=pytest.mark.release)


@pytest.mark.parametrize("run", ["reduced", RELEASE])
def test_numbers_follow_from_the_files(run, request):
    """MSE, L0, accuracy, rankings, ablations, and comparisons of section 11."""
    run = request.getfixturevalue(run)
    metrics, k = run.metrics, run.metrics["config"]["K"]
    encoder, (atoms, bias), (weight, constant) = layers_in(run.saved)
    x, y = pixels_and_labels(train=False)
    z = codes_of(x, encoder, k)
    l0, mse = (z > 0).sum(1).mean(), np.mean((z @ atoms + bias - x) ** 2)
    accuracy = np.mean((z @ weight + constant).argmax(1) == y)
    assert l0 == pytest.approx(metrics["sparsity"]["l0_mean"], abs=0.01)
    assert mse == pytest.approx(metrics["reconstruction"]["test_mse"], rel=1e-4)
    assert accuracy == pytest.approx(metrics["probe"]["test_accuracy"], abs=3e-4)
    seed, draws = metrics["config"]["SEED"], torch.Generator()
    order = torch.randperm(60_000, generator=draws.manual_seed(seed)).numpy()
    train_x, train_y = [part[order[6_000:]] for part in pixels_and_labels(train=True)]
    z_train = codes_of(train_x, encoder, k)
    means = np.stack([z_train[train_y == c].mean(0) for c in range(10)], axis=1)
    average, positive = z_train.mean(0), np.maximum(weight, 0)

    def dealt_scores(draw):
        """Positive weights dealt anew in blocks of ten units of like mean activation."""
        draws.manual_seed(20 * seed + draw)
        scores = np.zeros_like(means)
        for c in range(10):
            order = np.argsort(-means[:, c], kind="stable")
            order = order[weight[order, c] > 0]
            for block in np.split(order, range(10, len(order), 10)):
                other = block[torch.randperm(len(block), generator=draws).numpy()]
                scores[block, c] = weight[other, c] * means[block, c]
        return scores

    def ablated(scores):
        """Right with the own class's ten at zero, at their means, and alone."""
        member = np.zeros_like(scores)
        for c, ten in enumerate(np.argsort(-scores, axis=0, kind="stable")[:10].T):
            member[ten, c] = scores[ten, c] > 0
        zeroed = z * (1 - member.T[y])
        logits = [zeroed @ weight, (zeroed + average * member.T[y]) @ weight]
        logits.append(z @ (weight * member))
        return [(values + constant).argmax(1) == y for values in logits]

    formula = np.abs(weight) * means
    for c, ten in enumerate(metrics["importance"]["top_units"].values()):
        best = np.sort(formula[:, c])[::-1][:10]
        np.testing.assert_allclose(formula[ten, c], best, rtol=1e-3)
    contrast = positive * (means - (means.sum(1, keepdims=True) - means) / 9)
    rankings = {"formula": [formula], "weight": [positive], "contrast": [contrast]}
    rankings["mean_activation"] = [(weight > 0) * means]
    rankings["signed"] = [weight * means]
    rankings["spread"] = [positive * z_train.std(0, keepdims=True).T]
    rankings["dealt"] = [dealt_scores(draw) for draw in range(20)]
    ways, right = ("zeroed", "mean_ablated", "kept"), {}
    for name, lists in rankings.items():
        outcomes = np.mean([ablated(scores) for scores in lists], axis=0)
        for way, right[way, name] in zip(ways, outcomes):
            accuracy = pytest.approx(metrics["ranking"][way][name], **NEAR)
            assert right[way, name].mean() == accuracy, (way, name)
    rows, rivals = list(metrics["comparisons"].values()), ("dealt", "contrast", "dealt")
    for row, way, rival in zip((rows[1], rows[3], rows[4]), ways, rivals):
        gain = right[way, "formula"] - right[way, rival]
        assert row["ours"] - row["rival"] == pytest.approx(gain.mean(), **NEAR)
        width = 2 * 1.96 * gain.std() / len(gain) ** 0.5
        assert row["high"] - row["low"] == pytest.approx(width, rel=0.02)


@pytest.mark.slow
def test_run_twice_is_run_once(reduced, tmp_path):
    """Another process finds the same numbers to the last digit, but for the time."""
    once, twice = copy.deepcopy(reduced.metrics), run_reduced(tmp_path).metrics
    for metrics in (once, twice):
        metrics["seconds"] = metrics["training"]["seconds"] = 0.0
    assert once == twice
