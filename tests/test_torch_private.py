"""Each private name of torch that zograd uses: what breaks if torch changes it; and that one file has all of them."""

import ast
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode

from zograd._base import torch_private as private

SOURCE = Path(__file__).resolve().parents[1] / "src" / "zograd"
HOME = SOURCE / "_base" / "torch_private.py"


def breaks(what):
    """The message of a failure here: torch has changed something, and this no longer works."""
    return f"torch {torch.__version__} changed a private name that zograd needs: {what}. See {HOME.name}."


def seen_inside(ask, transform=torch.func.grad):
    """What a question says inside a torch.func transform."""
    answers = []

    def fn(x):
        answers.append(ask(x))
        return (x * x).sum()

    transform(fn)(torch.ones(3))
    return answers[0]


# ------------------------------------------------------------------------------------------------------ a test a name


def test_transforms_active():
    what = breaks("fn under a torch.func transform would be watched for autograd, and its gradient be lost")
    assert private.transforms_active() is False, what
    assert seen_inside(lambda x: private.transforms_active()) is True, what


def test_transform_depth():
    what = breaks("an inner derivative would be taken for an outer one in forward mode of forward mode")
    assert private.transform_depth() == 0, what
    assert seen_inside(lambda x: private.transform_depth()) == 1, what
    twice = torch.func.vmap(torch.func.grad(lambda x: (depths.append(private.transform_depth()), x.sum())[1]))
    depths = []
    twice(torch.ones(2, 3))
    assert depths == [2], what


def test_is_transformed():
    what = breaks("`torch.func.grad(fn)` would see a constant")
    assert not private.is_transformed(torch.ones(3)), what
    assert not private.is_transformed(3.0), what
    assert seen_inside(private.is_transformed), what
    assert seen_inside(private.is_transformed, torch.vmap), what


def test_is_batched():
    what = breaks("LowRank would multiply the shared weights once for each direction")
    assert not private.is_batched(torch.ones(3)), what
    assert not seen_inside(private.is_batched), what
    assert seen_inside(private.is_batched, torch.vmap), what


def test_is_legacy_batched():
    what = breaks("`is_grads_batched=True` would fail, as a value is asked of a batch of cotangents")
    found = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, cotangent):
            found.append(private.is_legacy_batched(cotangent))
            return 2 * cotangent

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Double.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert found == [True], what
    assert private.is_legacy_batched(x) is False, what


def test_unwrapped():
    what = breaks("MeZO would not notice a parameter inside a torch.func transform, and evaluate it unperturbed")
    parameter = torch.ones(3)
    found = []
    torch.func.grad(lambda x: (found.append(private.unwrapped(x)), x.sum())[1])(parameter)
    torch.vmap(torch.func.grad(lambda x: (found.append(private.unwrapped(x)), x.sum())[1]))(parameter[None])
    assert found[0] is parameter, what
    assert found[1].shape == (1, 3), what
    assert private.unwrapped(parameter) is parameter, what


def test_below_transforms():
    what = breaks("MeZO could not make a perturbed parameter inside a torch.func transform")

    def draw(x):
        with private.below_transforms():
            assert private.transform_depth() == 0, what
            torch.rand(2)  # vmap refuses this
        return x

    torch.vmap(draw)(torch.ones(2))


def test_forward_mode_active():
    what = breaks("a derivative in forward mode under `no_grad` would be missing")
    assert private.forward_mode_active() is False, what
    with forward_ad.dual_level():
        assert private.forward_mode_active() is True, what
    assert private.forward_mode_active() is False, what


def test_forward_mode_enabled():
    what = breaks("forward mode of forward mode would be zero")
    found = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, tangent):
            (x,) = ctx.saved_tensors
            with private.forward_mode_enabled():
                dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
                found.append(forward_ad.unpack_dual(dual * dual).tangent)
            return 2 * x * tangent

    with forward_ad.dual_level():
        Square.apply(forward_ad.make_dual(torch.ones(2), torch.ones(2)))
    assert found[0] is not None, what
    assert found[0].tolist() == [2.0, 2.0], what


def test_random_allowed():
    what = breaks("`is_grads_batched=True` would fail where directions are drawn again")

    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, cotangent):
            with private.random_allowed():
                torch.rand(2)
            with pytest.raises(RuntimeError, match="random"):  # or else the context is not needed any more
                torch.rand(2)
            return cotangent

    x = torch.ones(3, requires_grad=True)
    (rows,) = torch.autograd.grad(Noise.apply(x), x, torch.eye(3), is_grads_batched=True)
    assert rows.shape == (3, 3), what
    with private.random_allowed():
        torch.rand(2)


