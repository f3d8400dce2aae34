"""Execute `fashion_sae.ipynb`: the one place that does it. `python tests/execute.py` makes
the full run, saves the notebook with its outputs, and brings the README up to it.
"""

import ast
import base64
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "fashion_sae.ipynb"
README = ROOT / "README.md"
REQUIREMENTS = ROOT / "requirements.txt"
MODELS = ROOT / "models"
DATA = ROOT / "data"
FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
FILES += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package below
VERSIONS = "# the committed run: "  # begins a line of requirements.txt
WIDGET = "application/vnd.jupyter.widget-view+json"
INJECTED = "injected-parameters"
PICTURES = {"class_atoms.png": "class-atoms", "exchange.png": "exchange"}  # and tags


def text_of(path):
    return path.read_text(encoding="utf-8")


def write_whole(path, content):
    """Write bytes, a text, or a dict as JSON to a file, whole or not at all."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    if isinstance(content, str):
        content = content.encode()
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def code_cells(notebook, without=None):
    """The code cells, in order; all but those tagged `without`."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if without not in cell.metadata.get("tags", [])]


def tagged(notebook, tag):
    for cell in notebook.cells:
        if tag in cell.metadata.get("tags", []):
            return cell
    raise LookupError(f"no cell of {NOTEBOOK.name} has the tag {tag!r}")


def read(path=NOTEBOOK):
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def code_sha256(notebook):
    """Hash of the joined sources of the code cells, an injected one left out."""
    sources = [cell.source for cell in code_cells(notebook, without=INJECTED)]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


def parameters_of(notebook):
    parameters = {}
    exec(tagged(notebook, "parameters").source, {}, parameters)
    return parameters


def inject(notebook, **parameters):
    """Add a cell that sets `parameters`; KeyError for a name that is none of them."""
    unknown = sorted(set(parameters) - set(parameters_of(notebook)))
    if unknown:
        raise KeyError(f"{', '.join(unknown)}: not among the notebook's parameters")
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    source = "\n".join(["from math import inf, nan", *lines])
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": [INJECTED]})
    place = notebook.cells.index(tagged(notebook, "parameters"))
    notebook.cells.insert(place + 1, cell)
    return notebook


class ThisPython(AsyncKernelManager):
    """Starts this Python, whatever kernelspecs say, without a warning about TCP."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR"]
        return KernelSpec(argv=[*command, "-f", "{connection_file}"], language="python")


def execute(notebook, folder=ROOT, **options):
    """Run every cell in a fresh kernel whose working folder is `folder`."""
    options.update(timeout=3600, kernel_manager_class=ThisPython, coalesce_streams=True)
    options.update(record_timing=False, store_widget_state=False)
    folders = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, resources=folders, **options).execute()
    return notebook


def run_source(source, namespace, whole=True):
    tree = ast.parse(TransformerManager().transform_cell(source))
    if not whole:
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
        tree.body = [part for part in tree.body if isinstance(part, kinds)]
    exec(compile(tree, "a cell", "exec"), namespace)


def load(until, **parameters):
    """Run cells in this process, up to one that holds `until`; then only define."""
    os.environ.setdefault("MPLBACKEND", "agg")
    namespace, whole = {"__name__": "__main__"}, True
    with contextlib.redirect_stdout(None):
        for cell in code_cells(inject(read(), **parameters)):
            run_source(cell.source, namespace, whole)
            whole = whole and until not in cell.source
    if whole:
        raise LookupError(f"no code cell of {NOTEBOOK.name} holds {until!r}")
    return namespace


def fetch_data(folder=DATA):
    """Put missing files in place from Debian's package, silent where that fails."""
    raw, source = Path(folder, "FashionMNIST", "raw"), DEBIAN
    missing = [name for name in FILES if not list(raw.glob(f"{name}*"))]
    problems = contextlib.suppress(OSError, subprocess.SubprocessError)
    with tempfile.TemporaryDirectory() as scratch, problems:
        if missing and not DEBIAN.is_dir():
            fetch = "apt-get download dataset-fashion-mnist"
            fetch = f"{fetch} || {{ apt-get update; {fetch}; }}; dpkg-deb -x *.deb ."
            limits = {"timeout": 900, "capture_output": True, "cwd": scratch}
            subprocess.run(["sh", "-c", fetch], **limits)
            source = Path(scratch, DEBIAN.relative_to("/"))
        raw.mkdir(parents=True, exist_ok=True)
        for name in missing:
            content = Path(source, f"{name}.gz").read_bytes()
            write_whole(raw / f"{name}.gz", content)


