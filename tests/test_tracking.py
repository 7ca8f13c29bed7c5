"""The tracker: what it counts is what fn saw, and a budget is never passed by what can be planned."""

import asyncio
import contextvars
import dataclasses
import itertools
import threading

import numpy as np
import pytest
import torch

import zograd
from zograd import zero_order
from zograd.evaluators import EVALUATORS, Journal
from zograd.schemes import SCHEMES


class Counted:
    """A function that counts its own calls, and points where it sees many at once."""

    def __init__(self, fail_at=None, batched=False):
        self.calls, self.fail_at, self.batched = 0, fail_at, batched

    def __call__(self, x):
        self.calls += len(x) if self.batched else 1
        if self.calls == self.fail_at:
            raise OSError("down")
        return (x**3).sum(dim=-1)


X = torch.tensor([0.3, -1.2, 2.5])


# ------------------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("evaluator", ["loop", "batched"])
def test_it_counts_what_fn_saw(scheme, evaluator):
    fn = Counted(batched=evaluator == "batched")
    decorated = zero_order(method=scheme, num_samples=7, evaluator=evaluator)(fn)
    with zograd.Tracker() as t:
        for k in range(1, 4):
            estimate = decorated.estimate(X)
            assert t.evaluations == fn.calls == k * estimate.evaluations
            assert (t.estimates, t.retries, t.failures) == (k, 0, 0)
    decorated.estimate(X)
    assert t.evaluations == 3 * estimate.evaluations  # none after the block


@pytest.mark.parametrize("evaluator", EVALUATORS)
def test_points_seen_at_once_count_one_by_one(evaluator):
    decorated = zero_order(method="antithetic", num_samples=9, evaluator=evaluator)(lambda x: (x**3).sum(dim=-1))
    with zograd.Tracker() as t:
        assert decorated.estimate(X).evaluations == t.evaluations == 19


@pytest.mark.parametrize("fail_at", [1, 2, 5, 12, 15])
def test_calls_before_an_exception_count(fail_at):
    fn = Counted(fail_at)
    decorated = zero_order(method="antithetic", num_samples=7)(fn)
    with zograd.Tracker(budget=100) as t:
        with pytest.raises((OSError, zograd.EvaluationError), match="down"):
            decorated.estimate(X)
        assert t.evaluations == fn.calls == fail_at
        assert (t.estimates, t.history) == (0, [])
        assert t.seconds > 0
        assert decorated.estimate(X).evaluations == 15
    assert t.evaluations == fn.calls == fail_at + 15


def test_repeated_evaluations_count():
    calls = []

    def trains_inside(x):
        calls.append(x)
        y = (x**2).sum()
        return torch.autograd.grad(y, x)[0].sum()

    with zograd.Tracker() as t:
        estimate = zero_order(num_samples=4)(trains_inside).estimate(X)
    assert t.evaluations == estimate.evaluations == len(calls) == 6  # the center twice


def test_a_vectorized_call_that_was_given_up_does_not_count():
    with zograd.Tracker() as t:
        noisy = zero_order(num_samples=8, evaluator="vmap")(lambda x: x.sum() + torch.randn(()))
        assert noisy.estimate(X).evaluations == t.evaluations == 1 + 8
        assert noisy.estimate(X).evaluations == 1 + 8  # where fn is known to draw


def test_plain_calls_do_not_count():
    fn = Counted()
    decorated = zero_order(num_samples=3)(fn)
    with zograd.Tracker(budget=0) as t:
        decorated(X)
        with torch.no_grad():
            decorated(X.clone().requires_grad_())
    assert (t.evaluations, fn.calls) == (0, 2)


def test_modules_and_mezo_count():
    net = zograd.nn.ZeroOrder(torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0)), num_samples=5)
    x, calls = torch.nn.Parameter(X.clone()), itertools.count(1)
    opt = zograd.optim.MeZO([x], lr=0.1, num_samples=4, seed=0)
    with zograd.Tracker() as t:
        net(X[None]).sum().backward()
        assert t.evaluations == 6
        loss = opt.step(lambda: next(calls) * 0.0 + (x**2).sum())
    assert t.evaluations == 6 + 8 == 6 + next(calls) - 1
    assert t.estimates == 2
    assert t.history[1]["fn"] == "MeZO.step"
    assert t.history[1]["value"] == loss.item()
    assert t.history[1]["gradient_norm"] is None


def test_values_from_a_journal_cost_nothing(tmp_path):
    decorated = zero_order(num_samples=5, seed=0, evaluator=Journal("loop", tmp_path / "j"))(Counted())
    with zograd.Tracker() as t:
        decorated.estimate(X)
        decorated.estimate(X)
    assert (t.evaluations, t.estimates) == (6, 2)


# ------------------------------------------------------------------------------------------------------------ budget


