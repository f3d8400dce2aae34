"""Measurements of speed and of the training recipe; run by hand, nothing else running.

    python tests/benchmark.py          # a step, an epoch, each section: one table
    python tests/benchmark.py recipe   # the ladder: one ingredient more a row

Both write what they find to `models/benchmark.json`, and the README's tables from it.
Alternatives are timed in one process and take turns, and medians are given, so that the
ratios hold where the machine's speed drifts. No test image is looked at.
"""

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import execute
import matplotlib
import torch
import torch.nn.functional as F
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

DATA = str(execute.ROOT / "data")
LADDER = (
    "literal: default start, raw pixels, constant rate",
    "+ warm-up, and a rate that falls",
    "+ centring",
    "+ atoms of length one, tied at the start",
    "+ patches as the start",
    "+ shrinkage",
    "+ nested steps (the recipe)",
)


def notebook_cells(seed=0):
    """Everything that the notebook defines up to its probe, nothing trained."""
    skipped = ("classes", "run-training", "curves", "error", "one-image")
    return execute.run_cells("fit-probes", skip=skipped, SEED=seed, DATA_DIR=DATA)


def start(cells, level, seed):
    """The model that a row of the ladder starts from."""
    images = cells["images"]["train"]
    draws = cells["generator"](seed)
    noise = torch.randn(1024, 784, generator=draws)
    atoms = F.normalize(noise) if level < 4 else cells["patches"](draws)
    mean = images.mean(0) if level >= 2 else torch.zeros(784)
    model = cells["KSparseAutoencoder"](atoms, mean)
    if level < 3:  # the start that PyTorch gives to linear layers
        torch.manual_seed(seed)
        encoder, decoder = nn.Linear(784, 1024), nn.Linear(1024, 784)
        model.encoder.load_state_dict(encoder.state_dict())
        model.atoms.data = decoder.weight.data.T.contiguous()
        model.bias.data = decoder.bias.data + mean
    return model


