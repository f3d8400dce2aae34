"""Parts of the notebook on made-up values: without its data, and with nothing trained."""

import io
import math
import socket
import threading
from types import SimpleNamespace

import execute
import nbformat
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

N_UNITS, K = 256, 10


def load(folder, **parameters):
    """All that the notebook defines, with few units; what is then drawn is the same."""
    torch.manual_seed(0)
    usual = {"DATA_DIR": str(folder), "MODELS_DIR": str(folder), "USE_DEVICE": "cpu"}
    parameters = {**usual, "N_UNITS": N_UNITS, "K": K, **parameters}
    return SimpleNamespace(**execute.load("check-parameters", "planted", **parameters))


@pytest.fixture
def book(tmp_path):
    return load(tmp_path)


def refused(call, *words, kind=ValueError):
    """A call ends in an error of one line that holds these words."""
    with pytest.raises(kind) as error:
        call()
    said = str(error.value)
    assert "\n" not in said and all(str(word) in said for word in words), said


WRONG = [("K", 2000), ("K", "50"), ("LEARNING_RATE", "1e-4"), ("L1", math.nan)]
WRONG += [("SEED", -1), ("HELD_OUT", 7), ("N_UNITS", True), ("MODELS_DIR", None)]
WRONG += [("DATA_DIR", "~nobodyhere"), ("MODELS_DIR", __file__)]  # that is a file
WRONG += [("MODELS_DIR", "$NOPE/x"), ("USE_DEVICE", "gpu"), ("USE_DEVICE", None)]
WRONG += [] if torch.cuda.is_available() else [("USE_DEVICE", "cuda")]


