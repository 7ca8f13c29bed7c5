"""Kuhn poker, and populations of policies for it that grow by best responses; many games side by side.

Three cards and one bet. A policy plays both seats: 12 probabilities of betting (or calling), as (..., 4, 3) for the
four situations of each card: to open, to answer a bet after checking, to answer a check, to answer a bet. In
realization weights (what a player contributes to the probability of each way to play) the payoff is bilinear.
"""

import torch


def _payoffs():
    """To the first player, whose ways are bet, check-fold, check-call; the second's are bet, check, and call, fold."""
    sign = (torch.arange(3).view(3, 1) - torch.arange(3)).sign().float()
    dealt = (sign != 0).float() / 6
    table = torch.zeros(3, 4, 3, 3)  # first's way, second's way, first's card, second's card
    table[0, 2], table[0, 3] = 2 * sign, 1.0
    table[1, 0] = -1.0
    table[2, 0] = 2 * sign
    table[1, 1] = table[2, 1] = sign
    return (table * dealt).permute(0, 2, 1, 3).reshape(9, 12)


PAYOFFS = _payoffs()


def realizations(policies):
    """(..., 4, 3) to the weights of the first player, (..., 9), and of the second, (..., 12)."""
    opens, late, after_check, call = policies.unbind(dim=-2)
    first = torch.stack([opens, (1 - opens) * (1 - late), (1 - opens) * late], dim=-2)
    second = torch.stack([after_check, 1 - after_check, call, 1 - call], dim=-2)
    return first.flatten(-2), second.flatten(-2)


def meta_game(policies):
    """The payoff of each policy against each other, the seats by turns: (..., n, 4, 3) to (..., n, n)."""
    first, second = realizations(policies)
    payoff = first @ PAYOFFS @ second.mT
    return (payoff - payoff.mT) / 2


def best_response(policies):
    """The exact best response to a policy, as zeros and ones (..., 4, 3), and NashConv, what it gains in both seats."""
    first, second = realizations(policies)
    bet, fold, call = (second @ PAYOFFS.T).unflatten(-1, (3, 3)).unbind(dim=-2)  # what each way is worth to the first
    check = torch.maximum(fold, call)
    bet_checked, checked, call_bet, folded = (-(first @ PAYOFFS)).unflatten(-1, (4, 3)).unbind(dim=-2)
    choices = torch.stack([bet > check, call > fold, bet_checked > checked, call_bet > folded], dim=-2).float()
    as_first = torch.maximum(bet, check).sum(dim=-1)
    as_second = (torch.maximum(bet_checked, checked) + torch.maximum(call_bet, folded)).sum(dim=-1)
    return choices, as_first + as_second


def mixture(policies, weights):
    """The mean of the betting probabilities, as the NAC code has it, not weighted by how often each plays there."""
    return (policies * weights[..., None, None]).sum(dim=-3)


def self_improve(solver, policies, uniforms):
    """Grow populations by responses to the solver's mixture; NashConv of that mixture after each response.

    Args:
        solver: the meta-solver, (..., n, n) to weights (..., n).
        policies: of (..., 1, 4, 3).
        uniforms: what a response's rounding is drawn from, (rounds, ..., 4, 3, 2): its probabilities are these and the
            best action's plus one, normalized; None for exact best responses.

    Yields:
        NashConv, of shape (...).
    """
    weights = solver(meta_game(policies))
    while True:
        response, _ = best_response(mixture(policies, weights))
        if uniforms is not None:
            (act, other), uniforms = uniforms[0].unbind(dim=-1), uniforms[1:]
            response = (act + response) / (act + other + 1)
        policies = torch.cat([policies, response.unsqueeze(-3)], dim=-3)
        weights = solver(meta_game(policies))
        yield best_response(mixture(policies, weights))[1]
