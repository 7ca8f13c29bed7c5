"""The memory of an estimate at 10 million parameters, in units of the parameters, each case in a process of its own."""

import argparse
import json
import multiprocessing
import resource
from pathlib import Path

SIZE = 10_000_000
CASES = {
    "loop, N = 32": ("loop", None, 32),
    "loop, N = 1000": ("loop", None, 1000),
    "vmap, chunk 1": ("vmap", 1, 32),
    "vmap, chunk 8": ("vmap", 8, 32),
    "vmap, chunk 32": ("vmap", 32, 32),
}


def peak(kind, chunk, num):
    """The peak of the forward call and of the whole estimate, in a process that has done nothing yet."""
    import torch

    import zograd

    torch.set_num_threads(1)
    evaluator = zograd.evaluators.Loop() if kind == "loop" else zograd.evaluators.Vmap(chunk)
    signs = zograd.distributions.Rademacher()  # the noise costs the same memory as any, and less time
    fn = zograd.zero_order(signs, method="antithetic", num_samples=num, evaluator=evaluator)(lambda p: p[::1000].sum())
    fn(torch.zeros(1000, requires_grad=True)).backward()  # what is loaded and made once
    x = torch.zeros(SIZE, requires_grad=True)
    x.detach().add_(1)  # pages are there only once written
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = fn(x)
    forward = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    value.backward()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return forward * 1024 / (4 * SIZE), whole * 1024 / (4 * SIZE)


def put_peak(results, *case):
    results.put(peak(*case))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    options = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), {}
    for name, case in CASES.items():
        results = context.Queue()
        process = context.Process(target=put_peak, args=(results, *case))
        process.start()
        forward, whole = results.get(timeout=600)
        process.join()
        rows[name] = {"forward": forward, "with backward": whole}
        print(f"{name:16} {forward:6.2f} x the parameters, with backward {whole:6.2f}", flush=True)
    options.output.write_text(json.dumps({"parameters": SIZE, "peaks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
