"""Five runs, SEED = HELD_OUT = 1 to 5, on images that never served as test images.

Their comparisons become `models/replication.json` when all five are done.
"""

import json
import tempfile
from pathlib import Path

import execute


def main():
    execute.fetch_data()
    found = {"code_sha256": execute.code_sha256(execute.read()), "runs": []}
    for seed in range(1, 6):
        parameters = {"SEED": seed, "HELD_OUT": seed, "DATA_DIR": str(execute.DATA)}
        with tempfile.TemporaryDirectory() as folder:
            execute.execute(execute.inject(execute.read(), **parameters), folder)
            text = execute.text_of(Path(folder, "models", "metrics.json"))
        metrics = json.loads(text)
        metrics["config"]["DATA_DIR"] = "data"
        found["runs"].append({x: metrics[x] for x in ("config", "comparisons")})
        said = [row["outcome"] for row in metrics["comparisons"].values()]
        counts = [f"{said.count(word)} {word}" for word in ("yes", "no", "open")]
        print(f"SEED = HELD_OUT = {seed}: {', '.join(counts)}", flush=True)
    execute.write_whole(execute.MODELS / "replication.json", found)


if __name__ == "__main__":
    main()
