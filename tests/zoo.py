"""Compare estimates on every kind of module in ``zoo_kinds`` with values that are made by hand.

``python tests/zoo.py --json FILE`` writes the table; with another zograd on ``PYTHONPATH`` it judges that.

The oracle shares no code with zograd. For each point it makes the module again, as it was before the call, writes the
point into its parameters, seeds torch and calls it once. Of an estimate it takes the directions only. ``sigma`` is a
power of two and the directions are units or signs, so that points, coefficients and gradients of the right values have
no rounding that depends on an order: under ``loop`` all is compared bit for bit. Under ``vmap`` torch's batched
operations may round otherwise, and 1e-9 is allowed.

Two estimates are made in a row, so that what the first leaves on the module enters the second.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import platform
import random
import types
import warnings
import weakref
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import zograd
from zoo_kinds import KINDS

SIGMA = 2.0**-4
SEED = 2**40 + 12345
ROUNDS = 2
FORMS = ("ZeroOrder", "ZeroOrderGradientModule")
EVALUATORS = ("loop", "vmap", "threads")
CASES = [
    (name, form, evaluator)
    for name, form, evaluator in itertools.product(KINDS, FORMS, EVALUATORS)
    if not (KINDS[name].process and evaluator == "threads")
]
SCHEMES = {"antithetic": (1.0, -1.0), "forward": (1.0,)}  # the offsets, past the center


# ----------------------------------------------------------------------------------------------- a picture of a module


class Picture:
    """All that can be reached from a module, as a flat dict of comparable things by path."""

    def __init__(self, module):
        self.entries, self._seen, self._storages, self._kept = {}, {}, {}, []
        self._look("module", module)

    def _look(self, path, value):
        if isinstance(
            value, (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
        ):
            self.entries[path] = value
            return
        if not isinstance(value, (tuple, types.FunctionType, types.MethodType, torch.Generator)):
            first = self._seen.setdefault(id(value), path)
            if first != path:
                self.entries[path] = f"the same as {first}"
                return
            self._kept.append(value)
        self.entries[f"{path}:"] = type(value).__qualname__
        if isinstance(value, torch.Tensor):
            self._tensor(path, value)
        elif isinstance(value, np.ndarray):
            self.entries[path] = torch.from_numpy(value.copy())
        elif isinstance(value, torch.jit.ScriptModule):
            self._items(path, value.state_dict().items())
        elif isinstance(value, nn.Module) and hasattr(value, "_orig_mod"):
            self._look(path, value._orig_mod)
        elif isinstance(value, dict):
            self._items(path, value.items())
            if type(value) not in (dict,) and hasattr(value, "__dict__"):
                self._items(f"{path}.", vars(value).items())
        elif isinstance(value, (list, tuple, deque)):
            self._items(path, enumerate(value))
        elif isinstance(value, (set, frozenset)):
            self._items(path, enumerate(sorted(value, key=repr)))
        else:
            self._other(path, value)

    def _items(self, path, items):
        if "hooks" in path.rpartition(".")[2]:  # by the number of a handle, another for each module
            items = enumerate(value for _, value in items)
        for name, value in sorted(items, key=lambda item: str(item[0])):
            if name != "_compiled_call_impl" and not str(name).startswith("_dynamo"):
                self._look(f"{path}[{name!r}]" if not path.endswith(".") else f"{path}{name}", value)

    def _tensor(self, path, tensor):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            self.entries[path] = "a tensor of a vmap that is over"
            return
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            self.entries[path] = "uninitialized"
            return
        facts = [str(tensor.dtype), str(tensor.layout), list(map(str, () if tensor.is_nested else tensor.shape))]
        if isinstance(tensor, nn.Parameter):
            facts += [
                "trained" if tensor.requires_grad else "frozen",
                "no gradient" if tensor.grad is None else "gradient",
            ]
        self.entries[f"{path}:tensor"] = facts
        if tensor.is_nested:
            self.entries[path] = tensor.detach().values().clone()
            self.entries[f"{path}:offsets"] = tensor.offsets().clone()
        elif tensor.layout != torch.strided:
            self.entries[path] = tensor.detach().to_dense()
        elif tensor.is_quantized:
            self.entries[path] = tensor.int_repr()
        else:
            self.entries[path] = tensor.detach().clone()
            if tensor.numel():
                first = self._storages.setdefault(tensor.untyped_storage().data_ptr(), path)
                if first != path:
                    self.entries[f"{path}:memory"] = f"that of {first}"
        self._items(f"{path}.", vars(tensor).items())

    def _other(self, path, value):
        if isinstance(value, torch.Generator):
            self.entries[path] = value.get_state()
        elif isinstance(value, random.Random):
            self.entries[path] = repr(value.getstate())
        elif isinstance(value, np.random.Generator):
            self.entries[path] = repr(value.bit_generator.state)
        elif isinstance(value, np.random.RandomState):
            self.entries[path] = repr(value.get_state())
        elif isinstance(value, itertools.count):
            self.entries[path] = repr(value)
        elif isinstance(value, types.FunctionType):
            free = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            self._items(f"{path}.", [(name, cell.cell_contents) for name, cell in free])
        elif isinstance(value, types.MethodType):
            self._look(f"{path}.__self__", value.__self__)
        elif isinstance(value, functools.partial):
            self._look(f"{path}.func", value.func)
            self._look(f"{path}.args", value.args)
        elif isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType, weakref.ref, io.IOBase)):
            pass
        elif isinstance(value, nn.Module) or not type(value).__module__.startswith(("torch", "_thread", "threading")):
            self._object(path, value)

    def _object(self, path, value):
        self._items(f"{path}.", getattr(value, "__dict__", {}).items())
        for cls in type(value).__mro__:
            if cls.__module__.startswith(("torch", "builtins", "typing", "collections", "zograd")):
                continue
            for name in getattr(cls, "__slots__", ()):
                if not name.startswith("__") and hasattr(value, name):
                    self._look(f"{path}.{name}", getattr(value, name))
            data = {k: v for k, v in vars(cls).items() if not k.startswith("__") and not hasattr(v, "__get__")}
            self._items(f"{path}.<class>.", data.items())

    def differences(self, other, tolerance):
        """Return the paths at which another picture differs, with what is there."""
        found = []
        for path in sorted(self.entries.keys() | other.entries.keys()):
            one, two = self.entries.get(path, "nothing"), other.entries.get(path, "nothing")
            if not _equal(one, two, tolerance):
                found.append(f"{path} is {_short(one)}, right is {_short(two)}")
        return found


def _equal(one, two, tolerance):
    if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
        both_tensors = isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor)
        return not both_tensors and one == two
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if tolerance and (one.is_floating_point() or one.is_complex()):
        single = one.dtype not in (torch.float64, torch.complex128)
        return torch.allclose(one, two, rtol=1e-5 if single else tolerance, atol=1e-6 if single else tolerance)
    return torch.equal(one, two)


def _short(value):
    text = str(value.flatten()[:6].tolist()) if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


# ----------------------------------------------------------------------------------------------------------- the oracle


def stream(seed, number):
    """Return what torch is seeded with before an evaluation: number 0 is the center, i + 1 is direction i.

    The rule of docs/design.md, written again: splitmix64 of the seed, its halves put into the number one after the
    other, each time through the finalizer of murmur3.
    """
    mixed = (seed + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    mixed ^= mixed >> 31
    out = 2**30 + number
    for half in (mixed % 2**32, mixed // 2**32):
        out ^= half
        out = (out ^ (out >> 16)) * 0x85EBCA6B % 2**32
        out = (out ^ (out >> 13)) * 0xC2B2AE35 % 2**32
        out ^= out >> 16
    return out


@contextlib.contextmanager
def settled():
    """Work in float64, with random streams that are given back afterwards."""
    dtype, states = torch.get_default_dtype(), (random.getstate(), np.random.get_state())
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        np.random.set_state(states[1])


def made(kind):
    """Make a kind's module and inputs, the same each time."""
    torch.default_generator.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layouts in beta state, deprecated ways to norm a weight
        return kind.make()


