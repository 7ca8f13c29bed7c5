"""Make docs/reliability.md of the results."""

import json
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "reliability.md"

HEAD = """# Reliability

What was tried to break zograd, and what came of it. Each row is one script of `chaos/`, which says in its head what it
does; `make chaos` runs all of them and writes this page, and short forms run with the tests. "Wrong" is what must be 0:
silently wrong results, unnamed errors, and whatever else the script looks for; of the efficiency, how many figures fall
short of the least that is asked of them.

| question | tried | wrong | command |
|---|---|---|---|
"""

DETAILS = """
## What was counted

"""


def readable(text):
    """Long numbers by thousands, also within the name of a count."""
    return re.sub(r"(?<![\w.])\d{4,}(?![\w.])", lambda found: f"{int(found[0]):,}", text)


def machine(reports):
    """What the results were made on, each part said once."""
    parts = {name: sorted({report["machine"][name] for report in reports}) for name in reports[0]["machine"]}
    return "; ".join(f"{name} {' and '.join(found)}" for name, found in parts.items())


def main():
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "results").glob("*.json"))]
    rows, details = [], []
    for report in reports:
        first, *rest = (readable(f"{number} {name}") for name, number in report["counts"].items())
        rows.append(f"| {report['question']} | {first} | **{report['wrong']}** | `{report['command']}` |\n")
        details.append(f"- **{report['question']}.** {'; '.join([first, *rest])}.\n")
    text = HEAD + "".join(rows) + DETAILS + "".join(details) + f"\nMeasured on: {machine(reports)}.\n"
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.name}: {len(rows)} questions")


if __name__ == "__main__":
    main()
