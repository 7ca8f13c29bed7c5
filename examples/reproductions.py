"""Make docs/reproductions.md from what the examples kept in examples/results."""

import argparse
import json
from pathlib import Path

from tasks.report import RESULTS, here

EXAMPLES = Path(__file__).resolve().parent
PAGE = EXAMPLES.parent / "docs" / "reproductions.md"

HEAD = """\
# What the examples show

Each table is what its command printed after a full run, beside what the paper, another method or an earlier prototype
reports. The figures here are the mean over the seeds listed, ± one standard deviation between them. Settings were
chosen on other seeds, 100 and above. Evaluations are those of the objective for one seed, seconds those of all seeds
together, on one torch thread of a machine that ran other work beside it. `make examples` runs all of them and makes
this page.
"""


def cell(text):
    return str(text).replace("|", "\\|")


def section(record):
    """The heading, the command and the table of one example."""
    name = record["name"]
    path = max((p for p in EXAMPLES.glob("*.py") if name.startswith(p.stem)), key=lambda p: len(p.stem))
    title = path.read_text(encoding="utf-8").partition('"""')[2].splitlines()[0]
    lines = [f"## {name.replace('_', ' ')}", "", f"`python examples/{path.name}`: {title}", ""]
    if (PAGE.parent / "images" / f"{name}.png").exists():
        lines += [f"![The picture that it saves](images/{name}.png)", ""]
    lines += ["| | paper or reference | here | seeds | evaluations | seconds |", "|---|---|---|---|---|---|"]
    for row in record["rows"]:
        evaluations = "" if row["evaluations"] is None else f"{row['evaluations']:,}"
        cells = (row["what"], row["reference"], here(row), ranges(row["seeds"]), evaluations, f"{row['seconds']:.0f}")
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
