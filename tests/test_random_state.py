"""Common random numbers, ``current_seed`` and the state of the world that an estimate leaves behind."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional

import zograd
from zograd import SharedStreamError, zero_order

X = torch.tensor([0.5, 1.0, -1.5])
OPTIONS = {"method": "antithetic", "num_samples": 4, "sigma": 0.1}
METHODS = {"naive": 1, "forward": 1, "antithetic": 2, "fourth_order": 4}  # points a direction
EVALUATORS = ["loop", "vmap", "batched"]


def plain(x):
    return (x * torch.tensor([1.0, -2.0, 3.0])).sum(dim=-1)


def noisy(x):
    """Draws more, the less it is at; the draws are 100 times what the parameters do."""
    return plain(x) + 100 * torch.randn(()) + torch.rand(3).sum()


def draws_of_torch():
    """What torch's global stream gives from now on."""
    state = torch.get_rng_state()
    drawn = torch.randint(2**62, (8,)).tolist()
    torch.set_rng_state(state)
    return drawn


def one_draw_later():
    torch.empty((), dtype=torch.int64).random_()
    return torch.get_rng_state()


# ------------------------------------------------------------------------------------------ torch's global stream


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("fn", [plain, noisy], ids=["plain", "noisy"])
def test_the_global_stream_advances_by_one_draw_an_estimate(fn, evaluator):
    f = zero_order(**OPTIONS, evaluator=evaluator)(fn)
    torch.manual_seed(5)
    after = [one_draw_later() for _ in range(3)]
    torch.manual_seed(5)
    f.estimate(X)
    assert torch.equal(torch.get_rng_state(), after[0])
    value = f(X.clone().requires_grad_())
    assert torch.equal(torch.get_rng_state(), after[1])
    value.backward()
    assert torch.equal(torch.get_rng_state(), after[1])
    torch.func.grad(f)(X)
    assert torch.equal(torch.get_rng_state(), after[2])


@pytest.mark.parametrize("fn", [plain, noisy], ids=["plain", "noisy"])
@pytest.mark.parametrize("own", ["seed", "generator"])
def test_the_global_stream_stays_with_a_seed_or_a_generator(own, fn):
    generator = torch.Generator().manual_seed(1)
    f = zero_order(**OPTIONS, **({"seed": 3} if own == "seed" else {"generator": generator}))(fn)
    state = torch.get_rng_state()
    first, second = f.estimate(X), f.estimate(X)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.seed == second.seed) == (own == "seed")
    if own == "generator":
        generator.manual_seed(1)
        assert f.estimate(X).seed == first.seed
        assert torch.equal(torch.get_rng_state(), state)


def test_an_estimate_is_a_function_of_the_global_stream():
    f = zero_order(**OPTIONS)(noisy)
    torch.manual_seed(5)
    first, second = f.estimate(X), f.estimate(X)
    torch.manual_seed(5)
    again = f.estimate(X)
    assert torch.equal(first.grad, again.grad)
    assert torch.equal(first.value, again.value)
    assert first.seed != second.seed
    assert not torch.equal(first.value, second.value), "another estimate, other noise in fn"


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("at", [1, 4])
def test_an_exception_leaves_the_random_state_as_it_was(at, evaluator):
    calls = []

    def fn(x):
        torch.rand(7)
        calls.append(0)
        if len(calls) == at:
            raise ArithmeticError("the simulator stopped")
        return plain(x)

    chunked = {"vmap": zograd.evaluators.Vmap(1), "batched": zograd.evaluators.Batched(1)}.get(evaluator, evaluator)
    f = zero_order(**OPTIONS, evaluator=chunked, seed=2)(fn)
    state = torch.get_rng_state()
    # At the center, and under vmap, it is the function's own error.
    with pytest.raises((ArithmeticError, zograd.EvaluationError), match="the simulator stopped"):
        f.estimate(X)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="inside a function that zograd calls"):
        zograd.current_seed()
    assert torch.isfinite(f.estimate(X).grad).all()


