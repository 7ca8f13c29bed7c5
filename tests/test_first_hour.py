"""What one wants in the first hour, each as one would first write it.

The wishes are those that users of other zeroth-order and evolution-strategies packages ask for.
"""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import zograd
from zograd import zero_order


def simulate(angle, speed, steps=60):
    """A ball that is thrown and bounces off the floor: plain numpy, with branches."""
    x, y, vx, vy = 0.0, 1.0, speed * np.cos(angle), speed * np.sin(angle)
    for _ in range(steps):
        x, y, vy = x + 0.05 * vx, y + 0.05 * vy, vy - 0.5
        if y < 0:
            y, vy = -y, -0.7 * vy
    return np.array([x, y])


def test_a_numpy_simulator_and_adam():
    """My simulator is numpy code; I want to fit its inputs with Adam."""

    @zero_order(method="antithetic", num_samples=8, sigma=0.05)
    def distance(throw):
        angle, speed = throw.numpy()
        return abs(simulate(angle, speed)[0] - 12.0)

    throw = torch.tensor([0.3, 2.0], requires_grad=True)
    optimizer = torch.optim.Adam([throw], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = distance(throw)
        loss.backward()
        optimizer.step()
    assert loss < 0.5


def test_all_directions_in_one_call():
    """A thousand queries take forever one by one; my function is torch, so batch them for me."""
    calls = []

    @zero_order(method="antithetic", num_samples=1000, sigma=0.1, evaluator="vmap")
    def steps(x):
        calls.append(x)
        return torch.sign(x - 0.1).sum()

    x = torch.zeros(20, requires_grad=True)
    steps(x).backward()
    assert (x.grad > 0).all()
    assert len(calls) < 10


def test_bounded_memory():
    """More directions than fit in memory at once."""

    @zero_order(
        method="antithetic", num_samples=300, sigma=0.1, seed=0, evaluator=zograd.evaluators.Vmap(chunk_size=16)
    )
    def loss(x):
        return (x.round() ** 2).sum()

    assert loss.estimate(torch.full((30,), 1.5)).grad.mean() > 0


def test_a_metric_as_the_loss():
    """Train on the error rate itself, not on a surrogate."""

    class ErrorRate(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x, label):
            return (self.linear(x).argmax(dim=1) != label).float().mean()

    torch.manual_seed(0)
    label = torch.randint(3, (200,))
    x = torch.tensor([[3.0, 0.0], [-2.0, 2.0], [0.0, -3.0]])[label] + 0.5 * torch.randn(200, 2)
    net = zograd.nn.ZeroOrder(ErrorRate(), method="antithetic", num_samples=32, sigma=0.1, evaluator="vmap")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        net(x, label).backward()
        optimizer.step()
    with torch.no_grad():
        assert net(x, label) < 0.05


def test_a_class_with_its_own_noise():
    """The class that the TorchOpt page shows, with my distribution in it."""

    class Net(zograd.nn.ZeroOrderGradientModule, method="antithetic", num_samples=50, sigma=0.1):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x, y):
            return (torch.sign(self.linear(x).squeeze(1)) - y).abs().mean()

        def sample(self, sample_shape=torch.Size()):
            return torch.randn(sample_shape)

    net = Net()
    x = torch.randn(64, 4)
    grads = torch.autograd.grad(net(x, torch.sign(x[:, 0])), net.parameters())
    assert grads[0].shape == (1, 4)
    assert grads[0][0, 0] < 0


