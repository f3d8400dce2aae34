"""Parts of the notebook on made-up values, without its data and without a training."""

import gzip
import hashlib
import math
from types import SimpleNamespace

import execute
import numpy as np
import pytest
import torch
import torch.nn.functional as F

N_UNITS, K = 100, 10


@pytest.fixture
def cells(tmp_path):
    """All functions of the notebook, with few units, and with small official files."""
    torch.manual_seed(0)
    folders = {"DATA_DIR": f"{tmp_path}/data", "MODELS_DIR": f"{tmp_path}/models"}
    cells = execute.load("folders", N_UNITS=N_UNITS, K=K, USE_DEVICE="cpu", **folders)
    for name in execute.FILES:
        cells["OFFICIAL"][name] = hashlib.sha256(name.encode()).hexdigest()
    cells["RAW"].mkdir(parents=True)
    return cells


@pytest.fixture
def study(cells):
    rows = F.normalize(torch.randn(N_UNITS, 784))
    encoder = cells["frozen"](rows, rows[:, 0])
    decoder = cells["frozen"](rows.T, rows[0])
    codes, labels = cells["encode"](encoder, torch.rand(2000, 784)), torch.arange(2000)
    cells["study"] = cells["Study"](encoder, decoder, codes, labels % 10, seed=0)
    return cells["study"]


@pytest.mark.parametrize("outcome, shift", [("yes", 1.0), ("no", -1.0), ("open", 0.5)])
def test_compare(cells, capsys, outcome, shift):
    """An interval of Student's t for ten pairs, whose 95 % point is 2.262."""
    noise = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 0.2, -0.2, 0.1, -0.1])
    rival = torch.arange(10)
    cells["compare"]("a claim", rival + noise + shift, rival)
    row, margin = cells["comparisons"]["a claim"], 2.262 * noise.std().item() / 10**0.5
    assert row["outcome"] == outcome
    said = capsys.readouterr().out
    assert "a claim" in said and outcome in said
    assert (row["ours"], row["rival"]) == pytest.approx((4.5 + shift, 4.5))
    interval = pytest.approx((shift - margin, shift + margin), abs=0.005)
    assert (row["low"], row["high"]) == interval


def test_interval_over_classes(cells):
    """Of claims about all test images: that of ten means, one of each class."""
    values, cells["y_test"] = torch.randn(200), torch.arange(200) % 10
    cells["compare"]("on images", values, torch.zeros(200))
    cells["compare"]("on units", values[:50], torch.zeros(50))
    table = cells["verdict_table"]([])
    assert table.loc["on units", "over classes"] == ""
    said = table.loc["on images", "over classes"].strip("[]").split(", ")
    means = values.view(20, 10).mean(0)
    middle, margin = means.mean().item(), 2.262 * means.std().item() / 10**0.5
    interval = pytest.approx([middle - margin, middle + margin], abs=0.001)
    assert [float(x) for x in said] == interval


