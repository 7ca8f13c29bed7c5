"""Decorated functions travel to other processes, are copied, and stay what they decorate."""

import concurrent.futures
import copy
import functools
import inspect
import multiprocessing
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import zograd
from zograd import zero_order


@zero_order(method="antithetic", num_samples=6, sigma=0.1, seed=4)
def loss(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """How far x is from a staircase."""
    return scale * (x.round() - 3).abs().sum() + x.pow(2).sum()


def plain(x):
    return (x**3).sum()


elsewhere = zero_order(method="antithetic", num_samples=6, sigma=0.1, seed=4)(plain)
anonymous = zero_order(num_samples=6)(lambda x: x.sum())


class Model:
    """Something with a state and a decorated method."""

    def __init__(self, factor):
        self.factor = factor

    @zero_order(method="antithetic", num_samples=6, sigma=0.1, seed=4)
    def loss(self, x):
        return self.factor * (x**3).sum()

    @staticmethod
    @zero_order(seed=4)
    def static(x):
        return x.sum()

    @zero_order(seed=4)
    @staticmethod
    def static_too(x):
        return x.sum()


class Simulator:
    """A callable object."""

    def __init__(self, factor):
        self.factor = factor
        self.calls = 0

    def __call__(self, x, power=3):
        self.calls += 1
        return self.factor * (x**power).sum()


X = torch.tensor([0.3, -1.2, 2.5])


def grad_of(function, *args):
    return function.estimate(X, *args).grad


def closure():
    factor = 2.0

    @zero_order()
    def inner(x):
        return factor * x.sum()

    return inner


@pytest.fixture(scope="module")
def worker():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        yield pool


def there(worker, function, *args):
    return worker.submit(function, *args).result(timeout=120)


# ---------------------------------------------------------------------------------------------------------- pickling


def test_by_module_and_name():
    assert pickle.loads(pickle.dumps(loss)) is loss
    assert b"options" not in pickle.dumps(loss)


def test_under_another_name():
    again = pickle.loads(pickle.dumps(elsewhere))
    assert again.fn is plain
    assert again.options == elsewhere.options
    assert torch.equal(grad_of(again), grad_of(elsewhere))


def test_in_a_spawned_process(worker):
    assert torch.equal(there(worker, grad_of, loss), grad_of(loss))
    assert torch.equal(there(worker, grad_of, elsewhere), grad_of(elsewhere))
    assert torch.equal(there(worker, loss, X), loss(X))


def test_with_other_options(worker):
    # The name finds the function as it was decorated; the options are those of the replaced one.
    changed = loss.replace(sigma=0.5, num_samples=3)
    again = pickle.loads(pickle.dumps(changed))
    assert again.options == changed.options
    assert not isinstance(again.fn, zograd.ZeroOrderFunction)
    assert torch.equal(grad_of(again), grad_of(changed))
    assert torch.equal(there(worker, grad_of, changed), grad_of(changed))


def test_a_bound_method(worker):
    bound = Model(2.0).loss
    again = pickle.loads(pickle.dumps(bound))
    assert again.options == bound.options
    assert not isinstance(again.fn, zograd.ZeroOrderFunction)
    assert torch.equal(grad_of(again), grad_of(bound))
    assert torch.equal(there(worker, grad_of, bound), grad_of(bound))


def test_an_unbound_method():
    assert pickle.loads(pickle.dumps(Model.loss)) is Model.loss
    assert pickle.loads(pickle.dumps(Model.static)) is Model.static


def test_partials_and_callable_objects(worker):
    for fn in (functools.partial(plain), Simulator(2.0)):
        decorated = zero_order(num_samples=6, seed=4)(fn)
        again = pickle.loads(pickle.dumps(decorated))
        assert torch.equal(grad_of(again), grad_of(decorated))
        assert torch.equal(there(worker, grad_of, decorated), grad_of(decorated))


@pytest.mark.parametrize("function", [anonymous, closure()], ids=["lambda", "closure"])
def test_what_has_no_name_says_the_way_out(function):
    with pytest.raises(
        pickle.PicklingError, match=r"cannot be pickled: lambdas and functions defined.*top of a module"
    ):
        pickle.dumps(function)
    with pytest.raises(
        pickle.PicklingError, match=r"cannot be pickled: lambdas and functions defined.*top of a module"
    ):
        pickle.dumps(function.replace(sigma=0.5))


def test_a_generator_travels_with_its_state():
    generator = torch.Generator().manual_seed(3)
    decorated = zero_order(num_samples=6, generator=generator)(plain)
    again = pickle.loads(pickle.dumps(decorated))
    assert torch.equal(grad_of(again), grad_of(decorated))


def test_the_estimate_travels():
    estimate = loss.estimate(X)
    again = pickle.loads(pickle.dumps(estimate))
    assert torch.equal(again.grad, estimate.grad)
    assert torch.equal(again.coefficients, estimate.coefficients)
    assert (again.seed, again.evaluations) == (estimate.seed, estimate.evaluations)


SCRIPT = """
import concurrent.futures, multiprocessing, torch, zograd

@zograd.zero_order(method="antithetic", num_samples=4, seed=0)
def loss(x):
    return (x**3).sum()

def grad(f, x):
    return f.estimate(x).grad.tolist()

if __name__ == "__main__":
    x = torch.tensor([1.0, -2.0])
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(grad, loss, x).result(timeout=120) == grad(loss, x)
    print("equal")
"""


@pytest.mark.slow
def test_from_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240, check=False)
    assert run.stdout == "equal\n", run.stderr