def test_tied_weights():
    """My embedding and my output layer share a weight; its gradient must count both uses."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return nn.functional.cross_entropy(self.out(self.embed(tokens)), tokens.roll(1))

    model, tokens = Tied().double(), torch.tensor([0, 3, 1, 4, 2, 2])
    (truth,) = torch.autograd.grad(model(tokens), model.parameters())
    net = zograd.nn.ZeroOrder(model, method="antithetic", num_samples=4000, sigma=0.001, evaluator="vmap")
    (grad,) = torch.autograd.grad(net(tokens), net.parameters())
    assert torch.cosine_similarity(grad.flatten(), truth.flatten(), dim=0) > 0.99
    assert grad.norm() / truth.norm() == pytest.approx(1, abs=0.1)


def test_frozen_layers():
    """Freeze the backbone; perturb and train the head only."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())

    class Loss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x, y):
            assert torch.equal(self.model[0].weight, before["weight"])
            return (self.model(x) - y).abs().mean()

    net = zograd.nn.ZeroOrder(Loss(model), method="antithetic", num_samples=8, sigma=0.01)
    net(torch.randn(10, 6), torch.ones(10)).backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad.any()


def test_batch_norm_is_updated_once():
    """My batch norm statistics must not be updated once for every perturbation."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Flatten(0))

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).sign().mean()

    zograd.nn.ZeroOrder(Loss(), num_samples=20, sigma=0.1)(torch.randn(8, 3)).backward()
    assert model[1].num_batches_tracked == 1


def test_a_learning_rate_through_a_training_loop():
    """Tune a learning rate by the loss after training: the whole inner loop, optimizer and all, is my function."""
    torch.manual_seed(0)
    x = torch.randn(50, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])

    @zero_order(method="antithetic", num_samples=4, sigma=0.1)
    def after_training(log_rate):
        model = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=log_rate.exp().item())
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x).squeeze(1), y).backward()
            optimizer.step()
        return nn.functional.mse_loss(model(x).squeeze(1), y)

    log_rate = torch.tensor([-4.0], requires_grad=True)
    first = after_training(log_rate).item()
    outer = torch.optim.Adam([log_rate], lr=0.2)
    for _ in range(10):
        outer.zero_grad()
        after_training(log_rate).backward()
        outer.step()
    assert after_training(log_rate) < first / 3


def test_a_scalar_hyperparameter():
    """My parameter is one number."""

    @zero_order(method="antithetic", num_samples=10, sigma=0.1)
    def loss(rate):
        return (rate - 2.0) ** 2

    rate = torch.tensor(5.0, requires_grad=True)
    loss(rate).backward()
    assert rate.grad > 0
    assert rate.grad.shape == ()


def test_a_black_box_in_the_middle_of_a_network():
    """A layer of my network is a simulator; the layers before and after it are ordinary and all should train."""

    @zero_order(method="antithetic", num_samples=4, sigma=0.5, batch_dim=0)
    def sensors(x):
        return torch.sign(x)

    assert zograd.check_slices(sensors, torch.randn(6, 8))
    torch.manual_seed(0)
    x = torch.randn(256, 4)
    label = ((x[:, 0] * x[:, 1]) > 0).long()
    before, after = nn.Linear(4, 16), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*before.parameters(), *after.parameters()], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(after(sensors(before(x))), label)
        loss.backward()
        optimizer.step()
    assert before.weight.grad.any()
    assert loss < 0.4


def test_it_composes_with_ordinary_losses():
    """Add a regularizer that autograd knows to a score that it does not."""

    @zero_order(method="antithetic", num_samples=200, sigma=0.1)
    def score(x):
        return float((x.detach() > 0).sum())

    x = torch.full((3,), 0.5, requires_grad=True)
    (3 * (score(x * 2) + 0.0) - x.pow(2).sum() * 10).backward()
    assert (x.grad < 0).all()


def test_keyword_arguments():
    """Pass data and flags by keyword, and a dict of parameters."""

    @zero_order(method="antithetic", num_samples=20, sigma=0.1)
    def loss(params, data, *, train=True, scale=1.0):
        assert not train
        return scale * (data @ params["w"] + params["b"]).round().abs().mean()

    params = {"w": torch.ones(3, requires_grad=True), "b": torch.zeros(1, requires_grad=True)}
    loss(params, data=torch.randn(30, 3), train=False, scale=2.0).backward()
    assert params["w"].grad.any()
    loss(params=params, data=torch.randn(30, 3), train=False).backward()


def test_functional_transforms():
    """torch.func.grad and vmap, as over any function."""

    @zero_order(method="antithetic", num_samples=100, sigma=0.1, seed=0)
    def loss(w, x):
        return (w * x).sum().round()

    w, batch = torch.ones(2), torch.randn(5, 2)
    assert torch.func.grad(loss)(w, batch[0]).shape == (2,)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(w, batch)
    assert per_sample.shape == (5, 2)
    assert (per_sample * batch).sum() > 0


def test_residuals():
    """My simulator returns a vector of residuals, and I want the Jacobian or any cotangent."""

    @zero_order(method="antithetic", num_samples=2000, sigma=0.01, seed=0)
    def residuals(throw):
        return simulate(*throw.double().numpy(), steps=5) - np.array([12.0, 0.0])

    throw = torch.tensor([0.3, 2.0], dtype=torch.float64)
    jacobian = torch.func.jacrev(residuals)(throw)
    truth = torch.tensor([[-0.25 * 2 * np.sin(0.3), 0.25 * np.cos(0.3)], [0.25 * 2 * np.cos(0.3), 0.25 * np.sin(0.3)]])
    torch.testing.assert_close(jacobian, truth, atol=0.05, rtol=0)
    loss = residuals(throw.requires_grad_()).pow(2).mean()
    loss.backward()
    assert throw.grad.shape == (2,)


def test_the_same_seed_gives_the_same_run():
    """Seed torch and get the same training run again."""

    @zero_order(num_samples=10, sigma=0.1)
    def loss(x):
        return x.round().pow(2).sum()

    def run():
        torch.manual_seed(7)
        x = torch.full((4,), 3.0, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            loss(x).backward()
            optimizer.step()
        return x

    assert torch.equal(run(), run())


def test_a_line_search():
    """An optimizer that calls the closure several times needs the same directions each time."""

    @zero_order(method="antithetic", num_samples=30, sigma=0.01, seed=0)
    def loss(x):
        return float(((x - torch.tensor([1.0, -2.0, 3.0])) ** 2).sum())

    x = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([x], max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(x)
        value.backward()
        return value

    optimizer.step(closure)
    assert loss.estimate(x.detach()).value < 1e-3


def test_the_same_luck_on_both_sides():
    """My environment is random; compare both sides of a pair under the same random numbers."""

    @zero_order(method="antithetic", num_samples=20, sigma=0.1, seed=0)
    def reward(policy):
        luck = random.Random(zograd.current_seed())
        return policy.sum() + luck.gauss(0, 1000)

    estimate = reward.estimate(torch.zeros(3))
    assert (estimate.grad.abs() < 5).all()


def test_is_my_gradient_right():
    """Is my gradient right? Compare with autograd where there is one."""

    def smooth(x):
        return (x.sin() * torch.arange(1.0, 11.0)).sum()

    x = torch.linspace(-1, 1, 10)
    truth = torch.func.grad(smooth)(x)
    estimate = zero_order(method="antithetic", num_samples=5000, sigma=0.01, evaluator="vmap")(smooth).estimate(x)
    assert torch.cosine_similarity(estimate.grad, truth, dim=0) > 0.99
    assert estimate.grad.norm() / truth.norm() == pytest.approx(1, abs=0.05)


def test_how_many_queries():
    """How many times was my function called?"""
    estimate = zero_order(method="antithetic", num_samples=50)(lambda x: x.sum()).estimate(torch.zeros(3))
    assert estimate.evaluations == 101


def test_a_failed_simulation_does_not_pass_unseen():
    """One of my simulations returns nan; do not let it poison the weights."""

    @zero_order(num_samples=20, sigma=1.0, seed=0)
    def loss(x):
        return torch.log(x).sum()

    x = torch.full((3,), 1.0, requires_grad=True)
    with pytest.raises(zograd.NonFiniteError, match=r"non-finite values at .* direction"):
        loss(x).backward()
    assert x.grad is None


def test_half_precision_weights():
    """My model is in bfloat16; its weights must be the same bits after a step's estimates."""
    model = nn.Linear(8, 1).bfloat16()
    before = copy.deepcopy(model.state_dict())

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).float().abs().mean()

    zograd.nn.ZeroOrder(Loss(), method="antithetic", num_samples=10, sigma=0.1)(torch.randn(4, 8).bfloat16()).backward()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.weight.grad.dtype == torch.bfloat16
    assert model.weight.grad.any()