def test_a_seed_set_inside_fn_does_not_reach_the_caller():
    def fn(x):
        torch.manual_seed(0)
        return plain(x) + torch.rand(())

    state = torch.get_rng_state()
    zero_order(**OPTIONS, seed=1)(fn).estimate(X)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_state_of_numpy_and_python_is_left_to_fn():
    def fn(x):
        return float(plain(x)) + np.random.rand() + random.random()

    np.random.seed(3)
    random.seed(3)
    zero_order(**OPTIONS)(plain).estimate(X)
    assert random.random() == random.Random(3).random()
    assert np.random.rand() == np.random.RandomState(3).rand()
    np.random.seed(3)
    random.seed(3)
    zero_order(**OPTIONS)(fn).estimate(X)
    reference, python = np.random.RandomState(3), random.Random(3)
    for _ in range(9):
        reference.rand()
        python.random()
    assert np.random.rand() == reference.rand()
    assert random.random() == python.random()


def test_settings_are_as_before_after_an_exception():
    def fn(x):
        torch.set_grad_enabled(False)
        raise ArithmeticError("the simulator stopped")

    f = zero_order(**OPTIONS)(fn)
    x = X.clone().requires_grad_()
    dtype = torch.get_default_dtype()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ArithmeticError, match="the simulator stopped"):
            f(x)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_grad_enabled()
    with torch.no_grad():
        with pytest.raises(ArithmeticError, match="the simulator stopped"):
            f.estimate(x)
        assert not torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert torch.get_default_dtype() == dtype
    assert x.grad is None
    assert torch.equal(x.detach(), X)


def test_default_dtype_does_not_change_the_directions():
    weights = torch.tensor([1.0, -2.0, 3.0])
    f = zero_order(**OPTIONS, seed=1)(lambda x: float((x * weights).sum()))
    expected = f.estimate(X)
    torch.set_default_dtype(torch.float64)
    try:
        estimate = f.estimate(X)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(estimate.grad, expected.grad)
    assert estimate.value.dtype == torch.float64


# --------------------------------------------------------------------------------------------- common random numbers


def streams_of(method, evaluator="loop", **options):
    """What fn draws at each point: the center's draw, and one row a direction."""
    drawn = []

    def fn(x):
        drawn.append(torch.rand(2))
        return plain(x)

    zero_order(**{**OPTIONS, "method": method, "evaluator": evaluator, **options})(fn).estimate(X)
    center, rest = drawn[0], torch.stack(drawn[1:])
    return center, rest.view(-1, METHODS[method], 2)


@pytest.mark.parametrize("method", ["antithetic", "fourth_order", "naive"])
def test_points_of_one_direction_share_a_stream_and_directions_differ(method):
    center, streams = streams_of(method)
    assert (streams == streams[:, :1]).all()
    distinct = {tuple(row) for row in streams[:, 0].tolist()} | {tuple(center.tolist())}
    assert len(distinct) == OPTIONS["num_samples"] + 1


def test_with_forward_all_points_share_the_centers_stream():
    center, streams = streams_of("forward")
    assert (streams == center).all()


@pytest.mark.parametrize("method", METHODS)
def test_streams_change_from_estimate_to_estimate_unless_there_is_a_seed(method):
    assert not torch.equal(streams_of(method)[0], streams_of(method)[0])
    for one, two in zip(streams_of(method, seed=4), streams_of(method, seed=4), strict=True):
        assert torch.equal(one, two)


def test_the_stream_of_fn_is_not_that_of_the_directions():
    drawn = []

    def fn(x):
        drawn.append(torch.randn(16))
        return x.sum()

    noise = zero_order(**OPTIONS, seed=1)(fn).estimate(torch.zeros(16)).directions.noise(0, 4)[0]
    for numbers in drawn:
        assert not any(torch.equal(numbers, row) for row in noise)
        assert (torch.nn.functional.cosine_similarity(noise, numbers[None]).abs() < 0.95).all()


@pytest.mark.parametrize("evaluator", EVALUATORS)
@pytest.mark.parametrize("method", ["forward", "antithetic", "fourth_order"])
def test_additive_noise_cancels(method, evaluator):
    options = {**OPTIONS, "method": method, "evaluator": evaluator, "seed": 6}
    torch.testing.assert_close(
        zero_order(**options)(noisy).estimate(X).coefficients,
        zero_order(**options)(plain).estimate(X).coefficients,
        rtol=0,
        atol=1e-4,  # the last bits of numbers near 100
    )


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
def test_dropout_with_forward_has_the_variance_of_one_mask(evaluator):
    # A stream of its own at each point would put the masks' spread over sigma: 10**4 times this variance.
    def fn(x):
        return plain(functional.dropout(x, 0.5))

    f = zero_order(method="forward", num_samples=300, sigma=0.001, evaluator=evaluator)(fn)
    for seed in range(3):
        coefficients = f.replace(seed=seed).estimate(X).coefficients / 0.001
        assert (
            coefficients.std() < 2 * 14**0.5 * 1.3
        )  # the whole slope, doubled by dropout, and the spread of 300 draws
    antithetic = zero_order(method="antithetic", num_samples=300, sigma=0.001, evaluator=evaluator)(fn)
    assert (antithetic.estimate(X).coefficients / 0.001).std() < 2 * 14**0.5 * 1.3