def test_a_budget_is_used_to_the_last_evaluation_and_never_passed():
    fn = Counted()
    decorated = zero_order(method="antithetic", num_samples=10)(fn)
    with zograd.Tracker(budget=42) as t:
        decorated.estimate(X)
        decorated.estimate(X)
        state = torch.get_rng_state()
        with pytest.raises(
            zograd.BudgetExceeded, match=r"`Tracker\(budget=42\)`.*takes 21 .*, and 0 are left; 42 were"
        ):
            decorated.estimate(X)
        with pytest.raises(zograd.BudgetExceeded, match="not begun"):
            decorated(X.clone().requires_grad_())
        assert torch.equal(state, torch.get_rng_state())  # not even a seed was drawn
    assert t.evaluations == fn.calls == 42
    assert t.estimates == 2


def test_one_less_is_too_few():
    decorated = zero_order(method="antithetic", num_samples=10)(Counted())
    with zograd.Tracker(budget=20) as t, pytest.raises(zograd.BudgetExceeded, match="20 are left"):
        decorated.estimate(X)
    assert t.evaluations == 0


def test_a_budget_of_mezo():
    x = torch.nn.Parameter(X.clone())
    opt = zograd.optim.MeZO([x], lr=0.1, num_samples=2, seed=0)
    with zograd.Tracker(budget=7) as t:
        opt.step(lambda: (x**2).sum())
        before = x.detach().clone()
        with pytest.raises(zograd.BudgetExceeded, match=r"`MeZO.step` takes 4 evaluations, and 3 are left"):
            opt.step(lambda: (x**2).sum())
    assert torch.equal(x, before)
    assert len(opt.records) == t.estimates == 1


def test_an_estimate_that_failed_gives_back_what_it_did_not_use():
    fn = Counted(fail_at=3)
    decorated = zero_order(num_samples=10)(fn)
    with zograd.Tracker(budget=14) as t:
        with pytest.raises((OSError, zograd.EvaluationError), match="down"):
            decorated.estimate(X)
        decorated.estimate(X)
    assert t.evaluations == 14