def test_less_variance_from_a_baseline():
    """The naive estimate drowns in the size of my reward; subtract a baseline."""

    def reward(x):
        return 1000.0 + x.sum()

    x = torch.zeros(10)
    plain = zero_order(num_samples=200, sigma=0.1, seed=0)(reward).estimate(x).grad
    centered = (
        zero_order(num_samples=200, sigma=0.1, seed=0, shaping=zograd.shaping.leave_one_out)(reward).estimate(x).grad
    )
    assert (centered - 1).norm() < (plain - 1).norm() / 100


def test_my_torchopt_code():
    """Keep my TorchOpt code and change the import."""
    import zograd.compat.torchopt as torchopt

    distribution = torch.distributions.Normal(loc=0, scale=1)

    @torchopt.diff.zero_order(distribution=distribution, method="naive", argnums=0, num_samples=100, sigma=0.01)
    def forward(params, data):
        return (data @ params).abs().mean()

    params = torch.ones(3, requires_grad=True)
    loss = forward(params, torch.randn(10, 3))
    (grad,) = torch.autograd.grad(loss, params)
    assert grad.shape == (3,)


# ---------------------------------------------------------------------------------------- what came later


def slow(x):
    """At the top of a module, so that other processes find it."""
    return float((x.round() ** 2).sum())


