"""Write the tables of README.md and docs/choosing.md from what the benchmarks, examples and chaos runs have left.

Each table stands between two comments that name it; ``--check`` writes nothing and fails if one is not what it would
write.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


# What the front page shows of the comparison with peers, by how the question begins.
BESIDE = {
    "torchopt": (
        '`method="forward"`, f(x) = sum(x)',
        "one evaluation of 100 gives nan",
        "fn returns a Python float",
        "an inner training loop",
        "`torch.func.grad`",
        "fn adds noise of deviation 1",
        "a step in place",
    ),
    "evotorch": ("one evaluation of 100 gives nan", "a search on a named function"),
    "evosax": ("f is constant",),
    "jax": ("a numpy simulator",),
    "scipy": ("a staircase", "100 residuals"),
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
        + f"\n\nTheir time over zograd's: above 1 zograd is faster. One thread, two for 'second core'; "
        f"{machine['processor']}, torch {machine['torch'].partition('+')[0]}; `make bench`."
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
        + "\n\n`make bench-statistics`; antithetic differences throughout. Empty cells were not measured."
    )


def descent():
    """Evaluations until a loss is reached, by family, at few directions and at as many as parameters."""
    found = [row for row in load("benchmarks", "evaluations")["problems"].values() if row["descent"]]
    names = list(dict.fromkeys(name for row in found for name in row["descent"]))
    head = [f"{row['problem']}, N = {some['num_samples']}" for row in found for some in row["descent"][names[0]]]
    rows = []
    for name in names:
        cells = []
        for row in found:
            some = row["descent"].get(name, [])
            cells += [reached(entry) for entry in some] + [""] * (len(row["descent"][names[0]]) - len(some))
        rows.append([name, *cells])
    return table(["evaluations to a target loss, by Adam", *head], rows)


def reached(entry):
    """The median over the seeds, and how many of them never got there, which a median does not show."""
    never = entry["evaluations"].count(None)
    if entry["median"] is None:
        return "not reached"
    return f"{entry['median']:,.0f}" + (f" ({never} of {len(entry['evaluations'])} never)" if never else "")


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


def peers():
    """What others do otherwise, the first of the rows that their script verifies."""
    report, rows = load("benchmarks", "peers"), []
    for name, questions in BESIDE.items():
        peer = report["peers"][name]
        for words in questions:
            (row,) = (row for row in peer["rows"] if row["question"].startswith(words))
            cells = [str(row[key]).replace("|", "\\|") for key in ("question", "peer", "zograd")]
            rows.append([f"{peer['title']} {peer['version']}", *cells])
    count = sum(len(peer["rows"]) for peer in report["peers"].values())
    return (
        table(["beside", "asked", "the other", "zograd"], rows)
        + f"\n\n`make bench-peers`; all {count} rows, those included where the others are as good or better, in "
        "[benchmarks/peers/README.md](benchmarks/peers/README.md)."
    )


TABLES = {
    "speed": speed,
    "evaluations": evaluations,
    "descent": descent,
    "reproductions": reproductions,
    "reliability": reliability,
    "peers": peers,
}
PAGES = {
    "README.md": ("speed", "evaluations", "reproductions", "reliability", "peers"),
    "docs/choosing.md": ("evaluations", "descent"),
}


def filled(page, text):
    """The page's text with each table made anew."""
    for name in PAGES[page]:
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not (found and ended):
            raise SystemExit(f"{page} has no place for {name}: {begin} ... {end}")
        text = f"{before}{begin}\n{TABLES[name]()}\n{end}{after}"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the tables are what the results say")
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        old = (ROOT / page).read_text(encoding="utf-8")
        new = filled(page, old)
        if old != new:
            stale.append(page)
            if not options.check:
                (ROOT / page).write_text(new, encoding="utf-8")
    print(f"{'stale' if options.check else 'wrote'}: {', '.join(stale) or 'nothing'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
