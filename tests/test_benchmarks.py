"""The benchmark runs with zograd alone, and says what it measured."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
needs_git = pytest.mark.skipif(not (shutil.which("git") and (ROOT / ".git").exists()), reason="needs a git repository")


@pytest.fixture
def peers(monkeypatch):
    """The scripts beside the peers that need no peer: what a check is, and the table."""
    monkeypatch.syspath_prepend(FOLDER / "peers")
    yield importlib.import_module("checks"), importlib.import_module("table")
    for name in ("checks", "table"):
        del sys.modules[name]


def test_a_short_run(tmp_path):
    output = tmp_path / "short.json"
    only = ["--only", "one", "small100", "--rounds", "1", "--seconds", "0", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "compare.py", *only], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=True
    )
    report = json.loads(output.read_text())
    assert set(report["machine"]) == {"processor", "python", "torch", "threads"}
    assert set(report["results"]) == {"one", "small100"}
    small = report["results"]["small100"]
    assert (small["size"], small["num"]) == (5386, 100)
    assert {"zograd vmap", "zograd vmap, signs", "evaluations alone"} <= set(small["systems"])
    assert all(row["seconds"] > 0 and row["cores"] > 0 for row in small["systems"].values())
    ratio = small["systems"]["zograd vmap"]["ratios"]["evaluations alone"]
    assert ratio["quartiles"][0] <= ratio["median"] <= ratio["quartiles"][1]
    workloads = [result["workload"] for result in report["results"].values()]
    assert len(set(workloads)) == len(workloads)
    assert "us a direction" in run.stdout


def test_the_new_rows_say_what_a_peer_cannot_do(tmp_path):
    output = tmp_path / "new.json"
    only = ["--only", "batch_norm", "attributes", "--rounds", "1", "--seconds", "0", "--output", str(output)]
    run = subprocess.run(
        [sys.executable, "compare.py", *only], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=True
    )
    results = json.loads(output.read_text())["results"]
    for name in ("batch_norm", "attributes"):
        assert {"zograd loop", "evaluations alone"} <= set(results[name]["systems"])
        assert "JAX scan" in results[name]["unable"]
        assert "JAX scan" not in results[name]["missing"]
    assert "EvoTorch PGPE" in results["batch_norm"]["unable"]
    assert "EvoTorch PGPE" not in results["attributes"]["unable"]
    assert "n/a" in run.stdout


def test_the_page_shows_what_a_peer_cannot_do(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    page = importlib.import_module("page")
    del sys.modules["page"]
    row = {"us_per_direction": 12.0, "cores": 1.0, "ratios": {}}
    result = {"workload": "a net", "systems": {"zograd loop": row}, "unable": ["JAX scan"]}
    assert "| zograd loop | 12 | n/a |\n| JAX scan | n/a | n/a |\n" in page.table(result)
    assert page.table({"workload": "a net", "systems": {}})  # a result of before there was `unable`


@pytest.fixture
def regression(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield importlib.import_module("regression")
    for name in ("regression", "fixed_cost", "memory", "systems", "workloads"):
        if name not in before:
            sys.modules.pop(name, None)


def beside_the_last_commit(tmp_path, tree, *args):
    """Return the exit status of a comparison of a tree with HEAD, its results, and its table."""
    output = tmp_path / "regression.json"
    command = [sys.executable, "regression.py", "--base", "HEAD", "--tree", str(tree), "--seconds", "0.02"]
    command += ["--output", str(output), *args]
    run = compare(tmp_path, command)
    assert run.returncode in (0, 1), run.stderr
    return run.returncode, json.loads(output.read_text())["results"], run.stdout


def compare(tmp_path, command):
    """Run a comparison whose checkout goes to this folder, and see that it is gone afterwards."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=240, check=False, env=env)
    listed = subprocess.run(["git", "worktree", "list"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed
    return run


@needs_git
def test_two_rounds_of_a_tree_beside_itself_settle_nothing(tmp_path):
    status, results, text = beside_the_last_commit(tmp_path, ROOT, "--only", "one", "--most-rounds", "2")
    ((name, row),) = results.items()
    assert (status, name, row["verdict"]) == (0, "one: zograd loop", "not settled")
    low, high = row["interval"]
    assert low <= row["ratio"] <= high
    assert len(row["rounds"]) == 2
    assert "not settled" in text


@needs_git
@pytest.mark.slow
def test_a_planted_slowdown_is_found(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "src" / "zograd" / "__init__.py").open("a") as file:
        file.write(
            "\n_call = ZeroOrderFunction.__call__\n"
            "def _twice(self, *args, **kwargs):\n"
            "    _call(self, *args, **kwargs)\n"
            "    return _call(self, *args, **kwargs)\n"
            "ZeroOrderFunction.__call__ = _twice\n"
        )
    only = ["--only", "quadratic10: zograd loop", "--most-rounds", "4"]
    status, results, text = beside_the_last_commit(tmp_path, tmp_path, *only)
    ((name, row),) = results.items()
    assert (status, name, row["verdict"]) == (1, *only[1:2], "worse"), text
    assert 1.03 < row["interval"][0] < row["ratio"] < 3
    assert row["limit"] == 1.03


@needs_git
def test_a_row_that_the_tree_cannot_run_fails(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "src" / "zograd" / "__init__.py").open("a") as file:
        file.write("\ndef zero_order(*args, **kwargs):\n    raise RuntimeError('planted')\n")
    status, results, text = beside_the_last_commit(tmp_path, tmp_path, "--only", "one", "--most-rounds", "1")
    assert status == 1
    assert results == {
        "one: zograd loop": {"failure": "working tree: RuntimeError: planted", "verdict": "fails"},
    }
    assert "planted" in text


@needs_git
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--base", "no-such-commit"], "no-such-commit"),
        ([], "--base"),
        (["--base", "HEAD", "--only", "x"], "one: zograd loop"),
    ],
)
def test_a_comparison_that_cannot_be_made_exits_with_two(tmp_path, args, words):
    run = compare(tmp_path, [sys.executable, "regression.py", *args])
    assert run.returncode == 2
    assert words in run.stderr


