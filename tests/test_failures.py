"""What a failed evaluation means: it raises by name, is tried again at the same point, or its direction goes."""

import math
import re

import pytest
import torch

import zograd
from zograd import zero_order
from zograd.evaluators import Batched, Journal, Vmap
from zograd.failures import Drop, Retry

X = torch.tensor([0.4, -0.3, 0.1])
SETTINGS = {"method": "antithetic", "num_samples": 40, "sigma": 0.5, "seed": 1}


def cubes(x):
    return (x**3).sum(dim=-1)


class Fails:
    """Fails in a given way at calls of given numbers, counted from 1; batched, the first set of that call fails."""

    def __init__(self, at, how="raise"):
        self.at, self.how, self.calls, self.points = set(at), how, 0, []

    def __call__(self, x):
        self.calls += 1
        self.points.append(x.clone())
        if self.calls not in self.at:
            return cubes(x)
        out = cubes(x).clone()
        x.view(-1, 3)[0] = 9.0  # a simulator that fails may have written to its input
        if self.how == "raise":
            raise ConnectionError("busy")
        out.view(-1)[0] = {"nan": math.nan, "inf": math.inf}[self.how]
        return out


def estimate(fn, **settings):
    return zero_order(**{**SETTINGS, **settings})(fn).estimate(X)


WHOLE = estimate(cubes)


# --------------------------------------------------------------------------------------------------------------- raise


def test_the_error_names_direction_and_seed_and_has_the_cause():
    with pytest.raises(
        zograd.EvaluationError, match=r"`Fails` raised ConnectionError at direction 2 of the estimate with seed 1: busy"
    ) as caught:
        estimate(Fails({6}))  # the center, and both points of two directions
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_under_batched_it_names_the_directions():
    with pytest.raises(zograd.EvaluationError, match=r"raised ConnectionError at directions 20 to 39 of the estimate"):
        estimate(Fails({4}), evaluator=Batched(20))


def test_at_the_center_it_is_the_error_itself():
    for policy in ("raise", Drop(0.1)):
        with pytest.raises(ConnectionError, match="busy"):
            estimate(Fails({1}), failures=policy)


# --------------------------------------------------------------------------------------------------------------- Retry


@pytest.mark.parametrize("how", ["raise", "nan", "inf"])
@pytest.mark.parametrize("at", [{1}, {1, 2, 3}, {2}, {81, 82}, {3, 5, 6, 20, 21, 22}])
def test_retries_give_the_bits_of_no_failure(how, at):
    fn = Fails(at, how)
    got = estimate(fn, failures=Retry(3))
    assert torch.equal(got.grad, WHOLE.grad)
    assert (got.evaluations, got.failures) == (fn.calls, len(at)) == (81 + len(at), len(at))


@pytest.mark.parametrize("how", ["raise", "nan", "inf"])
def test_retries_of_many_at_once(how):
    got = estimate(Fails({3, 7}, how), failures=Retry(1), evaluator=Batched(5))
    assert torch.equal(got.grad, estimate(cubes, evaluator=Batched(5)).grad)
    assert (got.evaluations, got.failures) == (81 + 10, 10 if how == "raise" else 2)


def test_vmap_is_evaluated_again_where_values_are_not_finite():
    with pytest.raises(zograd.NonFiniteError, match="at direction"):
        estimate(lambda x: (x**3).sum() / (x[0] < 1.0), failures=Retry(1), evaluator=Vmap(5))
    assert torch.equal(
        estimate(cubes, failures=Retry(1), evaluator=Vmap(5)).grad, estimate(cubes, evaluator=Vmap(5)).grad
    )


def test_each_try_is_the_same_point_with_the_same_random_numbers():
    draws = []

    def fn(x):
        draws.append((x.clone(), torch.rand(()), zograd.current_seed()))
        if len(draws) in (4, 5):
            x.zero_()
            raise OSError("down")
        return x.sum()

    estimate(fn, failures=Retry(2))
    for again in (4, 5):
        assert torch.equal(draws[3][0], draws[again][0])
        assert draws[3][1:] == draws[again][1:]


@pytest.mark.parametrize(("how", "error"), [("raise", zograd.EvaluationError), ("nan", zograd.NonFiniteError)])
def test_when_the_tries_are_used_up_it_raises(how, error):
    fn = Fails(range(5, 100), how)
    with zograd.Tracker() as tracker, pytest.raises(error, match="at direction 1"):
        estimate(fn, failures=Retry(3))
    assert (tracker.evaluations, tracker.retries, tracker.failures) == (fn.calls, 3, 3)


