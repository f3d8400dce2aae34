"""A reduced run of the whole notebook, checked against NumPy."""

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import benchmark
import execute
import nbformat
import numpy as np
import pytest
import replicate
import torch
from conftest import REDUCED, Artifacts

FIGURES = 26
COLAB = "import sys, types; sys.modules['google.colab'] = types.ModuleType('colab')"


def outputs(notebook):
    return [out for cell in execute.code_cells(notebook) for out in cell.outputs]


def test_everything_came_out(reduced):
    names = {path.name for path in (reduced.folder / "saved").iterdir()}
    assert names == {"encoder.pth", "decoder.pth", "classifier.pth", "metrics.json"}
    assert reduced.saved.metrics["config"]["EPOCHS"] == 2
    assert set(reduced.saved.metrics) >= {
        *("config", "environment", "data_sha256", "models_sha256", "seconds"),
        *("training", "reconstruction", "sparsity", "probe", "importance", "ablation"),
        *("arithmetic", "judge", "known_answer", "maps", "seeds", "checks", "verdict"),
    }
    assert "code_sha256" not in reduced.saved.metrics  # that is for the full run
    assert set(execute.HEADLINES) <= set(reduced.saved.metrics["verdict"])


def test_nothing_on_stderr(reduced):
    streams = [out.text for out in outputs(reduced.notebook) if "text" in out]
    assert streams == []


def test_every_figure_is_read(reduced):
    """Each figure has a text alternative, which is also shown below it."""
    shown = [out for out in outputs(reduced.notebook) if "image/png" in out.get("data", {})]
    texts = {out["data"].get("text/markdown") for out in outputs(reduced.notebook) if "data" in out}
    assert len(shown) == FIGURES
    for figure in shown:
        text = figure["metadata"]["image/png"]["alt"]
        assert text in texts
        assert not set("{}") & set(text), text  # no number left out
    for cell_id in execute.PICTURES.values():
        assert execute.picture(reduced.notebook, cell_id)


def test_it_ends_with_a_line(reduced):
    """How long it took, which files there are, and where to look first."""
    (line,) = execute.code_cells(reduced.notebook)[-1].outputs
    said = line["data"]["text/markdown"]
    assert said.startswith(f"Done in {reduced.saved.metrics['seconds'] / 60:.1f} minutes.")
    for word in ("encoder.pth", "decoder.pth", "classifier.pth", "metrics.json", "(#12-", "(#16-"):
        assert word in said


def shown_by(cell):
    """Outputs of a cell, without the number of its execution."""
    return [{**out, "execution_count": None} for out in cell.outputs]


def test_cells_can_be_run_again_from_the_last_to_the_first(reduced):
    """Nothing is raised, which the fixture would show, and no output changes."""
    first = {cell["id"]: shown_by(cell) for cell in execute.code_cells(reduced.notebook)}
    assert len(reduced.backwards) > 50
    for cell in reduced.backwards:
        assert shown_by(cell) == first[cell["id"]], cell["id"]


def test_own_pictures(reduced):
    """What is a picture is read, with a remark where there is one; the rest is refused."""
    ending = reduced.ending
    for seconds in (ending["look_at"], ending["look_at_unit"]):
        assert sorted(seconds)[1] < 0.5  # of three; sliders stand before both
    bytes_, border = "Its values were read as 0 to 255 (uint8).", "Its border is brighter"
    for what, (off, remark) in ending["read"].items():
        assert (off > 0.5) if what == "negative" else (off < 1e-6), what
        assert (bytes_ in remark) == (what in ("uint8", "uint8 tensor", "PIL")), what
        assert (border in remark) == (what == "negative"), what
    asked = "give 28 x 28 values from 0 (black, the background) to 1, or to 255 of type uint8"
    said = {
        "above 1": f"the image goes from 0.0 to 255.0: {asked}",
        "integers": f"the image goes from 0.0 to 255.0: {asked}",
        "short": f"the image has the shape (783,): {asked}",
        "other shape": f"the image has the shape (14, 56): {asked}",
        "empty": f"the image has the shape (0,): {asked}",
        "colours": f"the image has the shape (28, 28, 3): {asked}; colours become gray by "
        'image.convert("L")',
        "not a number": f"the image goes from nan to nan: {asked}",
    }
    for what, error in ending["no image"].items():
        assert error == said[what] if what in said else "is no array of numbers" in error, what
    for unit, error in ending["no unit"].items():
        assert error == f"unit = {unit} is none: give an int from 0 to 1023"


