"""ZeroOrderGradientModule and ZeroOrder: each clause of their contract."""

import collections
import copy
import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import zograd
from zograd.nn import ZeroOrder, ZeroOrderGradientModule

EXACT = {"method": "antithetic", "num_samples": 600, "sigma": 0.01, "seed": 0}
CLOSE = 0.98  # the cosine is sqrt(N / (N + d)), .993 and more for d up to 8


class Normal(ZeroOrderGradientModule):
    """The ``sample`` that all modules here share."""

    def sample(self, sample_shape=torch.Size()):
        return torch.randn(sample_shape)


def true_grads(module, *args, **kwargs):
    """What backpropagation gives for the plain forward, by name."""
    twin = copy.deepcopy(module)
    loss = nn.Module.__call__(twin, *args, **kwargs)
    named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def cosine(a, b):
    names = [name for name in b if b[name] is not None]
    return torch.cosine_similarity(*(torch.cat([t[n].flatten().double() for n in names]) for t in (a, b)), dim=0).item()


def state_bits(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module, before):
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


class Linear(Normal, **EXACT):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x, scale=1.0, *, shift=0.0):
        return ((self.fc(x) + shift) * scale * torch.tensor([1.0, -3.0], dtype=x.dtype)).sum()


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_and_value_in_every_dtype(evaluator, dtype):
    torch.manual_seed(1)
    net, x = Linear(dtype), torch.randn(4, 3, dtype=dtype)
    sigma = 0.5 if dtype == torch.bfloat16 else 0.01  # the resolution of bfloat16 near 1 is 0.008
    net.zero_order_options = net.zero_order_options.replace(evaluator=evaluator, sigma=sigma)
    before = state_bits(net)
    loss = net(x)
    assert torch.equal(loss.detach(), nn.Module.__call__(net, x).detach())
    loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    assert all(p.grad.dtype == dtype for p in net.parameters())
    # bfloat16 adds the rounding of values of about 20 to steps of 1/8.
    assert cosine(grads, true_grads(net, x)) > (0.96 if dtype == torch.bfloat16 else CLOSE)
    assert_same_state(net, before)


def test_keyword_arguments_reach_forward():
    net, x = Linear(), torch.ones(2, 3)
    loss = net(x, shift=2.0, scale=-2.0)
    assert torch.equal(loss.detach(), nn.Module.__call__(net, x, -2.0, shift=2.0).detach())
    loss.backward()
    assert cosine({n: p.grad for n, p in net.named_parameters()}, true_grads(net, x, -2.0)) > CLOSE


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_tied_weights_get_the_gradient_of_all_their_uses(evaluator):
    class Tied(Normal, **EXACT, evaluator=evaluator):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return (self.b(self.a(x)) * torch.tensor([1.0, 2.0, -3.0])).sum()

    net, x = Tied(), torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    net(x).backward()
    truth = true_grads(net, x)["a.weight"]
    assert [name for name, _ in net.named_parameters()] == ["a.weight"]
    assert cosine({"a.weight": net.a.weight.grad}, {"a.weight": truth}) > CLOSE
    assert net.a.weight.grad.norm() / truth.norm() == pytest.approx(1, abs=0.2)


def test_frozen_parameters_are_not_perturbed():
    class Frozen(Normal, **EXACT):
        def __init__(self):
            super().__init__()
            self.free, self.frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self):
            frozen.append(self.frozen.clone())
            return (self.free * torch.tensor([1.0, 4.0])).sum() + 10 * self.frozen.sum()

    frozen = []
    net = Frozen()
    net().backward()
    assert net.frozen.grad is None
    assert all(torch.equal(f, torch.ones(2)) for f in frozen)
    torch.testing.assert_close(net.free.grad, torch.tensor([1.0, 4.0]), rtol=0, atol=0.8)
    assert list(net.estimate().grad) == ["free"]


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
@pytest.mark.parametrize("method", ["naive", "forward", "antithetic", "fourth_order"])
def test_buffers_change_as_in_one_plain_forward(evaluator, method):
    class Normed(Normal, method=method, num_samples=7, sigma=0.1, evaluator=evaluator):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)

        def forward(self, x):
            return (self.norm(self.fc(x)) ** 3).sum()

    net, x = Normed(), torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(net)
    running = net.norm.running_mean
    for _ in range(2):
        net(x).backward()
        nn.Module.__call__(plain, x)
    assert_same_state(net, plain.state_dict())
    assert net.norm.running_mean is running
    assert net.norm.num_batches_tracked == 2