def test_a_budget_holds_over_threads():
    fn, lock = Counted(), threading.Lock()

    def locked(x):
        with lock:
            return fn(x)

    decorated = zero_order(num_samples=10)(locked)
    refused = []

    def work():
        for _ in range(5):
            try:
                decorated.estimate(X)
            except zograd.BudgetExceeded as error:
                refused.append(error)

    with zograd.Tracker(budget=100) as t:
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(work,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert t.evaluations == fn.calls == 99  # nine of eleven each
    assert (t.estimates, len(refused)) == (9, 11)


def test_a_running_estimate_has_its_evaluations_set_aside():
    """Else two that run side by side would each find room in what is left, and together pass the budget."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(x):
        begun.set()
        assert go_on.wait(timeout=60)
        return x.sum()

    running, other = zero_order(num_samples=20)(slow), zero_order(num_samples=20)(lambda x: x.sum())
    with zograd.Tracker(budget=30) as t:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(running.estimate, X))
        thread.start()
        assert begun.wait(timeout=60)
        try:
            with pytest.raises(zograd.BudgetExceeded, match="takes 21 evaluations, and 9 are left; 1 were made"):
                other.estimate(X)
        finally:
            go_on.set()
            thread.join(timeout=60)
    assert (t.evaluations, t.estimates) == (21, 1)


# -------------------------------------------------------------------------------------------------- nesting, threads


def test_trackers_nest_and_each_counts():
    decorated = zero_order(num_samples=4)(Counted())
    with zograd.Tracker() as outer:
        decorated.estimate(X)
        with zograd.Tracker(budget=5) as inner:
            decorated.estimate(X)
            with pytest.raises(zograd.BudgetExceeded, match="budget=5"):
                decorated.estimate(X)
        decorated.estimate(X)
    assert (outer.evaluations, inner.evaluations) == (15, 5)
    assert outer._planned == inner._planned == 0  # what the inner one refused is not kept for it by the outer one


def test_a_tracker_entered_twice_counts_once():
    decorated = zero_order(num_samples=4)(Counted())
    with zograd.Tracker() as t:
        with t:
            decorated.estimate(X)
        decorated.estimate(X)
    with t:
        decorated.estimate(X)
    assert t.evaluations == 15


def test_estimates_inside_fn_count_for_themselves():
    inner = zero_order(num_samples=2, seed=0)(Counted())
    outer = zero_order(num_samples=3, seed=0)(lambda x: inner.estimate(x).value)
    with zograd.Tracker() as t:
        outer.estimate(X)
    assert (t.estimates, t.evaluations) == (5, 4 + 4 * 3)
    assert t.seconds == pytest.approx(t.history[-1]["seconds"], rel=0.5)  # the inner ones' is in the outer one's


def test_other_threads_are_seen_if_they_share_the_context_or_enter_it():
    decorated = zero_order(num_samples=4)(Counted())

    def unseen():
        contextvars.Context().run(decorated.estimate, X)

    with zograd.Tracker() as t:
        thread = threading.Thread(target=unseen)
        thread.start()
        thread.join(timeout=60)
        assert t.evaluations == 0
        asyncio.run(asyncio.to_thread(decorated.estimate, X))
        assert t.evaluations == 5

    def enters():
        with t:
            decorated.estimate(X)

    thread = threading.Thread(target=enters)
    thread.start()
    thread.join(timeout=60)
    assert t.evaluations == 10


# ------------------------------------------------------------------------------------- history, callback, progress bar


def test_history_and_callback():
    seen = []
    decorated = zero_order(method="antithetic", num_samples=6, sigma=0.1)(Counted())
    with zograd.Tracker(callback=seen.append) as t:
        estimates = [decorated.estimate(X) for _ in range(3)]
    assert [dataclasses.asdict(s) for s in seen] == t.history
    for k, (estimate, row) in enumerate(zip(estimates, t.history, strict=True)):
        assert row["index"] == k
        assert row["fn"] == "Counted"
        assert row["value"] == estimate.value.item()
        assert row["gradient_norm"] == pytest.approx(estimate.grad.norm().item(), rel=1e-6)
        assert row["seed"] == estimate.seed
        assert (row["evaluations"], row["retries"], row["failures"]) == (13, 0, 0)
        assert row["seconds"] > 0
    assert t.seconds >= sum(row["seconds"] for row in t.history)
    with pytest.raises(dataclasses.FrozenInstanceError, match="value"):
        seen[0].value = 0.0
    columns = {name: [row[name] for row in t.history] for name in t.history[0]}  # what a data frame is made of
    assert all(np.asarray(column).dtype != object for column in columns.values())


def test_objectives_of_several_values_have_none_of_them_in_the_history():
    with zograd.Tracker() as t:
        zero_order(num_samples=6)(lambda x: x * 2).estimate(X)
    assert (t.history[0]["value"], t.history[0]["gradient_norm"]) == (None, None)


def test_the_callback_may_estimate_and_its_exceptions_are_raised():
    decorated = zero_order(num_samples=6)(Counted())

    def once(estimate):
        if estimate.index == 0:
            decorated.estimate(X)
        else:
            raise ZeroDivisionError("mine")

    with zograd.Tracker(callback=once) as t, pytest.raises(ZeroDivisionError, match="mine"):
        decorated.estimate(X)
    assert t.estimates == 2


def test_the_bar_moves_by_evaluations(capsys):
    decorated = zero_order(method="antithetic", num_samples=10)(Counted())
    with zograd.Tracker(budget=42, progress=True):
        decorated.estimate(X)
        decorated.estimate(X)
    shown = capsys.readouterr().err
    assert "42/42" in shown
    assert "evaluations/s" in shown


def test_failures_show_in_the_bar(capsys):
    with zograd.Tracker(progress=True) as t:
        t._count(10, 1, 2, 0)
    assert "failures=2" in capsys.readouterr().err
    assert (t.evaluations, t.retries, t.failures) == (10, 1, 2)


def test_counts_that_an_evaluator_did_not_report_as_it_went_are_made_good():
    with zograd.Tracker() as t:
        with zograd.tracking.RunningEstimate("`f`", 5) as tally:
            tally.count(2)
            tally.finish(0, 1.0, evaluations=6, failures=1)
        assert (t.evaluations, t.failures) == (6, 1)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"budget": -1}, ValueError, r"`Tracker\(budget=...\)` must be at least 0, got -1"),
        ({"budget": 1.5}, TypeError, r"`Tracker\(budget=...\)` must be an int or None, got float 1.5"),
        ({"budget": True}, TypeError, r"`Tracker\(budget=...\)` must be an int or None, got bool True"),
        ({"progress": 1}, TypeError, r"`Tracker\(progress=...\)` must be a bool, got int 1"),
        ({"callback": 3}, TypeError, r"`Tracker\(callback=...\)` must be a function or None, got int 3"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        zograd.Tracker(**settings)


def test_it_says_what_it_counted():
    assert repr(zograd.Tracker(budget=3)).startswith("Tracker(budget=3, evaluations=0, retries=0, failures=0")


def test_workers_may_count_from_their_own_threads():
    with zograd.Tracker() as t, zograd.tracking.RunningEstimate("`f`", 40_000) as tally:

        def work():
            for _ in range(5000):
                tally.count()

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        tally.finish(0, 1.0, evaluations=40_000)
    assert t.evaluations == t.history[0]["evaluations"] == 40_000
    assert t._planned == 0
