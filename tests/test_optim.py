"""MeZO: the antithetic estimator's steps, in the memory of inference."""

import copy

import pytest
import torch
from torch import nn

import zograd
from problems import Directions
from zograd import NonFiniteError, ReplayError, ZeroOrderWarning, zero_order
from zograd._base.trees import Space
from zograd.distributions import Coordinate, Gaussian, Hadamard, LowRank, Orthogonal, Rademacher, Sobol, Sphere
from zograd.optim import MeZO, Records, replay

SMALL = [(3, 5), (7,), (2, 3, 4)]
LARGE = [(150, 301), (77,), (33_001,), (5, 5)]  # over 2**16 values, of odd sizes: directions come by tiles


FAMILIES = [Gaussian(), Rademacher(), Sphere(), LowRank(), Orthogonal(), Hadamard(), Sobol(), Coordinate()]


def parameters(shapes, dtype=torch.float32):
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def loss_of(params):
    return sum((k + 1) * (p.sin() * torch.linspace(0, 1, p.numel()).view(p.shape)).mean() for k, p in enumerate(params))


def trained(params, steps=1, loss=loss_of, **options):
    opt = MeZO(params, **{"lr": 0.1, "sigma": 0.01, "seed": 5, **options})
    for _ in range(steps):
        opt.step(lambda: loss(params))
    return opt


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("distribution", FAMILIES, ids=str)
@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_is_sgd_on_the_antithetic_estimate(shapes, distribution, num_samples, dtype):
    if isinstance(distribution, Sobol) and shapes is LARGE:
        pytest.skip("has no more dimensions")
    params = parameters(shapes, dtype)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    opt = trained(params, distribution=distribution, num_samples=num_samples, weight_decay=0.1)
    seed = opt.records.seeds[0]
    estimated = zero_order(
        distribution, method="antithetic", num_samples=num_samples, sigma=0.01, seed=seed, evaluator="loop"
    )(loss_of)
    estimated(twins).backward()
    torch.optim.SGD(twins, lr=0.1, weight_decay=0.1).step()
    assert all(map(torch.equal, params, twins))


def test_points_are_in_full_precision_in_a_closure_with_autocast():
    def cast(params):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(params)

    options = {"distribution": LowRank(2), "num_samples": 3}
    plain, other = (trained(parameters([(30, 40)]), loss=loss, **options) for loss in (loss_of, cast))
    assert plain.records.coefficients == other.records.coefficients


@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
def test_groups_have_settings_of_their_own(shapes):
    params = parameters(shapes)
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    groups = [{"params": params[:1], "sigma": 0.02}, {"params": [frozen, *params[1:]], "lr": 0.3}]
    opt = MeZO(groups, lr=0.1, sigma=0.01, seed=1)
    opt.step(lambda: loss_of(params))
    sigma = [0.02] + [0.01] * (len(shapes) - 1)
    f = zero_order(method="antithetic", sigma=sigma, seed=opt.records.seeds[0])(loss_of)
    f(twins).backward()
    torch.optim.SGD([{"params": twins[:1]}, {"params": twins[1:], "lr": 0.3}], lr=0.1).step()
    assert all(map(torch.equal, params, twins))
    assert torch.equal(frozen, torch.ones(4))


def test_frozen_parameters_are_evaluated_as_they_are():
    params = parameters(SMALL)
    params[1].requires_grad_(False)
    seen = []

    def loss():
        seen.append((params[1] + 0).clone())
        return loss_of(params)

    before = params[1].clone()
    MeZO(params, lr=0.1, sigma=0.1, seed=0).step(loss)
    assert all(torch.equal(x, before) for x in seen)
    assert torch.equal(params[1], before)