def test_the_rows_of_a_comparison_are_those_of_make_bench(regression):
    speed, memory = regression.speed_rows(), regression.memory_rows()
    ones = {name for name, (_, limit) in speed.items() if limit == 1.3}
    assert ones == {
        "one: zograd loop",
        "fixed cost: estimate and its gradient",
        "fixed cost: decorated call under no_grad",
    }
    assert {limit for _, limit in speed.values()} == {1.03, 1.3}
    workloads = importlib.import_module("workloads").WORKLOADS
    assert {name.partition(":")[0] for name in speed} == {*workloads, "fixed cost"}
    assert {"batch_norm: zograd loop", "backbone: zograd loop", "attributes: zograd loop"} <= set(speed)
    assert len(memory) == 5


def test_the_interval_is_students_of_the_mean_log_ratio(regression):
    # Student's 0.975 quantile with two degrees of freedom is 4.303; the deviation of these logs is 0.1.
    ratio, low, high = regression.interval([0.1, 0.2, 0.3])
    assert ratio == pytest.approx(math.exp(0.2))
    assert low == pytest.approx(math.exp(0.2 - 4.303 * 0.1 / math.sqrt(3)))
    assert high == pytest.approx(math.exp(0.2 + 4.303 * 0.1 / math.sqrt(3)))
    assert regression.interval([0.1])[1:] == (0.0, math.inf)


def test_the_interval_covers_the_ratio_as_often_as_it_says(regression):
    draws = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05
    covers = sum(low <= 1 <= high for _, low, high in map(regression.interval, draws.tolist()))
    assert 0.93 < covers / 2000 < 0.97


@pytest.mark.parametrize(
    ("logs", "limit", "verdict"),
    [
        ([0.05, 0.051, 0.049, 0.05], 1.03, "worse"),
        ([0.05, 0.051, 0.049, 0.05], 1.3, "no worse"),
        ([0.03, 0.031, 0.025, 0.03], 1.03, "no worse"),  # the lower bound is below 1.03
        ([-0.5, -0.51, -0.5, -0.5], 1.03, "no worse"),
        ([0.0, 0.001, 0.0], 1.03, "not settled"),  # of too few rounds
        ([0.0, 0.1, -0.1, 0.05], 1.03, "not settled"),
        ([0.5, 0.6, 0.4, 0.5], 1.03, "worse"),  # not settled, and worse for all that
        ([0.5], 1.03, "not settled"),
    ],
)
def test_the_verdicts(regression, logs, limit, verdict):
    assert regression.speed_verdict(logs, limit)["verdict"] == verdict


def test_memory_is_worse_if_it_grows(regression):
    assert regression.memory_verdict(4.01, 3.01)["verdict"] == "worse"
    assert regression.memory_verdict(3.02, 3.01)["verdict"] == "no worse"


def test_the_page_of_the_peers_is_that_of_its_results(peers):
    _, table = peers
    report = json.loads((FOLDER / "results" / "peers.json").read_text())
    assert set(report["peers"]) == set(table.PEERS)
    rows = [row for peer in report["peers"].values() for row in peer["rows"]]
    assert all(row["seen"] and row["question"] and row["peer"] and row["zograd"] for row in rows)
    assert (FOLDER / "peers" / "README.md").read_text() == table.page(report)


def test_a_claim_that_is_not_seen_is_no_row(peers, monkeypatch, tmp_path, capsys):
    checks, table = peers
    found, check = checks.checks()
    check("seen")(lambda: ("a", "b", True))
    check("not seen")(lambda: ("a", "a", False))
    check("broken")(lambda: 1 / 0)
    rows = [run() for run in found]
    assert [row["seen"] for row in rows] == [True, False, False]
    assert rows[2]["peer"] == "ZeroDivisionError: division by zero"
    assert checks.told(rows[:1], "peer")
    assert not checks.told(rows, "peer")
    assert capsys.readouterr().out.count("DOES NOT REPRODUCE") == 2

    script = type("Script", (), {"PEER": "Torch", "PACKAGE": "torch", "CHECKS": found})
    monkeypatch.setattr(table.importlib, "import_module", lambda name: script)
    monkeypatch.setattr(table, "there", lambda name: True)
    files = {"--output": tmp_path / "peers.json", "--page": tmp_path / "page.md"}
    monkeypatch.setattr(sys, "argv", ["table.py", *(str(x) for pair in files.items() for x in pair)])
    assert table.main() == 1
    assert not any(file.exists() for file in files.values())
