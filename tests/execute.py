"""Execute `fashion_sae.ipynb`: the one place that does it.

`python tests/execute.py` makes the full run, saves the notebook with its outputs, and
brings the README up to it; with `texts` behind it, it brings up the README alone.
"""

import ast
import base64
import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # before torch, as in the notebook

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "fashion_sae.ipynb"
EXECUTED = ROOT / "fashion_sae.executed.ipynb"  # of a notebook edited meanwhile
README, REQUIREMENTS = ROOT / "README.md", ROOT / "requirements.txt"
MODELS, DATA = ROOT / "models", ROOT / "data"
FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"]
FILES += ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package below
WIDGET = "application/vnd.jupyter.widget-view+json"
INJECTED = "injected-parameters"
EXPECTED = (CellExecutionError, LookupError, OSError, RuntimeError, ValueError)
PICTURES = {"class_atoms.png": "class-atoms", "film.png": "film"}  # and tags of cells
python_of = TransformerManager().transform_cell  # where a magic is a call of its text
RESULTS = {  # in models/, in the order in which they are made, and by what
    "replication.json": "python tests/replicate.py",
    "metrics.json": "python tests/execute.py, with the notebook's outputs",
    "benchmark.json": "python tests/benchmark.py, without and with recipe behind it",
}


def json_of(path):
    return json.loads(path.read_text("utf-8"))


def write_whole(path, content):
    """Write bytes, a text, or a dict as JSON to a file, whole or not at all."""
    if isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    path = path.resolve()  # where it is a link: the file behind it
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


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


def meaning(node):
    """What a part of a syntax tree says, without docstrings, as in all Pythons."""
    if isinstance(node, ast.Constant):
        return repr(node.value)
    if isinstance(node, list):
        return f"[{', '.join(map(meaning, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    defines = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    if defines and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 may add empty texts
        fields["values"] = [x for x in node.values if meaning(x) != "''"]
    said = [f"{x}={meaning(y)}" for x, y in fields.items() if y not in (None, [])]
    return f"{type(node).__name__}({', '.join(said)})"


def code_sha256(notebook):
    """Hash of what the code cells mean, an injected one left out."""
    cells = code_cells(notebook, without=INJECTED)
    bodies = [ast.parse(python_of(cell.source)).body for cell in cells]
    text = "\n".join(meaning(body) for body in bodies if body)
    return hashlib.sha256(text.encode()).hexdigest()


def older_results():
    """A sentence on what was made by other code than the notebook's; "" if nothing."""
    here, older = code_sha256(read()), []
    for name, command in RESULTS.items():
        path = MODELS / name
        text = path.read_text("utf-8") if path.exists() else ""
        if set(re.findall(r'"code_sha256": "(\w+)"', text)) != {here}:
            older.append(f"models/{name} ({command})")
    said = "Older than the code, until made anew in this order:"
    return f"{said} {'; '.join(older)}." if older else ""


def parameters_of(notebook):
    parameters = {}
    exec(tagged(notebook, "parameters").source, {}, parameters)
    return parameters


def inject(notebook, **parameters):
    """Add a cell that sets `parameters`; KeyError for a name that is none of them."""
    unknown = sorted(set(parameters) - set(parameters_of(notebook)))
    if unknown:
        raise KeyError(f"{', '.join(unknown)}: not among the notebook's parameters")
    cell = nbformat.v4.new_code_cell("from math import inf, nan", id=INJECTED)
    cell.metadata["tags"] = [INJECTED]
    cell.source += "".join(f"\n{name} = {x!r}" for name, x in parameters.items())
    place = notebook.cells.index(tagged(notebook, "parameters"))
    notebook.cells.insert(place + 1, cell)
    return notebook


