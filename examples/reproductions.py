"""Make docs/reproductions.md from what the examples kept in examples/results."""

import argparse
import json
import re
import textwrap
from pathlib import Path

from tasks.report import RESULTS, here

EXAMPLES = Path(__file__).resolve().parent
PAGE = EXAMPLES.parent / "docs" / "reproductions.md"

HEAD = """\
# What the examples show

Each table is what its command printed after a full run, beside what the paper or another method reports. Where it says
"numpy" or "prototype", that is a plain program written before the package, some with settings or data of their own: it
says what to expect roughly, and is not in the repository. The figures here are the mean over the seeds listed, ± one
standard deviation between them. Settings were chosen on other seeds, 100 and above. Evaluations are those of the
objective for one seed, seconds those of all seeds together, on one torch thread of a machine that ran other work beside
it; a row without seconds took less than half of one, or is of the same run as a row above it. `make examples` runs all
of them and makes this page.
"""

# A heading, and what the picture shows.
PICTURES = {
    "ars": (
        "Augmented random search",
        "The return of test episodes over training, a line a seed, as far as the target (dashed).",
    ),
    "bilevel": (
        "Which sources of data to trust",
        (
            "Left: a dot a seed, the bar their mean. Right: what zograd learned for seed 0, the sources of each kind "
            "in the order of their weights."
        ),
    ),
    "black_box_layer": (
        "A block without a gradient inside a network",
        (
            "Above: the mean over seeds after each epoch. Below: the paths of the four balls, a color each, that the "
            "encoder trained with N = 64 by sample (seed 0) launches for twelve images of a digit. At the dots the "
            "sensors see them."
        ),
    ),
    "es_maml": (
        "ES-MAML: policies that adapt",
        "Walks of policies of seed 0, each in the color of the goal (large dot) that it was adapted to.",
    ),
    "es_rl": (
        "Evolution strategies for reinforcement learning",
        "The return of test episodes over training, a line a seed, as far as the target (dashed).",
    ),
    "finetune_forward_only": (
        "Fine-tuning by forward passes only",
        (
            "Left: the loss on held-out text before (frozen) and after a fit by either method. Middle: the losses of "
            "the fits of seed 0, each averaged from the first step on. Right: the memory of the last three rows."
        ),
    ),
    "nac": (
        "Neural auto-curricula",
        "NashConv after each response, less is better. On the left, PSRO with its ties broken lies on PSRO.",
    ),
    "structured_evolution": (
        "Structured evolution: orthogonal directions",
        "The way to the target with seed 0; the table has the mean over the seeds.",
    ),
    "torchrun_es": (
        "Evolution strategies on several processes",
        "The speed at touchdown over training, a line a seed.",
    ),
    "unrolled": (
        "Unrolled computations, a few steps at a time",
        (
            "Left: the loss in the steady state. Right: paths of the two log learning rates, which all begin at (-4, "
            "-4); light is low loss, and all above 4000 is black. Both with seed 0."
        ),
    ),
    "when_not": (
        "Where zeroth order is the wrong tool",
        (
            "Left: a pair for each data set, metric and radius, the mean over seeds. Middle: ten ridge penalties. "
            "Right: the network, with seed 0."
        ),
    ),
}


def cell(text):
    """Text of a cell, in which a narrow screen breaks no number: neither at the minus of an exponent nor at ±."""
    return re.sub(r"(?<=\de)-(?=\d)", "\u2011", str(text)).replace(" ± ", "\u00a0±\u00a0").replace("|", "\\|")


def section(record):
    """The heading, what the example says about itself, its command, picture and table."""
    name = record["name"]
    path = max((p for p in EXAMPLES.glob("*.py") if name.startswith(p.stem)), key=lambda p: len(p.stem))
    about = path.read_text(encoding="utf-8").split('"""')[1].strip()
    title, caption = PICTURES[name]
    lines = [f"## {title}", "", about, "", f"`python examples/{path.name}` saves this picture:", ""]
    lines += [f"![{title}](images/{name}.png)", "", textwrap.fill(caption, 120), ""]
    lines += ["| | paper or reference | here | seeds | evaluations | seconds |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        evaluations = "" if row["evaluations"] is None else f"{row['evaluations']:,}"
        seconds = f"{row['seconds']:.0f}" if row["seconds"] >= 0.5 else ""
        cells = (row["what"], row["reference"], here(row), ranges(row["seeds"]), evaluations, seconds)
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join([*lines, "", f"torch {record['torch'].partition('+')[0]}, {record['machine']}."])


def ranges(seeds):
    """Seeds, those in a row as first to last."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="where to write the page")
    page = parser.parse_args().output
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    page.write_text("\n".join([HEAD, *(section(record) + "\n" for record in records)]), encoding="utf-8")
    print(f"wrote {page.name} with {sum(len(record['rows']) for record in records)} figures")


if __name__ == "__main__":
    main()