@pytest.mark.parametrize("k, silent", [(K, 0), (K // 5, 0), (K, N_UNITS - 3)])
def test_quick_gradient_is_that_of_the_plain_model(cells, k, silent):
    """Also where fewer than k units of an image fire, so that zeros are chosen."""
    x, results = torch.rand(64, 784), []
    atoms = F.normalize(torch.randn(N_UNITS, 784))
    for kind in ("KSparseAutoencoder", "QuickAutoencoder"):
        model = cells[kind](atoms, x.mean(0))
        model.encoder_bias.data[:silent] = -100.0
        output, values, _ = model(x, k)
        assert bool((values == 0).any()) == (silent > 0)
        gradients = torch.autograd.grad((output - x).square().sum(), model.parameters())
        results.append([output, values, *gradients])
    for plain, quick in zip(*results):
        assert plain.abs().max() > 0
        torch.testing.assert_close(quick, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("penalty", [4e-4, 4e-3])
def test_probe_is_near_the_optimum(cells, penalty):
    """Its penalised loss against that of a long accelerated proximal descent."""
    targets = torch.randint(10, (2000,))
    features = (torch.rand(10, 30)[targets] + torch.randn(2000, 30)).relu()
    cells["PROBE_EPOCHS"] = 250  # of two batches: as many steps as in a whole run
    probe = cells["fit_probe"](features, targets, penalty, seed=0)
    scale = features.square().mean().sqrt()
    features, one_hot = features / scale, F.one_hot(targets, 10)

    def loss(weight, bias):
        log_loss = F.cross_entropy(F.linear(features, weight, bias), targets)
        return log_loss + penalty * weight.abs().sum()

    weight, bias = torch.zeros(10, 30), torch.zeros(10)
    ahead = weight
    for step in range(1000):
        error = (F.linear(features, ahead, bias).softmax(1) - one_hot) / 2000
        before, bias = weight, bias - 0.05 * error.sum(0)
        weight = F.softshrink(ahead - 0.05 * error.T @ features, 0.05 * penalty)
        ahead = weight + step / (step + 3) * (weight - before)
    assert loss(probe.weight * scale, probe.bias) < 1.01 * loss(weight, bias)


def test_contributions_add_up_to_the_logit(cells, study):
    x, targets = torch.rand(20, 784), torch.arange(20) % 10
    codes = study.codes(x)
    assert (codes > 0).sum(1).max() == K
    contributions = codes * study.weight[:, targets].T  # [20, N_UNITS]
    logits = contributions.sum(1) + study.classifier.bias[targets]
    torch.testing.assert_close(study(x)[torch.arange(20), targets], logits)
    pictures = cells["overlays"](study, codes, targets)
    torch.testing.assert_close(pictures, contributions @ study.decoder.weight.T)


def test_teacher_and_its_units(cells, study):
    sets = torch.randperm(N_UNITS)[:50].view(10, 5)
    alone = torch.zeros(10, N_UNITS).scatter(1, sets, 1.0)  # only a class's units
    for raw in (False, True):
        assert cells["teacher_labels"](alone, sets, raw).tolist() == list(range(10))
    sizes = torch.rand(N_UNITS) + 0.1
    sizes[sets] /= 2  # the busiest units are others
    codes = (torch.rand(5000, N_UNITS) - 0.8).relu() * sizes
    shares = cells["shares_found"](codes, sets, False, seed=0)
    assert shares["formula"].mean() > 0.9 > 0.6 > shares["mean_activation"].mean()
    cells["top_units"] = lambda scores, n: sets.flip(0)  # of another class each
    assert cells["shares_found"](codes, sets, False, seed=0)["formula"].sum() == 0


def test_unit_that_draws_a_square_is_not_the_busiest(cells):
    square, x = cells["square_at"](12, 0), torch.rand(50, 784)
    rows, atoms = torch.zeros(N_UNITS, 784), torch.zeros(N_UNITS, 784)
    rows[7, square], rows[3, square] = 1.0, 5.0  # both fire for the square
    atoms[7, square], atoms[3, square] = 0.3, 0.02
    atoms[3, 400:440] = 0.15  # what unit 3 draws lies elsewhere
    encoder = cells["frozen"](rows, torch.zeros(N_UNITS))
    made_up = SimpleNamespace(atoms=atoms, codes=lambda x: cells["encode"](encoder, x))
    cells.update(images={"validation": x}, squares=square[None])
    rise = made_up.codes(cells["paste"](x, square)).mean(0) - made_up.codes(x).mean(0)
    assert rise.argmax() == 3
    assert cells["unit_that_draws"](made_up, square) == 7
    assert cells["energy_on_squares"](atoms[[7]]) == pytest.approx([1.0])
    assert cells["energy_on_squares"](atoms[[3]])[0] < 0.01


def test_peaks_on_a_map(cells):
    maps, masks = torch.zeros(3, 784), torch.zeros(3, 784, dtype=torch.bool)
    masks[:, 100:103] = True
    maps[0, 101], maps[1, 200], maps[2, 102] = 1.0, 1.0, 1.0
    maps[1, 101], maps[2, 500] = 0.5, -2.0  # a lower peak, and a negative one
    assert cells["peaks_on"](maps, masks).tolist() == [1.0, 0.0, 1.0]


def test_shuffling_keeps_the_weights_of_like_units(cells, study):
    study.means = study.means + torch.rand(study.means.shape) + 0.01
    scores = cells["shuffled_scores"](study, 0)
    weights, own = (scores / study.means).numpy(), study.weight.abs().numpy()
    assert np.mean(~np.isclose(weights, own)) > 0.5
    for c in range(10):
        order = study.means[:, c].argsort(descending=True, stable=True).numpy()
        for block in np.split(order, 10):
            shuffled, kept = np.sort(weights[block, c]), np.sort(own[block, c])
            np.testing.assert_allclose(shuffled, kept, rtol=1e-3, atol=1e-6)


def test_judge_sees_pixels_from_0_to_1(cells):
    """Pictures are added, clipped, and shown to the CNN, here a spy that says 3."""
    seen, targets = [], torch.arange(20) % 10

    def spy(x):
        seen.append(x)
        return F.one_hot(torch.full((20,), 3), 10)

    cells["cnn"], cells["x_test"] = spy, torch.rand(20, 784)
    pictures = torch.randn(2, 20, 784)
    said, norm = cells["judged"](pictures, targets)
    assert norm == pytest.approx(pictures.norm(dim=2).mean().item())
    assert said.tolist() == (targets == 3).float().tolist()
    shown = (cells["x_test"] + pictures).clamp(0, 1)
    torch.testing.assert_close(torch.stack(seen), shown)


@pytest.mark.parametrize("block", [0, 2])
def test_split(cells, block):
    parts = {"train": torch.arange(60_000), "t10k": torch.arange(-10_000, 0)}
    cells["load"] = lambda part: (parts[part], parts[part])
    images, _ = cells["split"](block, seed=5)
    everything = sorted(torch.cat(list(images.values())).tolist())
    assert everything == list(range(-10_000 if block == 0 else 0, 60_000))
    first = 10_000 * block - 10_000
    assert images["test"].tolist() == list(range(first, first + 10_000))


FOURTH = execute.FILES[3]  # below: what cannot work gets one clear sentence
PARAMETERS = [("K", 2000), ("K", "50"), ("LEARNING_RATE", "1e-4"), ("L1", math.nan)]
PARAMETERS += [("SEED", -1), ("HELD_OUT", 7), ("N_UNITS", True), ("MODELS_DIR", None)]
PARAMETERS += [("DATA_DIR", "~nobodyhere"), ("MODELS_DIR", __file__)]  # that is a file


def refused(call, *words, kind=ValueError):
    with pytest.raises(kind) as error:
        call()
    said = str(error.value)
    assert "\n" not in said
    assert [word for word in words if str(word) not in said] == [], said


@pytest.mark.parametrize("name, value", PARAMETERS)
def test_parameter(tmp_path, name, value):
    folders = {"DATA_DIR": str(tmp_path), "MODELS_DIR": str(tmp_path)}
    parameters = {**folders, name: value}
    refused(lambda: execute.load("folders", **parameters), f"{name} = {value!r}")


def test_home_and_variables_in_folders(cells, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("PLACE", "place")
    cells["MODELS_DIR"] = "~/$PLACE"
    assert cells["folder_of"]("MODELS_DIR") == tmp_path / "place"


def put(folder, names, packed=False):
    for name in names:
        content = gzip.compress(name.encode()) if packed else name.encode()
        (folder / (f"{name}.gz" if packed else name)).write_bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_data_file(cells, packed):
    put(cells["RAW"], execute.FILES, packed)
    assert cells["missing_files"]() == []
    assert cells["official"](FOURTH) == FOURTH.encode()
    path = cells["RAW"] / (f"{FOURTH}.gz" if packed else FOURTH)
    for content in (path.read_bytes()[:-9], gzip.compress(b"another file")):
        path.write_bytes(content)
        refused(lambda: cells["official"](FOURTH), path, "replace it")


@pytest.mark.parametrize("what", ["three of four", "flat", "a folder"])
def test_data_missing(cells, what):
    put(cells["RAW"].parents[1] if what == "flat" else cells["RAW"], execute.FILES[:3])
    if what == "a folder":
        (cells["RAW"] / FOURTH).mkdir()
    cells["FashionMNIST"] = None
    missing = execute.FILES if what == "flat" else [FOURTH]
    words = [*execute.FILES, cells["RAW"], f"Missing: {missing}"]
    refused(cells["fetch"], *words, kind=RuntimeError)


@pytest.mark.parametrize("word", ["K", "not whole", "decoder.pth", ""])
def test_end_of_a_run(cells, word):
    """A parameter changed, a comparison left out, a layer of another run; a sound one."""
    layer = cells["frozen"](torch.rand(9, 9), torch.rand(9))
    hashes = {x: cells["save_layer"](layer, x) for x in ("encoder.pth", "decoder.pth")}
    cells["metrics"].update(models_sha256=hashes, training={}, seconds=60.0)
    cells["comparisons"].update({f"claim {i}": {} for i in range(18)})
    last = execute.code_cells(execute.read())[-1].source
    if word == "K":
        cells["K"] = 11
    if word == "not whole":
        del cells["comparisons"]["claim 3"]
    if word == "decoder.pth":
        cells["save_layer"](cells["frozen"](torch.rand(2, 2), torch.rand(2)), word)
    if word:
        run = execute.run_source
        refused(lambda: run(last, cells), word, "choose Run All", kind=RuntimeError)
    else:
        execute.run_source(last, cells)
    assert (cells["MODELS"] / "metrics.json").exists() == (word == "")


def test_replications(cells):
    path = cells["MODELS"] / "replication.json"
    assert cells["replications"]() == []
    configs = [{**cells["config"], "SEED": 3}, {**cells["config"], "K": 11}]
    row = {"outcome": "yes", "difference": 1}
    runs = [{"config": x, "comparisons": {"a claim": row}} for x in configs]
    execute.write_whole(path, {"runs": runs})
    assert len(cells["replications"]()) == 1
    lacking = execute.text_of(path).replace("outcome", "x")
    for content in ("{", "[]", '{"runs": 3}', '{"runs": [{}]}', lacking):
        execute.write_whole(path, content)
        refused(cells["replications"], path, "delete it")
