"""What is committed tells one story: notebook, metrics, models, replication and README."""

import hashlib
import html
import json
import re
import subprocess
import sys

import execute
import nbformat
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(execute.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def replication():
    return json.loads(execute.REPLICATION.read_text())


WORKFLOW = execute.ROOT / ".github" / "workflows" / "ci.yml"


def source_of(notebook, cell_id):
    return next(cell.source for cell in notebook.cells if cell["id"] == cell_id)


def convert(to, *options):
    """What `jupyter nbconvert` makes of the committed notebook."""
    command = [sys.executable, "-m", "nbconvert", "--stdout", "--to", to, *options]
    run = subprocess.run(
        [*command, execute.NOTEBOOK.name],
        cwd=execute.ROOT,
        check=True,
        capture_output=True,
        encoding="utf-8",
    )
    return run.stdout


def test_outputs_are_of_this_code(notebook, committed):
    assert committed.metrics["code_sha256"] == execute.code_sha256(notebook)


def test_models_are_of_this_run(committed):
    for name, digest in committed.metrics["models_sha256"].items():
        data = (execute.ROOT / "models" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest, name


def test_was_run_in_order(notebook):
    counts = [cell.execution_count for cell in execute.code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {out.output_type for cell in execute.code_cells(notebook) for out in cell.outputs}
    assert kinds <= {"display_data", "execute_result"}  # no error, no stream


def test_is_clean(notebook):
    outputs = json.dumps([cell.outputs for cell in execute.code_cells(notebook)])
    assert not re.search(r"/(home|root|tmp|work|Users|mnt|private)/", outputs)
    assert execute.WIDGET not in outputs
    assert notebook.metadata == execute.METADATA
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert execute.NOTEBOOK.stat().st_size < 2_000_000
    nbformat.validate(notebook)


def test_was_a_full_run(notebook, committed):
    parameters = {}
    exec(next(c for c in notebook.cells if c["id"] == "parameters").source, {}, parameters)
    assert committed.metrics["config"] == parameters


def test_shape(notebook):
    """Not longer than can be read, and every link in it leads to a heading."""
    sources = [cell.source for cell in execute.code_cells(notebook)]
    assert len(sources) <= 80
    assert sum(len(source.splitlines()) for source in sources) <= 1500
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = re.findall(r"^#+ (.+)$", "\n".join(texts), re.M)
    sections = [m for text in texts if (m := re.match(r"## (\d+) \S", text))]
    assert [int(m[1]) for m in sections] == list(range(1, 17))
    head = re.compile("## |# Part|### What we")
    begins = [i for i, cell in enumerate(notebook.cells) if head.match(cell.source)]
    ends = [notebook.cells[i - 1].source for i in [*begins[2:], len(notebook.cells)]]
    assert ends.count("[↑ Contents](#Contents)") == 16  # the end of each section leads back up
    anchors = {heading.strip().replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#(.+?)\)", "\n".join(texts))
    assert set(links) <= anchors
    assert links


def test_html_page_can_be_read(notebook):
    """As the README converts it: figures have text alternatives, tables are tables."""
    page = convert("html", "--template", "classic")
    shown = [o for cell in execute.code_cells(notebook) for o in cell.outputs]
    figures = [o.metadata["image/png"]["alt"] for o in shown if "image/png" in o.data]
    pictures = re.findall(r'<img[^>]*src="data:image/png[^>]*>', page)
    texts = [re.search(r"""alt=(["'])(.*?)\1""", picture)[2] for picture in pictures]
    assert [html.unescape(text) for text in texts] == figures
    assert len(figures) > 0
    tables = sum("text/html" in o.data for o in shown)
    assert page.count("<table") >= tables > 0


def test_script_is_python():
    script = convert("script")
    assert "class KSparseAutoencoder(nn.Module):" in script
    compile(script, "fashion_sae.py", "exec")


def test_notebook_shows_what_was_measured(notebook, committed):
    """The verdict's table, made again from the files, is the one on display."""
    cell = next(cell for cell in notebook.cells if cell["id"] == "verdict")
    files = {"metrics": committed.metrics, "MODELS": execute.MODELS}
    namespace = {"pd": pd, "json": json, "same_run": lambda *_: None, **files}
    exec(cell.source, namespace)
    (output,) = cell.outputs
    assert output.data["text/html"] == namespace["verdict"]._repr_html_()
    for text in execute.HEADLINES:
        assert html.escape(text, quote=False) in output.data["text/html"]


def test_replication_is_of_this_code(notebook, replication, committed):
    assert replication["code_sha256"] == execute.code_sha256(notebook)
    seeds = [(run["SEED"], run["HELD_OUT"]) for run in replication["runs"]]
    assert seeds == [(i, i) for i in range(1, 6)]
    for run in replication["runs"]:
        assert run["verdict"].keys() == committed.metrics["verdict"].keys()
        assert run["checks"].keys() == committed.metrics["checks"].keys()


def test_replications_are_counted_rightly(notebook, replication):
    """The README's and the notebook's counts of yes are those of the five runs."""
    cell = next(cell for cell in notebook.cells if cell["id"] == "verdict")
    shown = cell.outputs[0].data["text/html"]
    rows = re.findall(r"^\|(.+)\|$", execute.README.read_text(), re.M)
    rows = {cells[0]: cells for row in rows if len(cells := row[1:-1].split(" | ")) == 8}
    assert "yes in n of 5" in rows["claim"]
    for text in replication["runs"][0]["verdict"]:
        said = [run["verdict"][text]["outcome"] for run in replication["runs"]]
        assert rows[text][6] == str(said.count("yes")), text
        row = shown.split(f"<th>{html.escape(text, quote=False)}</th>")[1].split("</tr>")[0]
        assert f"<td>{said.count('yes')}</td>" in row, text


def test_readme_says_what_was_measured(notebook):
    readme = execute.README.read_text()
    for name, write in execute.BLOCKS.items():
        begin, end = execute.block(readme, name)
        assert readme[begin:end] == write(), name
    for name, cell_id in execute.PICTURES.items():
        picture = (execute.MODELS / name).read_bytes()
        assert picture == execute.picture(notebook, cell_id), name
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (execute.ROOT / link).exists(), link


def prose_of(readme):
    """The README without what is generated, code, links and their targets, and citations."""
    for name in execute.BLOCKS:
        begin, end = execute.block(readme, name)
        readme = readme[:begin] + readme[end:]
    for pattern in (r"```.*?```", r"`[^`]*`", r"\]\([^)]*\)", r"\([^)]*, \d{4}[^)]*\)"):
        readme = re.sub(pattern, "", readme, flags=re.S)
    return readme


def test_numbers_of_the_readme_have_a_source(notebook, committed):
    """Each number in its sentences is a parameter, a shape or a section of this notebook."""
    config, k = committed.metrics["config"], committed.metrics["config"]["K"]
    n_units, pixels = committed.encoder["weight"].shape
    assert (n_units, k) == (config["N_UNITS"], committed.k)
    sections = [c.source.split()[1] for c in notebook.cells if c.source.startswith("## ")]
    oldest = re.search(r'python: \["(3\.\d+)"', WORKFLOW.read_text())[1]
    known = {f"{n_units:,}", str(k), str(pixels), str(int(pixels**0.5)), oldest, *sections}
    known |= {"0", "90", "10,000"}  # black; the share of energy in `energy_pixels`; a test set
    assert "energy.cumsum(1) < 0.9 *" in source_of(notebook, "checks")
    numbers = set(re.findall(r"(?<![\w-])(?:\d[\d,.]*\d|\d)", prose_of(execute.README.read_text())))
    assert numbers <= known


def test_workflow_runs_what_the_readme_says():
    commands = re.findall(r"```bash\n(.*?)\n```", execute.README.read_text(), re.S)
    assert re.findall(r"- run: (.+)", WORKFLOW.read_text())[::-1] == commands


def test_requirements_name_the_versions_of_the_run():
    assert execute.versions() in execute.REQUIREMENTS.read_text().splitlines()


def test_readme_snippet_runs(committed, monkeypatch, capsys):
    """The lines that load the three files in plain PyTorch print a class."""
    monkeypatch.chdir(execute.ROOT)
    snippet = re.search(r"```python\n(.*?)```", execute.README.read_text(), re.S)[1]
    namespace = {}
    exec(snippet, namespace)
    assert namespace["logits"].shape == (1, 10)
    assert capsys.readouterr().out.strip() in namespace["classes"]
    assert namespace["classes"] == list(committed.metrics["importance"]["top_units"])
