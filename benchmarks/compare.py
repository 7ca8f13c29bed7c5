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
from systems import REFERENCES, TORCHOPT, systems
from workloads import WORKLOADS

QUICK = ("python", "quadratic10", "quadratic1000", "one", "small100", "large")
RESULTS = Path(__file__).parent / "results"


def synchronize(device):
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def timed(run, seconds, device):
    """Seconds a call and processor time over it, over calls that together take about the given time."""
    synchronize(device)
    start, busy, calls = time.perf_counter(), time.process_time(), 0
    while not calls or time.perf_counter() - start < seconds:
        run()
        calls += 1
    synchronize(device)
    taken = time.perf_counter() - start
    return taken / calls, (time.process_time() - busy) / taken


def measure(name, rounds, seconds, device):
    workload = WORKLOADS[name](device)
    runs, targets, missing, unable = {}, {}, [], []
    for system, (make, target) in systems(workload, name).items():
        if make is None:
            unable.append(system)
            continue
        run = make()
        if run is None:
            missing.append(system)
            continue
        run()
        runs[system], targets[system] = run, target
    taken = {system: [] for system in runs}
    for _ in range(rounds):
        for system, run in runs.items():
            taken[system].append(timed(run, seconds, device))
    times = {system: [t for t, _ in rows] for system, rows in taken.items()}
    rows = {
        system: {
            "seconds": statistics.median(times[system]),
            "us_per_direction": statistics.median(times[system]) / workload.num * 1e6,
            "cores": statistics.median(cores for _, cores in taken[system]),
            "ratios": {r: spread(times[r], times[system]) for r in REFERENCES if r in times and r != system},
            "targets": targets[system],
        }
        for system in runs
    }
    report = {"workload": workload.name, "size": workload.size, "num": workload.num, "missing": missing}
    return report | {"unable": unable, "systems": rows}


def spread(reference, times):
    """The median and the quartiles over the rounds of the reference's time over ours."""
    ratios = [r / t for r, t in zip(reference, times, strict=True)]
    low, median, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": median, "quartiles": [low, high]}


def verdicts(row):
    """For each target whether it is met; a reference that was not there gives none."""
    for reference, least in row["targets"].items():
        if reference == "us":
            yield f"at most {least} us: {'met' if row['us_per_direction'] <= least else 'MISSED'}"
        elif reference in row["ratios"]:
            ratio = row["ratios"][reference]["median"]
            yield f"{reference} {ratio:.2f} x, at least {least:.2f}: {'met' if ratio >= least else 'MISSED'}"


def show(result):
    print(f"\n{result['workload']}: {result['size']} parameters, N = {result['num']}")
    for system, row in result["systems"].items():
        line = f"  {system:34} {row['us_per_direction']:11.2f} us a direction"
        if TORCHOPT in row["ratios"]:
            line += f"   {row['ratios'][TORCHOPT]['median']:6.2f} x"
        if row["cores"] > 1.1:
            line += f"   on {row['cores']:.1f} cores"
        print("; ".join([line, *verdicts(row)]), flush=True)
    for system in result["missing"]:
        print(f"  {system:34} not installed")
    for system in result["unable"]:
        print(f"  {system:34}         n/a")


def picture(results, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (
            f"{result['workload']}\n{system.removeprefix('zograd ')}",
            row["ratios"][TORCHOPT]["median"],
            row["targets"].get(TORCHOPT),
        )
        for result in results.values()
        for system, row in result["systems"].items()
        if system.startswith("zograd") and TORCHOPT in row["ratios"] and "noise" not in system
    ][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(bars) + 1), layout="constrained")
    axes.barh(range(len(bars)), [b[1] for b in bars], color="tab:blue", height=0.6)
    axes.set_yticks(range(len(bars)), [b[0] for b in bars])  # names as places would make equal ones one bar
    for k, (_, ratio, target) in enumerate(bars):
        axes.text(
            1.06 * max(ratio, target or 0), k, f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}", va="center", fontsize=8
        )
        if target:
            label = None if any(b[2] for b in bars[:k]) else "the project's own aim"
            axes.plot([target, target], [k - 0.38, k + 0.38], color="tab:orange", label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.4, 2 * max(b[1] for b in bars))
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel("TorchOpt's time over zograd's, antithetic, the same N;\none thread but for \"second core\"")
    axes.tick_params(axis="y", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if any(b[2] for b in bars):
        axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of the faster workloads")
    parser.add_argument("--only", nargs="*", choices=WORKLOADS, help="these workloads")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="time of each system in a round")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; the picture goes beside it")
    parser.add_argument("--device", default="cpu", help="where the tensors are: cpu, cuda, ...; JAX chooses its own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only or (QUICK if options.quick else tuple(WORKLOADS))
    rounds = options.rounds or (3 if options.quick else 9)
    seconds = 0.2 if options.seconds is None else options.seconds
    results = {}
    for name in names:
        results[name] = measure(name, rounds, seconds, options.device)
        show(results[name])
    machine = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    if options.device != "cpu":
        machine["device"] = torch.get_device_module(options.device).get_device_name()
    output = options.output or RESULTS / ("quick.json" if options.quick else "compare.json")
    output.write_text(json.dumps({"machine": machine, "rounds": rounds, "results": results}, indent=2) + "\n")
    if any(TORCHOPT in result["systems"] for result in results.values()):
        picture(results, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
