"""Write docs/speed.md from results/*.json: ``python page.py``, which `make bench` does at its end."""

import json
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "speed.md"
BASE = "TorchOpt antithetic"
ALONE = 1.1  # above it a system used more than the one core it was meant to, and the table says so

HEAD = """\
# Speed

This page is written by `benchmarks/page.py` from the results beside it; `make bench` measures anew. One thread of
{machine}, two for "second core"; {rounds} interleaved rounds. Every system gets the same
function, batch, number of directions N and float32, and makes the gradient too. Read the ratios: absolute times are
those of one machine.

![TorchOpt's time over zograd's by workload](../benchmarks/results/compare.png)

An orange mark is what the project asks of that row; {met} of {aims} are met.

## Beside other packages

Microseconds for one direction (two evaluations and a part of the gradient), the median over the rounds; and how many
times as fast as TorchOpt's antithetic method that is, the median of the ratios within each round, so that close rows
may stand in another order by it. "Evaluations alone" are as many calls of the function at a point that is there
already.
"""

NOTES = """\

What the figures do not say by themselves:

- A single direction is dearer than TorchOpt's. zograd evaluates the center as well, keeps the random state and checks
  what it gets.
- `LowRank` can take less time than plain inference: all evaluations see one input, so that they share the first layer's
  product, and plain inference does not.
- Processor time over elapsed time is given where it was not one core.
- "Second core" makes the next direction in a second thread (`prefetch`); "signs" is `Rademacher()`; "noise at hand"
  leaves out drawing and summing.
- "n/a": the package cannot do that work. JAX and evosax take functions of arrays, no torch module; EvoTorch's
  population goes through `torch.vmap`, which refuses the running statistics of BatchNorm.
- The JAX programs are compiled as a whole; TorchOpt, EvoTorch and zograd call torch's kernels one by one.
"""

FIXED = """\

## The smallest estimate

A function of ten numbers, one direction, antithetic: what an estimate costs when its evaluations cost next to nothing.

| | microseconds |
|---|---|
"""

MEMORY = """\

## Memory

The peak beyond the parameters themselves, in units of their size, at {parameters:,} parameters
(`benchmarks/memory.py`). It does not depend on the number of directions, but on how many points are made at once.

| evaluator | peak |
|---|---|
"""

END = """
Without `Vmap(chunk_size=...)` the chunk is chosen by the number of parameters and the size of the cache.
"""


def table(result: dict) -> str:
    """The rows of one workload, fastest first."""
    rows = sorted(result["systems"].items(), key=lambda item: item[1]["us_per_direction"])
    lines = [f"\n**{result['workload']}**\n", "| | µs a direction | as fast as TorchOpt |", "|---|---|---|"]
    for system, row in rows:
        ratio = 1.0 if system == BASE else row["ratios"].get(BASE, {}).get("median")
        cores = f" ({row['cores']:.1f} cores)" if row["cores"] > ALONE else ""
        lines.append(
            f"| {system}{cores} | {figure(row['us_per_direction'])} | {f'{figure(ratio)} ×' if ratio else 'n/a'} |"
        )
    lines += [f"| {system} | n/a | n/a |" for system in result.get("unable", ())]
    return "\n".join(lines) + "\n"


def figure(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def text() -> str:
    """The page."""
    compare, fixed, memory = (json.loads((HERE / "results" / f"{n}.json").read_text()) for n in FILES)
    machine = "an {processor}, Python {python}, torch {torch}".format(**compare["machine"])
    rows = [row for result in compare["results"].values() for row in result["systems"].values()]
    aims = [(row["ratios"][BASE]["median"], row["targets"][BASE]) for row in rows if BASE in row["targets"]]
    met = sum(ratio >= aim for ratio, aim in aims)
    parts = [HEAD.format(machine=machine, rounds=compare["rounds"], met=met, aims=len(aims))]
    parts += [table(result) for result in compare["results"].values()]
    parts += [NOTES, FIXED]
    parts += [f"| {name} | {figure(row['median_us'])} |\n" for name, row in fixed["results"].items()]
    parts += [MEMORY.format(parameters=memory["parameters"])]
    parts += [f"| {name} | {figure(row['forward'])} |\n" for name, row in memory["peaks"].items()]
    return "".join([*parts, END])


FILES = ("compare", "fixed_cost", "memory")

if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
