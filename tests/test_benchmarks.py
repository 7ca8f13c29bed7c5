"""The benchmark runs with zograd alone, and says what it measured."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


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