def test_all_my_cores():
    """An evaluation takes seconds; use all my cores."""
    x = torch.full((3,), 1.2)
    settings = {"method": "antithetic", "num_samples": 8, "sigma": 0.5, "seed": 0}
    alone = zero_order(**settings)(slow).estimate(x)
    with zograd.evaluators.Pool(workers=2) as pool:
        together = zero_order(**settings, evaluator=pool)(slow).estimate(x)
    assert torch.equal(alone.grad, together.grad)


def test_retry_a_crashed_simulation():
    """My license server hiccups; try again before giving up."""
    calls = []

    @zero_order(num_samples=8, failures=zograd.failures.Retry(3))
    def loss(x):
        calls.append(x)
        if len(calls) % 4 == 0:
            raise ConnectionError("try again")
        return x.sum()

    assert torch.isfinite(loss.estimate(torch.ones(2)).grad).all()


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")  # which tells how many, too
def test_drop_a_crashed_simulation():
    """A few of my simulations do not converge; leave those directions out, and tell me how many."""

    @zero_order(method="antithetic", num_samples=50, sigma=1.0, seed=0, failures=zograd.failures.Drop())
    def loss(x):
        return torch.log(x + 1.5).sum()

    estimate = loss.estimate(torch.zeros(2))
    assert torch.isfinite(estimate.grad).all()
    assert estimate.failures > 0


def test_a_budget_of_queries():
    """I pay per query: stop before the budget is passed."""

    @zero_order(num_samples=10)
    def loss(x):
        return x.sum()

    x = torch.ones(2, requires_grad=True)
    with zograd.Tracker(budget=25) as tracker:
        loss(x).backward()
        loss(x).backward()
        with pytest.raises(zograd.BudgetExceeded, match="25"):
            loss(x)
    assert tracker.evaluations <= 25


def test_resume_after_a_crash(tmp_path):
    """The cluster killed my job in the middle of a gradient; go on where it stopped."""
    calls = []

    def loss(x):
        calls.append(x)
        if len(calls) == 6:
            raise KeyboardInterrupt("stop")
        return x.sum()

    journal = zograd.evaluators.Journal("loop", tmp_path / "run.journal")
    journaled = zero_order(num_samples=10, seed=0, evaluator=journal)(loss)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        journaled.estimate(torch.ones(2))
    journaled.estimate(torch.ones(2))
    assert len(calls) == 12