@pytest.mark.parametrize("method", ["forward", "antithetic", "fourth_order"])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_under_vmap_the_sides_of_a_pair_share_their_numbers(chunk_size, method):
    def fn(x):
        return 0 * x.sum() + 100 * torch.rand(())

    f = zero_order(**{**OPTIONS, "method": method}, evaluator=zograd.evaluators.Vmap(chunk_size), seed=2)(fn)
    assert (f.estimate(X).coefficients.abs() < 1e-4).all()


def test_under_vmap_directions_have_numbers_of_their_own():
    f = zero_order(**{**OPTIONS, "method": "naive"}, evaluator="vmap", seed=2)(lambda x: 0 * x.sum() + torch.rand(()))
    assert len(set(f.estimate(X).coefficients.tolist())) == 4
    chunked = f.replace(evaluator=zograd.evaluators.Vmap(1)).estimate(X).coefficients
    assert len(set(chunked.tolist())) == 4


def test_under_vmap_with_forward_the_numbers_are_those_of_the_loop():
    f = zero_order(method="forward", num_samples=5, seed=2)(lambda x: (x * torch.rand(3)).sum())
    torch.testing.assert_close(f.replace(evaluator="vmap").estimate(X).grad, f.estimate(X).grad)


def test_the_value_is_drawn_as_the_loop_draws_it():
    loop = zero_order(**OPTIONS, seed=2)(noisy).estimate(X).value
    for evaluator in ("vmap", zograd.evaluators.Vmap(1)):
        assert torch.equal(zero_order(**OPTIONS, seed=2, evaluator=evaluator)(noisy).estimate(X).value, loop)


# ----------------------------------------------------------------------------------------------------- current_seed


def seeds_of(method, **options):
    seen = []

    def fn(x):
        seen.append(zograd.current_seed())
        assert zograd.current_seed() == seen[-1], "the same each time it is asked"
        return plain(x)

    zero_order(**{**OPTIONS, "method": method, **options})(fn).estimate(X)
    points = METHODS[method]
    return seen[0], [seen[1 + points * i : 1 + points * (i + 1)] for i in range(OPTIONS["num_samples"])]


@pytest.mark.parametrize("method", ["antithetic", "fourth_order", "naive"])
def test_current_seed_is_one_for_a_direction_and_another_for_the_next(method):
    center, directions = seeds_of(method)
    assert all(len(set(seeds)) == 1 for seeds in directions)
    assert len({center, *(seeds[0] for seeds in directions)}) == OPTIONS["num_samples"] + 1


def test_current_seed_with_forward_is_the_centers():
    center, directions = seeds_of("forward")
    assert {seed for seeds in directions for seed in seeds} == {center}


def test_current_seed_changes_with_the_estimate():
    assert seeds_of("naive")[0] != seeds_of("naive")[0]
    assert seeds_of("naive", seed=3) == seeds_of("naive", seed=3)


def test_current_seed_serves_numpy_and_python():
    def fn(x):
        seed = zograd.current_seed()
        assert type(seed) is int
        assert 0 <= seed < 2**32
        noise = np.random.default_rng(seed).normal() + np.random.RandomState(seed).normal()
        return float(plain(x)) + 100 * (noise + random.Random(seed).gauss(0, 1))

    for method in ("forward", "antithetic"):
        options = {**OPTIONS, "method": method, "seed": 6}
        expected = zero_order(**options)(plain).estimate(X).coefficients
        torch.testing.assert_close(zero_order(**options)(fn).estimate(X).coefficients, expected, rtol=0, atol=1e-5)


def test_current_seed_under_vmap_names_the_ways_out():
    f = zero_order(**OPTIONS, evaluator="vmap")(lambda x: plain(x) + (zograd.current_seed() > 0))
    with pytest.raises(RuntimeError, match=r'(?s)current_seed.*evaluator="vmap".*loop.*batched'):
        f.estimate(X)
    with pytest.raises(RuntimeError, match=r'(?s)current_seed.*evaluator="vmap".*loop.*batched'):
        f(X.clone().requires_grad_())