def test_without_function_modes():
    what = breaks("an estimate inside another's fn would look as if fn used autograd")
    asked = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            asked.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        with private.without_function_modes():
            x.sum()
        assert asked == [], what
        x.sum()
    assert asked, what
    with private.without_function_modes():
        assert x.sum() == 2, what


def test_without_overrides():
    what = breaks("a factored weight would ask itself for its shape for ever")

    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(what)

    x = torch.ones(2).as_subclass(Named)
    with private.without_overrides():
        assert x.shape == (2,), what


def test_dispatch_mode():
    what = breaks("two threads that estimate at once would share torch's random numbers")
    seen = []

    class Mode(private.dispatch_mode()):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(torch.Tag.nondeterministic_seeded in func.tags)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.rand(2)
        torch.ones(2)
        other = threading.Thread(target=torch.rand, args=(2,))
        other.start()
        other.join()
    assert seen == [True, False], what


def test_schema():
    what = breaks("random operators of a second thread would not be handed their generator, nor writes be seen")

    def arguments(overload):
        return {a.name: str(a.type) for a in private.schema(overload).arguments}

    assert "generator" not in arguments(torch.ops.aten.rand.default), what
    assert arguments(torch.ops.aten.rand.generator)["generator"] == "Optional[Generator]", what
    assert private.schema(torch.ops.aten.add_.Tensor).arguments[0].alias_info.is_write, what
    assert private.schema(torch.add) is None, what


def test_wrapper():
    what = breaks("LowRank could not share weights between directions under vmap")

    class Kind(torch.Tensor):
        @staticmethod
        def __new__(cls, like):
            return private.wrapper(cls, like)

        def __init__(self, like):
            pass

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError(what)

    like = torch.ones(2, 3, dtype=torch.float64).t()
    made = Kind(like)
    assert type(made) is Kind, what
    assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype), what


def test_writes():
    what = breaks("a write to a parameter or a point would pass unseen")
    x = torch.ones(3)
    before = private.writes(x)
    x.add_(1)
    assert private.writes(x) > before, what
    before = private.writes(x)
    x[:1].zero_()
    assert private.writes(x) > before, what
    x.sum()
    assert private.writes(x) == private.writes(x), what
    with torch.inference_mode():
        assert private.writes(torch.ones(3)) == 0, what


def test_storages():
    what = breaks("what a module holds would not be put back between points")
    x = torch.arange(4.0)
    (view,) = private.storages(x[1:3])
    assert view.numel() == 16, what
    kept = view.clone()
    x.zero_()
    view.copy_(kept)
    assert x.tolist() == [0, 1, 2, 3], what
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed layouts are in beta
        sparse_ones = [(torch.eye(2).to_sparse(), 2), (torch.eye(2).to_sparse_csr(), 3)]
    for sparse, parts in sparse_ones:
        assert len(private.storages(sparse)) == parts, what
    assert private.storages(torch.empty(2, device="meta")) is None, what


def test_watch_engine():
    what = breaks("fn's own backward would pass over the point without a sign")
    x, told = torch.ones(2, requires_grad=True), []
    outer = private.watch_engine(lambda: told.append(1))
    try:
        x.sum().backward()
        torch.autograd.grad(x.sum(), x)
        torch.func.grad(torch.sum)(x)
        assert told == [1, 1, 1], what
        thread = threading.Thread(target=lambda: x.sum().backward())  # others are none of its business
        thread.start()
        thread.join()
        assert told == [1, 1, 1], what
    finally:
        private.unwatch_engine(outer)
    x.sum().backward()
    assert told == [1, 1, 1], what


def test_unwatch_engine():
    what = breaks("torch would be left changed")
    before = vars(torch.autograd)["_engine_run_backward"]
    private.unwatch_engine(private.watch_engine(lambda: None))
    assert vars(torch.autograd)["_engine_run_backward"] is before, what


def test_own_code():
    assert private.own_code({"__name__": "torch._dynamo.guards"})
    assert not private.own_code({"__name__": "torch.nn.functional"})
    assert not private.own_code({})


def test_set_registry():
    what = breaks("a module would be evaluated unperturbed")
    layer = nn.Linear(2, 2)
    private.set_registry(layer, {**private.registries(layer)[0], "weight": torch.zeros(2, 2)})
    assert layer.weight.sum() == 0, what
    assert isinstance(layer.bias, nn.Parameter), what


