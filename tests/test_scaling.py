"""The recipes of docs/scaling.md, each run as the script that it is."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
RECIPES = dict(
    zip(
        ["threads", "processes", "factory", "loky", "distributed", "failures"],
        re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL),
        strict=True,
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name, tmp_path):
    if name in ("loky", "distributed") and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "failures" and sys.platform == "win32":
        pytest.skip("SIGKILL")
    script = tmp_path / "recipe.py"
    script.write_text(RECIPES[name], encoding="utf-8")
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "assert" in RECIPES[name]
