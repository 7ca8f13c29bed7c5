"""The games and simulators of the examples, against what is known of them."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))


def test_kuhn_poker():
    from tasks import kuhn

    assert kuhn.best_response(torch.full((4, 3), 0.5))[1] == pytest.approx(11 / 12)
    for bluff in (0.0, 0.2, 1 / 3):  # the family of equilibria
        policy = torch.tensor([[bluff, 0, 3 * bluff], [0, bluff + 1 / 3, 1], [1 / 3, 0, 1], [0, 1 / 3, 1]])
        first, second = kuhn.realizations(policy)
        assert first @ kuhn.PAYOFFS @ second == pytest.approx(-1 / 18)
        assert kuhn.best_response(policy)[1] == pytest.approx(0, abs=1e-6)


def test_a_best_response_wins_what_nashconv_says():
    from tasks import kuhn

    policies = torch.rand(20, 4, 3, generator=torch.Generator().manual_seed(1))
    response, gain = kuhn.best_response(policies)
    won = kuhn.meta_game(torch.stack([response, policies], dim=1))[:, 0, 1]
    torch.testing.assert_close(2 * won, gain)
    torch.testing.assert_close(kuhn.mixture(policies, torch.eye(20)[3]), policies[3])


def test_populations_grow_by_responses():
    from tasks import kuhn

    def even(payoffs):
        sizes.append(payoffs.shape)
        return torch.full(payoffs.shape[:-1], 1 / payoffs.shape[-1])

    sizes = []
    history = kuhn.self_improve(even, torch.rand(5, 1, 4, 3, generator=torch.Generator().manual_seed(2)), None)
    gains = [next(history).mean() for _ in range(30)]
    assert sizes[:3] == [(5, 1, 1), (5, 2, 2), (5, 3, 3)]
    assert gains[-1] < gains[0] / 4, "fictitious play goes towards an equilibrium"


def test_walks():
    from tasks import navigation

    still = torch.zeros(4, 6)
    assert navigation.corner_return(still, navigation.CORNERS).tolist() == [-400.0] * 4
    policy = torch.tensor([[0.0, 0, 0, 0, 9, -9]])  # straight ahead, 0.1 a step in each coordinate
    path = navigation.walk(policy, 5.0)
    torch.testing.assert_close(path[:3, 0], torch.tensor([[0.1, -0.1], [0.2, -0.2], [0.3, -0.3]]))
    assert path[-1, 0].tolist() == [5.0, -5.0]
    # At the goal, 3 steps away, the walk ends: 2 squared distances and the last one, of zero.
    square = navigation.square_return(policy, torch.tensor([[0.3, -0.3]]))
    assert square == pytest.approx(-(2 * 0.2**2 + 2 * 0.1**2), abs=1e-6)


def test_carts():
    from tasks import chain

    starts = torch.randn(4, 2, chain.CARTS, generator=torch.Generator().manual_seed(3))
    policies = torch.zeros(2, chain.WEIGHTS)
    policies[1, chain.CARTS - 1] = policies[1, -chain.CARTS] = -1.0  # the main diagonals: push each cart back
    idle, pushed = chain.cost(policies, starts)
    assert pushed < idle / 2
    assert chain.cost(policies[:1], torch.zeros(1, 2, chain.CARTS)) == 0
