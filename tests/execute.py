"""Execute `fashion_sae.ipynb`: the one place that does it.

    python tests/execute.py

makes the full run in the repository and saves the notebook with its outputs, clean of
whatever would change from machine to machine. Tests and benchmark use these functions.
"""

import base64
import hashlib
import json
import logging
import sys
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "fashion_sae.ipynb"
README = ROOT / "README.md"
PICTURE = ROOT / "models" / "known_answer.png"
BEGIN, END = "<!-- results: written by tests/execute.py -->", "<!-- end of results -->"
WIDGET = "application/vnd.jupyter.widget-view+json"


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
    """Hash of the code cells, as the notebook itself takes it of what it has run."""
    sources = [cell.source.rstrip("\n") for cell in code_cells(notebook)]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


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
        raise KeyError(
            f"{', '.join(unknown)}: not in the notebook's cell of parameters"
        )
    source = "from math import inf, nan\n" if "nan" in repr(parameters) else ""
    source += "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    cell = nbformat.v4.new_code_cell(source, id="injected-parameters")
    cell.metadata["tags"] = ["injected-parameters"]
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


def run_cells(until, namespace=None, after=None, **parameters):
    """Run code cells in this process, up to and with the one whose id is `until`.

    With `after` only the cells behind that id run, in the `namespace` given.
    Returns the namespace, a dict of everything that the cells define.
    """
    cells = code_cells(inject(read(), **parameters))
    ids = [cell["id"] for cell in cells]
    begin = ids.index(after) + 1 if after else 0
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    for cell in cells[begin : ids.index(until) + 1]:
        source = TransformerManager().transform_cell(cell.source)
        exec(compile(source, cell["id"], "exec"), namespace)
    return namespace


def clean(notebook):
    """Drop progress bars and the kernel's version from an executed notebook."""
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    return notebook


def results_table(metrics):
    """The README's table of claims, from the dictionary `metrics.json` holds."""
    rows = ["| claim | measured | 95 % interval | bar | control | held |"]
    rows.append("|---|---|---|---|---|---|")
    for text, row in metrics["verdict"].items():
        interval = ", ".join(f"{x:.4f}" for x in row["interval"])
        cells = (
            text,
            f"{row['measured']:.4g}",
            f"[{interval}]" if interval else "",
            row["bar"],
            row["control"],
            ("yes" if row["held"] else "**no**") + ", open" * row["open"],
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def picture(notebook, cell_id):
    """The bytes of the PNG that a cell shows."""
    cell = next(cell for cell in notebook.cells if cell["id"] == cell_id)
    outputs = (output.get("data", {}) for output in cell.outputs)
    return base64.b64decode(next(o["image/png"] for o in outputs if "image/png" in o))


def update_readme(notebook, metrics):
    """Bring the README's table and picture up to the run."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    table = results_table(metrics)
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    PICTURE.write_bytes(picture(notebook, "cue-figure"))


def main():
    """Make the full run; save the notebook with outputs, and the README's results."""
    notebook = clean(execute(read()))
    nbformat.write(notebook, NOTEBOOK)
    update_readme(notebook, json.loads((ROOT / "models" / "metrics.json").read_text()))
    print(f"{NOTEBOOK.name} is executed and saved; what it trained is in models/")


if __name__ == "__main__":
    sys.exit(main())
