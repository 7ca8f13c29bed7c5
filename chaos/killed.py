"""Does a run that is killed at random moments, and started again each time, end with the same bits?

A run trains a few parameters, or a module with buffers, through a journal; half of the runs also save model, optimizer
and generator now and then and go on from there. Each run is a process of its own, ended by SIGKILL after a random time,
several times in a row, and then left to finish. fn writes a byte to a file when it is called, which the kill cannot
take back.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from _record import arguments, write

import zograd
from zograd.evaluators import Journal, Loop

STEPS, SAMPLES, EVERY = 10, 6, 3
WORK = 0.0005  # seconds of an evaluation


class Model(torch.nn.Module):
    """A module whose evaluations leave a trace: the statistics of its normalization."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)

    def forward(self, x):
        """The loss."""
        return loss_of(self.norm(self.linear(x)))


def loss_of(x):
    """Counts, works, and draws a random number as a simulator would."""
    os.write(CALLS, b".")
    time.sleep(WORK)
    return ((x - 1) ** 4).sum() + 0.01 * torch.randn(())


CALLS = -1


def train(kind, evaluator, checkpoint):
    """A whole run, from the beginning or from its checkpoint.

    Returns:
        The trained parameters and buffers as one vector.
    """
    torch.manual_seed(0)
    settings = {"num_samples": SAMPLES, "sigma": 0.1, "method": "antithetic", "evaluator": evaluator}
    generator = torch.Generator().manual_seed(7)
    if kind == "module":
        model = zograd.nn.ZeroOrder(Model(), **settings, generator=generator)
        params, data = list(model.parameters()), torch.randn(4, 3)
        step, saved = lambda: model(data), model
    else:
        params = [torch.zeros(3, requires_grad=True)]
        fn = zograd.zero_order(**settings, generator=generator)(loss_of)
        step, saved = lambda: fn(params[0]), fn
    optimizer = torch.optim.Adam(params, lr=0.1)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        saved.load_state_dict(state["saved"])
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for p, value in zip(params, state["params"], strict=True):
                p.copy_(value)
    for k in range(first, STEPS):
        if checkpoint is not None and k % EVERY == 0:
            state = {"step": k, "saved": saved.state_dict(), "optimizer": optimizer.state_dict(), "params": params}
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)  # whole or not at all
        optimizer.zero_grad()
        step().backward()
        optimizer.step()
    buffers = [b for b in saved.buffers() if b.is_floating_point()] if kind == "module" else []
    return torch.cat([t.detach().reshape(-1) for t in [*params, *buffers]])


def in_a_process(kind, folder, with_checkpoint, *, kill_after=None):
    """Train in a forked process, which is killed after so many seconds.

    Returns:
        Whether it was killed before its end.
    """
    child = os.fork()
    if child == 0:
        global CALLS
        status = 1
        try:
            CALLS = os.open(folder / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            checkpoint = folder / "checkpoint" if with_checkpoint else None
            result = train(kind, Journal(Loop(), folder / "journal"), checkpoint)
            torch.save(result, folder / "result.new")
            os.replace(folder / "result.new", folder / "result")
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"a run failed by itself: {status}")
    return os.WIFSIGNALED(status)


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 200, "kills")
    chance, started = random.Random(given.seed), time.perf_counter()
    global CALLS
    CALLS = os.open(os.devnull, os.O_WRONLY)
    wanted = {kind: train(kind, "loop", None) for kind in ("function", "module")}
    seconds = STEPS * (2 * SAMPLES + 1) * WORK * 2.5
    counts = dict.fromkeys(["kills", "runs", "evaluations", "evaluations that a kill had repeated"], 0)
    different = beyond = 0
    while counts["kills"] < given.count:
        kind, with_checkpoint = chance.choice(["function", "module"]), chance.random() < 0.5
        with tempfile.TemporaryDirectory() as name:
            folder, kills, again = Path(name), 0, chance.randint(1, 6)
            for _ in range(again):
                kills += in_a_process(kind, folder, with_checkpoint, kill_after=chance.uniform(0, seconds))
            in_a_process(kind, folder, with_checkpoint)
            different += not torch.equal(torch.load(folder / "result", weights_only=True), wanted[kind])
            calls = (folder / "calls").stat().st_size
        extra = calls - STEPS * (2 * SAMPLES + 1)
        # One evaluation is in flight; a module's center is evaluated again in each estimate that is read.
        centers = 0 if kind == "function" else again * (EVERY if with_checkpoint else STEPS)
        allowed = kills + centers
        beyond += extra > allowed or extra < 0
        counts["kills"] += kills
        counts["runs"] += 1
        counts["evaluations"] += calls
        counts["evaluations that a kill had repeated"] += extra if kind == "function" else 0
    counts["runs with other parameters or buffers"] = different
    counts["runs that repeated more than was in flight"] = beyond
    return write(given, "kill -9 and resume: the same bits, nothing lost", counts, different + beyond, started)


if __name__ == "__main__":
    sys.exit(main())
