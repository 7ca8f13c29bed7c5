"""Episodes as an objective, and the normalizer: common seeds, frozen statistics, exact merging."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import zograd
from zograd.contrib.rl import Episodes, Moments, Normalizer


class Walk:
    """A point that drifts at random towards a policy's action; ends after 5 steps."""

    made = 0

    def __init__(self):
        type(self).made += 1

    def reset(self, *, seed):
        self.random, self.x, self.left = np.random.default_rng(seed), np.zeros(2, dtype=np.float32), 5
        return self.x, {}

    def step(self, action):
        self.x = (self.x + action + self.random.standard_normal(2)).astype(np.float32)
        self.left -= 1
        return self.x, 1.0 - float(np.square(self.x).sum()), self.left == 0 and self.x[0] > 0, self.left == 0, {}


def linear(weights):
    gain = weights.numpy()
    return lambda observation: gain * observation


X = torch.tensor([0.1, -0.2])


def test_it_is_minus_the_return_without_the_bonus():
    fn = Episodes(Walk, linear)
    seen = []
    inside = zograd.zero_order(num_samples=3, seed=0)(lambda x: seen.append(zograd.current_seed()) or fn(x))
    estimate = inside.estimate(X)
    (total,) = fn.returns(X, seen[:1])
    assert estimate.value.item() == pytest.approx(-total)
    assert fn.steps == 5 * 5
    without = zograd.zero_order(num_samples=3, seed=0)(Episodes(Walk, linear, bonus=1.0)).estimate(X)
    assert without.value.item() == pytest.approx(-total + 5)


def test_several_episodes_are_averaged():
    seen = []
    fn = Episodes(Walk, linear, episodes=3)
    inside = zograd.zero_order(num_samples=1, seed=0)(lambda x: seen.append(zograd.current_seed()) or fn(x))
    estimate = inside.estimate(X)
    assert estimate.value.item() == pytest.approx(-sum(fn.returns(X, [seen[0] + k for k in range(3)])) / 3)


def test_the_points_of_a_direction_begin_alike():
    # The return does not depend on the policy: with the same seed both sides cancel exactly.
    still = Episodes(Walk, lambda weights: lambda observation: 0.0)
    estimate = zograd.zero_order(method="antithetic", num_samples=4, seed=0)(still).estimate(X)
    assert estimate.coefficients.tolist() == [0.0] * 4
    naive = zograd.zero_order(num_samples=4, seed=0)(still).estimate(X)
    assert len(set(naive.coefficients.tolist())) == 4


def test_it_pickles_without_its_environment_and_threads_have_their_own():
    fn = Episodes(Walk, linear)
    wanted = fn.returns(X, [3])
    assert pickle.loads(pickle.dumps(fn)).returns(X, [3]) == wanted
    assert copy.deepcopy(fn).returns(X, [3]) == wanted
    Walk.made, barrier = 0, threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: (barrier.wait(), fn.returns(X, [3]))[1], range(2))) == [wanted] * 2
    assert Walk.made == 2


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"make": "CartPole-v1"}, TypeError, r"`Episodes\(make=...\)` must be a function, got str 'CartPole-v1'"),
        ({"policy": 3}, TypeError, r"`Episodes\(policy=...\)` must be a function, got int 3"),
        ({"episodes": 0}, ValueError, r"`Episodes\(episodes=...\)` must be at least 1, got 0"),
        ({"episodes": 1.0}, TypeError, r"`Episodes\(episodes=...\)` must be an int, got float 1.0"),
    ],
)
def test_bad_settings(settings, error, match):
    with pytest.raises(error, match=match):
        Episodes(**{"make": Walk, "policy": linear, **settings})


@pytest.mark.parametrize("settings", [{"least": 0.0}, {"clip": -1.0}])
def test_bad_settings_of_the_normalizer(settings):
    with pytest.raises(ValueError, match=r"`Normalizer\((least|clip)=...\)` must be positive"):
        Normalizer(**settings)


ROWS = np.random.default_rng(0).standard_normal((50, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, -3.0]


@pytest.mark.parametrize("cut", [0, 1, 17, 50])
def test_moments_of_parts_merge_into_those_of_the_whole(cut):
    parts = Moments(), Moments()
    for i, row in enumerate(ROWS):
        parts[i >= cut].add(row)
    parts[0].merge(parts[1])
    assert parts[0].count == 50
    np.testing.assert_allclose(parts[0].mean, ROWS.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(parts[0].squares / 50, ROWS.var(axis=0), rtol=1e-12)


def test_float32_observations_are_summed_in_float64():
    moments = Moments()
    for _ in range(1000):
        moments.add(np.array([1e4, 0.1], dtype=np.float32))
        moments.add(np.array([1e4 + 1, 0.1], dtype=np.float32))
    assert moments.mean.dtype == np.float64
    np.testing.assert_allclose(moments.squares / 2000, [0.25, 0.0], atol=1e-9)


def test_it_normalizes_by_what_it_knew_at_the_last_update():
    normalizer = Normalizer()
    for row in ROWS:
        normalizer.seen.add(np.append(row, 7.0))  # the last never varies
    assert (normalizer(np.ones(4)) == 1.0).all()
    normalizer.update()
    out = np.stack([normalizer(np.append(row, 7.0)) for row in ROWS])
    np.testing.assert_allclose(out.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(out.std(axis=0), [1, 1, 1, 0], atol=1e-12)
    assert normalizer(np.full(4, 100.0))[3] == 0.0
    before = normalizer(np.append(ROWS[0], 7.0))
    normalizer.seen.add(np.full(4, 1e6))
    assert (normalizer(np.append(ROWS[0], 7.0)) == before).all()
    normalizer.update()
    assert (normalizer(np.append(ROWS[0], 7.0)) != before).any()


def test_it_clips():
    for one, clipped in ((np.array([9.0]), [2.0]), (9.0, 2.0)):
        normalizer = Normalizer(clip=2.0)
        for x in (one * 0.0, one * 0.1):
            normalizer.seen.add(x)
        normalizer.update()
        assert normalizer(one) == clipped
        assert normalizer(-one) == -2.0


def test_its_state_comes_back():
    first, second = Normalizer(), Normalizer()
    for row in ROWS:
        first.seen.add(row)
    first.update()
    second.load_state_dict(first.state_dict())
    assert (second(ROWS[3]) == first(ROWS[3])).all()
    first.seen.add(ROWS[0])
    second.seen.add(ROWS[0])
    first.update()
    second.update()
    assert (second(ROWS[3]) == first(ROWS[3])).all()


def test_an_estimate_learns_and_an_evaluation_does_not():
    normalizer = Normalizer()
    fn = Episodes(Walk, linear, normalizer=normalizer)
    fn.returns(X, [0, 1])
    assert normalizer.seen.count == 0
    zograd.zero_order(method="antithetic", num_samples=2, seed=0)(fn).estimate(X)
    assert normalizer.seen.count == 5 * 5
    assert normalizer.known.count == 0
