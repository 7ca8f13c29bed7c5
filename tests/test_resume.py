"""States to go on from: where a generator stands is saved with a module or a decorated function, as plain numbers."""

import copy
import io

import pytest
import torch

import zograd
from zograd import zero_order
from zograd.nn import ZeroOrder, ZeroOrderGradientModule

X = torch.tensor([[0.3, -1.2, 2.5]])


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return (self.linear(x) ** 2).sum().round(decimals=1)


class Net(ZeroOrderGradientModule, num_samples=4):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return (self.linear(x) ** 2).sum()

    def sample(self, sample_shape=()):
        return torch.randn(sample_shape)


def wrapped(generator=None):
    torch.manual_seed(0)
    return ZeroOrder(Loss(), num_samples=4, generator=generator)


def subclassed(generator=None):
    torch.manual_seed(0)
    net = Net()
    net.zero_order_options = net.zero_order_options.replace(generator=generator)
    return net


def total(x):
    return x.sum()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def through_a_file(state):
    """As `torch.save` and a load that runs no code make it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


every_module = pytest.mark.parametrize("make", [wrapped, subclassed])


@every_module
def test_a_run_goes_on_bit_for_bit(make):
    def steps(net, optimizer, count):
        seeds = []
        for _ in range(count):
            optimizer.zero_grad()
            with zograd.Tracker() as t:
                net(X).backward()
            optimizer.step()
            seeds.append(t.history[0]["seed"])
        return seeds

    net = make(generator())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    steps(net, optimizer, 3)
    saved = through_a_file({"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    seeds = steps(net, optimizer, 3)

    again = make(generator(77))
    optimizer = torch.optim.Adam(again.parameters(), lr=0.1)
    again.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    assert steps(again, optimizer, 3) == seeds
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@every_module
def test_without_a_generator_the_state_is_that_of_the_tensors(make):
    net = make()
    plain = [name for name, _ in net.named_parameters()]
    assert list(net.state_dict()) == plain
    make().load_state_dict(net.state_dict())
    outer = torch.nn.Sequential(make(), make(generator()))
    keys = list(outer.state_dict())
    assert [k for k in keys if k.endswith("_extra_state")] == ["1._extra_state"]
    torch.nn.Sequential(make(), make(generator())).load_state_dict(through_a_file(outer.state_dict()))


@every_module
def test_a_state_for_one_with_a_generator_does_not_fit_one_without(make):
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*_extra_state"):
        make(generator()).load_state_dict(make().state_dict())
    assert make(generator()).load_state_dict(make().state_dict(), strict=False).missing_keys == ["_extra_state"]
    with pytest.raises(ValueError, match=r"load_state_dict\(...\)`: `generator=` must be given .* there is none here"):
        make().load_state_dict(make(generator()).state_dict())


def test_a_users_own_extra_state_is_left_alone():
    class Own(Net):
        def get_extra_state(self):
            return {"mine": 3}

        def set_extra_state(self, state):
            self.got = state

    net, other = Own(), Own()
    other.load_state_dict(net.state_dict())
    assert other.got == {"mine": 3}


def test_a_decorated_function_goes_on():
    def fn(x):
        return (x**3).sum()

    decorated = zero_order(num_samples=4, generator=generator())(fn)
    decorated.estimate(X)
    state = through_a_file(decorated.state_dict())
    assert state["seed"] == 0
    expected = [decorated.estimate(X).grad for _ in range(3)]
    again = zero_order(num_samples=4, generator=generator(9))(fn)
    again.load_state_dict(state)
    for grad in expected:
        assert torch.equal(again.estimate(X).grad, grad)


def test_a_method_and_a_copy_have_the_state_of_their_generator():
    class Model:
        @zero_order(num_samples=4, generator=generator())
        def loss(self, x):
            return (x**3).sum()

    model = Model()
    state = model.loss.state_dict()
    first = model.loss.estimate(X).grad
    twin = copy.deepcopy(Model.loss)
    model.loss.load_state_dict(state)
    assert torch.equal(model.loss.estimate(X).grad, first)
    assert twin.state_dict()["generator"].equal(Model.loss.state_dict()["generator"])


@pytest.mark.parametrize("settings", [{}, {"seed": 3}])
def test_functions_without_a_generator_have_nothing_to_save(settings):
    decorated = zero_order(**settings)(total)
    assert decorated.state_dict() == {}
    decorated.load_state_dict({})
    with pytest.raises(ValueError, match=r"`total.load_state_dict\(...\)`: `generator=` must be given .* none here"):
        decorated.load_state_dict(zero_order(generator=generator())(total).state_dict())
    with pytest.raises(ValueError, match=r"`total.load_state_dict\(...\)`: `generator=` must be given .* none there"):
        zero_order(generator=generator())(total).load_state_dict(decorated.state_dict())


@pytest.mark.parametrize(
    "position",
    [torch.zeros(3, dtype=torch.uint8), torch.zeros(5056), b"abc", 7, torch.zeros(5056, dtype=torch.uint8)],
    ids=["short", "float32", "bytes", "number", "zeros"],
)
def test_states_that_are_none_are_refused(position):
    decorated = zero_order(generator=generator())(total)
    before = decorated.state_dict()["generator"].clone()
    with pytest.raises(
        ValueError, match=r"`total.load_state_dict\(...\)`: the state must be that of a generator on cpu"
    ):
        decorated.load_state_dict({"generator": position})
    assert decorated.state_dict()["generator"].equal(before)