def test_how_sure_is_the_gradient():
    """How noisy is my gradient, and how many samples do I need?"""
    estimate = zero_order(method="antithetic", num_samples=100, seed=0)(lambda x: x.sum()).estimate(torch.ones(5))
    assert estimate.standard_error().shape == (5,)
    assert estimate.snr() > 1
    assert 10 < estimate.samples_needed(cosine=0.9) < 100


def test_is_my_setup_right():
    """Check my function, sigma and distribution before I spend a week on them."""
    report = zograd.diagnostics.check(zero_order(num_samples=10)(lambda x: x.sum()), torch.ones(5))
    assert report


def test_plain_finite_differences():
    """Plain finite differences, one coordinate at a time, batched."""
    decorated = zero_order(
        zograd.distributions.Coordinate(), "antithetic", num_samples=4, sigma=1e-3, evaluator="vmap"
    )(lambda x: (x**2).sum())
    x = torch.tensor([1.0, -2.0, 3.0, 0.5])
    torch.testing.assert_close(decorated.estimate(x).grad, 2 * x, atol=1e-2, rtol=0)


def test_orthogonal_directions():
    """Orthogonal directions, so that d of them span the space."""
    family = zograd.distributions.Orthogonal(lengths="sqrt_d")  # of Gaussian lengths they would not weigh alike
    decorated = zero_order(family, "antithetic", num_samples=4, sigma=0.1)(lambda x: x.sum())
    torch.testing.assert_close(decorated.estimate(torch.zeros(4)).grad, torch.ones(4))


def test_ranks_as_in_evolution_strategies():
    """Rank-shape the returns, as OpenAI's evolution strategies do."""
    decorated = zero_order(method="antithetic", num_samples=32, shaping=zograd.shaping.centered_ranks)(
        lambda x: x.sum().exp()
    )
    assert (decorated.estimate(torch.zeros(3)).grad.sum()) > 0


def test_low_rank_directions():
    """Perturb big layers by low-rank noise that shares the base product."""
    net = zograd.nn.ZeroOrder(
        nn.Sequential(nn.Linear(32, 32), nn.Flatten(0)),
        zograd.distributions.LowRank(rank=1),
        num_samples=8,
        evaluator="vmap",
    )
    assert net.zero_order_options.distribution == zograd.distributions.LowRank(rank=1)


def test_fine_tune_in_the_memory_of_inference():
    """Fine-tune a model that only just fits: in place, no gradient stored."""
    model = nn.Linear(4, 1)
    x, y = torch.randn(32, 4), torch.ones(32, 1)
    optimizer = zograd.optim.MeZO(model.parameters(), lr=1e-2, sigma=1e-3)
    first = nn.functional.mse_loss(model(x), y)
    for _ in range(50):
        optimizer.step(lambda: nn.functional.mse_loss(model(x), y))
    assert nn.functional.mse_loss(model(x), y) < first


def test_hessian_vector_products():
    """A Hessian-vector product from the evaluations I have paid for."""

    @zero_order(method="antithetic", num_samples=20000, sigma=0.1, evaluator="vmap")
    def loss(x):
        return (x**2 * torch.tensor([1.0, 2.0])).sum()

    x = torch.tensor([0.5, -0.5], requires_grad=True)
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (product,) = torch.autograd.grad(grad @ torch.tensor([1.0, 1.0]), x)
    torch.testing.assert_close(product, torch.tensor([2.0, 4.0]), atol=0.5, rtol=0)


def test_long_unrolls():
    """My inner loop has thousands of steps: update every few, without bias."""

    def window(params, state):  # ten steps
        loss = 0.0
        for _ in range(10):
            state = state + params
            loss = loss + state.sum()
        return loss, state

    estimator = zograd.unrolled.PES(window, sigma=0.1)
    params = torch.zeros(2, requires_grad=True)
    state = estimator.init(params, torch.zeros(2))
    for _ in range(3):
        loss, state = estimator(params, state)
        loss.backward()
    assert params.grad.any()


