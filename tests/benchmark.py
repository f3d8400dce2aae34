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

DATA = str(execute.DATA)
LADDER = ["literal: default start, raw pixels, constant rate", "+ changing rate"]
LADDER += ["+ centring", "+ atoms of length one, tied at the start"]
LADDER += ["+ patches as the start", "+ shrinkage (the recipe)"]
RECIPE = len(LADDER) - 1


def notebook_cells(seed=0):
    """What the notebook defines, with its data, and with nothing trained."""
    with tempfile.TemporaryDirectory() as models:
        parameters = {"DATA_DIR": DATA, "MODELS_DIR": models, "USE_DEVICE": "cpu"}
        return execute.load("patches", SEED=seed, **parameters)


def start(cells, level, seed):
    draws = cells["generator"](seed)
    mean = cells["mean_image"] if level >= 2 else torch.zeros(784)
    noise = F.normalize(torch.randn(1024, 784, generator=draws))
    atoms = cells["patches"](draws) if level >= 4 else noise
    model = cells["QuickAutoencoder"](atoms, mean)
    if level < 3:  # the start that PyTorch gives to linear layers
        torch.manual_seed(seed)
        encoder, decoder = nn.Linear(784, 1024), nn.Linear(1024, 784)
        model.encoder_weight.data = encoder.weight.data
        model.encoder_bias.data = encoder.bias.data
        model.atoms.data = decoder.weight.data.T.contiguous()
        model.bias.data = decoder.bias.data + mean
    return model


def step(cells, level, model, batch, optimizer):
    if level >= 3:
        cells["SHRINKAGE"] = 0.1 if level == RECIPE else 0.0
        cells["train_step"](model, batch, optimizer)
    else:  # nothing is done to the atoms
        loss = F.mse_loss(model(batch, cells["K"])[0], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train(cells, level, seed, images, epochs=30):
    """Train as a row of the ladder says, without stopping early."""
    model, draws = start(cells, level, seed), cells["generator"](seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=level > 0)
    order = []
    for _ in range(epochs):
        order += cells["batches"](len(images), 256, draws)
    for i, rows in enumerate(order):
        if level >= 1:
            rate = 1e-3 * cells["rate_share"](i, len(order))
            optimizer.param_groups[0]["lr"] = rate
        step(cells, level, model, images[rows], optimizer)
    return model


def climb(level, seed):
    """One row of the ladder: the table's numbers, on validation images."""
    cells = notebook_cells(seed)
    x, y = cells["images"], cells["labels"]
    begun = time.perf_counter()
    model = train(cells, level, seed, x["train"])
    seconds = time.perf_counter() - begun
    encoder, decoder = cells["as_layers"](model)
    codes = cells["encode"](encoder, x["train"])
    silent = (codes.amax(0) == 0).sum().item()
    probe = cells["fit_probe"](codes, y["train"], cells["L1"], seed)
    codes = cells["encode"](encoder, x["validation"])
    right = cells["is_correct"](probe, codes, y["validation"]).mean().item()
    mse = F.mse_loss(decoder(codes), x["validation"]).item()
    energy = decoder.weight.T.square().sort(dim=1, descending=True).values
    pixels = (energy.cumsum(1) < 0.9 * energy.sum(1, keepdim=True)).sum(1) + 1.0
    return mse, silent, right, pixels.median().item(), seconds


def ratios():
    """A training step beside the five dense products of its shapes."""
    cells = notebook_cells()
    images = cells["images"]["train"][: 50 * 256]
    model, batch = start(cells, RECIPE, 0), images[:256]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    weight, atoms = torch.randn(1024, 784), torch.randn(1024, 784)
    codes, error = torch.rand(256, 1024), torch.randn(256, 784)

    def five_products():
        forward = batch @ weight.T, codes @ atoms
        return forward, codes.T @ error, error @ atoms.T, codes.T @ batch

    def step_with(k):
        cells["K"] = k
        step(cells, RECIPE, model, batch, optimizer)

    calls, times = [five_products, lambda: step_with(10), lambda: step_with(50)], []
    for _ in range(10):  # in turns, and the first round warms up
        for call in calls:
            begun = time.perf_counter()
            for _ in range(20):
                call()
            times.append(time.perf_counter() - begun)
    five, ten, fifty = [statistics.median(times[i + 3 :: 3]) for i in range(3)]
    return {
        "a step with 50 active units": fifty / five,
        "a step with 10 active units": ten / five,
    }


def main(what):
    """Measure, write the file, and bring the README up to it."""
    execute.fetch_data()
    found = {"machine": f"{torch.get_num_threads()} threads, torch {torch.__version__}"}
    found["code_sha256"] = execute.code_sha256(execute.read())
    if what == "recipe":
        found["measured"] = {}
        for level, name in enumerate(LADDER):
            rows = [climb(level, seed) for seed in (0, 1)]
            found["measured"][name] = [statistics.mean(pair) for pair in zip(*rows)]
            print(name, found["measured"][name], flush=True)
    else:
        found["measured"] = ratios()
        print(found["measured"])
    path = execute.MODELS / "benchmark.json"
    execute.write_whole(path, {**execute.json_of(path), what: found})
    execute.write_texts()


if __name__ == "__main__":
    main("recipe" if sys.argv[1:] == ["recipe"] else "speed")
