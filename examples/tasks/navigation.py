"""A point that walks in the plane from the origin to a goal that it is not told; many policies at once.

Both tasks of the ES-MAML code: four corners, where a reward shows only within a distance of 2 of the goal, and goals
anywhere in a square, where it shows everywhere.
"""

import itertools

import torch

CORNERS = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])
WEIGHTS = 6  # of a linear policy: a matrix of 2 by 2, and 2 more
STEPS, STRIDE = 100, 0.1


@torch.no_grad()  # a simulator gives values and no gradients
def walk(policies, box):
    """The places of every step; (..., 6) to (steps, ..., 2)."""
    flat = policies.reshape(-1, WEIGHTS)
    matrices, offsets = flat[:, :4].view(-1, 2, 2), flat[:, 4:].unsqueeze(1)
    path = torch.zeros(STEPS + 1, len(flat), 1, 2)
    for here, there in itertools.pairwise(path):
        stride = torch.baddbmm(offsets, here, matrices).tanh_().clamp_(-STRIDE, STRIDE)
        torch.add(here, stride, out=there).clamp_(-box, box)
    return path[1:].view(STEPS, *policies.shape[:-1], 2)


def corner_return(policies, goals):
    """At most 0, and -400 for a policy that never comes near its goal."""
    distance = (walk(policies, 5.0) - goals).square().sum(dim=-1)
    return ((4 - distance).clamp(min=0) - 4).sum(dim=0)


def square_return(policies, goals):
    """Minus the squared distance, summed up to the step that comes within 0.1 of the goal."""
    reward = -(walk(policies, 1.0) - goals).square().sum(dim=-1)
    arrived = (reward >= -0.01).cumsum(dim=0) - (reward >= -0.01).long()  # before this step
    return (reward * (arrived == 0)).sum(dim=0)


def square_goals(num):
    return 2 * torch.rand(num, 2) - 1