def test_buffer_that_forward_replaces():
    class Counter(Normal, num_samples=3):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))
            self.register_buffer("count", torch.zeros(()))

        def forward(self):
            self.count = self.count + 1
            return self.w.sum() * self.count

    net = Counter()
    assert net().item() == 1
    assert net().item() == 2
    assert net.count == 2


def test_attributes_and_logs_are_as_the_plain_call_left_them():
    class Logging(Normal, num_samples=5):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.log, self.stats, self.calls = [], {"last": None}, 0

        def forward(self):
            self.calls += 1
            self.log.append(self.calls)
            self.stats["last"] = self.w.detach().clone()
            self.newcomer = self.calls
            return (self.w * self.calls).sum()

    net = Logging()
    log = net.log
    net().backward()
    net()
    assert net.calls == 2
    assert net.log is log
    assert log == [1, 2]
    assert torch.equal(net.stats["last"], torch.ones(2))
    assert net.newcomer == 2


def test_settings_are_inherited_and_live_in_one_attribute():
    class Parent(Normal, method="antithetic", num_samples=3, sigma=0.5):
        def forward(self):
            return (self.w**2).sum()

    class Child(Parent, num_samples=7):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.sigma = -1.0  # the user's own, never read
            self.num_samples = "many"

    net, other = Child(), Child()
    assert net.estimate().evaluations == 15
    net.zero_order_options = net.zero_order_options.replace(sigma=0.1, num_samples=2)
    assert net.estimate().evaluations == 5
    assert other.estimate().evaluations == 15
    assert Child.zero_order_options.sigma == Parent.zero_order_options.sigma == 0.5
    assert Parent.zero_order_options.num_samples == 3
    assert copy.deepcopy(net).estimate().evaluations == 5


def test_forward_and_sample_may_come_from_any_ancestor():
    class Forwards(nn.Module):
        def forward(self):
            return self.w.sum()

    class Samples:
        def sample(self, sample_shape=torch.Size()):
            return torch.randn(sample_shape)

    class Both(ZeroOrderGradientModule, Forwards, Samples):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

    class Neither(ZeroOrderGradientModule):
        pass

    assert Both()().requires_grad
    with pytest.raises(TypeError, match=r"abstract class Neither without `forward` and `sample`"):
        Neither()


def test_super_forward_is_plain():
    class Base(Normal, num_samples=4):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self):
            return self.w.sum()

    class Twice(Base):
        def forward(self):
            return 2 * super().forward()

    assert Twice().estimate().evaluations == 5


def test_no_parameters():
    class Empty(Normal):
        def forward(self):
            return torch.zeros(())

    net = Empty()
    with pytest.raises(RuntimeError, match=r"^The module has no parameters\.$"):
        net()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^The module has no parameters\.$"):
        net()


def test_plain_call_without_grad_mode_or_trainable_parameters():
    class Counting(Normal, num_samples=50):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self):
            calls.append(1)
            return self.w.sum()

    calls = []
    net = Counting()
    with torch.no_grad():
        assert not net().requires_grad
    with torch.inference_mode():
        net()
    net.w.requires_grad_(False)
    net()
    assert len(calls) == 3


def test_state_dict_deepcopy_and_hooks():
    net = Linear()
    assert list(net.state_dict()) == ["fc.weight", "fc.bias"]
    net(torch.ones(1, 3))
    assert list(net.state_dict()) == ["fc.weight", "fc.bias"]
    twin = copy.deepcopy(net)
    twin.load_state_dict(net.state_dict())
    twin.fc.weight.data.zero_()
    assert twin(torch.ones(1, 3)).item() != net(torch.ones(1, 3)).item()
    net.register_forward_hook(lambda module, args, out: out * 2)
    assert net(torch.ones(1, 3)).item() == pytest.approx(2 * net.forward(torch.ones(1, 3)).item())