def test_when_the_tries_are_used_up_it_drops():
    fn = Fails({4, 5, 6})
    with pytest.warns(zograd.ZeroOrderWarning, match="1 of 40 directions were dropped"):
        got = estimate(fn, failures=Retry(2, then=Drop()))
    assert got.failures == 3
    assert (got.coefficients == 0).nonzero().flatten().tolist() == [1]


# ---------------------------------------------------------------------------------------------------------------- Drop


@pytest.mark.parametrize("how", ["raise", "nan", "inf"])
@pytest.mark.parametrize("method", ["naive", "forward", "antithetic", "fourth_order"])
def test_the_mean_is_over_the_survivors(how, method):
    sides = {"antithetic": 2, "fourth_order": 4}.get(method, 1)
    # Direction 0, and the last side of direction 7.
    fn = Fails({2, 1 + 8 * sides}, how)
    with pytest.warns(zograd.ZeroOrderWarning, match="2 of 40 directions were dropped since an evaluation of `Fails`"):
        got = estimate(fn, failures=Drop(), method=method)
    whole = estimate(cubes, method=method)
    alive = [i for i in range(40) if i not in (0, 7)]
    noise = torch.cat([whole.directions.noise(lo, hi)[0] for lo, hi in whole.directions.blocks()])[alive].double()
    wanted = (whole.coefficients[alive].unsqueeze(1) * noise).sum(dim=0) / 38 / 0.5
    torch.testing.assert_close(got.grad.double(), wanted, rtol=1e-5, atol=1e-6)
    assert (got.evaluations, got.failures) == (40 * sides + 1, 2)


def test_nothing_failed_nothing_changes():
    assert torch.equal(estimate(cubes, failures=Drop()).grad, WHOLE.grad)
    shaped = {"shaping": zograd.shaping.leave_one_out, "method": "naive"}
    assert torch.equal(estimate(cubes, failures=Drop(), **shaped).grad, estimate(cubes, **shaped).grad)


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
def test_shapings_see_the_survivors_only():
    seen = []

    def shaping(values):
        seen.append(values)
        return values

    got = estimate(Fails({2}), failures=Drop(), shaping=shaping)
    assert seen[0].shape == (39, 2)
    assert torch.isfinite(got.grad).all()


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
def test_several_values_and_their_cotangents():
    def several(x):
        return torch.stack([x.sum(), x[0] / (x[0] < 0.9)])

    got = estimate(several, failures=Drop())
    lost = (got.coefficients == 0).all(dim=1)
    assert 0 < lost.sum() == got.failures < 20
    one = estimate(lambda x: several(x).sum(), failures=Drop())
    torch.testing.assert_close(got.vjp(torch.ones(2)), one.grad)


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
def test_a_second_derivative_is_over_the_survivors_too():
    many = {"num_samples": 20_000}
    got = estimate(Fails(range(2, 40_000, 97)), failures=Drop(), **many)
    assert got.failures == 413
    # 413 of 20 thousand rows are missing by chance: a hundredth of them weighs like sqrt(413) rows.
    torch.testing.assert_close(got.hvp(torch.ones(3)), estimate(cubes, **many).hvp(torch.ones(3)), rtol=0.05, atol=0.15)
    orthogonal = estimate(Fails({4}), failures=Drop(), distribution=zograd.distributions.Orthogonal())
    with pytest.raises(zograd.SecondDerivativeError, match=r"directions were dropped, and those of Orthogonal"):
        orthogonal.hvp(torch.ones(3))


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
@pytest.mark.parametrize("least", [0.5, 0.9, 1.0])
def test_too_few_survivors_raise_as_soon_as_that_is_known(least):
    allowed = round(40 * (1 - least))
    assert estimate(Fails(range(2, 2 + 2 * allowed)), failures=Drop(least)).failures == 2 * allowed
    fn = Fails(range(2, 100))
    with pytest.raises(
        zograd.EvaluationError,
        match=re.escape(f"`Drop(min_success={least:g})`: of 40 directions of `Fails` {allowed + 1} failed"),
    ):
        estimate(fn, failures=Drop(least))
    assert fn.calls == 1 + 2 * (allowed + 1)


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
def test_slices():
    """One coefficient a slice: a direction goes as a whole."""
    settings = {"batch_dim": 0, "failures": Drop()}
    rows = torch.ones(4, 3)
    fn = zero_order(**SETTINGS, **settings)(lambda x: x.sum(dim=1) / (x[:, 0] < 2.1))
    got = fn.estimate(rows)
    assert got.failures > 0
    assert torch.isfinite(got.grad).all()
    assert ((got.coefficients == 0).all(dim=1) == (got.coefficients == 0).any(dim=1)).all()


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
@pytest.mark.parametrize("evaluator", ["vmap", "batched"])
def test_many_at_once_lose_what_is_not_finite(evaluator):
    def fn(x):
        return (x**3).sum(dim=-1) / (x[..., 0] < 1.0)

    one, many = (estimate(fn, failures=Drop(), evaluator=e) for e in ("loop", evaluator))
    assert torch.equal(one.coefficients == 0, many.coefficients == 0)
    torch.testing.assert_close(one.grad, many.grad)
    assert one.failures == many.failures > 0


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
def test_a_batch_that_raises_goes_as_a_whole():
    got = estimate(Fails({2}), failures=Drop(), evaluator=Batched(5))
    assert (got.coefficients == 0).nonzero().flatten().tolist() == list(range(5))
    assert got.failures == 5


