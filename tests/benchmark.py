"""Measurements for `models/benchmark.json` and the README; nothing else may run.

`python tests/benchmark.py` measures a step, with `recipe` behind it the ladder.
"""

import statistics
import sys
import tempfile
import time

import execute
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer

LADDER = ["literal: default start, raw pixels, constant rate", "+ centring"]
LADDER += ["+ atoms of length one, from noise, tied at the start"]
LADDER += ["+ many units first", "+ falling rate (the recipe)"]


def load(seed):
    """The notebook with its data, and with nothing trained."""
    cells, folder = ["check-parameters", "seeds", "run-split"], str(execute.DATA)
    with tempfile.TemporaryDirectory() as models:
        usual = {"DATA_DIR": folder, "MODELS_DIR": models, "USE_DEVICE": "cpu"}
        return execute.load(*cells, SEED=seed, **usual)


def default_start(model, seed, centred):
    """Give a model the start that PyTorch gives to linear layers."""
    torch.manual_seed(seed)
    n_units = len(model.atoms)
    encoder, decoder = nn.Linear(784, n_units), nn.Linear(n_units, 784)
    model.mean *= centred
    start = [encoder.weight, encoder.bias, decoder.weight.T, decoder.bias + model.mean]
    for parameter, values in zip(model.parameters(), start):
        parameter.data.copy_(values.data)


def plain_step(model, batch, k, optimizer):
    """A step after which atoms may have any length."""
    loss = F.mse_loss(model(batch, k)[0], batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def climb(level, seed):
    """A row of the ladder, without stopping early; measured on validation images."""
    book, begun = load(seed), time.perf_counter()
    (x, y), checked, rng = book.train, book.validation, book.generator(seed)
    model = book.KSparseAutoencoder(x, seed)
    if level < 2:
        default_start(model, seed, centred=level)
    optimizer = torch.optim.Adam(model.parameters(), lr=book.LEARNING_RATE, fused=True)
    order = []
    for _ in range(book.EPOCHS):
        order += book.batches(len(x), book.BATCH_SIZE, rng)
    for i, rows in enumerate(order):
        k, rate = book.schedule(i, len(order))
        optimizer.param_groups[0]["lr"] = rate if level >= 4 else book.LEARNING_RATE
        step = book.train_step if level >= 2 else plain_step
        step(model, x[rows], k if level >= 3 else book.K, optimizer)
    seconds = time.perf_counter() - begun
    encoder, decoder = book.as_layers(model)
    codes = book.encode(encoder, x)
    probe, rates = book.fit_probe(codes, y, book.L1, seed), (codes > 0).float().mean(0)
    codes = book.encode(encoder, checked.x)
    mse = F.mse_loss(decoder(codes), checked.x).item()
    right = book.is_correct(probe, codes, checked.y).mean().item()
    return mse, (rates == 0).sum().item(), (rates < 0.001).sum().item(), right, seconds


def ratio():
    """A training step beside the five dense products of its shapes in float32."""
    book = load(seed=0)
    model, n = book.KSparseAutoencoder(book.train.x, 0), book.BATCH_SIZE
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    batch, codes = book.train.x[:n], torch.rand(n, book.N_UNITS)
    weight, atoms = torch.randn(2, book.N_UNITS, 784)
    last = codes.T, batch
    pairs = [(batch, weight.T), (codes, atoms), (batch, atoms.T), last, last]
    here = {"globals": locals(), "num_threads": torch.get_num_threads()}
    step = Timer("book.train_step(model, batch, book.K, optimizer)", **here)
    products = Timer("for left, right in pairs: left @ right", **here)
    times = [timer.blocked_autorange(min_run_time=10) for timer in (step, products)]
    return {f"a step with {book.K} active units": times[0].median / times[1].median}


def main(what):
    """Measure, write the file, and bring the README up to it."""
    execute.fetch_data()
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    found = {"machine": machine, "code_sha256": execute.code_sha256(execute.read())}
    found["measured"] = ratio() if what == "speed" else {}
    for level, name in enumerate(LADDER if what == "recipe" else []):
        pairs = zip(climb(level, seed=0), climb(level, seed=1))
        found["measured"][name] = [statistics.mean(pair) for pair in pairs]
        print(name, found["measured"][name], flush=True)
    assert found["code_sha256"] == execute.code_sha256(execute.read()), "edited"
    path = execute.MODELS / "benchmark.json"
    execute.write_whole(path, {**execute.json_of(path), what: found})
    execute.write_texts()


if __name__ == "__main__":
    main("recipe" if sys.argv[1:] == ["recipe"] else "speed")