@pytest.mark.parametrize("shapes", [SMALL, [(300, 300), (7,)]], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_estimating_drifts_no_bit(dtype, shapes):
    params = parameters(shapes, dtype)
    before = [p.detach().clone() for p in params]
    opt = trained(
        params, steps=1000 if shapes is SMALL else 20, loss=lambda p: sum(x.float().sum() for x in p), lr=0.0, sigma=0.1
    )
    assert all(map(torch.equal, params, before))
    assert len({*opt.records.coefficients}) > 10  # and yet the points were other points


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_moved_in_full_and_rounded_once(dtype):
    params = parameters(LARGE, dtype)
    before = [p.detach().float() for p in params]
    opt = trained(params, sigma=0.1, lr=10.0, weight_decay=0.01, loss=lambda p: loss_of([x.float() for x in p]))
    space = Space.of(tuple(params))
    eps = Directions(Gaussian(), space, opt.records.seeds[0], 1).noise(0, 1)[0][0]
    c = torch.tensor(opt.records.coefficients[0])
    for p, old, noise in zip(params, before, space.split(eps), strict=True):
        gradient = (noise * c).div(0.1).add(old, alpha=0.01)
        assert torch.equal(p, old.add(gradient, alpha=-10.0).to(dtype))


class Alive(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of all memory that is made while it is entered and still lives."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                memory = t.untyped_storage()
                if memory._cdata not in self.sizes:
                    self.sizes[memory._cdata] = memory.nbytes()
                    self.now += memory.nbytes()
                    weakref.finalize(memory, self.free, memory._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, address):
        self.now -= self.sizes.pop(address, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_samples", [1, 2])
def test_beyond_the_forward_pass_there_is_room_for_one_parameter(dtype, num_samples):
    model = nn.Sequential(*(nn.Linear(500, 500) for _ in range(10))).to(dtype)
    x = torch.zeros(1, 500, dtype=dtype)
    params = list(model.parameters())
    opt = MeZO(params, lr=1e-3, sigma=0.1, num_samples=num_samples, weight_decay=0.1, seed=0)
    opt.step(lambda: model(x).float().sum())
    forward, step = Alive(), Alive()
    with torch.no_grad(), forward:
        model(x).float().sum()
    with step:
        opt.step(lambda: model(x).float().sum())
    total = sum(p.numel() * p.element_size() for p in params)
    largest = max(p.numel() * p.element_size() for p in params)
    assert largest / 2 < step.peak - forward.peak <= largest + 0.1 * total


@pytest.mark.parametrize("seed", [None, 7])
def test_a_saved_run_resumes_bit_for_bit(tmp_path, seed):
    def run(params, opt, steps):
        scheduler.last_epoch = len(opt.records)
        for _ in range(steps):
            opt.step(lambda: (params[0] * torch.rand(3, 5)).sum() + loss_of(params))
            scheduler.step()

    options = {"lr": 0.1, "sigma": 0.01, "num_samples": 2, "weight_decay": 0.01, "seed": seed}
    whole = parameters(SMALL)
    opt = MeZO(whole, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    torch.manual_seed(0)
    run(whole, opt, 10)

    half = parameters(SMALL)
    first = MeZO(half, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(first, 0.9)
    torch.manual_seed(0)
    run(half, first, 5)
    torch.save([first.state_dict(), half, scheduler.state_dict(), torch.get_rng_state()], tmp_path / "run.pt")
    state, half, schedule, stream = torch.load(tmp_path / "run.pt", weights_only=True)
    second = MeZO(half, **{**options, "seed": None if seed is None else 1})
    scheduler = torch.optim.lr_scheduler.ExponentialLR(second, 0.9)
    second.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    torch.manual_seed(99)
    torch.set_rng_state(stream)
    run(half, second, 5)
    assert all(map(torch.equal, whole, half))
    assert second.records == opt.records


@pytest.mark.parametrize("distribution", [None, Rademacher()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [SMALL, LARGE], ids=["small", "large"])
def test_records_rebuild_the_weights(tmp_path, shapes, dtype, distribution):
    params = parameters(shapes, dtype)
    base = [p.detach().clone() for p in params]
    opt = MeZO(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], 0.5, 0.1, 2, distribution=distribution, seed=3
    )
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=3, gamma=0.5)
    for step in range(6):
        params[0].requires_grad_(step != 4)  # frozen for a while
        opt.step(lambda: loss_of([p.float() for p in params]))
        scheduler.step()
    opt.records.save(tmp_path / "records.pt")
    replay(Records.load(tmp_path / "records.pt"), base, distribution)
    assert all(map(torch.equal, base, params))
    assert not torch.equal(base[0], parameters(shapes, dtype)[0])


def test_records_of_a_run_that_double_precision_joins_later():
    params = [*parameters([(5,)]), *parameters([(4,)], torch.float64)]
    first = [p.detach().clone() for p in params]
    opt = trained(params[:1])
    opt.add_param_group({"params": params[1:]})
    for _ in range(3):
        opt.step(lambda: sum(p.sin().sum() for p in params))
    replay(Records.from_state_dict(opt.records.state_dict()), first)
    assert all(map(torch.equal, params, first))


def test_a_long_run_is_a_small_file(tmp_path):
    p = [nn.Parameter(torch.zeros(1))]
    opt = MeZO(p, lr=0.1, seed=0)
    opt.step(lambda: p[0].sum())
    records = opt.records
    records.seeds *= 20_000
    records.coefficients *= 20_000
    assert (len(records), records.nbytes) == (20_000, 160_000)
    records.save(tmp_path / "records.pt")
    assert (tmp_path / "records.pt").stat().st_size < 170_000
    assert Records.load(tmp_path / "records.pt") == records


def test_the_same_stream_for_both_sides_and_torchs_own_untouched():
    p, draws = [nn.Parameter(torch.zeros(3))], []

    def loss():
        draws.append((torch.rand(2).tolist(), zograd.current_seed()))
        return p[0].sum()

    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    after = torch.rand(3)
    torch.manual_seed(0)
    MeZO(p, lr=0.1, num_samples=3).step(loss)
    assert torch.equal(torch.rand(3), after)  # one draw, for the seed
    assert draws[0] == draws[1]
    assert draws[2] == draws[3]
    assert len({str(draw) for draw in draws}) == 3


def test_it_trains_a_classifier():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    opt = MeZO(model.parameters(), lr=0.1, sigma=1e-3, num_samples=8, seed=0)
    for _ in range(300):
        loss = opt.step(lambda: nn.functional.cross_entropy(model(x), y))
    assert loss < 1.0
    assert (model(x).argmax(1) == y).float().mean() > 0.8


def test_hooks_and_zero_grad_are_torchs():
    p = [nn.Parameter(torch.zeros(3))]
    opt, seen = MeZO(p, lr=0.1, seed=0), []
    opt.register_step_post_hook(lambda *_: seen.append(1))
    opt.zero_grad()
    assert opt.step(lambda: p[0].sum()).shape == ()
    assert seen == [1]
    assert p[0].grad is None


def test_a_copy_goes_its_own_way():
    p = [nn.Parameter(torch.zeros(3))]
    opt = trained(p, loss=lambda q: q[0].sum())
    twin = copy.deepcopy(opt)
    opt.step(lambda: p[0].sum())
    assert (len(opt.records), len(twin.records)) == (2, 1)


def unchanged(error, match, closure, params=None, **options):
    params = params or [nn.Parameter(torch.ones(3))]
    before = [p.detach().clone() for p in params]
    state = torch.get_rng_state()
    opt = MeZO(params, **{"lr": 0.1, "sigma": 0.1, "seed": 0, **options})
    with pytest.raises(error, match=match):
        opt.step(closure(params) if closure else None)
    assert all(map(torch.equal, params, before))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(opt.records) == 0


def made_before(p):
    value = p[0].sum()
    return lambda: value.detach()


@pytest.mark.parametrize(
    ("error", "match", "closure"),
    [
        (TypeError, r"`MeZO.step\(closure\)` needs a closure that returns the loss, got None", None),
        (TypeError, r"`MeZO.step\(closure\)` needs a closure that returns the loss, got 3", lambda p: 3),
        (TypeError, r"the closure must return a tensor or a number, got None", lambda p: lambda: None),
        (
            NonFiniteError,
            r"values, up to .*, have differences beyond the range of torch.float32; the parameters are as before",
            lambda p: lambda: p[0].double().sum() * 1e45,
        ),
        (ValueError, r"must return one value, got the shape \(3,\)", lambda p: lambda: p[0] + 1),
        (
            NonFiniteError,
            r"returned nan in step 0 at direction 0 \(offset \+1\); the parameters are as before",
            lambda p: lambda: (p[0] * float("nan")).sum(),
        ),
        (NonFiniteError, r"returned inf in step 0", lambda p: lambda: p[0].sum() / 0),
        (RuntimeError, r"used no trained parameter", made_before),
        (RuntimeError, r"must return the loss and not differentiate it", lambda p: lambda: p[0].sum().backward()),
        (RuntimeError, r"writes to a parameter in place", lambda p: lambda: p[0].add_(1).sum()),
        (ZeroDivisionError, r"division", lambda p: lambda: 1 / 0),
    ],
)
def test_a_closure_that_fails_leaves_all_as_it_was(error, match, closure):
    unchanged(error, match, closure)


def test_directions_that_cannot_be_made_again_are_refused():
    import itertools

    count = itertools.count()
    sample = lambda shape: torch.full(shape, float(next(count)))  # noqa: E731
    unchanged(ReplayError, r"its directions cannot be made again", lambda p: lambda: p[0].sum(), distribution=sample)


def test_nothing_to_train_is_an_error():
    frozen = [nn.Parameter(torch.ones(3), requires_grad=False)]
    unchanged(ValueError, r"no parameter requires grad", lambda p: lambda: p[0].sum(), frozen)
    empty = [nn.Parameter(torch.ones(0, 3))]
    unchanged(ValueError, r"no parameter of those that require grad has a value", lambda p: lambda: p[0].sum(), empty)


@pytest.mark.parametrize("name", ["lr", "sigma", "weight_decay"])
@pytest.mark.parametrize("value", [float("nan"), -1.0])
def test_settings_are_checked_at_every_step(name, value):
    params = parameters(SMALL)
    opt = trained(params)
    before = [p.detach().clone() for p in params]
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=rf"`MeZO\({name}=...\)` must be .* finite, got {value}"):
        opt.step(lambda: loss_of(params))
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, r"`MeZO\(lr=...\)` must be at least 0 and finite, got -1.0"),
        ({"sigma": 0.0}, ValueError, r"`MeZO\(sigma=...\)` must be positive and finite, got 0.0"),
        ({"sigma": float("nan")}, ValueError, r"`MeZO\(sigma=...\)` must be positive and finite, got nan"),
        ({"weight_decay": float("inf")}, ValueError, r"`MeZO\(weight_decay=...\)` must be at least 0"),
        ({"num_samples": 0}, ValueError, r"`MeZO\(num_samples=...\)` must be at least 1, got 0"),
        ({"num_samples": 1.5}, TypeError, r"`MeZO\(num_samples=...\)` must be an int, got float 1.5"),
        ({"seed": -1}, ValueError, r"`MeZO\(seed=...\)` must lie in \[0, 2\*\*63\), got -1"),
        ({"seed": 1.5}, TypeError, r"`MeZO\(seed=...\)` must be an int or None, got float 1.5"),
        ({"seed": True}, TypeError, r"`MeZO\(seed=...\)` must be an int or None, got bool True"),
        ({"generator": 3}, TypeError, r"`MeZO\(generator=...\)` must be a torch.Generator or None, got int 3"),
        ({"lr": "fast"}, TypeError, r"`MeZO\(lr=...\)` must be a number, got str 'fast'"),
        ({"lr": None}, TypeError, r"`MeZO\(lr=...\)` must be a number, got NoneType None"),
        ({"sigma": torch.ones(2)}, TypeError, r"`MeZO\(sigma=...\)` must be a number, got Tensor"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, r"must not have both"),
        ({"distribution": 3}, TypeError, r"`MeZO\(distribution=...\)` must be a zograd or torch distribution"),
    ],
)
def test_bad_settings(options, error, match):
    with pytest.raises(error, match=match):
        MeZO([nn.Parameter(torch.ones(3))], **{"lr": 0.1, **options})


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([torch.ones(2, 2).to_sparse()], TypeError, r"must be dense and real, got a sparse tensor"),
        ([torch.ones(2, dtype=torch.complex64)], TypeError, r"must be dense and real, got a complex tensor"),
        ([torch.ones(2, dtype=torch.int64)], TypeError, r"must be dense and real, got a tensor of torch.int64"),
        ([torch.ones(2), torch.ones(2, device="meta")], TypeError, r"got a meta tensor"),
        ([torch.ones(1, 2).expand(3, 2)], ValueError, r"its own memory to be written to, got an expanded .* \(3, 2\)"),
        ([], ValueError, r"empty parameter list"),
    ],
)
def test_bad_parameters(params, error, match):
    with pytest.raises(error, match=match):
        MeZO(params, lr=0.1)


