"""What is committed tells one story: notebook, metrics, models, replication and README."""

import hashlib
import json
import re

import execute
import nbformat
from test_run import check_outputs, metrics_in

NOTEBOOK = nbformat.read(execute.NOTEBOOK, as_version=4)
METRICS = metrics_in(execute.MODELS)
WORKFLOW = execute.text_of(execute.ROOT / ".github" / "workflows" / "ci.yml")


def test_notebook_is_a_full_run_of_its_code():
    assert METRICS["code_sha256"] == execute.code_sha256(NOTEBOOK)
    assert METRICS["config"] == execute.parameters_of(NOTEBOOK)
    for name, digest in METRICS["models_sha256"].items():
        content = (execute.MODELS / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    for name, tag in execute.PICTURES.items():
        picture = execute.picture(NOTEBOOK, tag)
        assert (execute.MODELS / name).read_bytes() == picture


def test_notebook_is_clean():
    cells = execute.code_cells(NOTEBOOK)
    assert sum(len(cell.source.splitlines()) for cell in cells) <= 1350
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    check_outputs(NOTEBOOK)
    outputs = json.dumps([cell.outputs for cell in cells])
    assert not re.search(r"/(home|root|tmp|work|Users|mnt|private)/", outputs)
    assert "version" not in NOTEBOOK.metadata["language_info"]
    assert execute.NOTEBOOK.stat().st_size < 3_000_000
    nbformat.validate(NOTEBOOK)


def test_replication_is_of_this_code():
    replication = json.loads(execute.text_of(execute.MODELS / "replication.json"))
    assert replication["code_sha256"] == execute.code_sha256(NOTEBOOK)
    for i in range(1, 6):
        run = replication["runs"][i - 1]
        assert run["config"] == {**METRICS["config"], "SEED": i, "HELD_OUT": i}
        assert list(run["comparisons"]) == list(METRICS["comparisons"])
    rows = execute.text_of(execute.README).splitlines()
    for claim in METRICS["comparisons"]:
        said = [run["comparisons"][claim]["outcome"] for run in replication["runs"]]
        (row,) = [row for row in rows if row.startswith(f"| {claim} |")]
        for outcome in set(said):
            assert f"{said.count(outcome)} {outcome}" in row.split("|")[-2]


def test_readme_shows_what_was_measured():
    for path, text in execute.texts().items():
        assert execute.text_of(path) == text
    readme = execute.text_of(execute.README)
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (execute.ROOT / link).exists(), link
    commands = re.findall(r"^python -m pip install -r .*$", readme, re.M)
    run = re.findall(r"- run: (python -m pip install -r .+)", WORKFLOW)
    assert sorted(run) == sorted(commands)


def test_numbers_in_the_readme_have_a_source():
    """Each in its prose is a parameter, shape, section, version, or was measured."""
    prose = execute.text_of(execute.README)
    unread = [r"<!-- (\w+): generated -->.*?<!-- end of \1 -->", r"```.*?```"]
    unread += [r"`[^`]*`", r"\]\([^)]*\)", r"\([^)]*\b(?:19|20)\d\d\b[^)]*\)"]
    for pattern in unread:  # tables, code, links and citations
        prose = re.sub(pattern, "", prose, flags=re.S)
    known = {str(x) for x in [*range(1, 16), 18, 28, "1,024", "784"]}
    known |= {str(x) for x in execute.parameters_of(NOTEBOOK).values()}
    versions = execute.text_of(execute.REQUIREMENTS) + WORKFLOW
    known |= set(re.findall(r"[\d.]+", versions))
    for number in re.findall(r"\d+\.\d+", json.dumps(METRICS)):
        known |= {f"{float(number):.{digits}f}" for digits in (2, 3, 4, 5)}
        known |= {f"{100 * float(number):.{digits}f} %" for digits in (0, 1)}
    found = re.findall(r"(?<![\w.-])(?:\d[\d,.]*\d|\d)(?: %)?", prose)
    assert set(found) <= known


def test_readme_snippet_reads_one_image_and_many(monkeypatch):
    monkeypatch.chdir(execute.ROOT)
    readme = execute.text_of(execute.README)
    snippet = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    for n in (1, 32):
        exec(snippet.replace("rand(1, 784)", f"rand({n}, 784)"), {})
