"""What one estimate costs at its smallest: one antithetic direction on ten parameters, with its gradient.

Beside it, in the same rounds: the three evaluations alone, and an autograd Function of the same two outputs that
computes nothing, forward and backward, which is torch's own share.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import zograd


def fn(x):
    return (x * x).sum()


class Empty(torch.autograd.Function):
    """Two outputs, one of them saved, as the estimator's Function has."""

    @staticmethod
    def forward(x):
        return x[0].clone(), x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, cotangent, _):
        return cotangent * ctx.saved_tensors[0]


def calls():
    """The calls that are timed, by name."""
    x, plain = torch.randn(10, requires_grad=True), torch.randn(10)
    estimate = zograd.zero_order(method="antithetic", num_samples=1)(fn)
    no_grad = torch.no_grad()
    return {
        "estimate and its gradient": lambda: estimate(x).backward(),
        "three evaluations": lambda: (fn(plain), fn(plain), fn(plain)),
        "empty Function and its gradient": lambda: Empty.apply(x)[0].backward(),
        "decorated call under no_grad": no_grad(lambda: estimate(plain)),
        "bare call under no_grad": no_grad(lambda: fn(plain)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fixed_cost.json")
    options = parser.parse_args()

    torch.set_num_threads(1)
    systems = calls()
    times = {name: [] for name in systems}
    for _ in range(options.rounds):
        for name, run in systems.items():
            start = time.perf_counter()
            for _ in range(100):
                run()
            times[name].append((time.perf_counter() - start) * 1e4)
    rows = {name: {"median_us": statistics.median(t), "fastest_us": min(t)} for name, t in times.items()}
    for name, row in rows.items():
        print(f"{name:34} {row['median_us']:8.1f} us   fastest round {row['fastest_us']:8.1f} us")
    machine = {"processor": processor(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    options.output.write_text(
        json.dumps({"machine": machine, "rounds": options.rounds, "results": rows}, indent=2) + "\n"
    )


def processor():
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
