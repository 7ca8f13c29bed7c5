"""Evolution strategies on several processes: land a rocket whose engine is either on or off.

    torchrun --nproc_per_node 2 examples/torchrun_es.py

Each rank flies its share of the perturbed pilots; the ranks exchange 8 bytes for each, sum the same directions in the
same order, and so move the same parameters by the same bits: the checksum at the end is that of one process, whatever
the number of ranks. Without torchrun the script is that one process.
"""

import argparse
import hashlib
import random

import torch
import torch.distributed as dist
from tqdm import tqdm

import zograd

GRAVITY, ENGINE, SECONDS = 1.6, 4.0, 0.1  # the moon's, in m/s^2; of a time step


def fly(pilot, seed):
    """One flight in plain Python.

    Args:
        pilot: four weights; the engine is on where their sum over the instruments is positive.
        seed: of the height and speed that it begins with.

    Returns:
        The speed at touchdown in m/s and the seconds for which the engine was on.
    """
    chance = random.Random(seed)
    height, speed, burned = chance.uniform(50, 150), chance.uniform(0, 20), 0.0  # speed: downwards
    bias, by_height, by_speed, by_square = pilot
    for _ in range(1000):
        on = bias + by_height * height / 100 + by_speed * speed / 10 + by_square * speed * speed / 100 > 0
        speed += (GRAVITY - ENGINE * on) * SECONDS
        height -= speed * SECONDS
        burned += on * SECONDS
        if height <= 0:
            return abs(speed), burned
    return 50.0, burned  # it never came down


def loss(weights):
    """Speed at touchdown and fuel, over five flights that all points of a direction begin alike."""
    pilot, seed = weights.tolist(), zograd.current_seed()
    flights = [fly(pilot, seed + k) for k in range(5)]
    return sum(speed + 0.1 * burned for speed, burned in flights) / len(flights)


def landing_speed(weights):
    """The mean over flights that training has not seen."""
    return sum(fly(weights.tolist(), f"test {k}")[0] for k in range(100)) / 100


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    evaluator = zograd.evaluators.Distributed(timeout=60)  # a rank that dies ends the others within a minute
    generator = torch.Generator().manual_seed(options.seed)  # in the same state on every rank
    objective = zograd.zero_order(
        method="antithetic", num_samples=24, sigma=0.3, evaluator=evaluator, generator=generator
    )(loss)
    weights = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    before = landing_speed(weights)
    with zograd.Tracker() as tracker:
        for _ in tqdm(range(options.steps), unit="step", disable=rank > 0):
            optimizer.zero_grad()
            objective(weights).backward()
            optimizer.step()
    after = landing_speed(weights)

    checksum = hashlib.sha256(bytes(weights.detach().view(torch.uint8).tolist())).hexdigest()[:16]
    everyone = [None] * ranks
    dist.all_gather_object(everyone, (tracker.evaluations, checksum))
    if rank == 0:
        print(f"touchdown at {before:.1f} m/s before, at {after:.2f} m/s after training; {ranks} ranks flew", end=" ")
        print(f"{' + '.join(str(count) for count, _ in everyone)} times 5; parameters {checksum}")
    dist.destroy_process_group()
    assert {other for _, other in everyone} == {checksum}, everyone
    assert after < 4 < before, (before, after)


if __name__ == "__main__":
    main()