@pytest.mark.filterwarnings("ignore::zograd.ZeroOrderWarning")
def test_a_journal_remembers_what_was_dropped(tmp_path):
    calls = []

    def fn(x):
        calls.append(1)
        return (x**3).sum() / (x[0] < 1.0)

    journal = Journal("loop", tmp_path / "journal")
    first, again = (estimate(fn, failures=Drop(), evaluator=journal) for _ in range(2))
    assert torch.equal(first.grad, again.grad)
    lost = int((first.coefficients == 0).sum())
    assert lost > 0
    assert (again.evaluations, len(calls)) == (0, 81)
    with zograd.Tracker() as tracker, pytest.raises(zograd.NonFiniteError, match="at direction"):
        estimate(fn, evaluator=journal)  # a policy that does not accept them evaluates again
    assert tracker.evaluations == 1


def test_what_chance_fails_does_not_move_the_mean():
    """Failures by chance leave the mean as it was: exactly, over all patterns of one failure among N."""
    values = estimate(cubes, num_samples=6)
    grads = []
    for i in range(6):
        with pytest.warns(zograd.ZeroOrderWarning, match="1 of 6"):
            grads.append(estimate(Fails({2 + 2 * i}), num_samples=6, failures=Drop()).grad)
    torch.testing.assert_close(torch.stack(grads).mean(dim=0), values.grad, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Retry(0), ValueError, r"`Retry\(times=...\)` must be at least 1, got 0"),
        (lambda: Retry(1.0), TypeError, r"`Retry\(times=...\)` must be an int, got float 1.0"),
        (lambda: Retry(True), TypeError, r"`Retry\(times=...\)` must be an int, got bool True"),
        (lambda: Retry(1, then="drop"), ValueError, r"`Retry\(then=...\)` must be 'raise' or a Drop, got 'drop'"),
        (lambda: Retry(1, then=3), TypeError, r"`Retry\(then=...\)` must be 'raise' or a Drop, got int 3"),
        (lambda: Retry(1, then=Drop), TypeError, r"`Retry\(then=...\)` .*, got the class: add `\(\)`"),
        (lambda: Drop(0), ValueError, r"`Drop\(min_success=...\)` must lie above 0 and be at most 1, got 0"),
        (lambda: Drop(1.1), ValueError, r"`Drop\(min_success=...\)` must lie above 0 and be at most 1, got 1.1"),
        (lambda: Drop(float("nan")), ValueError, r"must lie above 0 and be at most 1, got nan"),
        (lambda: Drop("all"), TypeError, r"`Drop\(min_success=...\)` must be a number, got str 'all'"),
        (lambda: zero_order(failures=Drop), TypeError, r"`zero_order\(failures=...\)` .* the class Drop: add `\(\)`"),
        (
            lambda: zero_order(failures=3),
            TypeError,
            r"must be 'raise', a Retry or a Drop of `zograd.failures`, got int 3",
        ),
    ],
)
def test_bad_settings(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_modules_take_policies():
    net = zograd.nn.ZeroOrder(torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0)), failures=Retry(2))
    assert net.zero_order_options.failures == Retry(2)
    assert torch.isfinite(net.estimate(X).value).all()


def test_ranks_that_fail_are_not_dropped():
    """The error of a nested Distributed is one of all ranks; a policy on one of them would part it from the others."""

    def fn(x):
        if fn.calls:
            raise zograd.RankError("rank 1 raised")
        fn.calls += 1
        return x.sum()

    fn.calls = 0
    with pytest.raises(zograd.RankError, match="rank 1 raised"):
        zograd.zero_order(num_samples=4, failures=zograd.failures.Drop(0.1))(fn).estimate(torch.zeros(2))
