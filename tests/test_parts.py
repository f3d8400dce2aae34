"""Parts of the notebook on made-up values: without its data, and with nothing trained."""

import io
import math
import socket
import threading
from types import SimpleNamespace

import execute
import nbformat
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

N_UNITS, K, SEEDS = 256, 10, range(1, 6)


def load(folder, **parameters):
    """All that the notebook defines, with few units; what is then drawn is the same."""
    torch.manual_seed(0)
    usual = {"DATA_DIR": str(folder), "MODELS_DIR": str(folder), "USE_DEVICE": "cpu"}
    parameters = {**usual, "N_UNITS": N_UNITS, "K": K, **parameters}
    return execute.load("check-parameters", "planted", **parameters)


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
    monkeypatch.setattr("tempfile.TemporaryFile", open)  # that cannot write to a folder
    path = book.folder("DATA_DIR", "~/$PLACE")
    assert path == str(tmp_path / "a") and (tmp_path / "a").is_dir()
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
    assert socket.getdefaulttimeout() is None and not [*raw.glob("*-ubyte")]
    said = capsys.readouterr().out
    assert f"fetched into {tmp_path}. 0.5 s" in said and said.count("\n") == 1
    images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 784)
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes(2)
    for name in execute.FILES:
        (raw / name).write_bytes(images if "images" in name else labels)
    book.fetch(tmp_path)  # nothing is asked for
    words = [tmp_path, "delete its folder FashionMNIST and run again"]
    refused(lambda: book.load(tmp_path, "t10k"), "idx3 are not the official", *words)
    (raw / execute.FILES[2]).write_bytes(images[:99])
    refused(lambda: book.load(tmp_path, "t10k"), "damaged data", *words)


def test_split(book):
    """With HELD_OUT = 2 the second sixth of all rows is held out, and none lost."""
    rows = torch.arange(600)
    parts = [part.y.tolist() for part in book.split(rows, rows, 2, seed=5)]
    assert sorted(sum(parts, [])) == rows.tolist() and parts[2] == [*range(100, 200)]
    assert [len(x) for x in parts] == [440, 60, 100]


def test_step_and_schedule(book):
    """k falls in a straight line over 15 % of 200 steps, the rate over the last 15 %."""
    at = [book.schedule(step, 200) for step in (0, 15, 30, 170, 185)]
    line = [(4 * K, 1e-3), (2.5 * K, 1e-3), (K, 1e-3), (K, 1e-3), (K, 0.5e-3)]
    assert_close(torch.tensor(at), torch.tensor(line))
    x = torch.rand(64, 784)
    model, before = [book.KSparseAutoencoder(x, seed=0) for _ in range(2)]
    book.train_step(model, x, K, torch.optim.Adam(model.parameters(), lr=0.01))
    assert (model.atoms - before.atoms).abs().max() > 0.005
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


LOOP = """
import warnings
for i in bar(range(3), "looping"):
    print("step", i)
    time.sleep(0.6)
    warnings.warn("a warning")
"""


def test_bar_removes_itself_alone(tmp_path):
    """What a loop prints and warns stays in the file, and nothing else does."""
    notebook = execute.read()
    needed = [cell for cell in notebook.cells if cell.id in ("imports", "generator")]
    notebook.cells = [*needed, nbformat.v4.new_code_cell(LOOP)]
    execute.execute(notebook, tmp_path)
    shown = notebook.cells[-1].outputs
    printed, warned = [out.text for out in shown if not execute.is_left_over(out)]
    assert printed == "step 0\nstep 1\nstep 2\n"
    assert "UserWarning: a warning" in warned and "looping" not in warned


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
    pupil = SimpleNamespace(weight=weight, means=means[:, None].expand(-1, 10))
    assert_close(book.shares_found(pupil, counts)["formula"], torch.ones(10))