def test_parametrizations():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    net, x = Linear(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    parametrize.register_parametrization(net.fc, "weight", Double())
    net(x).backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    assert "fc.parametrizations.weight.original" in grads
    assert cosine(grads, true_grads(net, x)) > CLOSE


def test_two_threads_share_a_module():
    net, x = Linear(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    net.zero_order_options = net.zero_order_options.replace(num_samples=60, seed=5)
    alone, before, out = net.estimate(x).grad, state_bits(net), {}

    def work(name):
        out[name] = [net.estimate(x).grad for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(out) == 2
    assert all(torch.equal(g[name], alone[name]) for grads in out.values() for g in grads for name in alone)
    assert_same_state(net, before)


def test_an_exception_in_the_middle_leaves_nothing_behind():
    class Failing(Normal, num_samples=10):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            seen.append(1)
            out = self.norm(self.fc(x)).sum()
            if len(seen) == 6:
                self.train(False)
                raise OSError("simulator crashed")
            return out

    seen = []
    net = Failing()
    before = state_bits(net)
    with pytest.raises(zograd.EvaluationError, match=r"raised OSError at direction 4 .*: simulator crashed"):
        net(torch.randn(4, 2))
    assert_same_state(net, before)
    assert net.training
    assert net.norm.training
    assert net.calls == 0


def test_lstm_under_loop_and_its_error_under_vmap():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lstm = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0][:, -1].pow(2).sum()

    x = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    net = ZeroOrder(Recurrent(), method="antithetic", num_samples=300, sigma=0.01, seed=1)
    net(x).backward()
    # sqrt(N / (N + d)) with d = 84 is .88.
    assert cosine({n: p.grad for n, p in net.named_parameters()}, true_grads(net, x)) > 0.8
    net.zero_order_options = net.zero_order_options.replace(evaluator="vmap")
    with pytest.raises(RuntimeError, match=r'cannot be vectorized by `evaluator="vmap"`: use `evaluator="loop"`'):
        net(x)


def test_a_parameter_behind_a_closure_is_perturbed():
    class Hidden(Normal, **EXACT):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.helper = lambda: self.w.sum()

        def forward(self):
            return self.helper()

    net = Hidden()
    net().backward()
    torch.testing.assert_close(net.w.grad, torch.ones(2), rtol=0, atol=0.3)


def test_modules_in_plain_lists_and_bound_methods_are_perturbed():
    class Listed(Normal, **EXACT):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)
            self.stages, self.last = [self.a, {"b": (self.b,)}], self.finish

        def finish(self, x):
            return self.stages[1]["b"][0](x).sum()

        def forward(self, x):
            return self.last(self.stages[0](x))

    net, x = Listed(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    stages = net.stages
    net(x).backward()
    assert cosine({n: p.grad for n, p in net.named_parameters()}, true_grads(net, x)) > CLOSE
    assert net.stages is stages
    assert net.stages[0] is net.a


def test_modules_in_named_tuples_are_perturbed():
    class Stages(NamedTuple):
        a: nn.Module
        b: nn.Module

    class Named(Normal, **EXACT):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)
            self.stages = Stages(self.a, self.b)

        def forward(self, x):
            return self.stages.b(self.stages.a(x)).sum()

    net, x = Named(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    stages = net.stages
    net(x).backward()
    assert cosine({n: p.grad for n, p in net.named_parameters()}, true_grads(net, x)) > CLOSE
    assert net.stages is stages


def test_inner_training_loop_in_forward():
    class Adapts(Normal, **EXACT):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0, -1.0]))

        def forward(self):
            (step,) = torch.autograd.grad(((self.w - 1) ** 2).sum(), self.w)
            return ((self.w - 0.25 * step) ** 2 * torch.tensor([1.0, 3.0])).sum()

    net = Adapts()
    net().backward()
    assert net.w.grad is not None
    # w' = (w + 1) / 2, so the gradient is w' * (1, 3) = (1.5, 0).
    torch.testing.assert_close(net.w.grad, torch.tensor([1.5, 0.0]), rtol=0, atol=0.3)


