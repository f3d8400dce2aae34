"""Execute `fashion_sae.ipynb`: the one place that does it.

    python tests/execute.py

makes the full run in the repository and saves the notebook with its outputs, clean of
whatever would change from machine to machine; it adds the hash of the code to
`models/metrics.json` and brings the README's results up to the run. Tests, benchmark and
replication use these functions.
"""

import base64
import functools
import hashlib
import json
import logging
import os
import sys
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "fashion_sae.ipynb"
README = ROOT / "README.md"
MODELS = ROOT / "models"
REPLICATION = MODELS / "replication.json"
BENCHMARK = MODELS / "benchmark.json"
REQUIREMENTS = ROOT / "requirements.txt"
VERSIONS = "# the committed run: "  # begins the line of requirements.txt that names them
WIDGET = "application/vnd.jupyter.widget-view+json"
INJECTED = "injected-parameters"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {  # what `jupyter nbconvert --to script` needs, and no version
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}
PICTURES = {  # of the README, and the cells that show them
    "judge.png": "judge-figure",
    "known_answer.png": "known-answer-figure",
    "class_atoms.png": "class-atoms",
}
HEADLINES = (  # the claims that the README shows unfolded
    "test MSE",
    "probe accuracy",
    "judge (CNN): erasing the top ten costs more than matched units",
    "judge (CNN): erasing the top ten costs more than class mean",
    "zeroing the top ten costs more than their mean shift foretells",
    "classes whose cue unit ranks first or second",
    "decoy: best place in ten rankings (1 is the top)",
    "activity on mutual best matches: another start",
)


def read(path=NOTEBOOK):
    """The notebook, without outputs."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def code_cells(notebook):
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_sha256(notebook):
    """Hash of the joined sources of the code cells, an injected one left out."""
    cells = code_cells(notebook)
    own = [c.source for c in cells if INJECTED not in c.metadata.get("tags", [])]
    return hashlib.sha256("\n".join(own).encode()).hexdigest()


def write_json(path, content):
    """Write a JSON file, whole or not at all."""
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def inject(notebook, **parameters):
    """Add a cell that sets `parameters` right after the cell tagged `parameters`.

    Raises KeyError for a name that the tagged cell does not set.
    """
    place, tagged = next(
        (i, cell)
        for i, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    )
    known = {}
    exec(tagged.source, known)
    if unknown := sorted(parameters.keys() - known.keys()):
        raise KeyError(f"{', '.join(unknown)}: not in the notebook's cell of parameters")
    source = "from math import inf, nan\n"
    source += "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cell = nbformat.v4.new_code_cell(source, id=INJECTED)
    cell.metadata["tags"] = [INJECTED]
    notebook.cells.insert(place + 1, cell)
    return notebook


def execute(notebook, folder=ROOT, timeout=1800):
    """Run every cell in a fresh kernel whose working folder is `folder`."""
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return notebook


def run_cells(until, namespace=None, after=None, skip=(), **parameters):
    """Run code cells in this process, up to and with the one whose id is `until`.

    With `after` only the cells behind that id run, in the `namespace` given; those
    whose ids are in `skip` do not. Returns the namespace, a dict of everything that
    the cells define.
    """
    cells = code_cells(inject(read(), **parameters))
    ids = [cell["id"] for cell in cells]
    begin = ids.index(after) + 1 if after else 0
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    for cell in cells[begin : ids.index(until) + 1]:
        if cell["id"] in skip:
            continue
        source = TransformerManager().transform_cell(cell.source)
        exec(compile(source, cell["id"], "exec"), namespace)
    return namespace


def clean(notebook):
    """Drop progress bars and the kernel's version from an executed notebook."""
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def replicated(sha256):
    """The runs in replication.json, if they are of the code with that hash."""
    if not REPLICATION.exists():
        return []
    content = json.loads(REPLICATION.read_text())
    return content["runs"] if content["code_sha256"] == sha256 else []


def replicated_cells(rows):
    """Count of yes, and mean ± spread, of one claim's rows, a row per replication."""
    values = [row["measured"] for row in rows]
    mean = sum(values) / len(values)
    spread = (sum((x - mean) ** 2 for x in values) / (len(values) - 1)) ** 0.5
    yes = sum(row["outcome"] == "yes" for row in rows)
    return str(yes), f"{mean:.3g} ± {spread:.2g}"


