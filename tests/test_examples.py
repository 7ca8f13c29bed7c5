"""Each example runs from its first line to its last: a smoke, too short for its result to be asserted."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "reproductions")
OWN = {  # those with options of their own, and no table
    "quickstart": ["--steps", 3, "--output"],
    "check": ["--figure"],
    "simulator": ["--steps", 2, "--samples", 2, "--output"],
}
FIELDS = {"what", "reference", "mean", "spread", "seeds", "evaluations", "seconds"}


def run(path, *options, folder=None):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path), *map(str, options)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, cwd=folder)


def skip_without_its_package(done):
    """An example says which package it needs; that is no failure if the package is indeed not there."""
    missing = re.search(r"No module named '(\w+)[\w.]*': this example needs", done.stderr)
    if done.returncode and missing and importlib.util.find_spec(missing[1]) is None:
        pytest.skip(missing[0])


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path):
    picture, table = tmp_path / "picture.png", tmp_path / "rows.json"
    quick = OWN.get(path.stem, ["--quick", "--json", table, "--output"])
    results = sorted((FOLDER / "results").glob("*"))
    before = [file.read_bytes() for file in results]
    done = run(path, *quick, picture, folder=tmp_path)
    skip_without_its_package(done)
    assert done.returncode == 0, done.stderr[-3000:]
    assert picture.stat().st_size > 1000
    assert [file.read_bytes() for file in sorted((FOLDER / "results").glob("*"))] == before, "a smoke kept its result"
    if path.stem not in OWN:
        rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
        assert rows
        assert all(set(row) == FIELDS for row in rows)
        assert all(row["what"] in done.stdout for row in rows)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_public(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert not re.search(r"zograd\._|from zograd\S* import .*\b_", text)
    assert "    assert " in text
    assert "tqdm" in text or path.stem == "check"  # which takes a second


def test_the_page_of_reproductions_is_what_the_results_say(tmp_path):
    page = ROOT / "docs" / "reproductions.md"
    done = run(FOLDER / "reproductions.py", "--output", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