# ----------------------------------------------------------------------------------------------------------- copying


def test_a_copy_has_its_own_generator():
    generator = torch.Generator().manual_seed(3)
    decorated = zero_order(num_samples=6, generator=generator)(plain)
    twin = copy.deepcopy(decorated)
    assert twin.options.generator is not generator
    first = grad_of(decorated)
    grad_of(decorated)
    assert torch.equal(grad_of(twin), first)  # the copy did not move with the original
    state = generator.get_state()
    grad_of(twin)
    assert torch.equal(generator.get_state(), state)


def test_a_copy_has_its_own_callable_object():
    simulator = Simulator(2.0)
    decorated = zero_order(seed=4)(simulator)
    twin = copy.deepcopy(decorated)
    twin.fn.factor = 50.0
    assert simulator.factor == 2.0
    torch.testing.assert_close(grad_of(decorated) * 25, grad_of(twin))


def test_a_copy_of_a_function_is_the_function():
    assert copy.deepcopy(loss).fn is loss.fn
    assert copy.copy(loss).options == loss.options
    assert torch.equal(grad_of(copy.deepcopy(loss)), grad_of(loss))


def test_a_copied_owner_has_its_own_method():
    model = Model(2.0)
    twin = copy.deepcopy(model)
    twin.factor = 6.0
    torch.testing.assert_close(grad_of(twin.loss), 3 * grad_of(model.loss))


# ------------------------------------------------------------------------------------- what it decorates, it looks like


def test_it_looks_like_the_function():
    assert loss.__name__ == "loss"
    assert loss.__qualname__ == "loss"
    assert loss.__module__ == __name__
    assert loss.__doc__ == "How far x is from a staircase."
    assert loss.__wrapped__ is loss.fn
    assert list(inspect.signature(loss).parameters) == ["x", "scale"]
    assert inspect.signature(loss).parameters["scale"].default == 1.0
    assert loss.__annotations__ == loss.fn.__annotations__
    assert "loss" in repr(loss)
    assert "sigma=0.1" in repr(loss)