def plain_call(module, inputs, seed, grad=False):
    """Call a module once, as a user would."""
    torch.default_generator.manual_seed(seed)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(), _uncompiled(module):
        warnings.simplefilter("ignore")
        out = module(*inputs)
    return torch.as_tensor(out).detach().double().clone()


def _uncompiled(module):
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in module.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def trained(module):
    """Return the parameters that require grad, in the order of their names, which is that of a direction's entries."""
    return sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)


class Oracle:
    """The right results for one kind, by module made anew for each point.

    Args:
        kind: the kind.
        judged: the module that zograd had: where the first call makes the parameters they are read from there.
        grad: whether grad mode is on in each call, which decides some of torch's fused paths.
    """

    def __init__(self, kind, judged, grad=False):
        self.kind, self._judged, self.grad = kind, judged, grad

    def begin(self, round):
        """Return the module as it is before an estimate, and the inputs."""
        module, inputs = made(self.kind)
        if self.kind.lazy:
            self._call(module, inputs, 0)
            for part in module.modules():
                if hasattr(part, "reset_running_stats"):
                    part.reset_running_stats()
            with torch.no_grad():
                for p, q in zip(module.parameters(), self._judged.parameters(), strict=True):
                    p.copy_(q)
        for earlier in range(round):
            self._call(module, inputs, stream(SEED + earlier, 0))
        return module, inputs

    def after(self, round):
        """Return the value at the center, and the module after that one plain call."""
        module, inputs = self.begin(round)
        return self._call(module, inputs, stream(SEED + round, 0)), module

    def value(self, round, direction, offset, number):
        """Return the value at one point."""
        module, inputs = self.begin(round)
        place = 0
        with torch.no_grad():
            for _, p in trained(module):
                along = direction[place : place + p.numel()].view(p.shape)
                p.copy_(p.to(along) + SIGMA * offset * along)
                place += p.numel()
        return self._call(module, inputs, stream(SEED + round, number))

    def in_one_vmap(self, round, directions):
        """Return the value at the center and at the points, which draw alike: a row each of one call of torch.vmap."""
        module, inputs = self.begin(round)
        names, center = zip(*[(name, p.detach()) for name, p in trained(module)], strict=True)
        rows = []
        for direction in (torch.zeros_like(directions[0]), *directions):
            parts = direction.split([p.numel() for p in center])
            rows.append([p + SIGMA * part.view(p.shape) for p, part in zip(center, parts, strict=True)])

        def one(row):
            return torch.func.functional_call(module, dict(zip(names, row, strict=True)), inputs)

        torch.default_generator.manual_seed(stream(SEED + round, 0))
        with torch.no_grad():
            return torch.vmap(one, randomness="same")([torch.stack(column) for column in zip(*rows, strict=True)])

    def _call(self, module, inputs, seed):
        return plain_call(module, inputs, seed, self.grad)