def test_current_seed_under_batched_names_the_way_out():
    f = zero_order(**OPTIONS, evaluator="batched")(lambda x: plain(x) + zograd.current_seed())
    with pytest.raises(RuntimeError, match=r"(?s)batched.*current_seeds"):
        f.estimate(X)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("method", METHODS)
def test_current_seeds_under_batched_are_those_of_the_loop(method, chunk_size):
    calls = []

    def fn(x):
        seeds = zograd.current_seeds()
        assert seeds.dtype == torch.int64
        assert seeds.shape == x.shape[:1]
        calls.append(seeds.tolist())
        return plain(x)

    options = {**OPTIONS, "method": method, "seed": 9}
    zero_order(**options, evaluator=zograd.evaluators.Batched(chunk_size))(fn).estimate(X)
    center, directions = seeds_of(method, seed=9)
    assert calls[0] == [center]
    # Side by side within a chunk: for each chunk, all directions of one side, then of the next.
    got = {seed for call in calls[1:] for seed in call}
    assert got == {seeds[0] for seeds in directions}
    assert sum(len(call) for call in calls[1:]) == OPTIONS["num_samples"] * METHODS[method]


def test_current_seeds_elsewhere_names_the_way_out():
    f = zero_order(**OPTIONS)(lambda x: plain(x) + zograd.current_seeds()[0])
    with pytest.raises(RuntimeError, match=r"(?s)batched.*current_seed"):
        f.estimate(X)
    with pytest.raises(RuntimeError, match="inside a function that zograd calls"):
        zograd.current_seeds()


def test_current_seed_in_a_plain_call():
    seen = []

    def fn(x):
        seen.append((zograd.current_seed(), zograd.current_seed()))
        return plain(x)

    f = zero_order(**OPTIONS)(fn)
    with torch.no_grad():
        f(X)
        f(X)
    f(X)  # nothing requires grad
    assert all(one == two for one, two in seen)
    assert len({one for one, _ in seen}) == 3
    assert all(0 <= one < 2**32 for one, _ in seen)
    torch.manual_seed(1)
    f(X)
    torch.manual_seed(1)
    f(X)
    assert seen[-1] == seen[-2]


def test_current_seeds_in_a_plain_call_of_a_batched_function():
    seen = []

    def fn(x):
        seen.append(zograd.current_seeds())
        return plain(x)

    zero_order(**OPTIONS, evaluator="batched")(fn)(X)
    assert seen[0].shape == (1,)
    assert seen[0].dtype == torch.int64


def test_current_seed_outside_is_an_error():
    with pytest.raises(RuntimeError, match="inside a function that zograd calls"):
        zograd.current_seed()
    zero_order(**OPTIONS)(plain).estimate(X)
    with pytest.raises(RuntimeError, match="inside a function that zograd calls"):
        zograd.current_seed()


def test_current_seed_in_backward_of_another_thread_is_an_error_there():
    errors = []

    def fn(x):
        def ask():
            try:
                zograd.current_seed()
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return plain(x)

    zero_order(**OPTIONS)(fn).estimate(X)
    assert len(errors) == 9
    assert "none is running" in errors[0]


def test_nested_estimates_have_a_current_seed_of_their_own():
    inside, outside = [], []

    def inner_fn(y):
        inside.append(zograd.current_seed())
        return y.sum()

    inner = zero_order(num_samples=1, method="antithetic")(inner_fn)

    def outer_fn(x):
        before = zograd.current_seed()
        first, second = inner.estimate(x), inner.estimate(x)
        assert first.seed != second.seed
        assert zograd.current_seed() == before
        torch.rand(3)
        outside.append(before)
        return plain(x)

    zero_order(num_samples=1, method="antithetic")(outer_fn).estimate(X)
    center, plus, minus = inside[:6], inside[6:12], inside[12:]
    assert plus == minus
    assert center != plus
    assert not set(inside) & set(outside)
    assert plus[1] == plus[2], "both sides of the inner pair"
    assert plus[:3] != plus[3:], "the two inner estimates differ"


# ------------------------------------------------------------------------------------------------------------ threads