def test_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match="EPOCH"):
        execute.inject(execute.read(), EPOCH=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extreme",
    [
        {"K": 1, "EPOCHS": 1},
        {"N_UNITS": 64, "K": 64, "BATCH_SIZE": 1000},
        {"N_UNITS": 8192, "EPOCHS": 1, "PROBE_EPOCHS": 1},
        {"HELD_OUT": 6, "SEED": 6},
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


@pytest.mark.slow
def test_twice_in_one_kernel_is_as_once(tmp_path, data):
    """Run All, and Run All again: the same outputs, but for the time, and the same files."""
    notebook = execute.inject(execute.read(), **REDUCED)
    n = len(notebook.cells)
    digest = "[hashlib.sha256((MODELS / x).read_bytes()).hexdigest() for x in sorted(layer_sums())]"
    notebook.cells += [nbformat.v4.new_code_cell(digest), *copy.deepcopy(notebook.cells)]
    notebook.cells.append(nbformat.v4.new_code_cell(digest))
    execute.execute(notebook, tmp_path)
    once, twice = notebook.cells[: n + 1], notebook.cells[n + 1 :]
    for a, b in zip(once, twice, strict=True):
        if a.cell_type == "code" and a["id"] != "write-metrics":
            assert shown_by(a) == shown_by(b), a["id"]


@pytest.mark.slow
def test_as_a_script(tmp_path, data):
    """`jupyter nbconvert --to script`, then `python`, without a kernel."""
    nbformat.write(execute.inject(execute.read(), **REDUCED), tmp_path / "study.ipynb")
    for command in ("-m nbconvert --to script study.ipynb", "study.py"):
        subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True)
    assert (tmp_path / "models" / "metrics.json").exists()


@pytest.mark.parametrize("block", [0, 1, 6])
def test_split(block, data):
    """HELD_OUT names the test images; every other training image is in one split."""
    cells = execute.run_cells("split", DATA_DIR=REDUCED["DATA_DIR"], HELD_OUT=block)
    images, labels = ({k: x.numpy() for k, x in cells[n].items()} for n in ("images", "labels"))
    (x, y), test = data.train, data.test
    if block:
        rows = slice(10_000 * block - 10_000, 10_000 * block)
        test = x[rows], y[rows]
        x, y = np.delete(x, rows, axis=0), np.delete(y, rows)
    np.testing.assert_array_equal(images["test"], test[0])
    np.testing.assert_array_equal(labels["test"], test[1])
    assert len(images["validation"]) == 6_000

    def counted(x, y):
        pixels = map(bytes, (255 * x).round().astype(np.uint8))
        return Counter(zip(pixels, y.tolist(), strict=True))

    used = [counted(images[k], labels[k]) for k in ("train", "validation")]
    assert used[0] + used[1] == counted(x, y)


def test_replications_are_gathered(reduced, tmp_path, monkeypatch):
    """Five runs, here of a stand-in, become a file and two columns of the README."""
    metrics = reduced.saved.metrics
    first = next(iter(metrics["verdict"]))

    def stand_in(notebook, folder):
        given = {}
        exec(next(c.source for c in notebook.cells if c["id"] == execute.INJECTED), given)
        run = json.loads(json.dumps(metrics))
        run["config"] |= {name: given[name] for name in ("SEED", "HELD_OUT")}
        run["verdict"][first] |= {"measured": given["SEED"], "outcome": "yes"}
        if given["SEED"] == 2:
            run["verdict"][first]["outcome"] = "open"
        Path(given["MODELS_DIR"]).mkdir()
        Path(given["MODELS_DIR"], "metrics.json").write_text(json.dumps(run))

    monkeypatch.setattr(execute, "execute", stand_in)
    monkeypatch.setattr(execute, "REPLICATION", tmp_path / "replication.json")
    replicate.main()
    (written,) = tmp_path.iterdir()
    runs = json.loads(written.read_text())["runs"]
    assert [(run["SEED"], run["HELD_OUT"]) for run in runs] == [(i, i) for i in range(1, 6)]
    assert set(runs[0]) == {"SEED", "HELD_OUT", "seconds", "verdict", "checks"}

    code = execute.code_sha256(reduced.notebook)  # the injected cell does not count
    rows = execute.results(metrics | {"code_sha256": code}).splitlines()
    (row,) = {row for row in rows if row.startswith(f"| {first} |")}
    assert row.endswith("| 4 | 3 ± 1.6 |")
    assert "yes in n of" not in execute.results(metrics | {"code_sha256": "another"})


@pytest.fixture(params=["reduced", "committed"])
def saved(request):
    run = request.getfixturevalue(request.param)
    return run.saved if request.param == "reduced" else run


def test_metrics_follow_from_the_files(saved, data):
    """MSE, L0, accuracy and ranking, recomputed with NumPy."""
    metrics, (x, y), z = saved.metrics, data.test, saved.test_codes
    l0 = (z > 0).sum(1)
    assert l0.max() <= saved.k
    assert l0.mean() == pytest.approx(metrics["sparsity"]["l0_mean"], abs=0.01)
    reconstruction = z @ saved.decoder["weight"].T + saved.decoder["bias"]
    mse = np.mean((reconstruction - x) ** 2)
    assert mse == pytest.approx(metrics["reconstruction"]["test_mse"], rel=1e-4)
    hits = saved.logits(z).argmax(1) == y
    assert hits.mean() == pytest.approx(metrics["probe"]["test_accuracy"], abs=3e-4)
    importance = np.abs(saved.classifier["weight"]) * saved.train_means
    for row, top in zip(importance, saved.units("top_10"), strict=True):
        np.testing.assert_allclose(row[top], np.sort(row)[::-1][:10], rtol=1e-3)


def test_ablation_follows_from_the_files(saved, data):
    """What is left of each class without its top ten, and without matched units."""
    ablation, y = saved.metrics["ablation"], data.test[1]
    right = saved.right_without(saved.units("top_10"))
    own = [right[c, y == c].mean() for c in range(10)]
    by_class = list(ablation["top_10_by_class"].values())
    np.testing.assert_allclose(own, by_class, atol=2e-3)
    others = [right[c, y != c].mean() for c in range(10)]
    measured = ablation["other_accuracy"]["top_10"]["10"]["mean"]
    assert np.mean(others) == pytest.approx(measured, abs=1e-3)

    right = saved.right_without(saved.units("matched"))
    own = [right[c, y == c].mean() for c in range(10)]
    measured = ablation["own_accuracy"]["matched"]["10"]["mean"]
    assert np.mean(own) == pytest.approx(measured, abs=1e-3)
    for top, matched in zip(saved.units("top_10"), saved.units("matched"), strict=True):
        assert len({*top, *matched}) == 20


def test_mean_shift_follows_from_the_files(saved, data):
    """Own accuracy when only the top ten's mean logits over the class go."""
    shift = np.stack(
        [
            saved.classifier["weight"][:, top] @ means[top]
            for top, means in zip(saved.units("top_10"), saved.train_means, strict=True)
        ]
    )  # [10 classes, 10 logits]
    y = data.test[1]
    right = (saved.logits(saved.test_codes) - shift[y]).argmax(1) == y
    measured = saved.metrics["arithmetic"]["own_accuracy"]["mean_shift"]["mean"]
    assert right.mean() == pytest.approx(measured, abs=1e-3)


def test_judges_see_what_is_said(reduced, data):
    """Erased pictures, recomputed with NumPy: atoms of a class's units, equal energy."""
    saved, x, y = reduced.saved, data.test[0][:500], data.test[1][:500]
    z, erased = saved.test_codes[:500], {}
    for kind in ("top_10", "matched"):
        kept = np.zeros_like(z)
        units = saved.units(kind)[y]
        np.put_along_axis(kept, units, np.take_along_axis(z, units, 1), 1)
        erased[kind] = kept @ saved.decoder["weight"].T
    means = saved.class_means(lambda images: images)
    erased["class_mean"] = (means - means.mean(0))[y]
    energy = np.linalg.norm(erased["top_10"], axis=1, keepdims=True)
    for kind, picture in erased.items():
        norm = np.linalg.norm(picture, axis=1, keepdims=True)
        left = np.clip(x - picture * energy / np.maximum(norm, 1e-12), 0, 1)
        np.testing.assert_allclose(reduced.seen[kind], left, atol=1e-4, err_msg=kind)


def test_benchmark_fits_the_notebook(data):
    """Each row of the recipe's ladder starts and makes a step."""
    cells = benchmark.notebook_cells()
    batch = cells["images"]["train"][:64]
    for level in range(len(benchmark.LADDER)):
        model = benchmark.start(cells, level, 0)
        optimizer = torch.optim.Adam(model.parameters())
        before = cells["evaluate"](model, batch)[0]
        for _ in range(5):
            cells["train_step"](model, batch, optimizer, 50)
        assert cells["evaluate"](model, batch)[0] < before, benchmark.LADDER[level]
