"""What was seen beside each peer: prints it, and writes results/peers.json and the README of this folder from it."""

import argparse
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from checks import there, told

FOLDER = Path(__file__).parent
PEERS = ("torchopt", "evotorch", "evosax", "jax", "scipy")
HEAD = """# zograd beside its peers, point by point

Each row is a check that a script of this folder runs on both sides: what was asked, what the peer did, what zograd
did. A claim that does not come true fails the run, and nothing is written. Rows where both do alike, or the peer does
better, are here for the same reason as the others. Speed and memory are the matter of the folder above.

`make bench-peers` runs the scripts and writes this page and `../results/peers.json` (two minutes);
`python beside_torchopt.py` runs one of them.
"""


def cell(text):
    return text.replace("|", "\\|")


def page(report):
    parts = [HEAD.rstrip()]
    for name, peer in report["peers"].items():
        parts.append(f"\n## {peer['title']} {peer['version']}\n\n| | {peer['title']} | zograd |\n|---|---|---|")
        parts += [f"| {cell(r['question'])} | {cell(r['peer'])} | {cell(r['zograd'])} |" for r in peer["rows"]]
        parts.append(f"\n[beside_{name}.py](beside_{name}.py)")
    machine = ", ".join(f"{k} {v}" for k, v in report["packages"].items())
    return "\n".join([*parts, f"\nMeasured with {machine}.\n"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "results" / "peers.json")
    parser.add_argument("--page", type=Path, default=FOLDER / "README.md")
    options = parser.parse_args()
    version = importlib.metadata.version
    report = {"packages": {name: version(name) for name in ("torch", "zograd")}, "peers": {}}
    for name in options.only:
        if not there(name):
            print(f"{name} is not installed: left out")
            continue
        script = importlib.import_module(f"beside_{name}")
        print(f"\n== {script.PEER} {version(script.PACKAGE)}")
        rows = [check() for check in script.CHECKS]
        if not told(rows, script.PEER):
            return 1
        report["peers"][name] = {"title": script.PEER, "version": version(script.PACKAGE), "rows": rows}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    options.page.write_text(page(report))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
