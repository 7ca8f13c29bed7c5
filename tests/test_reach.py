"""What a function reaches, and by which path: one table of programs, and trees drawn at random."""

import collections
import enum
import functools
import random
import threading
import types
import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import zograd
from zograd._base.reach import closure, defaults, is_generator, named_globals, of_library, parts, reach

W = torch.ones(2)
SCALES = {"a": torch.ones(1), "b": [torch.zeros(1)]}
NET = nn.Linear(2, 1)
A = np.ones(3)
CONFIG = types.SimpleNamespace(lr=torch.tensor(0.1))


def tensors(value):
    """The paths of all tensors that a thing reaches."""
    return sorted(r.path for r in reach(value) if isinstance(r.value, torch.Tensor))


def reads_a_global(x):
    return x * W


def reads_by_lambda(x):
    return (lambda y: y * W)(x)


def reads_in_a_comprehension(x):
    return sum(y * w for y in x for w in SCALES["b"])


def calls_another(x):
    return reads_a_global(x) + 1


def reads_a_module(x):
    return NET(x)


def reads_an_attribute(x):
    return x * CONFIG.lr


def reads_an_array(x):
    return float(x.sum()) * A[0]


def has_a_default(x, scale=W, *, shift=SCALES):
    return x * scale


def calls_itself(x):
    return calls_itself(x - W) if x.sum() > 0 else x


def keeps_a_count(x):
    keeps_a_count.calls.append(x)
    return x


keeps_a_count.calls = [torch.ones(1)]


def closes_over(value):
    return lambda x: (x, value)


def closes_twice(value):
    def outer(x):
        def inner():
            return value

        return inner()

    return outer


class Slots:
    __slots__ = ("missing", "w")

    def __init__(self):
        self.w = torch.ones(1)


class Below(Slots):
    __slots__ = ("v",)

    def __init__(self):
        super().__init__()
        self.v = torch.ones(1)


class HiddenSlot:
    __slots__ = ("__w",)

    def __init__(self):
        self.__w = torch.ones(1)


class AsksItself:
    @property
    def scale(self):
        return W

    def __call__(self, x):
        return x * self.scale


class OfTheClass:
    shared = torch.ones(1)
    log: list[Any] = [torch.zeros(1)]  # noqa: RUF012

    def __call__(self, x):
        return x * self.shared


class Inherits(OfTheClass):
    pass


class CallsAMethod:
    def __init__(self):
        self.net = nn.Linear(1, 1, bias=False)

    def __call__(self, x):
        return self.helper(x)

    def helper(self, x):
        return x * W

    @property
    def expensive(self):
        raise AssertionError("a property is not asked")


@dataclass
class Data:
    w: torch.Tensor = field(default_factory=lambda: torch.ones(1))
    inner: list[torch.Tensor] = field(default_factory=lambda: [torch.zeros(1)])


@dataclass(frozen=True, slots=True)
class Frozen:
    w: torch.Tensor


class Named(NamedTuple):
    first: torch.Tensor
    rest: list[torch.Tensor]


class OwnDict(dict):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = torch.ones(1)


class Color(enum.Enum):
    RED = 1


class Agent:
    def __init__(self):
        self.net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        self.helpers = [nn.Linear(1, 1, bias=False)]

    def act(self, x):
        return self.net(x)

    @staticmethod
    def alone(x):
        return x * W

    @classmethod
    def of_all(cls, x):
        return x


agent = Agent()
OF_NET = ["bias", "running_mean", "running_var", "num_batches_tracked", "weight"]


def uses_the_agent(x):
    return agent.net(x)


def cycle():
    a, b = {}, []
    a["b"], a["w"] = b, torch.ones(1)
    b.append(a)
    return a


def nested_by(depth):
    tree = torch.ones(1)
    for _ in range(depth):
        tree = [tree]
    return tree


SHARED = torch.ones(1)
AGENT = [
    *(f"{{}}.net[{i}].{name}" for i, names in enumerate([["weight", "bias"], OF_NET]) for name in names),
    "{}.helpers[0].weight",
]