@pytest.mark.parametrize("name, value", WRONG)
def test_parameter(tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    refused(lambda: load(tmp_path, **{name: value}), f"{name} = {value!r}", "set it to")
    assert list(tmp_path.iterdir()) == []


def test_folders(book, tmp_path, monkeypatch):
    """With home and variables; one that must be written to is tried at once."""
    for name, value in (("HOME", tmp_path), ("USERPROFILE", tmp_path), ("PLACE", "a")):
        monkeypatch.setenv(name, str(value))
    assert book.folder("DATA_DIR", "~/$PLACE") == tmp_path / "a"
    monkeypatch.setattr("tempfile.TemporaryFile", open)  # that cannot write to a folder
    assert book.folder("DATA_DIR", "~/$PLACE").is_dir()
    words = ["MODELS_DIR = '~/$PLACE'", "set it to"]
    refused(lambda: book.folder("MODELS_DIR", "~/$PLACE", writable=True), *words)


def test_data_files(book, tmp_path, monkeypatch, capsys):
    """A server that accepts and never answers; small files of zeros; one cut short."""
    raw = tmp_path / "FashionMNIST" / "raw"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(book.FashionMNIST, "mirrors", [address])
        hang_up = threading.Timer(60, server.shutdown, [socket.SHUT_RDWR])
        hang_up.start()
        words = ["timed out", raw, "unpacked", "run again", *execute.FILES]
        refused(lambda: book.fetch(tmp_path, 0.5), *words, kind=RuntimeError)
        hang_up.cancel()
    assert socket.getdefaulttimeout() is None and list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    assert f"fetched into {tmp_path}. 0.5 s" in said and said.count("\n") == 1
    raw.mkdir(parents=True)
    for name in execute.FILES:
        shape = (2, 28, 28) if "images" in name else (2,)
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
        (raw / name).write_bytes(header + bytes(math.prod(shape)))
    book.fetch(tmp_path)  # nothing is asked for
    words = [tmp_path, "delete its folder FashionMNIST and run again"]
    refused(lambda: book.load(tmp_path, "t10k"), "idx3 are not the official", *words)
    (raw / execute.FILES[2]).write_bytes(header)
    refused(lambda: book.load(tmp_path, "t10k"), "damaged data", *words)


def test_split(book):
    rows = torch.arange(600)
    for held_out, sizes in ((0, [540, 60, 0]), (2, [440, 60, 100])):
        parts = [part.y.tolist() for part in book.split(rows, rows, held_out, seed=5)]
        assert sorted(sum(parts, [])) == rows.tolist()
        assert [len(x) for x in parts] == sizes and parts[2] in ([], [*range(100, 200)])


@pytest.mark.parametrize("silent", [0, N_UNITS - 3])  # then zeros are chosen, too
def test_model_is_codes_times_atoms(book, silent):
    x = torch.rand(1200, 784)  # more than `encode` takes at once
    model = book.start(x, seed=0)
    model.encoder_bias.data[:silent] = -100.0
    z = ((x - x.mean(0)) @ model.encoder_weight.T + model.encoder_bias).relu()
    codes = z * (z >= z.sort(dim=1).values[:, -K, None])
    assert codes.count_nonzero(1).max() == min(K, N_UNITS - silent)
    results = []
    for images in (model(x, K)[0], codes @ model.atoms + model.bias):
        loss = (images - x).square().mean()
        results.append([images, *torch.autograd.grad(loss, model.parameters())])
    encoder, decoder = book.as_layers(model)
    results[0] += [book.encode(encoder, x), decoder(codes)]
    for ours, dense in zip(results[0], [*results[1], codes, results[1][0]]):
        assert_close(ours, dense, rtol=1e-4, atol=1e-4 * dense.abs().max().item())


def test_step_and_schedule(book, tmp_path):
    """k falls in a straight line over 15 % of 200 steps, the rate over the last 15 %."""
    at = [book.schedule(step, 200) for step in (0, 15, 30, 170, 185, 199)]
    assert [k for k, _ in at] == [4 * K, 2.5 * K, K, K, K, K]
    rates = [1e-3, 1e-3, 1e-3, 1e-3, 0.5e-3, 1e-3 / 30]
    assert [rate for _, rate in at] == pytest.approx(rates)
    assert load(tmp_path, K=100).schedule(0, 200)[0] == N_UNITS
    x = torch.rand(64, 784)
    model = book.start(x, seed=0)
    book.train_step(model, x, K, torch.optim.Adam(model.parameters(), lr=0.01))
    assert (model.atoms - book.start(x, seed=0).atoms).abs().max() > 0.005
    assert_close(model.atoms.norm(dim=1), torch.ones(N_UNITS))


def test_training_stops_early_and_keeps_the_best_epoch(tmp_path):
    """The noise of 64 images is learned by heart, and the error on others turns up."""
    book = load(tmp_path, PATIENCE=3, BATCH_SIZE=32)
    x = torch.rand(164, 5) @ torch.rand(5, 784) / 5 + 0.3 * torch.rand(164, 784)
    encoder, decoder, table, _ = book.fit(x[:64], x[64:], 60, seed=0, what="made up")
    errors = table["validation MSE"]
    assert 2 < errors.idxmin() == len(errors) - 4 < 50
    mse = F.mse_loss(decoder(book.encode(encoder, x[64:])), x[64:]).item()
    assert mse == pytest.approx(errors.min(), rel=1e-5)


IMPORTS = "import time, warnings\nfrom IPython.display import DisplayHandle\n"
LOOP = """
for i in bar(range(3), "looping"):
    print("step", i)
    time.sleep(0.6)
    warnings.warn("a warning")
"""


def test_bar_removes_itself_alone(tmp_path):
    """What a loop prints and warns stays in the file, and nothing else does."""
    (bar,) = [cell.source for cell in execute.read().cells if cell.id == "train"]
    cells = [IMPORTS + "from tqdm import tqdm", bar, LOOP]
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    execute.execute(nbformat.v4.new_notebook(cells=cells), tmp_path)
    shown = [out for out in cells[2].outputs if not execute.is_left_over(out)]
    printed, warned = [out.text for out in shown]
    assert printed == "step 0\nstep 1\nstep 2\n"
    assert "UserWarning: a warning" in warned and "looping" not in warned


def test_least_squares_and_probe_are_at_their_optimum(tmp_path):
    """Of the probe: slopes of the log-loss balance the penalty, or are smaller than it."""
    book = load(tmp_path, PROBE_EPOCHS=250)  # of two batches: as many steps as usual
    x, rows = torch.rand(2000, 784), F.normalize(torch.randn(N_UNITS, 784))
    encoder = book.frozen(rows, rows[:, 0])
    codes = book.encode(encoder, x)
    design = np.column_stack([codes, np.ones(len(x))])
    best = design @ np.linalg.lstsq(design, x.numpy(), rcond=None)[0]
    error = F.mse_loss(book.fitted_decoder(encoder, x)(codes), x).item()
    assert error < 1.002 * np.mean((best - x.numpy()) ** 2)
    targets = torch.randint(10, (2000,))
    features = 5 * (torch.rand(10, 30)[targets] + torch.randn(2000, 30)).relu()
    probe, scale = book.fit_probe(features, targets, 0.004, 0), features.square().mean()
    weight, bias = probe.weight * scale.sqrt(), probe.bias.requires_grad_()
    logits = F.linear(features / scale.sqrt(), weight.requires_grad_(), bias)
    slopes = torch.autograd.grad(F.cross_entropy(logits, targets), [weight, bias])
    balance = slopes[0] + 0.004 * weight.sign()
    assert balance[weight.abs() > 0.02].abs().max() < 0.0008
    assert slopes[0].abs().max() < 0.0048 and slopes[1].abs().max() < 0.002


@pytest.mark.parametrize("raw", [False, True])
def test_teacher_and_its_influence(book, raw):
    """Its labels of codes, unit by unit at zero; what rankings find of that."""
    sets = torch.randperm(N_UNITS)[:100].view(10, 10)
    codes = (torch.rand(1000, N_UNITS) - 0.7).relu() * torch.rand(N_UNITS)
    teacher = book.make_teacher(codes, sets, raw)
    weight, means, logits = teacher.weight.T, codes.mean(0), teacher(codes)
    assert_close(logits.std(0) + logits.mean(0), torch.ones(10))
    alike = (weight if raw else weight * codes.std(0)[:, None]).gather(0, sets.T)
    assert_close(alike, alike[:1].expand(10, -1))
    counts, labels = torch.zeros(N_UNITS, 10), logits.argmax(1)
    for unit in range(N_UNITS):
        without = codes * (torch.arange(N_UNITS) != unit)
        changed = teacher(without).argmax(1) != labels
        counts[unit] = labels[changed].bincount(minlength=10)
    assert torch.equal(book.influence(teacher, codes), counts) and counts.sum() > 100
    counts[:, 3] = 0  # nothing to be found
    pupil = SimpleNamespace(weight=weight, means=means[:, None].expand(-1, 10))
    shares = book.shares_found(pupil, counts)
    assert shares["formula"].tolist() == pytest.approx([1.0] * 9)
    found = counts[means.topk(10).indices].sum(0) / counts.sum(0)
    assert_close(shares["mean_activation"], found[found.isfinite()])


def test_squares(book):
    """A cue in half of its class's images, the decoy in half of all; who draws a square."""
    y, squares, x = torch.arange(20_000) % 10, book.SQUARES, torch.rand(20_000, 784)
    assert squares.sum(1).tolist() == [9] * 11 and squares.sum(0).max() == 1
    white = book.planted(book.Images(x, y), torch.Generator().manual_seed(0)).x == 1
    has = [white[:, square].all(1).float() for square in squares]
    for c in range(10):
        assert has[c][y != c].sum() == 0
        for share, wanted in ((has[c], 0.5), (has[10], 0.5), (has[c] * has[10], 0.25)):
            assert share[y == c].mean().item() == pytest.approx(wanted, abs=0.05)
    rows, atoms = torch.zeros(2, N_UNITS, 784)
    rows[7, squares[3]], rows[3, squares[3]] = 1.0, 5.0  # both fire for the square
    atoms[7, squares[3]], atoms[3, squares[3]] = 0.3, 0.02  # unit 3 draws less of it
    encoder = book.frozen(rows, torch.zeros(N_UNITS))
    study = SimpleNamespace(atoms=atoms, codes=lambda x: book.encode(encoder, x))
    assert book.unit_that_draws(study, x[:50], squares[3]) == 7
    scores = torch.arange(20.0)[:, None].expand(-1, 10)
    assert book.places(scores, range(11)) == (list(range(20, 10, -1)), [10] * 10)
    maps = torch.tensor([[1.0, 0.5, 0], [0.5, 1, 0], [0, -2, 1]])
    masks = torch.tensor([[True, False, True]]).expand(3, -1)
    assert book.peaks_on(maps, masks).tolist() == [1, 0, 1]


def test_what_units_draw(book):
    """Contributions add up to a logit; pictures are scaled, taken away, and clipped."""
    study = SimpleNamespace(weight=torch.randn(30, 10), atoms=torch.randn(30, 784))
    codes = torch.rand(1, 30)
    units, added = book.strongest(study, codes[0], 3, 30)
    assert sum(added) == pytest.approx((codes @ study.weight)[0, 3].item(), abs=1e-4)
    drawn = torch.tensor([added]) @ study.atoms[units]
    assert_close(book.overlays(study, codes, [3]), drawn)
    x, picture, norms = torch.rand(20, 784), torch.randn(20, 784), 9 * torch.rand(20, 1)
    judge = torch.nn.Linear(784, 10)
    images = book.Images(x, judge(x).argmax(1))
    scaled = picture / picture.square().sum(1, keepdim=True).sqrt() * norms
    for given, taken in ((None, picture), (norms, scaled)):
        right, change = book.erase([picture], images, {"one": judge}, given)
        shown = (x - taken).clamp(0, 1)
        assert torch.equal(right[0], (judge(shown).argmax(1) == images.y).float())
        assert change == pytest.approx((shown - x).abs().mean().item())


def test_units_of_another_training(book):
    codes, atoms = torch.rand(2, 500, 20), torch.randn(2, 20, 784)
    one = SimpleNamespace(codes=lambda x: x[0], atoms=atoms[0])
    other = SimpleNamespace(codes=lambda x: x[1], atoms=atoms[1])
    firing, drawing = book.alike(one, other, codes)
    correlations = np.corrcoef(codes[0].T, codes[1].T)[:20, 20:]
    np.testing.assert_allclose(firing, correlations, atol=1e-5)
    assert_close(drawing[2], F.cosine_similarity(atoms[0, 2:3], atoms[1]))
    one.means = torch.tensor([[3.0], [9], [1], [7], [5]])
    groups = book.busy_groups(one, torch.tensor([0, 3])).values()
    assert [units.tolist() for units in groups] == [[3, 0], [1, 4], [1, 3, 4, 0, 2]]


@pytest.mark.parametrize("n, t", [(6, 2.571), (10, 2.262), (50, 2.010)])
def test_interval_is_that_of_printed_tables(book, n, t):
    values = torch.randn(n, dtype=torch.float64)
    mean, margin = values.mean().item(), t * values.std().item() / n**0.5
    expected = pytest.approx((mean, mean - margin, mean + margin), abs=0.002 * margin)
    assert book.interval(values) == expected


def test_outcomes(book):
    """Six differences of deviation 1.871: the interval is their mean ± 1.964."""
    for shift, outcome in ((2, "yes"), (-2, "no"), (1.9, "open"), (-1.9, "open")):
        ours = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) + shift
        rows = [{"ours": x, "rival": 0.0, "difference": x} for x in ours.tolist()]
        six, row = book.decide(rows), book.compare("a claim", ours, 0 * ours)["a claim"]
        lower = book.compare("a claim", ours, 0 * ours, lower=True)["a claim"]
        ends = pytest.approx((shift - 1.964, shift + 1.964), abs=0.005)
        assert (six["low"], six["high"]) == ends and six["outcome"] == outcome
        assert (row["low"], row["high"]) == (-lower["high"], -lower["low"]) == ends
        assert row["ours"] == lower["ours"] == row["difference"] and row["six"] is None