def claims_table(metrics, kind, runs, only=None):
    """Table of claims in Markdown; `kind` is verdict or checks, `runs` replications."""
    heads = ["claim", "measured", "95 % interval over test images", "bar", "control"]
    heads += ["outcome"]
    heads += [f"yes in n of {len(runs)}", "mean ± spread"] if runs else []
    rows = [heads, ["---"] * len(heads)]
    for text in only or metrics[kind]:
        row = metrics[kind][text]
        interval = ", ".join(f"{x:.4f}" for x in row["interval"])
        cells = [
            text,
            f"{row['measured']:.4g}",
            f"[{interval}]" if interval else "",
            row["bar"],
            row["control"],
            row["outcome"] if row["outcome"] != "no" else "**no**",
        ]
        if runs:
            cells += replicated_cells([run[kind][text] for run in runs])
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def results(metrics=None):
    """The README's results: headlines, and all claims folded."""
    metrics = metrics or json.loads((MODELS / "metrics.json").read_text())
    runs = replicated(metrics["code_sha256"])
    return "\n\n".join(
        [
            claims_table(metrics, "verdict", runs, HEADLINES),
            "<details><summary>All claims</summary>",
            claims_table(metrics, "verdict", runs),
            "Checks, which a sound run cannot fail:",
            claims_table(metrics, "checks", runs),
            "</details>",
        ]
    )


def benchmark_table(what):
    """What `tests/benchmark.py` found, speed or recipe, as a table in Markdown."""
    found = json.loads(BENCHMARK.read_text()).get(what)
    if not found:
        return "not measured yet"
    if what == "speed":
        heads = [f"on {found['machine']}", "measured"]
        rows = [[name, f"{x:.3g}"] for name, x in found["measured"].items()]
    else:
        heads = ["recipe", "validation MSE", "silent", "probe accuracy"]
        heads += ["pixels, encoder row", "pixels, atom", "seconds"]
        digits = (".5f", ".0f", ".3f", ".0f", ".0f", ".0f")
        rows = [[name, *map(format, values, digits)] for name, values in found["measured"].items()]
    table = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def versions():
    """The line of requirements.txt that names the committed run's packages."""
    used = json.loads((MODELS / "metrics.json").read_text())["environment"]
    named = [name for name in used if name not in ("device", "threads")]
    return VERSIONS + ", ".join(f"{name} {used[name]}" for name in named)


def picture(notebook, cell_id):
    """The bytes of the PNG that a cell shows."""
    cell = next(cell for cell in notebook.cells if cell["id"] == cell_id)
    outputs = (output.get("data", {}) for output in cell.outputs)
    return base64.b64decode(next(o["image/png"] for o in outputs if "image/png" in o))


# what stands between two markers of the README, and what writes it
BLOCKS = {
    "results": results,
    "recipe": functools.partial(benchmark_table, "recipe"),
    "speed": functools.partial(benchmark_table, "speed"),
}


def block(text, name):
    """Where a block of the README begins and ends in its text."""
    begin, end = f"<!-- {name}: generated -->\n", f"\n<!-- end of {name} -->"
    return text.index(begin) + len(begin), text.index(end)


def update_readme():
    """Bring the README's tables up to the files in models/."""
    text = README.read_text()
    for name, write in BLOCKS.items():
        begin, end = block(text, name)
        text = text[:begin] + write() + text[end:]
    README.write_text(text)


def main():
    """Make the full run; save the notebook with outputs, and the README's results."""
    notebook = clean(execute(read()))
    metrics = json.loads((MODELS / "metrics.json").read_text())
    metrics["code_sha256"] = code_sha256(notebook)
    write_json(MODELS / "metrics.json", metrics)
    nbformat.write(notebook, NOTEBOOK)
    for name, cell_id in PICTURES.items():
        (MODELS / name).write_bytes(picture(notebook, cell_id))
    lines = REQUIREMENTS.read_text().splitlines()
    lines = [versions() if line.startswith(VERSIONS) else line for line in lines]
    REQUIREMENTS.write_text("\n".join(lines) + "\n")
    update_readme()
    print(f"{NOTEBOOK.name} is executed and saved; what it trained is in models/")


if __name__ == "__main__":
    sys.exit(main())