def test_a_refused_group_is_not_added():
    opt = MeZO([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"`MeZO\(sigma=...\)` must be positive"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))], "sigma": -1.0})
    assert len(opt.param_groups) == 1


def test_replay_checks_the_weights_and_the_distribution():
    opt = trained(parameters(SMALL))
    with pytest.raises(
        ValueError, match=r"`replay\(records, params\)`: the run had parameters of shapes .* got \[\(2,\)\]"
    ):
        replay(opt.records, [torch.zeros(2)])
    wider = [p.detach().double() for p in parameters(SMALL)]
    with pytest.raises(ValueError, match=r"none of the run's parameters were of float64, got \[torch.float64, "):
        replay(opt.records, wider)
    with pytest.raises(
        ValueError, match=r"`replay\(distribution=...\)` must be the run's, Gaussian\(\), got Rademacher"
    ):
        replay(opt.records, parameters(SMALL), Rademacher())
    other = MeZO(parameters(SMALL), lr=0.1, num_samples=2)
    with pytest.raises(ValueError, match=r"`num_samples` must be the saved run's, 1, got 2"):
        other.load_state_dict(opt.state_dict())


def test_a_sigma_below_the_resolution_is_warned_of_once():
    p = [nn.Parameter(torch.full((4,), 100.0, dtype=torch.bfloat16))]
    opt = MeZO(p, lr=0.0, sigma=1e-3)
    with pytest.warns(
        ZeroOrderWarning, match=r"`MeZO\(sigma=...\)` is 0\.001, below the resolution of torch\.bfloat16"
    ):
        opt.step(lambda: p[0].float().sum())
    opt.step(lambda: p[0].float().sum())


