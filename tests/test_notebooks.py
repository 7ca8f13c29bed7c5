"""The tutorial notebooks as they are committed: whole, run, and from nobody's machine. `make notebooks` runs them."""

import ast
import copy
import hashlib
import re
from pathlib import Path

import nbformat
import pytest

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
PATHS = r"(?<![\w/:.])/(?:home|Users|root|tmp|work|var|opt|usr|mnt|srv|private)/|[A-Z]:\\|site-packages|ipykernel_\d"


def code_of(cell):
    """The Python of a cell: what `%%writefile` writes counts, other magics do not."""
    source = re.sub(r"\A%%writefile .*\n", "", cell.source)
    return re.sub(r"^%.*$", "", source, flags=re.MULTILINE)


def text_of(output):
    parts = [output.get("text", ""), *(t for kind, t in output.get("data", {}).items() if kind.startswith("text/"))]
    return "\n".join(parts)


def has_picture(cell):
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def faults(notebook):
    """What keeps a notebook from being read as it stands."""
    try:
        nbformat.validate(copy.deepcopy(notebook))
    except nbformat.ValidationError as error:
        yield f"not a notebook: {error}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "not run once from top to bottom"
    sources = "\0".join(cell.source for cell in code)
    if notebook.metadata.get("outputs_of") != hashlib.sha256(sources.encode()).hexdigest()[:16]:
        yield "its outputs are of other code: `make notebooks` makes them anew"
    for cell in notebook.cells:
        if re.search(PATHS, cell.source):
            yield f"a path of a machine in a source: {cell.source[:60]!r}"
    for cell in code:
        yield from faults_of_code(cell)


def faults_of_code(cell):
    try:
        tree = ast.parse(code_of(cell))
    except SyntaxError as error:
        yield f"does not compile: {error}"
        return
    shows = any(isinstance(node, ast.Attribute) and node.attr == "show" for node in ast.walk(tree))
    calls = [node.value.func for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    prints = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
    if shows and not has_picture(cell):
        yield f"no picture: {cell.source[:60]!r}"
    if prints and not any(output.get("name") == "stdout" for output in cell.outputs):
        yield f"nothing printed: {cell.source[:60]!r}"
    for output in cell.outputs:
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"an error or a warning: {output.get('ename') or output.text[:80]}"
        if re.search(PATHS, text_of(output)):
            yield f"a path of a machine in an output: {text_of(output)[:200]!r}"


def test_all_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["fine_tuning", "simulator", "zero_order"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_whole(path):
    notebook = nbformat.read(path, as_version=4)
    assert list(faults(notebook)) == []
    assert sum(map(has_picture, notebook.cells)) >= 4
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert all((TUTORIALS / target).exists() for target in targets), targets


def printing(notebook):
    return next(cell for cell in notebook.cells if any(o.get("name") == "stdout" for o in cell.get("outputs", [])))


def drawing(notebook):
    return next(cell for cell in notebook.cells if has_picture(cell))


def an_error():
    return nbformat.v4.new_output("error", ename="KeyError", evalue="", traceback=[])


DAMAGES = {
    "nothing printed": lambda notebook: printing(notebook).update(outputs=[]),
    "no picture": lambda notebook: drawing(notebook).update(outputs=[]),
    "from top to bottom": lambda notebook: printing(notebook).update(execution_count=99),
    "does not compile": lambda notebook: printing(notebook).update(source="print(1"),
    "of other code": lambda notebook: printing(notebook).update(source="print(1)"),
    "not a notebook": lambda notebook: printing(notebook).pop("metadata"),
    "machine in an output": lambda notebook: printing(notebook).outputs[0].update(text="/usr/lib/x.py"),
    "machine in a source": lambda notebook: notebook.cells[0].update(source="see /tmp/x"),
    "a warning": lambda notebook: printing(notebook).outputs[0].update(name="stderr"),
    "KeyError": lambda notebook: printing(notebook).outputs.append(an_error()),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_damage_is_found(fault):
    notebook = nbformat.read(TUTORIALS / "zero_order.ipynb", as_version=4)
    assert not any(fault in found for found in faults(notebook))
    DAMAGES[fault](notebook)
    assert any(fault in found for found in faults(notebook))
