"""TorchOpt's import paths and both listings of its page, as written there."""

import inspect

import pytest
import torch

import zograd.compat.torchopt as torchopt
from zograd import zero_order
from zograd.nn import ZeroOrderGradientModule


class Distribution:
    def sample(self, sample_shape=torch.Size()):
        return torch.randn(sample_shape)


def distribution(sample_shape=torch.Size()):
    return torch.randn(sample_shape)


@pytest.mark.parametrize(
    "form",
    [Distribution(), distribution, torch.distributions.Normal(loc=0, scale=1)],
    ids=["class", "function", "torch"],
)
def test_functional_listing(form):
    torch.manual_seed(0)
    slope = torch.tensor([1.0, -2.0, 4.0])

    @torchopt.diff.zero_order(distribution=form, method="naive", argnums=0, num_samples=100, sigma=0.01)
    def forward(params, data):
        return ((params - data) @ slope).sum()

    params, data = torch.ones(3, requires_grad=True), torch.ones(3)
    loss = forward(params, data)
    grads = torch.autograd.grad(loss, params)
    # At the value 0 the naive estimate has the variance 2 a^2 of the antithetic one, a tenth of it at N = 100.
    torch.testing.assert_close(grads[0], slope, rtol=0, atol=2.5)
    assert torch.cosine_similarity(grads[0], slope, dim=0) > 0.95


def test_oop_listing():
    torch.manual_seed(0)

    class Net(ZeroOrderGradientModule, method="naive", num_samples=100, sigma=0.01):
        def __init__(self, dim):
            super().__init__()
            self.fc = torch.nn.Linear(dim, 1)

        def forward(self, batch):
            x, y = batch
            objective = torch.nn.functional.mse_loss(self.fc(x).squeeze(1), y)
            return objective

        def sample(self, sample_shape=torch.Size()):
            noise_batch = torch.randn(sample_shape)
            return noise_batch

    net = Net(4)
    data = torch.randn(16, 4), torch.randn(16)
    loss = net(data)
    grads = torch.autograd.grad(loss, net.parameters())
    assert [g.shape for g in grads] == [p.shape for p in net.parameters()]
    assert all(g.abs().sum() > 0 for g in grads)


def test_import_paths():
    assert torchopt.diff.zero_order.zero_order is zero_order
    assert torchopt.diff.zero_order.nn.ZeroOrderGradientModule is ZeroOrderGradientModule
    assert torchopt.nn.ZeroOrderGradientModule is ZeroOrderGradientModule


def test_from_imports():
    """As programs write them, the package's name aside; the decorator's module can be called, too."""
    from zograd.compat.torchopt import diff, nn
    from zograd.compat.torchopt.diff import zero_order as module
    from zograd.compat.torchopt.diff.zero_order import zero_order as decorator
    from zograd.compat.torchopt.diff.zero_order.nn import ZeroOrderGradientModule as there
    from zograd.compat.torchopt.nn import ZeroOrderGradientModule as here

    assert (diff, nn) == (torchopt.diff, torchopt.nn)
    assert here is there is ZeroOrderGradientModule
    assert module is diff.zero_order
    assert decorator is zero_order
    assert module(distribution, num_samples=3)(torch.sum).options.num_samples == 3


def test_signature_and_defaults_are_those_of_the_page():
    parameters = inspect.signature(zero_order).parameters
    assert list(parameters)[:5] == ["distribution", "method", "argnums", "num_samples", "sigma"]
    defaults = {name: p.default for name, p in list(parameters.items())[1:5]}
    assert defaults == {"method": "naive", "argnums": (0,), "num_samples": 1, "sigma": 1.0}


def test_ints_are_accepted():
    @zero_order(distribution, "forward", 0, 10, 1)
    def fn(x):
        return x.sum()

    assert fn.options.sigma == 1.0
    assert fn.options.argnums == (0,)
    assert fn(torch.ones(2, requires_grad=True)).requires_grad