def test_wrapper_trains_any_module_with_a_sigma_for_each_parameter():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))

        def forward(self):
            return (self.w**3).sum() + self.b**3

    sigma = {"module.w": 0.5, "module.b": 2.0}
    net = ZeroOrder(Loss(), method="antithetic", num_samples=200_000, sigma=sigma, evaluator="vmap", seed=0)
    net().backward()
    # x^3 smoothed has the slope 3 x^2 + 3 sigma^2, leaf by leaf.
    torch.testing.assert_close(net.module.w.grad, torch.tensor([3.75, 12.75]), rtol=0.03, atol=0.3)
    torch.testing.assert_close(net.module.b.grad, torch.tensor(39.0), rtol=0.03, atol=0.3)
    assert "ZeroOrder(" in repr(net)
    with pytest.raises(TypeError, match=r"`ZeroOrder\(module\)` must be a module, got function"):
        ZeroOrder(lambda x: x)


def test_bad_class_keywords():
    with pytest.raises(ValueError, match=r"`class Bad\(sigma=\.\.\.\)` must be positive, got -1\.0\."):

        class Bad(Normal, sigma=-1.0):
            pass

    with pytest.raises(TypeError, match=r"`class Odd` has no setting `sigmas`"):

        class Odd(Normal, sigmas=1.0):
            pass

    with pytest.raises(TypeError, match=r"`class Argued\(argnums=\.\.\.\)`: a ZeroOrderGradientModule has no setting"):

        class Argued(Normal, argnums=0):
            pass


def test_sampling_by_numpy_still_gives_the_right_gradient():
    np = pytest.importorskip("numpy")
    rng = np.random.default_rng(0)

    class Numpy(ZeroOrderGradientModule, **EXACT):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, -2.0]))

        def forward(self):
            return torch.stack([(self.w * torch.tensor([3.0, 5.0])).sum(), self.w[0] * 7])

        def sample(self, sample_shape=torch.Size()):
            return torch.from_numpy(rng.standard_normal(tuple(sample_shape)))

    net = Numpy()
    net().backward(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(net.w.grad, torch.tensor([17.0, 5.0]), rtol=0, atol=3.0)


def test_the_package_exports_the_module():
    assert zograd.nn.ZeroOrderGradientModule is ZeroOrderGradientModule


class Tracing(Normal, **EXACT):
    """What forward leaves behind in all kinds of containers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1)
        self.log, self.active, self.counts = [], None, collections.Counter()
        self.a.shared = self.shared = {}

    def forward(self, x):
        if self.active is None:
            self.active = [self.a]
        self.shared["h"] = self.active[0](x)
        self.log.append(("call", [len(self.log)]))
        self.counts["calls"] += 1
        return self.b(self.a.shared["h"]).sum()


def test_containers_are_shared_as_in_the_module_and_left_as_by_one_call():
    net, x = Tracing(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for call in range(3):
        net.zero_grad()
        net(x).backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        assert cosine(grads, true_grads(net, x)) > CLOSE
        assert net.log == [("call", [k]) for k in range(call + 1)]
        assert net.counts == {"calls": call + 1}
    assert net.active == [net.a]
    assert net.a.shared is net.shared


def test_parameters_registered_in_forward_are_an_error():
    class Lazy(Normal):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self):
            if not hasattr(self, "late"):
                self.late = nn.Parameter(torch.ones(1))
            return self.w.sum() * self.late.sum()

    with pytest.raises(RuntimeError, match=r"`Lazy\.forward` registered or removed a parameter or submodule"):
        Lazy()()


def test_replaced_parameters_are_still_parameters_to_isinstance():
    class Asks(Normal, **EXACT):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self):
            return self.w.sum() * (1.0 if isinstance(self.w, nn.Parameter) else 100.0)

    net = Asks()
    net().backward()
    torch.testing.assert_close(net.w.grad, torch.ones(2), rtol=0, atol=0.3)


def test_a_view_made_before_the_call_is_perturbed():
    class View(Normal, **EXACT):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, 2))
            self.transposed = self.w.t()

        def forward(self):
            return self.transposed.sum()

    net = View()
    net().backward()
    torch.testing.assert_close(net.w.grad, torch.ones(2, 2), rtol=0, atol=0.3)
    assert net.transposed.data_ptr() == net.w.data_ptr()


def test_a_cache_of_parametrizations_is_an_error():
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"inside `parametrize\.cached\(\)`"):
        Linear()(torch.ones(1, 3))