def all_draws(x):
    """Every way to draw that a user would think of."""
    ones = torch.ones(3)
    drawn = [
        torch.rand(()),
        torch.randn(3).sum(),
        torch.randint(5, (2,)).sum(),
        torch.randperm(5)[0],
        torch.multinomial(torch.ones(5), 2).sum(),
        torch.bernoulli(ones / 2).sum(),
        torch.normal(0.0, 1.0, (2,)).sum(),
        torch.normal(ones, ones).sum(),
        torch.poisson(ones).sum(),
        torch.rand_like(ones).sum(),
        torch.randn_like(ones).sum(),
        torch.empty(3).uniform_().sum(),
        torch.empty(3).exponential_().sum(),
        torch.empty(3).bernoulli_(0.5).sum(),
        torch.empty(3).bernoulli_(ones / 2).sum(),
        functional.dropout(ones, 0.5).sum(),
        torch.distributions.Gamma(2.0, 1.0).sample(),
        torch.distributions.Categorical(torch.ones(4)).sample(),
        torch.nn.init.kaiming_uniform_(torch.empty(2, 2)).sum(),
    ]
    return plain(x) + sum(drawn)


def few_draws(x):
    return plain(x) * torch.rand(()) + torch.randn(3).sum()


def with_dropout(x):
    return plain(functional.dropout(x, 0.5)) + functional.dropout(torch.ones(3), 0.5).sum()


def reseeding(x):
    torch.manual_seed(7)
    return plain(x) + torch.rand(())


INNER = zero_order(num_samples=2, sigma=0.1, method="antithetic")(lambda y: (y * torch.rand(3)).sum())


def nesting(x):
    return INNER.estimate(x.detach()).grad.sum() + torch.rand(())


def coefficients(fn, **options):
    return zero_order(**{**OPTIONS, "method": "naive", "seed": 1, **options})(fn).estimate(X).coefficients