class ThisPython(AsyncKernelManager):
    """Starts this Python, whatever kernelspecs say, without a warning about TCP."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR"]
        return KernelSpec(argv=[*command, "-f", "{connection_file}"], language="python")


def execute(notebook, folder=ROOT):
    """Run every cell in a fresh kernel whose working folder is `folder`."""
    options = {"timeout": 3600, "startup_timeout": 600}
    interrupt = [signal.SIGINT, signal.default_int_handler]  # not nbclient's
    options["on_notebook_start"] = lambda notebook: signal.signal(*interrupt)
    options.update(coalesce_streams=True, record_timing=False, store_widget_state=False)
    options["resources"] = {"metadata": {"path": str(folder)}}
    own = {name: x for name, x in os.environ.items() if name != "MPLBACKEND"}
    client = NotebookClient(notebook, kernel_manager_class=ThisPython, **options)
    return client.execute(env=own)


def load(*whole, **parameters):
    """The notebook as a module: all that it defines, and cells with these ids run.

    Of the others: imports, functions, classes, and what begins with a capital.
    """
    os.environ["MPLBACKEND"] = "agg"
    book = ModuleType("book")
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for cell in code_cells(inject(read(), **parameters)):
        for part in ast.parse(python_of(cell.source)).body:
            text = ast.unparse(part)
            if cell.id in whole or isinstance(part, kinds) or text[0].isupper():
                exec(text, vars(book))
    return book


def fetch_data():
    """Put missing files in place, unpacked, from Debian's package; silent if that fails.

    torchvision takes its own packed files alone: Debian's differ, though not inside.
    """
    raw, source = DATA / "FashionMNIST" / "raw", DEBIAN
    missing = [name for name in FILES if not (raw / name).is_file()]
    problems = (OSError, EOFError, subprocess.SubprocessError)
    fetch = "apt-get download dataset-fashion-mnist"
    fetch = f"{fetch} || {{ apt-get update; {fetch}; }}; dpkg-deb -x *.deb ."
    limits = {"timeout": 900, "capture_output": True}
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(*problems):
        if missing and not DEBIAN.is_dir():
            source = Path(scratch, DEBIAN.relative_to("/"))
            subprocess.run(["sh", "-c", fetch], cwd=scratch, **limits)
        for name in missing:
            content = gzip.decompress(Path(source, f"{name}.gz").read_bytes())
            raw.mkdir(parents=True, exist_ok=True)
            write_whole(raw / name, content)


def picture(notebook, tag):
    for output in tagged(notebook, tag).outputs:
        if "image/png" in output.get("data", {}):
            return base64.b64decode(output.data["image/png"])
    raise LookupError(f"the cell tagged {tag!r} shows no picture")


def table(*lines):
    """A table of lines whose cells are parted by a stroke, the first of them its heads."""
    lines = [lines[0], re.sub(r"[^|]+", "---", lines[0]), *lines[1:]]
    return "\n".join(f"| {line.replace('|', ' | ')} |" for line in lines)


def tables(metrics):
    """The README's generated tables, by name."""
    claims, found = [], json_of(MODELS / "benchmark.json")
    for claim, row in metrics["comparisons"].items():
        one = {**row, "mean": row["difference"], "outcome": "one training"}
        text = "|{ours:.3f}|{rival:.3f}|{mean:.3f} [{low:.3f}, {high:.3f}]|{outcome}"
        claims.append(claim + text.format(**row["six"] or one))
    speed = {**found["speed"]["measured"], "the committed run, s": metrics["seconds"]}
    speed = [f"{name}|{x:.4g}" for name, x in speed.items()]
    ladder = found["recipe"]["measured"].items()
    ladder = ["|".join([name, *(f"{x:.4g}" for x in row)]) for name, row in ladder]
    heads = "claim|ours|rival|mean difference over six trainings [95 %]|outcome"
    columns = "recipe|validation MSE|silent|rare|probe accuracy|seconds"
    rows = {"comparisons": table(heads, *claims), "recipe": table(columns, *ladder)}
    return {**rows, "speed": table(f"on {found['speed']['machine']}|measured", *speed)}


def texts():
    """README and requirements.txt, by path, as they should be by what is in models/."""
    metrics, readme = json_of(MODELS / "metrics.json"), README.read_text("utf-8")
    for name, rows in tables(metrics).items():
        begin, end = f"<!-- {name}: generated -->\n", f"\n<!-- end of {name} -->"
        if begin not in readme or end not in readme:
            raise LookupError(f"README.md lacks {begin.strip()} or {end.strip()}")
        readme = readme.split(begin)[0] + begin + rows + end + readme.split(end)[1]
    used = ", ".join(f"{name} {x}" for name, x in metrics["environment"].items())
    lines = re.sub("(?<=committed run: ).*", used, REQUIREMENTS.read_text("utf-8"))
    return {README: readme, REQUIREMENTS: lines}


def write_texts():
    for path, text in texts().items():
        write_whole(path, text)


def is_left_over(output):
    """Whether an output is a widget, or the empty text that a progress bar leaves."""
    data = output.get("data", {})
    empty = list(data) == ["text/plain"] and not data["text/plain"].strip()
    return empty or WIDGET in data


def save(notebook, before):
    """Save a run of the notebook file that held `before`, beside it if it was edited."""
    for cell in code_cells(notebook):
        cell.outputs = [out for out in cell.outputs if not is_left_over(out)]
    notebook.metadata = nbformat.reads(before.decode(), as_version=4).metadata
    notebook.metadata.get("language_info", {}).pop("version", None)
    metrics = json_of(MODELS / "metrics.json")
    metrics["code_sha256"] = code_sha256(notebook)
    write_whole(MODELS / "metrics.json", metrics)
    path = NOTEBOOK if NOTEBOOK.read_bytes() == before else EXECUTED
    write_whole(path, nbformat.writes(notebook) + "\n")
    for name, tag in PICTURES.items():
        write_whole(MODELS / name, picture(notebook, tag))
    write_texts()
    return path


def main():
    """Make the full run; one line when it begins, and one when it ends."""
    print(f"{NOTEBOOK.name} runs, which takes a few minutes ...", flush=True)
    try:
        before, notebook = NOTEBOOK.read_bytes(), read()
        fetch_data()
        path = save(execute(notebook), before)
    except KeyboardInterrupt:
        print(f"{NOTEBOOK.name} was stopped, and was not saved.", file=sys.stderr)
        os._exit(130)  # at once; the kernel ends when it has no parent
    except EXPECTED as error:
        sys.exit(f"{error}\nNot all was saved.")
    if path == EXECUTED:
        edited = f"{NOTEBOOK.name} was edited while it ran, and the edit is kept"
        ran = f"what ran is {path.name}, to which models/ and README.md belong"
        sys.exit(f"{edited}; {ran}: to run the edited one, give this command again.")
    print(f"It is executed and saved; what it trained is in {MODELS.name}/.")


if __name__ == "__main__":
    write_texts() if sys.argv[1:] == ["texts"] else main()
