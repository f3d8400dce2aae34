"""Five runs, SEED = HELD_OUT = 1 to 5, on images that never served as test images.

Their comparisons become `models/replication.json` when all five are done.
"""

import copy
import tempfile
from pathlib import Path

import execute


def main():
    execute.fetch_data()
    notebook = execute.read()  # once: all five are runs of one code
    usual = execute.parameters_of(notebook)["DATA_DIR"]
    found = {"code_sha256": execute.code_sha256(notebook), "runs": []}
    for seed in range(1, 6):
        parameters = {"SEED": seed, "HELD_OUT": seed, "DATA_DIR": str(execute.DATA)}
        run = execute.inject(copy.deepcopy(notebook), **parameters)
        with tempfile.TemporaryDirectory() as folder:
            execute.execute(run, folder)
            metrics = execute.json_of(Path(folder, "models", "metrics.json"))
        run = {"config": {**metrics["config"], "DATA_DIR": usual}}
        found["runs"].append({**run, "comparisons": metrics["comparisons"]})
        print(f"SEED = HELD_OUT = {seed}: {metrics['seconds']:.0f} s", flush=True)
    execute.write_whole(execute.MODELS / "replication.json", found)


if __name__ == "__main__":
    main()