def test_as_parameter():
    what = breaks("modules that look for parameters would not find the perturbed ones")
    x = torch.ones(2, requires_grad=True) * 2
    assert not isinstance(x, nn.Parameter), what
    private.as_parameter(x)
    assert isinstance(x, nn.Parameter), what
    assert x.grad_fn is not None, what


def test_registries():
    what = breaks("a copy of a module would share its parts with the module")
    net = nn.BatchNorm1d(2)
    net.inner = nn.Linear(2, 2, bias=False)
    parameters, buffers, modules = private.registries(net)
    assert list(parameters) == ["weight", "bias"], what
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"], what
    assert list(modules) == ["inner"], what
    assert private.registries(net.inner)[0]["bias"] is None, what
    assert [net.__dict__[name] for name in private.REGISTRIES] == [parameters, buffers, modules], what
    buffers["running_mean"] = torch.ones(2)
    assert net.running_mean.tolist() == [1, 1], what


def test_parametrizations_cached():
    what = breaks("inside `parametrize.cached()` all points would be given one weight")
    assert private.parametrizations_cached() is False, what
    with parametrize.cached():
        assert private.parametrizations_cached() is True, what
        parametrizations.weight_norm(nn.Linear(2, 2))


def test_compiler_loaded():
    what = breaks("MeZO would be compiled anew for each point, or import the compiler for nothing")
    code = (
        "import torch, zograd; from zograd._base.torch_private import compiler_loaded; print(compiler_loaded()); "
        "import torch._dynamo; print(compiler_loaded())"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "True"], what


# ------------------------------------------------------------------------------------------------- and nowhere else

_OBJECTS = (
    torch.Tensor,
    nn.Module(),
    torch.UntypedStorage,
    torch.Generator,
    torch.autograd.Function,
    torch.ops.aten.add.Tensor,
    torch.distributions.Normal,
)
# Attributes of torch's objects that begin with an underscore, and those that a release may not show in `dir`.
PRIVATE = {name for thing in _OBJECTS for name in dir(thing) if name.startswith("_") and not name.startswith("__")}
PRIVATE |= {"_C", "_dynamo", "_functorch", "_is_param", "_torchdynamo_disable", "_cdata", "_use_count", "_schema"}


def torch_names(tree):
    """What a module calls torch and its parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield (alias.asname or "torch"), alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def root_of(node):
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_uses(text):
    """Lines of a module that touch a private name of torch: by import, as an attribute, or in a string."""
    tree = ast.parse(text)
    known = dict(torch_names(tree))
    for path in known.values():
        if any(map(is_private, path.split("."))):
            yield 0, path
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = root_of(node)
            if root in known or (node.attr in PRIVATE and root not in ("self", "cls")):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words = node.value.split(".")
            if (words[0] == "torch" and any(map(is_private, words))) or node.value in PRIVATE:
                yield node.lineno, repr(node.value)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_other_module_touches_a_private_name(path):
    if path != HOME:
        assert list(private_uses(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C._functorch",
        "import torch as t\nt._C",
        "from torch.utils import _pytree",
        "from torch._functorch import pyfunctorch",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "def f(x):\n    return x._version",
        "def f(m):\n    m._buffers['a'] = 1",
        "def f(x):\n    x.y._is_param = True",
        "import sys\n'torch._dynamo' in sys.modules",
        "def f(x):\n    return getattr(x, '_version')",
        "def f(s):\n    return s.untyped_storage()._cdata",
        "def f(o):\n    return o._schema.arguments",
    ],
)
def test_the_search_finds(text):
    assert list(private_uses(text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.Tensor.__torch_function__",
        "class A:\n    def f(self):\n        return self._base",
        "'_own'",
    ],
)
def test_the_search_lets_pass(text):
    assert not list(private_uses(text))


def test_every_name_has_a_comment_and_a_test():
    tree = ast.parse(HOME.read_text(encoding="utf-8"))
    lines = HOME.read_text(encoding="utf-8").splitlines()
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    assert len(functions) > 15
    for function in functions:
        assert function.name in tests, function.name
        body = lines[function.body[0].end_lineno : function.end_lineno]
        assert any(line.strip().startswith("# ") for line in body), function.name


def test_nothing_private_is_touched_at_import():
    """Outside functions the file of private names has strings and definitions only."""
    tree = ast.parse(HOME.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    at_import = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and id(n) not in inside]
    assert not any(map(is_private, at_import))
