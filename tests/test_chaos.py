"""Short forms of the scripts in chaos/, which try to break the package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "chaos"
SHORT = {"counted": 200, "untouched": 120, "killed": 8, "damaged": 120, "bad_inputs": 200}
SHORT |= {"same_bits": 60, "faults": 5, "soak": 2000, "wire": 40, "ranks": 15}


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT)
def test_a_short_run_finds_nothing(script, tmp_path):
    if script in ("killed", "soak", "faults") and not hasattr(os, "fork"):
        pytest.skip("kills processes")
    output = tmp_path / "results.json"
    command = [sys.executable, f"{script}.py", "--count", str(SHORT[script]), "--output", str(output)]
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(output.read_text())
    assert report["wrong"] == 0
    assert max(report["counts"].values()) >= SHORT[script]
    assert f"python chaos/{script}.py --count {SHORT[script]}" in report["command"]


def test_the_page_says_what_the_results_say():
    page = (FOLDER.parent / "docs" / "reliability.md").read_text()
    for path in (FOLDER / "results").glob("*.json"):
        report = json.loads(path.read_text())
        assert f"**{report['wrong']}** | `{report['command']}`" in page


def test_the_makefile_says_how_long_it_takes():
    """To the ten minutes, as it was when the results were made."""
    seconds = sum(json.loads(path.read_text())["seconds"] for path in (FOLDER / "results").glob("*.json"))
    (line,) = (line for line in (FOLDER.parent / "Makefile").read_text().splitlines() if line.startswith("chaos:"))
    assert f"({round(seconds / 600) * 10} minutes)" in line
