"""Does a damaged journal give the right gradient or a named error, whatever happened to its bytes?"""

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from _record import arguments, write

import zograd
from zograd.evaluators import Journal

X = torch.tensor([0.3, -1.2, 2.5])
PAGE = 4096


def loss(x):
    """A value that any wrong bit would change."""
    return (x**3).sum() + x.exp().sum()


def estimate(evaluator):
    """The estimate whose journal is damaged."""
    return zograd.zero_order(method="antithetic", num_samples=60, seed=3, evaluator=evaluator)(loss).estimate(X)


def damage(data, kind, chance):
    """The bytes after some harm."""
    data, at = bytearray(data), chance.randrange(max(len(data), 1))
    if kind == "truncated":
        del data[at:]
    elif kind == "a bit changed":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "a page of noise":
        data[at // PAGE * PAGE : at // PAGE * PAGE + PAGE] = chance.randbytes(PAGE)
    elif kind == "zeros at the end":
        data[at:] = bytes(len(data) - at)
    elif kind == "a run moved":
        length = chance.randint(1, 300)
        start = chance.randrange(len(data))
        data[at : at + length] = data[start : start + length]
    elif kind == "more at the end":
        data += chance.randbytes(chance.randint(1, 2 * PAGE))
    return bytes(data)


KINDS = ("truncated", "a bit changed", "a page of noise", "zeros at the end", "a run moved", "more at the end")


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 6000, "damaged files")
    chance, started = random.Random(given.seed), time.perf_counter()
    counts = dict.fromkeys(["files", "right gradient", "named error"], 0)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal = Journal("loop", folder / "open")
        whole = estimate(journal)
        # As a killed process leaves it, with what is in the log only; and as one that ended leaves it.
        shutil.copy(folder / "open", folder / "killed")
        shutil.copy(folder / "open-wal", folder / "killed-wal")
        journal.close()
        shutil.copy(folder / "open", folder / "closed")
        sources = {n: (folder / n).read_bytes() for n in ("killed", "killed-wal", "closed")}
        for k in range(given.count):
            kind, path = KINDS[k % len(KINDS)], folder / f"{k}"
            target = chance.choice(["closed", "killed", "killed-wal"])
            for part in ("closed",) if target == "closed" else ("killed", "killed-wal"):
                data = damage(sources[part], kind, chance) if part == target else sources[part]
                path.with_name(path.name + ("-wal" if part.endswith("wal") else "")).write_bytes(data)
            outcome = tried(path, whole)
            counts["files"] += 1
            if outcome in counts:
                counts[outcome] += 1
            else:
                wrong += 1
                print(f"{kind} in {target}: {outcome}")
            for file in folder.glob(f"{k}*"):
                if file.name.split("-")[0] == str(k):
                    file.unlink()
    return write(given, "a damaged journal: right gradient or named error", counts, wrong, started)


def tried(path, whole):
    """What came of an estimate on this file."""
    journal = Journal("loop", path)
    try:
        got = estimate(journal)
    except zograd.JournalError:
        return "named error"
    except Exception as error:
        return f"another error: {error!r}"
    finally:
        journal.close()
    same = torch.equal(got.grad, whole.grad) and torch.equal(got.coefficients, whole.coefficients)
    return "right gradient" if same and torch.equal(got.value, whole.value) else "wrong gradient"


if __name__ == "__main__":
    sys.exit(main())