def train(cells, level, seed, epochs=30):
    """Train as a row of the ladder says, without stopping early."""
    images, draws = cells["images"]["train"], cells["generator"](seed)
    cells["SHRINKAGE"] = 0.1 if level >= 5 else 0.0
    model = start(cells, level, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=level > 0)
    steps = epochs * math.ceil(len(images) / 256)
    falls = cells["FALLS"] * steps
    step = 0
    for _ in range(epochs):
        for rows in cells["batches"](len(images), 256, draws):
            if level >= 1:
                rate = min(1, (step + 1) / 50, (steps - step) / (steps - falls))
                optimizer.param_groups[0]["lr"] = 1e-3 * rate
            few = level >= 6 and step < falls and torch.rand((), generator=draws) < 0.5
            if level >= 3:
                cells["train_step"](model, images[rows], optimizer, 10 if few else 50)
            else:
                batch = images[rows]
                output = model(batch, 50) if level == 0 else None
                output = cells["reconstruct"](model, batch, 50)[0] if level else output
                loss = F.mse_loss(output, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            step += 1
    return model


def spread(atoms):
    """Median number of pixels that hold 90 % of a row's energy."""
    energy = atoms.square().sort(dim=1, descending=True).values
    short = energy.cumsum(1) < 0.9 * energy.sum(1, keepdim=True)
    return (short.sum(1) + 1.0).median().item()


def recipe(seeds=(0, 1)):
    """The ladder's rows: mean over the seeds, on validation images."""
    ladder = {}
    for level, name in enumerate(LADDER):
        rows = []
        for seed in seeds:
            cells = notebook_cells(seed)
            images, labels = cells["images"], cells["labels"]
            begun = time.perf_counter()
            model = train(cells, level, seed)
            seconds = time.perf_counter() - begun
            encoder, decoder = cells["as_linear"](model)
            codes = {x: cells["encode"](encoder, images[x]) for x in images}
            silent = (codes["train"].amax(0) == 0).sum().item()
            (probe,) = cells["fit_probes"](codes["train"], labels["train"], [cells["L1"]], seed)
            right = cells["hits"](probe, codes["validation"], labels["validation"])
            mse = F.mse_loss(decoder(codes["validation"]), images["validation"]).item()
            widths = spread(encoder.weight), spread(decoder.weight.T)
            rows.append((mse, silent, right.mean().item(), *widths, seconds))
        ladder[name] = [statistics.mean(x) for x in zip(*rows, strict=True)]
        print(name, ladder[name], flush=True)
    return ladder


def median_times(alternatives, repeat=20, rounds=9):
    """Median seconds of each of several functions, called in turns."""
    times = {name: [] for name in alternatives}
    for call in alternatives.values():
        call()  # once to warm up
    for _ in range(rounds):
        for name, call in alternatives.items():
            begun = time.perf_counter()
            for _ in range(repeat):
                call()
            times[name].append((time.perf_counter() - begun) / repeat)
    return {name: statistics.median(values) for name, values in times.items()}


def steps(cells):
    """A training step as a share of the five dense products of its shapes."""
    model = start(cells, 6, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    batch = cells["images"]["train"][:256]
    weight, atoms = torch.randn(2, 1024, 784)
    codes, error = torch.rand(256, 1024), torch.randn(256, 784)

    def five():
        batch @ weight.T, codes @ atoms, codes.T @ error, error @ atoms.T, codes.T @ batch

    def step(k):
        return lambda: cells["train_step"](model, batch, optimizer, k)

    t = median_times({"five": five, "50": step(50), "10": step(10)})
    few = cells["FALLS"] * cells["NESTED"]
    mix = (1 - few) * t["50"] + few * t["10"]
    return {
        "a training step with 50 active units, of five dense products": t["50"] / t["five"],
        "a step with 10": t["10"] / t["five"],
        "a step, mean of the run's mix of both": mix / t["five"],
    }


def race(cells):
    """Training as the recipe says, as a share of the literal recipe's time, a few steps each."""
    images, times = cells["images"]["train"], {0: [], len(LADDER) - 1: []}
    few = {"images": {"train": images[: 50 * 256]}}
    for _ in range(3):
        for level in times:
            begun = time.perf_counter()
            train({**cells, **few}, level, 0, epochs=2)
            times[level].append(time.perf_counter() - begun)
    literal, ours = map(statistics.median, times.values())
    return {"training, of the literal recipe's time": ours / literal}


def sections():
    """Wall time of a full run and of each section, and peak memory (Linux).

    PyTorch and matplotlib are imported already; what is saved goes to a folder of its own.
    """
    shell = InteractiveShell.instance()
    title, rows = "", {}
    folder = tempfile.TemporaryDirectory()
    for cell in execute.inject(execute.read(), DATA_DIR=DATA, MODELS_DIR=folder.name).cells:
        if cell.cell_type == "markdown":
            headings = [x for x in cell.source.splitlines() if x.startswith("## ")]
            title = headings[0][3:] if headings else title
            continue
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
        begun = time.perf_counter()
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            shell.run_cell(cell.source, store_history=True).raise_error()
        seconds = time.perf_counter() - begun
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1e6
        before = rows.get(title, (0.0, 0.0))
        rows[title] = (before[0] + seconds, max(before[1], peak))
    folder.cleanup()
    part_1 = [s for title, (s, _) in rows.items() if int(title.split()[0]) <= 10]
    return {
        "the whole notebook, seconds": sum(s for s, _ in rows.values()),
        "Part I, seconds": sum(part_1),
        "peak memory, GB": max(peak for _, peak in rows.values()),
        **{f"section {title}, seconds": s for title, (s, _) in rows.items()},
    }


def first_output():
    """Seconds until a fresh process has shown the first output, that of section 2."""
    code = f"import execute; execute.run_cells('split', DATA_DIR={DATA!r})"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    return {"first output, seconds": time.perf_counter() - begun}


def speed():
    """The table of speed."""
    run = first_output() | sections()  # before anything else takes memory
    cells = notebook_cells()
    return steps(cells) | race(cells) | run


def machine():
    """What this was measured on."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    name = cpu[0].split(":")[1].strip() if cpu else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main(what):
    """Measure, print the table, and write file and README anew."""
    found = {"machine": machine(), "measured": {"recipe": recipe, "speed": speed}[what]()}
    found["code_sha256"] = execute.code_sha256(execute.read())
    whole = json.loads(execute.BENCHMARK.read_text()) if execute.BENCHMARK.exists() else {}
    execute.write_json(execute.BENCHMARK, whole | {what: found})
    execute.update_readme()
    print(execute.benchmark_table(what))


if __name__ == "__main__":
    matplotlib.use("agg")
    torch.set_flush_denormal(True)
    asked = sys.argv[1:] or ["speed"]
    if asked not in (["speed"], ["recipe"]):
        sys.exit(__doc__)
    main(*asked)
