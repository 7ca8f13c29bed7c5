"""Blocks that have no gradient, for the middle of a network: each maps every sample by itself."""

import torch

BALLS, STEPS, GRID, EVERY = 4, 12, 3, 4


def flights(launches):
    """Four balls a sample, launched into a box with gravity.

    Args:
        launches: (..., 16): of each ball two coordinates (logits of the place in the unit box) and two velocities.

    Returns:
        (..., 13, 4, 2): the place of each ball at the launch and after each step.
    """
    place, velocity = launches.unflatten(-1, (BALLS, 2, 2)).unbind(-2)
    place = place.sigmoid()
    places = [place]
    for _ in range(STEPS):
        velocity = velocity - torch.tensor([0.0, 0.1])
        place = place + 0.1 * velocity
        hit = (place < 0) | (place > 1)
        place = torch.where(place > 1, 2 - place, place.abs()).clamp(0, 1)
        velocity = torch.where(hit, -0.9 * velocity, velocity)
        places.append(place)
    return torch.stack(places, dim=-3)


def bouncing_balls(launches):
    """The balls of ``flights`` as a grid of sensors sees them at three instants.

    Args:
        launches: (..., 16), as there.

    Returns:
        (..., 108) zeros and ones: which of the nine cells each ball is in at each instant.
    """
    seen = flights(launches)[..., EVERY::EVERY, :, :].transpose(-3, -2)
    column, row = (seen * GRID).long().clamp(max=GRID - 1).unbind(-1)
    sensors = (GRID * row + column).unsqueeze(-1) == torch.arange(GRID**2)
    return sensors.flatten(-3).float()


def hard_signs(x):
    """Plus or minus one."""
    return torch.where(x > 0, 1.0, -1.0)


def five_levels(x):
    """The nearest of -1, -1/2, 0, 1/2 and 1."""
    return (2 * x.clamp(-1, 1)).round() / 2