def run_together(*targets):
    """Run each in a thread; what it returned, or raised."""
    results = [None] * len(targets)

    def work(i):
        try:
            results[i] = targets[i]()
        except BaseException as error:  # handed to the test
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(targets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def during(other, fn=few_draws, **options):
    """The coefficients of an estimate, and what ``other()`` gives, run in another thread in the middle of it."""
    begun, done, calls = threading.Event(), threading.Event(), []

    def interrupted(x):
        calls.append(0)
        first = torch.rand(()) * 0 + (torch.rand(()) if fn is few_draws else 0)
        if len(calls) == 3:
            begun.set()
            assert done.wait(30)
        return first + fn(x)

    def second():
        assert begun.wait(30)
        try:
            return other()
        finally:
            done.set()

    alone = coefficients(lambda x: torch.rand(()) * 0 + (torch.rand(()) if fn is few_draws else 0) + fn(x), **options)
    first, second_result = run_together(lambda: coefficients(interrupted, **options), second)
    assert isinstance(first, torch.Tensor), first
    return alone, first, second_result


def same_or_refused(result, alone):
    """Never other numbers: those of one thread, or the error that says so."""
    if isinstance(result, SharedStreamError):
        return
    if isinstance(result, BaseException):
        raise result
    assert torch.equal(result, alone)


@pytest.mark.parametrize("evaluator", ["loop", "vmap"])
@pytest.mark.parametrize("fn", [few_draws, with_dropout, nesting], ids=lambda fn: fn.__name__)
def test_an_estimate_in_the_middle_of_another_threads(fn, evaluator):
    if fn is nesting and evaluator == "vmap":
        pytest.skip("estimate() inside vmap is refused in any thread")
    alone = coefficients(fn, evaluator=evaluator)
    owner_alone, owner, other = during(lambda: coefficients(fn, evaluator=evaluator))
    assert torch.equal(owner, owner_alone)
    same_or_refused(other, alone)
    assert isinstance(other, torch.Tensor), "nothing here needs the global stream"


def test_every_random_function_in_the_middle_of_another_threads_estimate():
    alone = coefficients(all_draws)
    owner_alone, owner, other = during(lambda: coefficients(all_draws))
    assert torch.equal(owner, owner_alone)
    same_or_refused(other, alone)


@pytest.mark.parametrize("own", ["nothing", "generator"])
def test_the_seed_of_an_estimate_is_not_drawn_from_another_threads_estimate(own):
    generator = torch.Generator().manual_seed(1)
    options = {"seed": None} if own == "nothing" else {"seed": None, "generator": generator}
    owner_alone, owner, other = during(lambda: [coefficients(few_draws, **options) for _ in range(3)])
    assert torch.equal(owner, owner_alone)
    assert isinstance(other, list), other
    assert not torch.equal(other[0], other[1])


def test_seeds_drawn_during_another_threads_estimate_are_not_drawn_again_after_it():
    f = zero_order(num_samples=1)(plain)
    _, _, seeds = during(lambda: [f.estimate(X).seed for _ in range(2)])
    seeds += [f.estimate(X).seed for _ in range(2)]
    assert len(set(seeds)) == 4


def test_seeds_in_another_thread_do_not_hang_on_what_fn_has_drawn():
    f = zero_order(num_samples=1)(plain)
    seeds = []
    for _ in range(2):
        torch.manual_seed(3)
        seeds.append(during(lambda: [f.estimate(X).seed for _ in range(2)])[2])
        torch.manual_seed(3)
        seeds.append([f.estimate(X).seed for _ in range(2)])
    assert seeds[0] == seeds[2]
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("fn", [few_draws, nesting], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("distribution", [None, torch.randn], ids=["Gaussian", "function"])
def test_an_estimate_that_outlives_another_threads(distribution, fn):
    # The other estimate owns torch's stream when this one begins, and has let go of it before the rest of it.
    alone = coefficients(fn, distribution=distribution)
    owns, begun, gone = (threading.Event() for _ in range(3))
    calls = []

    def short(x):
        owns.set()
        assert begun.wait(30)
        return few_draws(x)

    def owner():
        coefficients(short)
        gone.set()

    def late(x):
        calls.append(0)
        if len(calls) == 1:
            begun.set()
            assert gone.wait(30)
        return fn(x)

    def outliving():
        assert owns.wait(30)
        return coefficients(late, distribution=distribution)

    error, result = run_together(owner, outliving)
    assert error is None
    same_or_refused(result, alone)


def test_many_threads_at_once_give_what_one_gives():
    expected = [coefficients(few_draws, seed=k, num_samples=20) for k in range(4)]
    state = torch.get_rng_state()

    def repeat(k):
        return [coefficients(few_draws, seed=k, num_samples=20) for _ in range(15)]

    for k, results in enumerate(run_together(*(lambda k=k: repeat(k) for k in range(4)))):
        assert isinstance(results, list), results
        assert all(torch.equal(result, expected[k]) for result in results)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_estimate_in_the_same_thread_is_undisturbed_by_threads_inside_fn():
    def fn(x):
        (result,) = run_together(lambda: coefficients(few_draws))
        assert torch.equal(result, alone)
        return plain(x) + torch.rand(())

    def reference(x):
        return plain(x) + torch.rand(())

    alone = coefficients(few_draws)
    assert torch.equal(coefficients(fn), coefficients(reference))


@pytest.mark.parametrize("method", ["antithetic", "fourth_order"])
def test_sides_come_in_one_vectorized_call_until_fn_is_seen_to_draw(method):
    calls = []

    def fn(x):
        calls.append(x.shape)
        return (x + torch.randn(3)).sum() if noisy else x.sum()

    f = zero_order(method=method, num_samples=8, sigma=0.1, evaluator="vmap", seed=1)(fn)
    sides = len(f.options.method.sides)
    noisy = False
    assert (f.estimate(torch.zeros(3)).evaluations, len(calls)) == (1 + 8 * sides, 2)
    calls.clear()
    noisy = True
    # The one call is given up where fn draws, since a pair must see the same numbers; that is remembered, not counted.
    assert (f.estimate(torch.zeros(3)).evaluations, len(calls)) == (1 + 8 * sides, 2 + sides)
    calls.clear()
    again = f.estimate(torch.zeros(3))
    assert (again.evaluations, len(calls)) == (1 + 8 * sides, 1 + sides)
    exact = f.replace(evaluator="loop").estimate(torch.zeros(3))
    torch.testing.assert_close(again.coefficients.std(), exact.coefficients.std(), rtol=0.9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_dropout_draws_nothing_in_threads(dtype, causal):
    """torch marks the operator as random whatever its dropout is."""
    x = torch.randn(2, 3, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))

    def fn(w, p):
        attended = torch.nn.functional.scaled_dot_product_attention(x * w, x, x, dropout_p=p, is_causal=causal)
        time.sleep(1e-4)
        return attended.sum()

    decorated = zero_order(method="antithetic", num_samples=50, sigma=0.1, seed=0)(fn)
    w = torch.ones((), dtype=dtype)
    alone = decorated.estimate(w, 0.0).grad
    with ThreadPoolExecutor(2) as threads:
        together = [threads.submit(decorated.estimate, w, 0.0) for _ in range(2)]
        assert all(torch.equal(made.result().grad, alone) for made in together)
