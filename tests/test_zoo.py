"""Estimates of every kind of module in ``zoo_kinds`` are right, or refused by name with the module untouched."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import zograd
import zoo
from zoo_kinds import KINDS

BEFORE = json.loads((Path(__file__).parent.parent / "benchmarks" / "results" / "zoo_before.json").read_text())[
    "results"
]

# Refused by every evaluator, with these words.
REFUSED = {
    "result_that_is_bool": "must return a tensor or a number, got bool",
    "result_that_is_a_tensor_of_integers": "return `.float()` of it",
    "scripted": "cannot be evaluated with other parameters: it is compiled",
    "traced": "cannot be evaluated with other parameters: it is compiled",
    "lazy_linear": "before the first call of a lazy module",
    "lazy_batch_norm": "before the first call of a lazy module",
}

# A weight under another name, or one that forward writes: a refusal will do, and so will a warning.
MAY_WARN = {
    "alias_by_a_view",
    "alias_by_detach",
    "alias_by_data",
    "alias_by_numpy",
    "alias_by_a_state_dict",
    "embedding_with_max_norm",
    "trained_parameter_written_by_its_data",
}

# Not right yet: why, under which evaluators, which kinds. Whoever mends one takes it out.
ALL = zoo.EVALUATORS
LATER = [
    ("the center draws other numbers than the points, not being a row of the vmap", ("vmap",), {"transformer_encoder"}),
    (
        "refused with a wrong cause",
        ("vmap",),
        {"branch_in_a_thread", "compiled", "compiled_in_place", "compiled_layer"},
    ),
]


def marks(name, evaluator):
    """Return the mark of a case that is not right yet."""
    reasons = [why for why, evaluators, names in LATER if evaluator in evaluators and name in names]
    assert len(reasons) <= 1, (name, evaluator)
    # Under threads a fault may need two of them to meet.
    return [pytest.mark.xfail(strict=evaluator != "threads", reason=why) for why in reasons]


@pytest.mark.parametrize(
    ("name", "form", "evaluator"),
    [pytest.param(*case, marks=marks(case[0], case[2]), id="-".join(case)) for case in zoo.CASES],
)
def test_a_kind(name, form, evaluator):
    verdict = zoo.judge(name, form, evaluator)
    if verdict.status == "refused":
        assert BEFORE.get(name, {}).get(f"{form}, {evaluator}") != "right", verdict
        named = 'use `evaluator="loop"`' in verdict.text and evaluator == "vmap"
        assert named or name in MAY_WARN or REFUSED.get(name, "no refusal") in verdict.text, verdict
    elif name in MAY_WARN:
        assert verdict.status in ("right", "warned, right", "warned, wrong"), verdict
    else:
        assert verdict.status == ("warned, right" if KINDS[name].unused else "right"), verdict


class Noisy(torch.nn.Module):
    """A linear function and whole numbers drawn from what the module holds: adding one to the other rounds nothing."""

    def __init__(self, chance, draw):
        super().__init__()
        self.w, self.chance, self.draw = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), chance, draw

    def forward(self):
        return (self.w * torch.tensor([1.0, 2.0, 4.0])).sum() + self.draw(self.chance)


@pytest.mark.parametrize("evaluator", ["loop", "threads"])
@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (torch.Generator, lambda g: torch.randint(1000, (), generator=g)),
        (lambda: np.random.default_rng(0), lambda g: int(g.integers(1000))),
        (lambda: np.random.RandomState(0), lambda g: int(g.randint(1000))),
        (lambda: random.Random(0), lambda g: g.randrange(1000)),
    ],
    ids=["torch", "numpy", "old numpy", "python"],
)
def test_both_points_of_a_pair_draw_alike_from_a_held_generator(make, draw, evaluator):
    with ThreadPoolExecutor(2) as pool:
        how = zograd.evaluators.Pool(pool) if evaluator == "threads" else evaluator
        units = zograd.distributions.Coordinate()
        net = zograd.nn.ZeroOrder(Noisy(make(), draw), units, "antithetic", None, 2.0**-4, evaluator=how, seed=0)
        estimate = net.estimate()
    assert torch.equal(estimate.grad["module.w"], torch.tensor([1.0, 2.0, 4.0]))  # the draws cancel in each difference
    assert len(set(estimate.values.mean(1).tolist())) == 3  # and each direction has its own
    plain = make()
    assert float(estimate.value) == 17 + float(draw(plain))  # the center is one plain call
    assert draw(net.module.chance) == draw(plain)


def test_each_mark_has_its_case():
    cases = {(name, evaluator) for name, _, evaluator in zoo.CASES}
    assert all((n, e) in cases for _, evaluators, names in LATER for e in evaluators for n in names)
    assert REFUSED.keys() | MAY_WARN <= KINDS.keys()
    assert len(KINDS) >= 60


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_made_the_same_each_time(name):
    with zoo.settled():
        assert zoo.Picture(zoo.made(KINDS[name])[0]).differences(zoo.Picture(zoo.made(KINDS[name])[0]), 0) == []


def test_the_stream_of_the_oracle_is_what_zograd_says():
    seen = []

    def fn(x):
        seen.append(zograd.current_seed())
        return x.sum()

    for method, numbers in (("antithetic", [0, 1, 1, 2, 2]), ("forward", [0, 0, 0]), ("naive", [0, 1, 2])):
        seen.clear()
        zograd.zero_order(method=method, num_samples=2, seed=zoo.SEED)(fn).estimate(torch.ones(3))
        assert seen == [zoo.stream(zoo.SEED, number) for number in numbers]


class Written(torch.nn.Module):
    """What a picture has to see: one thing of it is changed at a time."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("both", torch.zeros(2, 2))
        self.register_buffer("one", self.both[0])
        self.kept = {"list": [torch.zeros(2)], "number": 1}
        self.chance = torch.Generator()


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda m: m.layer.weight.data.add_(1e-6), "weight"),
        (lambda m: m.layer.weight.requires_grad_(False), "weight"),
        (lambda m: m.both.add_(1), "both"),
        (lambda m: m.register_buffer("one", m.one.clone()), "one"),
        (lambda m: m.kept["list"][0].add_(1), "list"),
        (lambda m: m.kept.update(number=2), "number"),
        (lambda m: m.kept.update(more=2), "more"),
        (lambda m: torch.rand(1, generator=m.chance), "chance"),
        (lambda m: m.layer.register_forward_hook(print), "_forward_hooks"),
        (lambda m: m.eval(), "training"),
        (lambda m: setattr(m.layer.weight, "scale", 2), "scale"),
        (lambda m: setattr(m.layer, "bias", torch.nn.Parameter(m.layer.bias.detach().double())), "bias"),
    ],
)
def test_a_picture_sees_each_change(change, path):
    def made():
        torch.manual_seed(0)
        return Written()

    assert zoo.Picture(made()).differences(zoo.Picture(made()), 0) == []
    changed = made()
    change(changed)
    found = zoo.Picture(changed).differences(zoo.Picture(made()), 0)
    assert found
    assert any(path in difference for difference in found)