def test_a_cheap_model_of_my_simulator():
    """I have a differentiable approximation of my simulator: use it to cut the noise, not the truth."""
    decorated = zero_order(method="antithetic", num_samples=50, surrogate=lambda x: (x**2).sum())(
        lambda x: (x**2).sum() + 0.01 * x.round().sum()
    )
    assert torch.isfinite(decorated.estimate(torch.ones(5)).grad).all()


# ------------------------------------------------------------------ strangers' tasks, from the documentation alone


class Cart:
    """In the form of a gymnasium environment: a cart is to be kept at the origin of a track; it starts anywhere."""

    def reset(self, *, seed=None, options=None):
        self.x, self.v, self.left = np.random.default_rng(seed).uniform(-1, 1), 0.0, 30
        return np.array([self.x, self.v]), {}

    def step(self, action):
        self.v += 0.3 * (1 if action == 1 else -1)
        self.x, self.left = self.x + 0.1 * self.v, self.left - 1
        return np.array([self.x, self.v]), -abs(self.x), False, self.left == 0, {}


def test_stranger_a_policy_of_discrete_actions():
    """RL researcher: my policy is a network, I maximize the return, and I want ranks as everyone has them."""
    torch.manual_seed(0)
    policy, env = nn.Linear(2, 2), Cart()

    @zero_order(method="antithetic", num_samples=16, sigma=0.3, shaping=zograd.shaping.centered_ranks)
    def episode_return(params, env):
        observation, _ = env.reset(seed=zograd.current_seed())
        total, done = 0.0, False
        while not done:
            logits = torch.func.functional_call(policy, params, (torch.as_tensor(observation, dtype=torch.float32),))
            observation, reward, terminated, truncated, _ = env.step(int(logits.argmax()))
            total, done = total + reward, terminated or truncated
        return total

    def score():
        with torch.no_grad():
            return np.mean([float(episode_return(dict(policy.named_parameters()), env)) for _ in range(20)])

    nn.init.zeros_(policy.weight)
    before = score()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1, maximize=True)
    for _ in range(15):
        optimizer.zero_grad()
        episode_return(dict(policy.named_parameters()), env).backward()
        optimizer.step()
    assert score() > before / 2  # both are negative


def test_stranger_a_slow_simulator_on_all_cores():
    """Engineer: all cores, a time limit, a retry for the license server. I guess the short spellings first."""
    with pytest.raises(ValueError, match=r"such as `zograd.evaluators.Pool\(workers=4\)`, got 'pool'"):
        zero_order(evaluator="pool")
    with pytest.raises(TypeError, match=r"For that many processes write `Pool\(workers=4\)`"):
        zograd.evaluators.Pool(4)
    with zograd.evaluators.Pool(workers=2, timeout=60) as pool, zograd.Tracker(budget=100) as tracker:
        cost = zero_order(
            method="forward", num_samples=10, sigma=0.5, evaluator=pool, failures=zograd.failures.Retry(3)
        )(slow)
        x = torch.full((3,), 1.2, requires_grad=True)
        cost(x).backward()
    assert x.grad.shape == (3,)
    assert tracker.evaluations == 11


