"""The tables of README.md are what the results say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_up_to_date():
    run = subprocess.run(
        [sys.executable, "benchmarks/front_page.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, "run `python benchmarks/front_page.py`\n" + run.stderr
