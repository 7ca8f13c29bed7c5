"""Write the tables of README.md from the results that the benchmarks, the examples and the chaos runs have left.

Each table stands between two comments that name it; ``--check`` writes nothing and fails if one is not what it would
write.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PEERS = ("TorchOpt antithetic", "EvoTorch PGPE", "evosax Open_ES", "JAX scan")
LEFT_OUT = ("noise at hand", "Normal(0, 1)")

# The figure of each example that its paper is known for, by how the row begins.
HEADLINES = {
    "es_rl": ("steps to a test return of 495", "CartPole by evolution strategies"),
    "ars": ("Swimmer-v5: episodes to a return of 325", "augmented random search"),
    "structured_evolution": (
        "evaluations to the target: Toeplitz policy, N = d = 30, Hadamard",
        "structured evolution",
    ),
    "es_maml": ("four corners, ES-MAML", "ES-MAML"),
    "nac": ("rough responses, NAC", "neural auto-curricula on Kuhn poker"),
    "bilevel": ("zograd: test accuracy", "weights of data sources through refits"),
    "unrolled": ("toy regression from 2488, PES", "persistent evolution strategies"),
    "finetune_forward_only": ("gain by MeZO", "an int8 model fitted by forward passes"),
    "black_box_layer": ("hard signs, N = 4 by sample", "hard signs in the middle of a network"),
}


def load(folder, name):
    path = ROOT / folder / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(head, rows):
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def speed():
    """How many times faster each way of zograd is than each peer, on the same work."""
    report, rows = load("benchmarks", "compare"), []
    for result in report["results"].values():
        for system, row in result["systems"].items():
            if not system.startswith("zograd") or any(part in system for part in LEFT_OUT):
                continue
            ratios = [row["ratios"].get(peer) for peer in PEERS]
            cells = [
                f"{r['median']:.2g}" if r and r["median"] < 10 else f"{r['median']:.0f}" if r else "" for r in ratios
            ]
            rows.append([result["workload"], system.removeprefix("zograd "), *cells])
    machine = report["machine"]
    return (
        table(["workload", "zograd", *PEERS], rows)
        + f"\n\nTheir time over zograd's: above 1 zograd is faster. One thread, {machine['processor']}, torch "
        f"{machine['torch'].partition('+')[0]}; `make bench`."
    )


def evaluations():
    """Evaluations for a cosine of 0.9 by family of directions."""
    report = load("benchmarks", "evaluations")
    if report is None:
        return "`make bench-statistics` has not been run."
    names = list(dict.fromkeys(name for result in report["problems"].values() for name in result["cosine"]))
    rows = []
    for name in names:
        nums = [result["cosine"].get(name) for result in report["problems"].values()]
        rows.append([name, *(f"{2 * num:,}" if num else "" for num in nums)])
    return (
        table(["evaluations for a cosine of 0.9", *(result["problem"] for result in report["problems"].values())], rows)
        + "\n\n`make bench-statistics`; antithetic differences throughout."
    )


def reproductions():
    """One figure of each system that the papers describe."""
    sys.path.insert(0, str(ROOT / "examples"))
    from tasks.report import here

    rows = []
    for name, (begins, title) in HEADLINES.items():
        record = load("examples", name)
        if record is None:
            continue
        row = next(row for row in record["rows"] if row["what"].startswith(begins))
        rows.append([f"[{title}](examples/{name}.py)", row["what"], str(row["reference"]), here(row)])
    return (
        table(["", "figure", "paper or reference", "here"], rows)
        + "\n\n`make examples`; all rows in [docs/reproductions.md](docs/reproductions.md)."
    )


def reliability():
    """What was tried to break it."""
    rows = []
    for path in sorted((ROOT / "chaos" / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if path.stem in ("efficiency", "wire"):  # figures, where nothing can go wrong
            continue
        (what, count), *_ = record["counts"].items()
        rows.append([record["question"], f"{count:,} {what}", str(record["wrong"])])
    return (
        table(["question", "tried", "wrong"], rows)
        + "\n\n`make chaos`; what each one does in [docs/reliability.md](docs/reliability.md)."
    )


TABLES = {"speed": speed, "evaluations": evaluations, "reproductions": reproductions, "reliability": reliability}


def filled(text):
    """The text with each table made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise SystemExit(f"README.md has no place for {name}: {begin} ... {end}")
        text = f"{before}{begin}\n{make()}\n{end}{after}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the tables are what the results say")
    options = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if options.check:
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    print("README.md is up to date" if old == new else "wrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