class TwoHeads(nn.Module):
    """The second head is not used, and the branch is by some points."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(3, 2), nn.Parameter(torch.ones(())), nn.Linear(3, 2)

    def forward(self, x):
        out = self.a(x).square().mean()
        return out + self.b if out > 0.3 else out


@pytest.mark.parametrize("distribution", [None, zograd.distributions.Sphere()], ids=["tiled", "whole"])
def test_what_the_closure_does_not_use_is_left_alone(distribution):
    net, x = TwoHeads(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    first = [p.detach().clone() for p in net.parameters()]
    optimizer = zograd.optim.MeZO(
        net.named_parameters(), lr=0.1, sigma=0.1, weight_decay=0.1, num_samples=3, distribution=distribution, seed=0
    )
    for _ in range(3):
        with pytest.warns(zograd.ZeroOrderWarning, match=r"used . of the parameters at no point, .*head\.weight, head"):
            optimizer.step(lambda: net(x))
    assert torch.equal(net.head.weight, first[-2])
    assert torch.equal(net.head.bias, first[-1])
    assert not torch.equal(net.a.weight, first[1])
    records = zograd.optim.Records.from_state_dict(optimizer.records.state_dict())
    zograd.replay(records, first, distribution)
    assert all(map(torch.equal, first, net.parameters()))


def test_a_family_that_mixes_entries_moves_what_is_not_used_and_says_so():
    x = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    guided = zograd.distributions.Guided(torch.eye(4)[:, :2])
    optimizer = zograd.optim.MeZO(x, lr=0.1, distribution=guided, seed=0)
    with pytest.warns(zograd.ZeroOrderWarning, match=r"1 of shape \(2,\): Guided.* moves them all the same"):
        optimizer.step(lambda: (x[0] - 1).square().sum())
    assert x[1].abs().sum() > 0