def test_squares(book):
    """A cue in half of its class's images, the decoy in half of all; who draws a square."""
    y, squares, x = torch.arange(20_000) % 10, book.SQUARES, torch.rand(20_000, 784)
    assert squares.sum(1).tolist() == [9] * 11 and squares.sum(0).max() == 1
    white = book.planted(book.Images(x, y), torch.Generator().manual_seed(0)).x == 1
    has = torch.stack([white[:, square].all(1).float() for square in squares])
    for c in range(10):
        own = has[:, y == c]
        shares = [own[c].mean(), own[10].mean(), (own[c] * own[10]).mean()]
        assert shares == pytest.approx([0.5, 0.5, 0.25], abs=0.05)
        assert own.sum() == own[c].sum() + own[10].sum()  # and no other cue
    rows, atoms = torch.zeros(2, N_UNITS, 784)
    rows[7, squares[3]], rows[3, squares[3]] = 1.0, 5.0  # both fire for the square
    atoms[7, squares[3]], atoms[3, squares[3]] = 0.3, 0.02  # unit 3 draws less of it
    encoder = book.frozen(rows, torch.zeros(N_UNITS))
    study = SimpleNamespace(atoms=atoms, codes=lambda x: book.encode(encoder, x))
    assert book.unit_that_draws(study, x[:50], squares[3]) == 7


def test_judges_see_pictures_taken_away(book):
    """The pictures are scaled, if norms are given; what is left is clipped."""
    x, picture, norms = torch.rand(20, 784), torch.randn(20, 784), 9 * torch.rand(20, 1)
    judge = torch.nn.Linear(784, 10)
    images = book.Images(x, judge(x).argmax(1))
    scaled = picture / picture.square().sum(1, keepdim=True).sqrt() * norms
    for given, taken in ((None, picture), (norms, scaled)):
        right, change = book.erase([picture], images, {"one": judge}, given)
        shown = (x - taken).clamp(0, 1)
        assert torch.equal(right[0], (judge(shown).argmax(1) == images.y).float())
        assert change == pytest.approx((shown - x).abs().mean().item())


def test_interval_is_that_of_printed_tables(book):
    for n, t in ((6, 2.571), (10, 2.262), (50, 2.010)):
        values = torch.arange(1.0, n + 1)
        mean, margin = values.mean().item(), t * values.std().item() / n**0.5
        ends = pytest.approx((mean - margin, mean + margin), abs=0.002 * margin)
        assert book.interval(values)[1:] == ends


@pytest.mark.filterwarnings("error")
def test_outcomes(book):
    """Six differences of deviation 1.871: the interval is their mean ± 1.964."""
    for shift, outcome in ((2, "yes"), (-2, "no"), (1.9, "open"), (-1.9, "open")):
        ours = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) + shift
        rows = [{"ours": x, "rival": 0.0, "difference": x} for x in ours.tolist()]
        assert book.decide(rows)["outcome"] == outcome
    higher = book.compare("higher", ours, 0 * ours)
    lower = book.compare("lower", 0 * ours, ours, lower=True)
    assert higher["higher"]["low"] == pytest.approx(-1.9 - 1.964, abs=0.005)
    assert lower["lower"]["low"] == higher["higher"]["low"]
    nothing = book.compare("the same", ours, ours)
    book.draw_verdict({**higher, **nothing})  # without a warning


def test_other_trainings(book, tmp_path):
    """Five that fit count; none where this run is a replication itself."""
    path, config = tmp_path / "replication.json", book.config
    claims = {"a claim": {"ours": 3, "rival": 1, "difference": 2}}
    runs = [{"config": {**config, "SEED": i}, "comparisons": claims} for i in SEEDS]
    execute.write_whole(path, {"runs": runs})
    for other, n in (({}, 5), ({"HELD_OUT": 1}, 0), ({"K": 11}, 0)):
        assert len(book.other_trainings(path, {**config, **other})) == n
    execute.write_whole(path, {"runs": [*runs[:4], runs[0]]})
    assert book.other_trainings(path, config) == []
    short = {**runs[4], "comparisons": {"a claim": {"ours": 3, "rival": 1}}}
    for last in ({}, short):
        execute.write_whole(path, {"runs": [*runs[:4], last]})
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
    wrong = [share * math.nan, (gray > 50).byte(), gray.float(), torch.rand(56, 14)]
    for image in [*wrong, picture.resize((56, 14)), -share, "a.png", None]:
        refused(lambda: book.pixels_of(image), "give 28 x 28 gray values from 0")
