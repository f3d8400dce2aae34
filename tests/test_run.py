"""A reduced run of the whole notebook, checked against NumPy."""

import re

import execute
import nbformat
import numpy as np
import pytest
from conftest import REDUCED, Artifacts

FIGURES = 22
COLAB = "import sys, types; sys.modules['google.colab'] = types.ModuleType('colab')"


def outputs(notebook):
    return [out for cell in execute.code_cells(notebook) for out in cell.outputs]


def test_everything_came_out(reduced):
    names = {path.name for path in (reduced.folder / "models").iterdir()}
    assert names == {"encoder.pth", "decoder.pth", "classifier.pth", "metrics.json"}
    assert reduced.saved.metrics["config"]["EPOCHS"] == 2
    assert reduced.saved.metrics["code_sha256"] == execute.code_sha256(reduced.notebook)
    assert set(reduced.saved.metrics) >= {
        *("config", "environment", "data_sha256", "models_sha256", "code_sha256"),
        *("training", "reconstruction", "sparsity", "probe", "importance", "ablation"),
        *("occlusion", "known_answer", "seeds", "verdict"),
    }


def test_nothing_on_stderr(reduced):
    streams = [out.text for out in outputs(reduced.notebook) if "text" in out]
    assert streams == []


def test_every_figure_is_read(reduced):
    """Each figure has a text alternative, which is also shown below it."""
    shown = [
        out for out in outputs(reduced.notebook) if "image/png" in out.get("data", {})
    ]
    texts = {
        out["data"].get("text/markdown")
        for out in outputs(reduced.notebook)
        if "data" in out
    }
    assert len(shown) >= FIGURES
    for figure in shown:
        text = figure["metadata"]["image/png"]["alt"]
        assert text in texts
        assert not re.search(r"[{}]|\b(\w+) \1\b", text)  # no number left out


def test_try_it_answers_in_two_seconds(reduced):
    assert max(reduced.try_it["seconds"]) < 2
    assert "784 values from 0 to 255: give 28 x 28" in reduced.try_it["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extreme",
    [
        {"K": 1, "EPOCHS": 1},
        {"N_UNITS": 64, "K": 64, "BATCH_SIZE": 1000},
        {"N_UNITS": 4096, "EPOCHS": 1},
    ],
    ids=lambda extreme: ", ".join(f"{k}={v}" for k, v in extreme.items()),
)
def test_extremes_run_through(extreme, tmp_path, data):
    """What the parameters allow, in a kernel that passes for Colab's."""
    notebook = execute.inject(execute.read(), **(REDUCED | extreme))
    notebook.cells.insert(0, nbformat.v4.new_code_cell(COLAB))
    execute.execute(notebook, tmp_path)
    saved = Artifacts(tmp_path / "models", data)
    assert 0 < (saved.codes(data.test[0][:500]) > 0).sum(1).max() <= saved.k
    ending = notebook.cells[-1].outputs[-1].data["text/markdown"]
    assert "google.colab.files.download('models/encoder.pth')" in ending


def test_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match="EPOCH"):
        execute.inject(execute.read(), EPOCH=1)


@pytest.mark.parametrize("run", ["reduced", "committed"])
def test_metrics_follow_from_the_files(run, request, data):
    """MSE, L0, accuracy, importance and ablation, recomputed with NumPy."""
    saved = request.getfixturevalue(run)
    saved = saved.saved if run == "reduced" else saved
    metrics, (x, y) = saved.metrics, data.test
    z = saved.codes(x)
    l0 = (z > 0).sum(1)
    assert l0.max() <= saved.k
    reconstruction = z @ saved.decoder["weight"].T + saved.decoder["bias"]
    mse = np.mean((reconstruction - x) ** 2)
    assert mse == pytest.approx(metrics["reconstruction"]["test_mse"], rel=1e-4)
    hits = saved.logits(z).argmax(1) == y
    assert hits.mean() == pytest.approx(metrics["probe"]["test_accuracy"], abs=3e-4)

    means = saved.train_means()  # [10, n_units]
    importance = np.abs(saved.classifier["weight"]) * means
    names = list(metrics["importance"]["top_units"])
    for c, name in enumerate(names):
        top = metrics["importance"]["top_units"][name]
        expected = np.sort(importance[c])[::-1][:10]
        np.testing.assert_allclose(importance[c, top], expected, rtol=1e-3)

        without = z[y == c].copy()
        without[:, top] = 0
        accuracy = np.mean(saved.logits(without).argmax(1) == c)
        by_class = metrics["ablation"]["top_10_by_class"]
        assert accuracy == pytest.approx(by_class[name], abs=2e-3)


def test_controls_are_controls(committed, data):
    """From the files alone: matched twins cost a class little, others are unharmed."""
    x, y = data.test
    z = committed.codes(x)
    base = committed.logits(z).argmax(1) == y
    own, other = [], []
    for c, name in enumerate(committed.metrics["importance"]["top_units"]):
        without = z.copy()
        without[:, committed.metrics["ablation"]["matched_units"][name]] = 0
        own.append(np.mean((committed.logits(without).argmax(1) == y)[y == c]))
        without = z.copy()
        without[:, committed.metrics["importance"]["top_units"][name]] = 0
        other.append(np.mean((committed.logits(without).argmax(1) == y)[y != c]))
    ablation = committed.metrics["ablation"]
    assert np.mean(own) == pytest.approx(
        ablation["matched"]["10"]["own_accuracy"]["mean"], abs=1e-3
    )
    measured = ablation["top by importance"]["10"]["other_accuracy"]["mean"]
    assert np.mean(other) == pytest.approx(measured, abs=1e-3)
    assert base.mean() - np.mean(own) <= 0.05