def picture(notebook, tag):
    for output in tagged(notebook, tag).outputs:
        if "image/png" in output.get("data", {}):
            return base64.b64decode(output.data["image/png"])
    raise LookupError(f"the cell tagged {tag!r} shows no picture")


def table(heads, rows):
    rows = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def comparisons_table(metrics):
    """All comparisons, and how they came out in replications of the same code."""
    path, runs, rows = MODELS / "replication.json", [], []
    found = json.loads(text_of(path)) if path.exists() else {}
    if found.get("code_sha256") == metrics["code_sha256"]:
        runs = [run["comparisons"] for run in found["runs"]]
    for claim, row in metrics["comparisons"].items():
        difference = f"{row['difference']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        again = "-"
        if runs:
            said = [run[claim]["outcome"] for run in runs]
            kinds = [x for x in ("yes", "no", "open") if x in said]
            values = [run[claim]["difference"] for run in runs]
            mean, spread = statistics.mean(values), statistics.stdev(values)
            again = ", ".join(f"{said.count(kind)} {kind}" for kind in kinds)
            again += f"; {mean:.3f} ± {spread:.3f}"
        measured = [f"{row['ours']:.3f}", f"{row['rival']:.3f}"]
        rows.append([claim, *measured, f"{difference} **{row['outcome']}**", again])
    heads = ["claim", "ours", "rival", "difference [95 % interval]", "replications"]
    return table(heads, rows)


def benchmark_table(what):
    found = json.loads(text_of(MODELS / "benchmark.json"))[what]
    heads, digits = [f"on {found['machine']}", "measured"], [".3g"]
    if what == "recipe":
        heads = ["recipe", "validation MSE", "silent", "probe accuracy"]
        heads += ["pixels of an atom", "seconds"]
        digits = [".5f", ".0f", ".3f", ".0f", ".0f"]
    rows = []
    for name, values in found["measured"].items():
        values = values if isinstance(values, list) else [values]
        rows.append([name, *map(format, values, digits)])
    return table(heads, rows)


def texts():
    """README and requirements.txt, by path, as they should be by what is in models/."""
    tables = {name: benchmark_table(name) for name in ("recipe", "speed")}
    metrics = json.loads(text_of(MODELS / "metrics.json"))
    tables["comparisons"] = comparisons_table(metrics)
    readme, lines = text_of(README), text_of(REQUIREMENTS).splitlines()
    for name, rows in tables.items():
        begin, end = f"<!-- {name}: generated -->\n", f"\n<!-- end of {name} -->"
        if begin not in readme or end not in readme:
            raise LookupError(f"README.md lacks {begin.strip()} or {end.strip()}")
        head, tail = readme.split(begin)[0], readme.split(end)[1]
        readme = head + begin + rows + end + tail
    used = [f"{name} {x}" for name, x in metrics["environment"].items()]
    version = VERSIONS + ", ".join(used)
    lines = [version if line.startswith(VERSIONS) else line for line in lines]
    return {README: readme, REQUIREMENTS: "\n".join(lines) + "\n"}


def save(notebook):
    for cell in code_cells(notebook):
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    notebook.metadata = read().metadata
    notebook.metadata.get("language_info", {}).pop("version", None)
    metrics = json.loads(text_of(MODELS / "metrics.json"))
    metrics["code_sha256"] = code_sha256(notebook)
    write_whole(MODELS / "metrics.json", metrics)
    write_whole(NOTEBOOK, nbformat.writes(notebook) + "\n")
    for name, tag in PICTURES.items():
        write_whole(MODELS / name, picture(notebook, tag))
    for path, text in texts().items():
        write_whole(path, text)


def main():
    """Make the full run; one line when it begins, and one when it ends."""
    print(f"{NOTEBOOK.name} runs, which takes a few minutes ...", flush=True)
    try:
        notebook = read()
        for tag in PICTURES.values():  # known before the run rather than after it
            tagged(notebook, tag)
        fetch_data()
        save(execute(notebook))
    except CellExecutionError as error:
        sys.exit(f"{error}\n{NOTEBOOK.name} has stopped, and was not saved.")
    except (LookupError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"Not all was saved: {error}")
    print(f"It is executed and saved; what it trained is in {MODELS.name}/.")


if __name__ == "__main__":
    main()
