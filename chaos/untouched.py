"""Does an estimate, or an exception in one, leave everything outside as it was?

Parameters, their gradients, buffers, train and eval flags, attributes, grad mode, autocast, torch's default dtype and
its random state, but for the one draw of a seed. In train mode buffers may change as in one plain call.
"""

import copy
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from _record import arguments, write
from torch import nn

import zograd
from zograd.evaluators import Journal


class Down(Exception):
    """What forward raises now and then."""


class Net(nn.Module):
    """Normalization, dropout, a tied weight, a frozen one, and an attribute that forward changes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.seen = 0
        self.plan = {"fail at": None, "calls": 0}

    def forward(self, x):
        """The loss."""
        self.plan["calls"] += 1
        if self.plan["calls"] == self.plan["fail at"]:
            raise Down
        self.seen += 1
        return self.second(self.drop(self.norm(self.first(x)))).square().mean()


def state(net, *, traces=True):
    """All that must not change, as bytes and plain values."""
    kept = [p.detach().numpy().tobytes() for p in net.parameters()]
    kept += [None if p.grad is None else p.grad.numpy().tobytes() for p in net.parameters()]
    kept += [p.requires_grad for p in net.parameters()] + [m.training for m in net.modules()]
    if traces:
        kept += [b.numpy().tobytes() for b in net.buffers()] + [net.seen]
    kept += [torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()]
    kept += [torch.is_inference_mode_enabled(), len(net._forward_hooks), sorted(net.__dict__)]
    return kept


def main():
    """Run.

    Returns:
        The exit status.
    """
    given = arguments(__doc__, 10_000, "estimates")
    chance, started = random.Random(given.seed), time.perf_counter()
    counts = dict.fromkeys(["estimates", "ended by an exception", "in train mode", "with a journal"], 0)
    torch.manual_seed(0)
    net, data = Net(), torch.randn(8, 4)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        # Dropout draws, and its mask is in no argument: the key of a module holds its state, and the seed the draws.
        journal = Journal("loop", Path(folder) / "journal")
        for _ in range(given.count):
            train, with_journal = chance.random() < 0.5, chance.random() < 0.1
            net.train(train)
            settings = {
                "method": chance.choice(["naive", "forward", "antithetic"]),
                "num_samples": chance.randint(1, 3),
                "evaluator": journal if with_journal else chance.choice(["loop", "loop", "vmap"]),
            }
            evaluations = 1 + settings["num_samples"] * (2 if settings["method"] == "antithetic" else 1)
            plain = copy.deepcopy(net)
            plain.plan = {"fail at": None, "calls": 0}
            net.plan.update({"calls": 0, "fail at": chance.randint(1, evaluations) if chance.random() < 0.3 else None})
            before, random_state = state(net), torch.get_rng_state()
            drawn, failed = one_draw_later(random_state), False
            wrapped = zograd.nn.ZeroOrder(net, **settings)
            dtype = chance.choice([None, None, torch.bfloat16])
            try:
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    inside = state(net)
                    wrapped.estimate(data) if chance.random() < 0.5 else wrapped(data).detach()
                    wrong += state(net, traces=False) != without_traces(inside, net)
            except (Down, zograd.EvaluationError):
                failed = True
            wrong += not torch.equal(torch.get_rng_state(), drawn)
            if failed:
                wrong += state(net) != before
            else:
                wrong += not as_one_plain_call(net, plain, data, dtype)
            counts["estimates"] += 1
            counts["ended by an exception"] += failed
            counts["in train mode"] += train
            counts["with a journal"] += with_journal
    return write(given, "outside state after an estimate or an exception", counts, wrong, started)


def without_traces(kept, net):
    """A state without what forward may change."""
    first = 3 * len(list(net.parameters())) + len(list(net.modules()))
    return kept[:first] + kept[first + len(list(net.buffers())) + 1 :]


def one_draw_later(random_state):
    """The random state of torch after the draw of one seed."""
    generator = torch.Generator()
    generator.set_state(random_state)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator.get_state()


def as_one_plain_call(net, plain, data, dtype):
    """Whether buffers and attributes are as one call leaves them."""
    with (
        torch.random.fork_rng(),
        torch.no_grad(),
        torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        plain(data)
    return state(plain) == state(net)


if __name__ == "__main__":
    sys.exit(main())