def of_agent(name):
    return sorted(path.format(name) for path in AGENT)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (reads_a_global, ["W"]),
        (reads_by_lambda, ["W"]),
        (reads_in_a_comprehension, ["SCALES['a']", "SCALES['b'][0]"]),
        (calls_another, ["W"]),
        (reads_a_module, ["NET.bias", "NET.weight"]),
        (reads_an_attribute, ["CONFIG.lr"]),
        (has_a_default, ["scale", "shift['a']", "shift['b'][0]"]),
        (calls_itself, ["W"]),
        (keeps_a_count, ["keeps_a_count.calls[0]"]),
        (closes_over(W), ["value"]),
        (closes_over({"w": W}), ["value['w']"]),
        (closes_twice(W), ["value"]),
        (closes_over(reads_a_global), ["W"]),
        (uses_the_agent, of_agent("agent")),
        (agent.act, of_agent("self")),
        (Agent.alone, ["W"]),
        (functools.partial(reads_a_global, W), []),
        (functools.partial(has_a_default, scale=torch.zeros(1)), []),
        (Slots(), ["self.w"]),
        (Below(), ["self.v", "self.w"]),
        (OfTheClass(), ["self.log[0]", "self.shared"]),
        (Inherits(), ["self.log[0]", "self.shared"]),
        (CallsAMethod(), ["W", "self.net.weight"]),
        (Data(), ["self.inner[0]", "self.w"]),
        (Frozen(W), ["self.w"]),
        (Named(W, [torch.zeros(1)]), ["self.first", "self.rest[0]"]),
        (OwnDict({"a": W}), ["self.extra", "self['a']"]),
        (collections.deque([W]), ["self[0]"]),
        (collections.defaultdict(list, a=[W]), ["self['a'][0]"]),
        (collections.OrderedDict(a=W), ["self['a']"]),
        ({W: 1}, ["self.keys(){tensor([1., 1.])}"]),
        (torch.no_grad()(closes_over(W)), ["value"]),
        (HiddenSlot(), ["self._HiddenSlot__w"]),
        (AsksItself(), ["W"]),
        (types.SimpleNamespace(w=W), ["self.w"]),
        (cycle(), ["self['w']"]),
        ([SHARED, {"again": SHARED}], ["self[0]"]),
        (nested_by(5000), ["self" + "[0]" * 5000]),
        (functools.lru_cache(reads_a_global), ["W"]),
        (zograd.zero_order()(reads_a_global), ["W"]),
        (nn.ModuleDict({"a b": nn.Linear(1, 1, bias=False)}), ["self['a b'].weight"]),
        (nn.ParameterList([torch.ones(1)]), ["self[0]"]),
        (list(range(100_000)), []),
        (Color.RED, []),
        (weakref.ref(NET), []),
        (threading.Lock(), []),
        (torch, []),
        (torch.add, []),
        (nn.functional.linear, []),
        (np.linalg.norm, []),
        (int, []),
        (3.0, []),
        (None, []),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__)[:20],
)
def test_what_is_reached(value, wanted):
    found = tensors(value)
    if isinstance(value, functools.partial) and value.keywords:
        wanted = ["scale", "self.keywords['scale']", "shift['a']", "shift['b'][0]"]
    elif isinstance(value, functools.partial):
        wanted = ["W"]  # the same tensor is an argument and a global: the first way there
    assert found == sorted(wanted)


def test_an_array_and_what_makes_random_numbers_are_reached():
    def fn(x):
        return generators, A

    generators = [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)]
    found = {r.path: r.value for r in reach(fn) if is_generator(r.value)}
    assert found == {f"generators[{i}]": g for i, g in enumerate(generators)}
    assert [r.path for r in reach(fn) if r.value is A] == ["A"]


def test_a_view_of_an_array_is_found_by_its_own_path():
    holder = {"base": np.ones(4)}
    holder["view"] = holder["base"][:2]
    assert [r.path for r in reach(holder) if isinstance(r.value, np.ndarray)] == ["self['base']", "self['view']"]


def test_what_comes_first_says_how_a_function_holds_it():
    held = {r.path: (r.first.kind, r.first.text) for r in reach(closes_over({"w": W})) if r.first}
    assert held["value"] == held["value['w']"] == ("closure", "value")
    assert {r.first.kind for r in reach(reads_a_global) if r.first} == {"global"}
    assert {r.first.kind for r in reach(agent.act) if r.first} >= {"self"}
    assert {r.first.kind for r in reach(functools.partial(len, [W])) if r.first} == {"partial"}
    assert next(reach(W)).first is None


def test_a_method_counts_where_it_is_named():
    class Counts:
        def __call__(self, x):
            return self.step(x)

        def step(self, x):
            return x * W

        def never(self, x):
            return NET(x)

    it = Counts()

    def steps(x):
        return it.never(x)

    assert tensors(Counts()) == ["W"]
    assert tensors(steps) == ["NET.bias", "NET.weight", "W"]


def test_the_variables_of_a_function():
    assert closure(closes_over(3)) == {"value": 3}
    assert named_globals(reads_by_lambda) == {"W": W}
    assert defaults(has_a_default) == {"scale": W, "shift": SCALES}

    def empty():
        return later

    assert closure(empty) == {}
    later = 1
    assert closure(empty) == {"later": 1}


def test_libraries_are_not_looked_into():
    assert of_library(nn.functional.dropout)
    assert of_library(nn.Linear)
    assert of_library(zograd.zero_order)
    assert of_library(random.randint)
    assert not of_library(reads_a_global)
    assert not of_library(Agent)


def test_a_walk_does_not_change_what_it_looks_at():
    log = collections.defaultdict(list)
    cached = functools.lru_cache(reads_a_global)
    list(reach([log, cached, Below(), CallsAMethod()]))
    assert log == {}
    assert cached.cache_info().currsize == 0


def test_a_step_leads_to_what_it_names():
    (step, value), *_ = parts({"a": 1})
    assert (step.kind, step.behind("x"), value) == ("entry", "x['a']", 1)


leaves = st.just(None).map(lambda _: torch.ones(1)) | st.integers() | st.text(max_size=3) | st.none()
names = st.sampled_from(["a", "b", "weight"])


def objects(inner):
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(names | st.integers(0, 3), inner, max_size=3)
        | st.dictionaries(names, inner, max_size=3).map(lambda d: types.SimpleNamespace(**d))
        | st.tuples(inner, st.lists(inner, max_size=2)).map(lambda t: Named(*t))
        | inner.map(Frozen)
        | st.lists(inner, max_size=3).map(collections.deque)
    )


def planted(tree):
    """Every tensor of such a tree."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, types.SimpleNamespace):
        tree = vars(tree)
    if isinstance(tree, Frozen):
        tree = [tree.w]
    items = (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple, collections.deque)) else ()
    )
    return [tensor for item in items for tensor in planted(item)]


@given(st.recursive(leaves, objects, max_leaves=20))
def test_every_tensor_is_found_at_a_path_that_leads_there(tree):
    found = [r for r in reach(closes_over(tree)) if isinstance(r.value, torch.Tensor)]
    assert {id(r.value) for r in found} == {id(t) for t in planted(tree)}
    for r in found:
        assert eval(r.path, {"value": tree}) is r.value