def test_stranger_fine_tuning_by_forward_passes():
    """Fine-tuner: a frozen body, a head, a scheduler; my habit is `loss.backward(); optimizer.step()`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    body, x = copy.deepcopy(model[0].state_dict()), torch.randn(64, 4)
    y = (x[:, 0] > 0).long()
    optimizer = zograd.optim.MeZO(model.parameters(), lr=0.3, sigma=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    with pytest.raises(TypeError, match=r"needs a closure that returns the loss.*write `opt.step\(lambda:"):
        optimizer.step()
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(float(optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))))
        schedule.step()
    assert np.mean(losses[-10:]) < 0.75 * losses[0]
    assert all(torch.equal(body[k], v) for k, v in model[0].state_dict().items())


class Quantize(nn.Module):
    def forward(self, x):
        return (4 * x).round() / 4


def test_stranger_a_quantizer_as_a_layer():
    """Network builder: my layer has no parameters; I wrap it, then I decorate it, and then do what the errors say."""
    x = torch.randn(16, 3)
    with pytest.raises(
        RuntimeError, match=r"no parameters\..*`zero_order\(...\)\(lambda x: module\(x\)\)`, with `batch_dim=0`"
    ):
        zograd.nn.ZeroOrder(Quantize())(x)
    with pytest.raises(TypeError, match=r"or decorate `lambda x: module\(x\)` for the gradient of its input"):
        zero_order(batch_dim=0)(Quantize())
    module = Quantize()
    layer = zero_order(method="antithetic", num_samples=8, sigma=0.3, batch_dim=0)(lambda x: module(x))
    before, after = nn.Linear(3, 5), nn.Linear(5, 1)
    after(layer(before(x))).pow(2).mean().backward()
    assert before.weight.grad.any()
    assert after.weight.grad.any()


def test_stranger_a_module_does_not_swallow_its_inputs_gradient():
    """Network builder again: my wrapped objective also gets an activation that should train; it must say no."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return (self.scale * x).round().sum()

    net, x = zograd.nn.ZeroOrder(Loss()), torch.ones(3, requires_grad=True)
    with pytest.warns(zograd.ZeroOrderWarning, match=r"Parameters alone do: detach it, or decorate a function of it"):
        net(x).backward()


def test_stranger_one_gradient_to_ten_digits():
    """Numerical analyst: central differences against the formula, gradcheck, and a step too small for float32."""

    def fn(x):
        return (x.sin() * x.exp()).sum()

    x = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
    central = zero_order(zograd.distributions.Coordinate(), "antithetic", num_samples=None, sigma=1e-5)(fn)
    torch.testing.assert_close(central.estimate(x).grad, torch.func.grad(fn)(x), rtol=1e-8, atol=1e-9)
    assert torch.autograd.gradcheck(central, x)
    with pytest.raises(ValueError, match=r"such as 'forward' or 'antithetic'"):
        zero_order(zograd.distributions.Coordinate(), num_samples=None, sigma=1e-5)
    with pytest.warns(zograd.ZeroOrderWarning, match=r"below the resolution of torch\.float32.*float64 parameters"):
        central.replace(sigma=1e-10).estimate(x.detach().float() + 2)


def test_stranger_torchopt_with_its_own_import_lines():
    """TorchOpt user: I put `zograd.compat.` before each `torchopt` and nothing else."""
    import zograd.compat.torchopt as torchopt
    from zograd.compat.torchopt.diff.zero_order import zero_order as decorator
    from zograd.compat.torchopt.nn import ZeroOrderGradientModule

    class Net(ZeroOrderGradientModule, method="forward", num_samples=200, sigma=0.1):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 1)

        def forward(self, x):
            return self.fc(x).sum()

        def sample(self, sample_shape=torch.Size()):
            return torch.randn(sample_shape)

    torch.manual_seed(0)
    net = Net()
    grads = torch.autograd.grad(net(torch.ones(3, 2)), net.parameters())
    assert torch.cosine_similarity(torch.cat([g.flatten() for g in grads]), torch.ones(3), dim=0) > 0.9
    for decorate in (decorator, torchopt.diff.zero_order):
        loss = decorate(lambda shape: torch.randn(shape), method="antithetic", num_samples=2, sigma=0.1)(torch.sum)
        loss(torch.ones(2, requires_grad=True)).backward()


