"""The benchmark runs with zograd alone, and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks"


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