def test_methods_keep_self():
    one, two = Model(1.0), Model(-5.0)
    x = X.clone().requires_grad_()
    one.loss(x).backward()
    torch.testing.assert_close(x.grad, grad_of(one.loss))
    torch.testing.assert_close(grad_of(two.loss), -5 * grad_of(one.loss))
    torch.testing.assert_close(Model.loss.replace(argnums=1).estimate(two, X).grad, grad_of(two.loss))
    assert isinstance(Model.loss, zograd.ZeroOrderFunction)
    assert Model.static.estimate(X).evaluations == 2
    assert Model(1.0).static.estimate(X).evaluations == 2
    assert Model(1.0).static_too.estimate(X).evaluations == 2
    with pytest.raises(ValueError, match=r"no floating-point tensor.*argument 0 is the one after `self`"):
        Model.loss(one, X)


def test_methods_of_modules():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor([2.0]))

        @zero_order(method="antithetic", num_samples=8, seed=0)
        def loss(self, x):
            return (self.scale.detach() * x).sum()

    net = Net()
    x = X.clone().requires_grad_()
    net.loss(x).backward()
    assert torch.equal(x.grad, grad_of(net.loss))
    assert "loss" not in net.state_dict()


def test_partials():
    shifted = zero_order(num_samples=6, seed=4)(functools.partial(Simulator(2.0), power=2))
    whole = zero_order(num_samples=6, seed=4)(lambda x: 2.0 * (x**2).sum())
    assert torch.equal(grad_of(shifted), grad_of(whole))
    first = zero_order(argnums=0, num_samples=6, seed=4)(functools.partial(lambda scale, x: scale * x.sum(), 3.0))
    assert torch.equal(grad_of(first), grad_of(zero_order(num_samples=6, seed=4)(lambda x: 3.0 * x.sum())))


def test_callable_objects():
    simulator = Simulator(2.0)
    decorated = zero_order(num_samples=6, seed=4)(simulator)
    decorated.estimate(X)
    assert simulator.calls == 7
    with torch.no_grad():
        decorated(X)
    assert simulator.calls == 8


def test_names_of_a_callable_object_do_not_hide_ours():
    simulator = Simulator(2.0)
    simulator.estimate = simulator.replace = "the user's own"
    decorated = zero_order(num_samples=6, seed=4)(simulator)
    assert decorated.estimate(X).evaluations == 7
    assert decorated.replace(num_samples=3).estimate(X).evaluations == 4


def test_builtins():
    import math

    decorated = zero_order(num_samples=6, seed=4)(math.exp)
    assert torch.isfinite(decorated.estimate(torch.tensor([0.5])).grad).all()


# ------------------------------------------------------------------------------------------------------------ types


TYPED = """
import torch
import zograd

@zograd.zero_order(method="antithetic", num_samples=8)
def loss(x: torch.Tensor, steps: int, *, noisy: bool = False) -> float:
    return 0.0

x = torch.zeros(3)
reveal_type(loss(x, 3))
reveal_type(loss.estimate(x, 3, noisy=True).evaluations)
loss(x, "3")
loss(x)
loss.estimate(x, 3, loud=True)
loss.replace(sigma=0.5)(x, None)
zograd.zero_order(num_samples="many")
"""


@pytest.mark.slow
def test_type_checkers_see_the_arguments(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "snippet.py").write_text(TYPED, encoding="utf-8")
    source = Path(zograd.__file__).parents[1]
    # Torch's own stubs are skipped: they take a minute, and the arguments are what is looked at.
    (tmp_path / "mypy.ini").write_text(
        textwrap.dedent(
            f"""
            [mypy]
            mypy_path = {source.as_posix()}
            follow_imports = silent
            [mypy-torch.*,optree.*,tqdm.*]
            follow_imports = skip
            """
        ),
        encoding="utf-8",
    )
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "snippet.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    lines = {}
    for line in run.stdout.splitlines():
        if line.startswith("snippet.py:"):
            lines.setdefault(int(line.split(":")[1]), line)  # an error comes before its notes
    assert sorted(lines) == [10, 11, 12, 13, 14, 15, 16], run.stdout + run.stderr
    assert re.search(r'Revealed type is "(builtins\.)?int"', lines[11])
    assert all("error" in lines[n] for n in range(12, 17))