_cache = {}  # the last values, which evaluators share


def right_values(oracle, method, round, directions):
    """Return the value at each point, shaped (directions, offsets, *value)."""
    key = (oracle.kind.name, oracle.grad, method, round, torch.stack(directions).numpy().tobytes())
    if oracle.kind.lazy or key not in _cache:
        if len(_cache) > 8:
            _cache.clear()
        rows = []
        for i, direction in enumerate(directions):
            number = 0 if method == "forward" else i + 1
            rows.append(torch.stack([oracle.value(round, direction, c, number) for c in SCHEMES[method]]))
        _cache[key] = torch.stack(rows)
    return _cache[key]


def differences(oracle, form, evaluator, method, round, estimate, judged):
    """Return what is wrong with an estimate and with the module after it."""
    kind, tolerance = oracle.kind, 0 if evaluator == "loop" else 1e-9
    center, after = oracle.after(round)
    value = center
    directions = _directions(estimate)
    if kind.reordered and evaluator == "vmap":
        center, *rows = oracle.in_one_vmap(round, directions)
        values = torch.stack(rows).unsqueeze(1)
        value = center if torch.allclose(center, estimate.value) else value
    else:
        values = right_values(oracle, method, round, directions)
    coefficients = values[:, 0] - center if method == "forward" else (values[:, 0] - values[:, 1]) / 2
    found = []
    checks = [("value", estimate.value.double(), value), ("coefficients", estimate.coefficients, coefficients)]
    if hasattr(estimate, "values") and not callable(estimate.values):
        checks.append(("values", estimate.values, values))
    cotangent = torch.linspace(1, 2, center.numel()).view(center.shape) if center.dim() else torch.ones(())
    cotangent = (cotangent * 4).round() / 4
    given = estimate.vjp(cotangent.to(estimate.value.dtype) if estimate.value.is_floating_point() else cotangent)
    along = coefficients.flatten(1) @ cotangent.flatten() if center.dim() else coefficients
    number = 1 if form == "ZeroOrder" else len(directions)  # each coordinate once is a sum, no mean
    flat, place = sum(c * d for c, d in zip(along, directions, strict=True)) / (SIGMA * number), 0
    for name, p in trained(after):
        right = flat[place : place + p.numel()].view(p.shape).to(p.dtype)
        place += p.numel()
        right = torch.zeros_like(right) if name in kind.unused else right
        checks.append((f"gradient of {name}", given[f"module.{name}"], right))
    for what, one, two in checks:
        if not _equal(one.detach(), two.detach(), tolerance):
            found.append(f"{what} is {_short(one)}, right is {_short(two)}")
    return found + Picture(judged).differences(Picture(after), tolerance)


def _directions(estimate):
    runs = getattr(estimate.directions, "entries", None) or estimate.directions.values
    size = estimate.directions.space.size
    rows = []
    for i in range(len(estimate.directions)):
        row = torch.zeros(size)
        for begin, run in runs(i, 0, size):
            row[begin : begin + run.numel()] = run
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------------------- judging