def test_stranger_f1_as_the_loss():
    """Metric user: sklearn's F1; I hand the decorator my model, then its parameters, before I find the module."""
    from sklearn.metrics import f1_score

    def loss(model, x, label):
        return 1 - f1_score(label.numpy(), model(x).argmax(dim=1).numpy(), average="macro")

    torch.manual_seed(0)
    label = torch.randint(2, (100,))
    x, model = torch.randn(100, 3) + 2 * label[:, None], nn.Linear(3, 2)
    decorated = zero_order(method="antithetic", num_samples=16, sigma=0.3)(loss)
    with pytest.raises(
        ValueError, match=r"got Linear: use `zograd.nn.ZeroOrder\(module, ...\)`, or pass its parameters"
    ):
        decorated(model, x, label)
    with pytest.raises(ValueError, match=r"got generator: pass `list\(...\)` of it"):
        decorated(model.parameters(), x, label)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, label):
            return loss(self.model, x, label)

    net = zograd.nn.ZeroOrder(Loss(), method="antithetic", num_samples=16, sigma=0.3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        net(x, label).backward()
        optimizer.step()
    assert loss(model, x, label) < 0.1


def test_stranger_a_noisy_function_in_numpy():
    """Noisy function: numpy arrays in and out, and noise as large as the signal; as many samples as it takes."""

    @zero_order(method="antithetic", num_samples=zograd.Until(snr=3, at_most=2000), sigma=0.5, seed=0)
    def measure(x):
        luck = np.random.default_rng(zograd.current_seed())
        return float(((np.asarray(x) - 1) ** 2).sum() + luck.normal(0, 5))

    with pytest.raises(ValueError, match=r"got ndarray: pass `torch.tensor\(...\)` of it"):
        measure(np.zeros(3))
    estimate = measure.estimate(torch.zeros(3))
    assert (estimate.grad < 0).all()
    assert estimate.evaluations < 500
    report = zograd.check(measure, torch.zeros(3), budget=500)
    assert report.calls.deterministic is False
    assert (
        report.suggestion.method == "antithetic"
    )  # the noise of both sides is one; the forward difference needs 1000 N


def test_stranger_error_bars():
    """Error bars: each entry as value and deviation, of a function and of a module, and the N for a tenth of it.

    A deviation of 4 fails one entry of a right estimate in 16,000, and the seed is fixed.
    """
    x = torch.linspace(0.5, 1.5, 4)
    fn = zero_order(method="antithetic", num_samples=400, sigma=0.05, seed=0)(lambda x: (x**2).sum())
    estimate = fn.estimate(x)
    error = estimate.standard_error()
    assert ((estimate.grad - 2 * x).abs() < 4 * error).all()
    tenth = fn.replace(num_samples=40_000, evaluator="vmap").estimate(x).standard_error()
    torch.testing.assert_close(tenth, error / 10, rtol=0.2, atol=0)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(x.clone())

        def forward(self):
            return (self.w**2).sum()

    net = zograd.nn.ZeroOrder(Loss(), method="antithetic", num_samples=50, seed=0)
    bars = net.estimate().standard_error()
    assert {name: e.shape for name, e in bars.items()} == {"module.w": (4,)}


def test_stranger_resume_after_a_kill(tmp_path):
    """Resume: a journal and a checkpoint of all that has a `state_dict`; then the same program again."""
    calls = []

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self):
            calls.append(1)
            if len(calls) == dies_at:
                raise KeyboardInterrupt("killed")
            return (self.w - 1).square().sum()

    def program(folder):
        journal = zograd.evaluators.Journal("loop", folder / "run.journal")
        generator = torch.Generator().manual_seed(0)
        net = zograd.nn.ZeroOrder(Loss(), method="antithetic", num_samples=4, evaluator=journal, generator=generator)
        optimizer, first = torch.optim.Adam(net.parameters(), lr=0.1), 0
        if (folder / "checkpoint.pt").exists():
            saved = torch.load(folder / "checkpoint.pt", weights_only=True)
            net.load_state_dict(saved["net"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"]
        for step in range(first, 6):
            saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(saved, folder / "checkpoint.pt")
            optimizer.zero_grad()
            net().backward()
            optimizer.step()
        return net.module.w.detach()

    dies_at = None
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    wanted = program(tmp_path / "whole")
    total = len(calls)
    calls.clear()
    dies_at = 25
    with pytest.raises(KeyboardInterrupt, match="killed"):
        program(tmp_path / "killed")
    assert torch.equal(program(tmp_path / "killed"), wanted)
    assert len(calls) <= total + 2  # what was under way, and the center of the step it was in
