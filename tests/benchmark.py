"""Measurements of the training recipe and of speed; run by hand, nothing else running.

    python tests/benchmark.py recipe     # the ladder: one ingredient more a row
    python tests/benchmark.py steps      # a training step against dense products
    python tests/benchmark.py sections   # wall time and peak memory of each section

Each is timed in one process; alternatives take turns, and medians are given, so that the
ratios hold where the machine's speed drifts. No test image is looked at.
"""

import math
import statistics
import sys
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
    atoms = F.normalize(noise) if level < 4 else cells["patches"](images, draws)
    mean = images.mean(0) if level >= 2 else torch.zeros(784)
    model = cells["KSparseAutoencoder"](atoms, mean)
    if level < 3:  # the start that PyTorch gives to linear layers
        torch.manual_seed(seed)
        encoder, decoder = nn.Linear(784, 1024), nn.Linear(1024, 784)
        model.encoder.load_state_dict(encoder.state_dict())
        model.atoms.data = decoder.weight.data.T.contiguous()
        model.bias.data = decoder.bias.data + mean
    return model


def train(cells, level, seed):
    """Train as a row of the ladder says, 30 epochs without stopping early."""
    images, draws = cells["images"]["train"], cells["generator"](seed)
    cells["SHRINKAGE"] = 0.1 if level >= 5 else 0.0
    model = start(cells, level, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=level > 0)
    steps = 30 * math.ceil(len(images) / 256)
    falls = cells["FALLS"] * steps
    step = 0
    for _ in range(30):
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
    """Print the ladder: mean over the seeds, on validation images."""
    print(
        "| recipe | validation MSE | silent units | probe accuracy "
        "| pixels, encoder row | pixels, atom | seconds |\n|---|---|---|---|---|---|---|"
    )
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
        mse, silent, accuracy, *rest = (statistics.mean(x) for x in zip(*rows, strict=True))
        print(
            f"| {name} | {mse:.5f} | {silent:.0f} | {accuracy:.3f} | "
            + " | ".join(f"{x:.0f}" for x in rest)
            + " |",
            flush=True,
        )


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


def steps():
    """Print a training step as a share of the five dense products of its shapes."""
    cells = notebook_cells()
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
    print(f"five dense products: {1000 * t['five']:.1f} ms")
    print(f"a step with 50 units: {t['50'] / t['five']:.2f} of that")
    print(f"a step with 10 units: {t['10'] / t['five']:.2f}")
    print(f"the run's mix of both: {mix / t['five']:.2f}")


def sections():
    """Print wall time and peak memory (Linux) of each section of a full run."""
    shell = InteractiveShell.instance()
    title, rows = "", {}
    for cell in execute.read().cells:
        if cell.cell_type == "markdown":
            headings = [x for x in cell.source.splitlines() if x.startswith("## ")]
            title = headings[0][3:] if headings else title
            continue
        Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
        begun = time.perf_counter()
        shell.run_cell(cell.source, store_history=True).raise_error()
        seconds = time.perf_counter() - begun
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1e6
        before = rows.get(title, (0.0, 0.0))
        rows[title] = (before[0] + seconds, max(before[1], peak))
    print("| section | seconds | peak memory, GB |\n|---|---|---|")
    for title, (seconds, peak) in rows.items():
        print(f"| {title} | {seconds:.1f} | {peak:.2f} |")
    print(f"| all | {sum(s for s, _ in rows.values()):.0f} | |")


if __name__ == "__main__":
    matplotlib.use("agg")
    measurements = {f.__name__: f for f in (recipe, steps, sections)}
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    if asked not in measurements:
        sys.exit(__doc__)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    measurements[asked]()
