"""Replicate the study on images that never served as test images.

    python tests/replicate.py

runs the notebook five times, one after the other, with SEED = HELD_OUT = 1 to 5, each in
a fresh folder, and writes what their verdicts say to `models/replication.json`.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import execute


def replicate(notebook, seed):
    """One run's seed, held-out block, seconds, and outcome of every claim."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder, "models")
        parameters = {"SEED": seed, "HELD_OUT": seed, "MODELS_DIR": str(models)}
        data = str(execute.ROOT / "data")
        execute.execute(execute.inject(notebook, DATA_DIR=data, **parameters), folder)
        metrics = json.loads((models / "metrics.json").read_text())
    row = {name: metrics["config"][name] for name in ("SEED", "HELD_OUT")}
    return row | {name: metrics[name] for name in ("seconds", "verdict", "checks")}


def main():
    """Make the five runs, print a line for each, and write the file at the end."""
    notebook, runs = execute.read(), []
    for seed in range(1, 6):
        runs.append(replicate(copy.deepcopy(notebook), seed))
        said = [claim["outcome"] for claim in runs[-1]["verdict"].values()]
        counts = ", ".join(f"{said.count(x)} {x}" for x in ("yes", "no", "open"))
        print(f"SEED = HELD_OUT = {seed}: {counts}", flush=True)
    code = execute.code_sha256(notebook)
    execute.write_json(execute.REPLICATION, {"code_sha256": code, "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
