"""The recipes of docs/scaling.md, each run as the script that it is."""

import importlib.util
import re
import subprocess
import sys
import time
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kill -9")
def test_the_example_goes_on_after_kill_9(tmp_path):
    def command(name):
        example = Path(__file__).parent.parent / "examples" / "simulator.py"
        return [sys.executable, str(example), "--steps", "3", "--samples", "4", "--folder", str(tmp_path / name)]

    def finished(name):
        run = subprocess.run(command(name), capture_output=True, text=True, timeout=240, check=True)
        throw = re.search(r"throw (\[.*\])", run.stdout).group(1)
        return throw, int(re.search(r"(\d+) runs of the program, (\d+)", run.stdout).group(1)), run.stdout

    pytest.importorskip("matplotlib")
    with subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed" / "run.journal-wal").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        run.kill()
    again, rest, _ = finished("killed")
    whole, all_of_them, said = finished("whole")
    assert again == whole
    assert rest <= all_of_them + 5
    assert (tmp_path / "whole" / "simulator.png").stat().st_size > 10_000, said