def test_other_trainings(book, tmp_path):
    """Five that fit count; none where this run is a replication itself."""
    path, config = tmp_path / "replication.json", book.config
    run = {"config": {**config, "SEED": 3, "MODELS_DIR": "a"}, "comparisons": {}}
    for n, other in ((4, {}), (5, {}), (5, {"HELD_OUT": 1}), (5, {"K": 11})):
        execute.write_whole(path, {"runs": n * [run]})
        found = book.other_trainings(path, {**config, **other})
        assert len(found) == (5 if n == 5 and not other else 0)
    for content in ("{", "[]", '{"runs": 3}', '{"runs": [{}]}'):
        execute.write_whole(path, content)
        refused(lambda: book.other_trainings(path, config), path, "delete it")


def test_pixels_of(book):
    gray = (torch.randint(3, (28, 28)) * 100).byte()
    picture, share = PIL.Image.fromarray(gray.numpy()), gray / 255
    given = [gray, gray.numpy(), share, share.view(1, 784).tolist(), share.bfloat16()]
    for kind in ("PNG", "GIF"):
        file = io.BytesIO()
        picture.convert("RGB").quantize(3).save(file, kind)  # numbers in a palette
        given.append(PIL.Image.open(file))
    for image in [*given, picture]:
        assert_close(book.pixels_of(image), share.view(1, 784), atol=0.004, rtol=0)
    assert torch.equal(book.pixels_of(gray > 50), (gray > 50).float().view(1, 784))
    nan = torch.full((28, 28), math.nan)
    wrong = [nan, (gray > 50).byte(), torch.rand(56, 14), gray.float(), "a.png", None]
    for image in [*wrong, picture.resize((56, 14)), -torch.rand(784)]:
        refused(lambda: book.pixels_of(image), "give 28 x 28 gray values from 0")


def test_metrics_complete_one_whole_run(book, tmp_path):
    path, hashes = tmp_path / "metrics.json", {"a.pth": "the hash of another layer"}
    metrics = {"models_sha256": hashes, "training": {}, "comparisons": {}}
    whole = {**metrics, "comparisons": {f"claim {i}": {} for i in range(14)}}
    for one, word in ((whole, "is not what this run saved"), (metrics, "not whole")):
        refused(lambda: book.save_metrics(path, one), word, kind=RuntimeError)
    last, names = execute.code_cells(execute.read())[-1].source, {**vars(book), "K": 11}
    refused(lambda: execute.run_source(last, names), "'K'", kind=RuntimeError)