@dataclass
class Verdict:
    """What came of one kind under one evaluator.

    Each is "right", "wrong", one of these after a warning, "refused", or "refused, traces left": an error that came
    after the module was changed.

    Attributes:
        kind: the kind's name.
        form: the class that estimated.
        evaluator: its evaluator.
        status: one of the six.
        text: of the error or of the warning.
        differences: what is wrong, at most six; of a refused one what it left on the module.
    """

    kind: str
    form: str
    evaluator: str
    status: str
    text: str = ""
    differences: tuple[str, ...] = ()


def judge(name, form, evaluator):
    """Estimate twice and compare with the oracle."""
    kind = KINDS[name]
    # Where forward draws, vmap gives each direction numbers that no plain call has, unless all are alike.
    alike = kind.generator or (kind.draws and evaluator == "vmap")
    method = "antithetic" if form == "ZeroOrder" and not alike else "forward"
    with settled(), contextlib.ExitStack() as stack:
        if kind.compiled:
            torch.compiler.reset()
        module, inputs = made(kind)
        how = evaluator
        if evaluator == "threads":
            how = zograd.evaluators.Pool(stack.enter_context(ThreadPoolExecutor(2)))
        objective = _objective(form, module, method, how)
        text = ""
        for round in range(ROUNDS):
            objective.zero_order_options = objective.zero_order_options.replace(seed=SEED + round)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    estimate = objective.estimate(*inputs)
                except Exception as error:
                    left = _left(kind, module, round)
                    status = "refused, traces left" if left else "refused"
                    return Verdict(name, form, evaluator, status, _text(error), left)
            told = "; ".join(str(w.message) for w in caught if issubclass(w.category, zograd.ZeroOrderWarning))
            text = text or told
            # torch takes some fused paths by grad mode: either is right, if it is that of all evaluations.
            oracles = [Oracle(kind, module, grad) for grad in (False, True)[: 1 + kind.fused]]
            found = [differences(oracle, form, evaluator, method, round, estimate, module) for oracle in oracles]
            silent = [f"no warning names {name}" for name in kind.unused if name not in told]
            if silent or all(found):
                text = f"{text} (estimate {round + 1} of {ROUNDS})" if text else text
                status = "warned, wrong" if text else "wrong"
                return Verdict(name, form, evaluator, status, text, tuple((found[0] + silent)[:6]))
    return Verdict(name, form, evaluator, "warned, right" if text else "right", text)


def _objective(form, module, method, evaluator):
    if form == "ZeroOrder":
        units = zograd.distributions.Coordinate()
        return zograd.nn.ZeroOrder(module, units, method, None, SIGMA, evaluator=evaluator, seed=SEED)
    options = {"method": method, "num_samples": 2, "sigma": SIGMA, "evaluator": evaluator, "seed": SEED}

    class Net(zograd.nn.ZeroOrderGradientModule, **options):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return self.module(*inputs)

        def sample(self, sample_shape=torch.Size()):
            return torch.randint(0, 2, sample_shape).double() * 2 - 1

    return Net()


def _text(error):
    parts = []
    while error is not None and len(parts) < 3:
        parts.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
        error = error.__cause__
    return " | from ".join(parts)


def _left(kind, module, round):
    """Return what a refused estimate changed on the module."""
    if kind.lazy:
        return ()
    before = Oracle(kind, module).begin(round)[0]
    return tuple(Picture(module).differences(Picture(before), 0)[:6])


def table(verdicts):
    """Return verdicts by kind, class and evaluator, those that are right as that word alone."""
    results = {}
    for v in verdicts:
        said = {"status": v.status, "text": v.text[:400], "differences": [d[:200] for d in v.differences[:3]]}
        results.setdefault(v.kind, {})[f"{v.form}, {v.evaluator}"] = "right" if v.status == "right" else said
    return results


def main():
    """Judge every kind under every evaluator, print what is not right and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where to write the table")
    parser.add_argument("--only", default="", help="kinds whose names contain this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    verdicts = []
    for name, form, evaluator in CASES:
        if given.only in name:
            v = judge(name, form, evaluator)
            verdicts.append(v)
            if v.status != "right":
                print(f"{name}, {form}, {evaluator}: {v.status}. {v.text[:200]} {' / '.join(v.differences)[:300]}")
    counts = dict(Counter(v.status for v in verdicts))
    print(f"{len({v.kind for v in verdicts})} kinds, {len(verdicts)} results: {counts}")
    if given.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "zograd": zograd.__version__}
        report = {"command": "python tests/zoo.py", "versions": versions, "counts": counts, "results": table(verdicts)}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
