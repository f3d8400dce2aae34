"""Speed of the study, measured with the notebook's own cells; run by hand.

    python tests/benchmark.py            # steps, race, growth
    python tests/benchmark.py sections   # wall time and peak memory of each section

Everything is timed in this one process; alternatives take turns, and medians are given,
so that the ratios hold where the machine's speed drifts.
"""

import functools
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

TARGET = 0.0070  # test MSE that the literal recipe reaches at the end of its 30 epochs
ROUNDS = 7


class Literal(nn.Module):
    """The recipe taken at its word: default start, raw pixels in, dense layers."""

    def __init__(self, n_units, k):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(784, n_units), nn.Linear(n_units, 784)
        self.k = k

    def forward(self, images):
        pre_activations = self.encoder(images).relu()
        values, units = pre_activations.topk(self.k)
        codes = torch.zeros_like(pre_activations).scatter(1, units, values)
        return self.decoder(codes), values, units


def median_times(alternatives, repeat=20, rounds=ROUNDS):
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


def our_step(cells, model, k):
    """A function that makes one training step of the notebook's model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    batch = cells["images"]["train"][:256]

    def step():
        cells["train_step"](model, batch, optimizer, k)

    return step


def literal_step(model):
    """A function that makes one step of the literal recipe on a batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(batch):
        loss = F.mse_loss(model(batch)[0], batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def products(batch, n_units):
    """Functions that make the five dense matrix products of a step, and the first."""
    weight, atoms = torch.randn(2, n_units, 784)
    codes, error = torch.rand(len(batch), n_units), torch.randn_like(batch)

    def encode():
        return F.linear(batch, weight)

    def five():
        encode()
        codes @ atoms, codes.T @ error, error @ atoms.T, codes.T @ batch

    return {"five products": five, "encode": encode}


def new_model(cells, n_units):
    cells["N_UNITS"] = n_units
    images = cells["images"]["train"]
    return cells["KSparseAutoencoder"](cells["start_atoms"](images, 0), images.mean(0))


def steps_and_growth(cells):
    """One step against dense products, at growing numbers of units."""
    batch = cells["images"]["train"][:256]
    loader = cells["batches"](cells["images"]["train"], cells["labels"]["train"], 0)
    print(
        "| units | our step, ms | / five products | with k / 5 | / encoder's "
        "| literal / ours | test MSE after 3 epochs |\n|---|---|---|---|---|---|---|"
    )
    for n_units in (1024, 2048, 4096, 8192):
        model = new_model(cells, n_units)
        literal = Literal(n_units, cells["K"])
        t = median_times(
            {
                "ours": our_step(cells, model, cells["K"]),
                "few": our_step(cells, model, cells["K"] // 5),
                "literal": functools.partial(literal_step(literal), batch),
                **products(batch, n_units),
            }
        )
        model = new_model(cells, n_units)
        cells["train"](model, loader, cells["images"]["validation"][:1000], 3)
        mse = cells["evaluate"](model, cells["images"]["test"])[0]
        print(
            f"| {n_units} | {1000 * t['ours']:.1f} "
            f"| {t['ours'] / t['five products']:.2f} "
            f"| {t['few'] / t['five products']:.2f} "
            f"| {t['ours'] / t['encode']:.2f} "
            f"| {t['literal'] / t['ours']:.2f} | {mse:.5f} |",
            flush=True,
        )


def race(cells):
    """Seconds of 30 epochs, and until test MSE is TARGET.

    The literal recipe's evaluation is left out, ours after each epoch is counted.
    """
    test, validation = cells["images"]["test"], cells["images"]["validation"]
    loader = cells["batches"](cells["images"]["train"], cells["labels"]["train"], 0)
    torch.manual_seed(0)
    literal, spent, reached = Literal(1024, cells["K"]), 0.0, None
    step = literal_step(literal)
    for epoch in range(1, 31):
        begun = time.perf_counter()
        for batch, _ in loader:
            step(batch)
        spent += time.perf_counter() - begun
        mse = cells["evaluate"](literal, test)[0]
        if reached is None and mse <= TARGET:
            reached = (epoch, spent)
    silent = 1024 - alive(literal, cells["images"]["train"])
    print(f"literal: {spent:.0f} s for 30 epochs, test MSE {mse:.5f}, {silent} silent,")
    print(f"  test MSE {TARGET} reached at (epoch, seconds) {reached}")
    model = new_model(cells, 1024)
    begun = time.perf_counter()
    cells["train"](model, loader, validation, 30)
    ours = time.perf_counter() - begun
    mse = cells["evaluate"](model, test)[0]
    print(f"ours: {ours:.0f} s ({ours / spent:.2f}) for 30 epochs, MSE {mse:.5f}")
    for epochs in (1, 2, 3, 4, 5):
        model = new_model(cells, 1024)
        begun = time.perf_counter()
        cells["train"](model, loader, validation[:256], epochs)
        ours = time.perf_counter() - begun
        if cells["evaluate"](model, test)[0] <= TARGET:
            print(f"ours: {TARGET} reached in {epochs} epochs, {ours:.1f} s; ", end="")
            print(f"{(reached or (30, spent))[1] / ours:.1f} times faster")
            break


def alive(model, images):
    """How many units fire for any image."""
    fired = torch.zeros(model.encoder.out_features, dtype=torch.bool)
    with torch.no_grad():
        for x in images.split(4096):
            _, values, units = model(x)
            fired[units[values > 0]] = True
    return int(fired.sum())


def sections():
    """Wall time and peak memory (Linux) of each section of a full run."""
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


def main():
    matplotlib.use("agg")
    if sys.argv[1:] == ["sections"]:
        return sections()
    cells = execute.run_cells("train", DATA_DIR=str(execute.ROOT / "data"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    steps_and_growth(cells)
    race(cells)


if __name__ == "__main__":
    sys.exit(main())
