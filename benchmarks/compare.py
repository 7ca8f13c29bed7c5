"""zograd beside its peers on the same work: one thread, interleaved rounds, medians of ratios.

A peer that is not installed is left out. ``--quick`` takes two minutes.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch
from fixed_cost import processor
from systems import systems
from workloads import WORKLOADS

QUICK = ("python", "quadratic10", "quadratic1000", "one", "small100", "large")
BASE = "TorchOpt antithetic"
RESULTS = Path(__file__).parent / "results"


def timed(run, seconds):
    """Seconds a call, over calls that together take about the given time."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(name, rounds, seconds):
    workload = WORKLOADS[name]()
    runs, targets, missing = {}, {}, []
    for system, (make, target) in systems(workload, name).items():
        run = make()
        if run is None:
            missing.append(system)
            continue
        run()
        runs[system], targets[system] = run, target
    times = {system: [] for system in runs}
    for _ in range(rounds):
        for system, run in runs.items():
            times[system].append(timed(run, seconds))
    rows = {}
    for system, taken in times.items():
        row = {"seconds": statistics.median(taken), "us_per_direction": statistics.median(taken) / workload.num * 1e6}
        if BASE in times:
            row["ratio"] = statistics.median(b / t for b, t in zip(times[BASE], taken, strict=True))
        if targets[system]:
            row["target"] = targets[system]
        for reference in ("the evaluations alone", "plain forward passes"):
            if reference in times:
                row[f"share of {reference}"] = statistics.median(
                    r / t for r, t in zip(times[reference], taken, strict=True)
                )
        rows[system] = row
    return {"workload": workload.name, "size": workload.size, "num": workload.num, "missing": missing, "systems": rows}


def show(result):
    print(f"\n{result['workload']}: {result['size']} parameters, N = {result['num']}")
    for system, row in result["systems"].items():
        line = f"  {system:28} {row['us_per_direction']:11.2f} us a direction"
        if "ratio" in row:
            line += f"   {row['ratio']:6.2f} x"
        if "target" in row and "ratio" in row:
            line += f"   at least {row['target']}: {'met' if row['ratio'] >= row['target'] else 'MISSED'}"
        if "share of plain forward passes" in row and "zograd" in system:
            line += f"   {row['share of plain forward passes']:.0%} of plain forward passes"
        print(line)
    for system in result["missing"]:
        print(f"  {system:28} not installed")


def picture(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{result['workload']}\n{system.removeprefix('zograd ')}", row["ratio"], row.get("target"))
        for result in results.values()
        for system, row in result["systems"].items()
        if system.startswith("zograd") and "ratio" in row
    ][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(bars) + 1), layout="constrained")
    axes.barh([b[0] for b in bars], [b[1] for b in bars], color="tab:blue", height=0.6)
    for k, (_, ratio, target) in enumerate(bars):
        axes.text(
            1.06 * max(ratio, target or 0), k, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", va="center", fontsize=8
        )
        if target:
            axes.plot([target, target], [k - 0.38, k + 0.38], color="tab:orange", label="the aim" if k == 0 else None)
    axes.legend(loc="lower right", frameon=False)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.4, 2 * max(b[1] for b in bars))
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel("TorchOpt's time over zograd's, antithetic, the same N, one thread")
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of the faster workloads")
    parser.add_argument("--only", nargs="*", choices=WORKLOADS, help="these workloads")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="time of each system in a round")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; the picture goes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only or (QUICK if options.quick else tuple(WORKLOADS))
    rounds = options.rounds or (3 if options.quick else 9)
    seconds = 0.2 if options.seconds is None else options.seconds
    results = {}
    for name in names:
        results[name] = measure(name, rounds, seconds)
        show(results[name])
    machine = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    output = options.output or RESULTS / ("quick.json" if options.quick else "compare.json")
    output.write_text(json.dumps({"machine": machine, "rounds": rounds, "results": results}, indent=2) + "\n")
    if any("ratio" in row for result in results.values() for row in result["systems"].values()):
        picture(results, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
