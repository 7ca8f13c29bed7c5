"""Eight carts in a row, held together by springs; a policy of Toeplitz matrices pushes them back to rest.

A Toeplitz matrix has one weight a diagonal: each cart is pushed by the same function of its neighbors' states.
"""

import torch

CARTS, STEPS, STEP = 8, 40, 0.15
WEIGHTS = 2 * (2 * CARTS - 1)
SPRINGS = 2 * (torch.diag(torch.ones(CARTS - 1), 1) + torch.diag(torch.ones(CARTS - 1), -1) - 2 * torch.eye(CARTS))
DIAGONALS = torch.arange(CARTS).view(1, -1) - torch.arange(CARTS).view(-1, 1) + CARTS - 1


def cost(policies, starts):
    """The mean cost of each policy; (sets, weights) and (starts, 2, carts) to (sets,)."""
    by_place, by_speed = (half[:, DIAGONALS] for half in policies.chunk(2, dim=1))
    place, speed = starts.expand(len(policies), *starts.shape).unbind(dim=2)
    total = torch.zeros(len(policies))
    for _ in range(STEPS):
        push = torch.tanh(place @ by_place + speed @ by_speed)
        speed = speed + STEP * (place @ SPRINGS - 0.02 * speed + push)
        place = place + STEP * speed
        total += (place.square() + 0.1 * speed.square() + 0.01 * push.square()).mean(dim=(1, 2))
    return total / STEPS
