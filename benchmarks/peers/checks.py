"""What a check is: one question, what happens in the peer, what in zograd, and whether it is as claimed."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Check:
    """One row of the table; ``run`` returns the peer's side, zograd's, and whether the row says what was seen."""

    question: str
    run: Callable[[], tuple[str, str, bool]]

    def __call__(self):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                peer, ours, seen = self.run()
            except Exception as error:  # a claim that cannot be run has not been seen
                peer, ours, seen = f"{type(error).__name__}: {error}", "", False
        return {"question": self.question, "peer": peer, "zograd": ours, "seen": bool(seen)}


def checks():
    """A list, and the decorator that puts a check into it."""
    found = []

    def check(question):
        def add(run):
            found.append(Check(question, run))
            return run

        return add

    return found, check


def raised(call):
    """The name of what a call raises, or None."""
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


def there(name):
    return importlib.util.find_spec(name) is not None


def told(rows, peer):
    """Print the rows; whether each said what was seen."""
    for row in rows:
        print(f"{row['question']}\n    {peer}: {row['peer']}\n    zograd: {row['zograd']}")
        if not row["seen"]:
            print("    DOES NOT REPRODUCE")
    return all(row["seen"] for row in rows)
