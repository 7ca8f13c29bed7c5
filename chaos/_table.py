"""Make docs/reliability.md of the results."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "reliability.md"

HEAD = """# Reliability

What was tried to break zograd, and what came of it. Each row is one script of `chaos/`, which says in its head what it
does; `make chaos` runs all of them and writes this page, and short forms run with the tests. "Wrong" is what must be 0:
silently wrong results, unnamed errors, and whatever else the script looks for.

| question | tried | wrong | command |
|---|---|---|---|
"""


def main():
    rows, machines = [], set()
    for path in sorted((HERE / "results").glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        tried = ", ".join(f"{number} {name}" for name, number in report["counts"].items())
        rows.append(f"| {report['question']} | {tried} | **{report['wrong']}** | `{report['command']}` |\n")
        machines.add(", ".join(f"{name} {text}" for name, text in report["machine"].items()))
    PAGE.write_text(HEAD + "".join(rows) + f"\nMeasured on: {'; '.join(sorted(machines))}.\n", encoding="utf-8")
    print(f"{PAGE.name}: {len(rows)} questions")


if __name__ == "__main__":
    main()
