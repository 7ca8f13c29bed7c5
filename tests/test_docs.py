"""The code in README.md and docs/ runs as printed, and the pages hang together; `make docs` builds them."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

import zograd

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
REFERENCE = sorted((DOCS / "api").glob("*.md"))
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))  # tests/test_notebooks.py looks into them
WITHOUT_CODE = ("design.md", "reliability.md", "reproductions.md", "speed.md")
# What a page shows beyond the tests' packages; the extra `docs` has it, with which `make docs` runs all pages.
NEEDS = {"integrations.md": ("gymnasium", "pytorch_lightning", "tensorboard")}


def page(path):
    missing = [name for name in NEEDS.get(path.name, ()) if importlib.util.find_spec(name) is None]
    skip = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: of the extra `docs`")
    return pytest.param(path, id=path.name, marks=skip)


@pytest.mark.parametrize("page", [page(path) for path in PAGES])
def test_python_blocks_run_in_order(page):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    scope = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(page), "exec"), scope)
    assert blocks or page.name in WITHOUT_CODE


@pytest.mark.parametrize("page", PAGES + REFERENCE, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert all((page.parent / target).exists() for target in targets), targets


def in_the_contents():
    """The entries of all tables of contents."""
    trees = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]


def test_every_page_is_in_the_contents_once():
    notebooks = sorted((DOCS / "tutorials").glob("*.ipynb"))
    pages = [path.relative_to(DOCS).with_suffix("").as_posix() for path in [*PAGES[1:], *REFERENCE, *notebooks]]
    assert sorted(in_the_contents()) == sorted(set(pages) - {"index"})


def test_every_public_name_is_in_the_reference():
    told = "\n".join(path.read_text(encoding="utf-8") for path in REFERENCE)
    modules = set(re.findall(r"automodule:: zograd\.([\w.]+)", told))
    by_module = {name for module in modules for name in getattr(getattr(zograd, module, None), "__all__", ())}
    one_by_one = set(re.findall(r"auto\w+:: (\w+)", told))
    missing = set(zograd.__all__) - modules - by_module - one_by_one - {"__version__"}
    assert not missing


def test_the_page_on_speed_is_that_of_the_results():
    text = runpy.run_path(str(ROOT / "benchmarks" / "page.py"))["text"]
    assert (DOCS / "speed.md").read_text(encoding="utf-8") == text(), "run `python benchmarks/page.py`"


def test_formulas_are_closed():
    for path in [*PAGES, *REFERENCE]:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert prose.count("$$") % 2 == 0, path.name
        assert prose.replace("$$", "").count("$") % 2 == 0, path.name


def test_the_check_of_the_built_pages_finds_what_leads_nowhere(tmp_path):
    """What `make docs-test` sees without a browser; the rest needs one."""
    dead_links = runpy.run_path(str(ROOT / "tests" / "browse.py"))["dead_links"]
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text('<h1 id="top"></h1><a href="a/b.html#x">b</a><img src="dot.png">')
    (tmp_path / "a" / "b.html").write_text(
        '<p id="x"></p><a href="../index.html#top">up</a><a href="https://x.org">x</a>'
    )
    (tmp_path / "dot.png").write_bytes(b"")
    assert not list(dead_links(tmp_path))
    (tmp_path / "dot.png").unlink()
    (tmp_path / "a" / "c.html").write_text(
        '<a href="b.html#y"></a><a href="d.html"></a><script src="https://x.org/s.js">'
    )
    assert list(dead_links(tmp_path)) == [
        "a/c.html: is fetched from elsewhere: https://x.org/s.js",
        "a/c.html: no such place: b.html#y",
        "a/c.html: leads nowhere: d.html",
        "index.html: leads nowhere: dot.png",
    ]
