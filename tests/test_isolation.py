"""Modules: each evaluation begins where the module was, and the center alone leaves traces."""

import copy
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn

import zograd
from zograd.distributions import Coordinate
from zograd.nn import ZeroOrder

EXACT = {"distribution": Coordinate(), "method": "antithetic", "num_samples": None, "sigma": 2.0**-4}
X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


class Frozen(nn.Module):
    """A frozen parameter that is written to from some call on, or at points alone."""

    def __init__(self, begins=0, points_only=False):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.ema = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
        self.begins, self.points_only, self.calls = begins, points_only, 0

    def forward(self, x):
        self.calls += 1
        center = bool((self.w == self.w.round()).all())
        if self.calls > self.begins and not (self.points_only and center):
            self.ema.data.mul_(0.5).add_(0.5 * self.w)
        return ((self.w + self.ema) * x).sum()


def slope(net):
    net.zero_grad()
    loss = ZeroOrder(net, **EXACT)
    loss(X).backward()
    return net.w.grad


def test_a_momentum_encoder_has_the_gradient_of_one_call_and_its_traces():
    net, plain = Frozen(), Frozen()
    loss = ZeroOrder(net, **EXACT)
    for _ in range(4):
        net.zero_grad()
        loss(X).backward()
        with torch.no_grad():
            plain(X)
        torch.testing.assert_close(net.w.grad, 1.5 * X)
        assert torch.equal(net.ema, plain.ema)


@pytest.mark.parametrize("points_only", [False, True])
def test_a_frozen_parameter_written_from_the_third_estimate_on_is_named(points_only):
    net = Frozen(begins=2, points_only=points_only)
    loss = ZeroOrder(net, **EXACT)
    for _ in range(2):
        loss(X).backward()
    if points_only:
        net.begins = 0
    with pytest.raises(RuntimeError, match=r"`ZeroOrder` wrote to module\.ema in this estimate.*had not done before"):
        loss(X)
    net.zero_grad()
    loss(X).backward()  # from now on it is put back
    torch.testing.assert_close(net.w.grad, 1.5 * X)


def test_a_frozen_backbone_is_not_copied():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.w = nn.Linear(3, 3).requires_grad_(False), nn.Parameter(torch.ones(3))

        def forward(self, x):
            seen.add(self.body.weight.data_ptr())
            return (self.body(x) * self.w).sum()

    seen, net = set(), Head()
    loss = ZeroOrder(net, **EXACT)
    for _ in range(3):
        loss(X.float()).backward()
    assert seen == {net.body.weight.data_ptr()}


class Counting(nn.Module):
    """State of several kinds at once, from some call on."""

    kinds: ClassVar[list[int]] = []

    def __init__(self, begins=0):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.h, self.log, self.numbers, self.begins = torch.zeros(3, dtype=torch.float64), [], itertools.count(), begins

    def forward(self, x):
        n = next(self.numbers)
        self.log.append(n)
        if n >= self.begins:
            self.h.mul_(0.5).add_(self.w.detach())
            type(self).kinds.append(n)
        return (self.w * x).sum() + self.h.sum() + len(self.kinds) + len(self.log)


@pytest.mark.parametrize("begins", [0, 2])
def test_state_of_any_kind_that_begins_late(begins):
    Counting.kinds.clear()
    net, plain = Counting(begins), Counting(begins)
    loss = ZeroOrder(net, **EXACT)
    for k in range(4):
        net.zero_grad()
        value = loss(X)
        value.backward()
        seen = list(Counting.kinds)
        if seen:
            Counting.kinds.pop()  # by which the plain call has to begin where the estimate did
        with torch.no_grad():
            assert torch.equal(value.detach(), plain(X))
        assert Counting.kinds == seen
        assert torch.equal(net.h, plain.h)
        assert net.log == plain.log
        torch.testing.assert_close(net.w.grad, X + (1 if k >= begins else 0))


def test_an_exception_puts_everything_back():
    class Fails(Counting):
        def forward(self, x):
            out = super().forward(x)
            if len(self.log) == 1 and bool((self.w != self.w.round()).any()):
                raise OSError("down")
            return out

    net = Fails()
    before, held = copy.deepcopy(vars(net)["log"]), net.log
    Fails.kinds.clear()
    with pytest.raises(zograd.EvaluationError, match="down"):
        ZeroOrder(net, **EXACT)(X)
    assert net.log is held
    assert held == before == []
    assert Fails.kinds == []
    assert torch.equal(net.h, torch.zeros_like(net.h))
    assert net.w.requires_grad
    assert type(net.w) is nn.Parameter


def test_another_thread_waits_for_the_parameters():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            inside.set()
            return (self.w * x).sum()

    inside, net, grads = threading.Event(), Slow(), []
    loss = ZeroOrder(net, **EXACT)
    threads = [threading.Thread(target=lambda: grads.append(loss.estimate(X).grad["module.w"])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(grads) == 4
    assert all(torch.equal(g, X) for g in grads)
    assert type(net.w) is nn.Parameter


class Branch(nn.Module):
    """The second parameter is read at points alone; the third never."""

    def __init__(self, a=-0.05):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (a, 1.0))
        self.c = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self):
        return self.b if self.a > 0 else self.a * 0


def evaluators(tmp_path):
    yield "loop"
    yield zograd.evaluators.Journal("loop", tmp_path / "a.journal")
    yield zograd.evaluators.Journal("loop", tmp_path / "a.journal")  # from the file
    with ThreadPoolExecutor(2) as threads:
        yield zograd.evaluators.Pool(threads)
        yield zograd.evaluators.Journal(zograd.evaluators.Pool(threads), tmp_path / "b.journal")


def test_a_parameter_that_only_a_branch_at_some_points_reads_is_used(tmp_path):
    grads = []
    for evaluator in evaluators(tmp_path):
        net = ZeroOrder(Branch(), method="antithetic", num_samples=4000, sigma=0.3, seed=0, evaluator=evaluator)
        with pytest.warns(
            zograd.ZeroOrderWarning, match=r"read 1 of its parameters at no point, module\.c: their grad"
        ):
            grads.append(net.estimate().grad)
    assert torch.equal(grads[0]["module.c"], torch.zeros(2, dtype=torch.float64))
    assert abs(float(grads[0]["module.b"]) - 0.434) < 0.05  # the normal distribution's mass above 1/6
    assert all(torch.equal(grads[0][n], g[n]) for g in grads for n in g)


def test_what_is_not_read_is_zero_in_every_derivative():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return torch.stack([(self.w * x).sum(), self.w.sum()])

    net = ZeroOrder(Two(), method="antithetic", num_samples=50, sigma=0.1, seed=0)
    with pytest.warns(zograd.ZeroOrderWarning, match="module.head"):
        out = net(torch.ones(3))
    out.sum().backward(retain_graph=True)
    assert torch.equal(net.module.head.grad, torch.zeros(2))
    assert net.module.w.grad.abs().min() > 0
    with pytest.warns(zograd.ZeroOrderWarning, match="module.head"):
        made = net.estimate(torch.ones(3))
    assert torch.equal(made.vjp(torch.ones(2))["module.head"], torch.zeros(2))


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_unread_entries_have_no_second_derivative(evaluator):
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

        def forward(self):
            return self.w.square().sum()

    net = ZeroOrder(Square(), method="antithetic", num_samples=400, sigma=0.5, seed=0, evaluator=evaluator)
    with pytest.warns(zograd.ZeroOrderWarning, match="module.head"):
        value = net()
    grads = torch.autograd.grad(value, [net.module.w, net.module.head], create_graph=True)
    again = torch.autograd.grad(grads[0].sum(), [net.module.w, net.module.head])
    assert torch.equal(again[1], torch.zeros(2))
    torch.testing.assert_close(again[0], torch.full((2,), 2.0), rtol=0, atol=1.0)


def test_a_family_that_mixes_entries_only_warns():
    basis = torch.eye(6)[:, :2]
    net = ZeroOrder(
        Branch(),
        distribution=zograd.distributions.Guided(basis[:4]),
        method="antithetic",
        num_samples=20,
        sigma=0.3,
        seed=0,
    )
    with pytest.warns(zograd.ZeroOrderWarning, match=r"moves them all the same"):
        assert net.estimate().grad["module.c"].abs().sum() > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_a_frozen_encoder_takes_torch_s_fused_path_at_the_center_and_at_the_points(evaluator):
    """Padded places are zero there, and not on the other path: a difference of the two is no slope."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)
            self.w = nn.Parameter(torch.arange(8.0))  # a normalized layer's sum is zero on both paths

        def forward(self, x, mask):
            return (self.body(x, src_key_padding_mask=mask) * self.w).sum()

    torch.manual_seed(1)
    x, mask = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 2:] = True
    net = Padded()
    right = net.body(x, src_key_padding_mask=mask).sum((0, 1))
    made = ZeroOrder(net, Coordinate(), "forward", None, 2.0**-4, evaluator=evaluator).estimate(x, mask)
    torch.testing.assert_close(made.grad["module.w"], right, rtol=1e-3, atol=1e-3)


def test_threads_wait_for_each_other_where_a_copy_would_be_another_function():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return other(self.w * x)

    class Other(nn.Module):
        def forward(self, x):
            self.last = x
            time.sleep(1e-3)
            return self.last.sum()

    other, grads = Other(), []
    with ThreadPoolExecutor(4) as threads:
        for evaluator in ("loop", zograd.evaluators.Pool(threads)):
            grads.append(ZeroOrder(Reads(), **EXACT, evaluator=evaluator).estimate(X).grad["module.w"])
    assert torch.equal(*grads)


def test_what_functions_in_a_list_of_the_user_s_read_is_their_own():
    """A name that looks like torch's hooks is none of them."""

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.my_hooks = nn.Parameter(torch.ones(3)), [lambda: mine.append(1)]
            self.register_forward_hook(lambda *_: its.append(1))

        def forward(self, x):
            self.my_hooks[0]()
            return (self.w * x).sum()

    mine, its = [], []
    ZeroOrder(Calls(), **EXACT)(torch.ones(3)).backward()
    assert len(mine) == 7
    assert len(its) == 1
