"""Evolution strategies on several processes: land a rocket whose engine is either on or off.

    torchrun --nproc_per_node 2 examples/torchrun_es.py

Each rank flies its share of the perturbed pilots; the ranks exchange 8 bytes for each, sum the same directions in the
same order, and so move the same parameters by the same bits: the checksum at the end is that of one process, whatever
the number of ranks. Without torchrun the script is that one process.
"""

import hashlib
import random

import torch
import torch.distributed as dist
from tqdm import tqdm

import zograd
from tasks.report import Report, arguments

try:
    from matplotlib.figure import Figure

    from tasks import picture
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install matplotlib`.") from error

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


def train(seed, steps, hidden):
    """The weights, the touchdown speed on unseen flights after every fifth step, and this rank's evaluations."""
    evaluator = zograd.evaluators.Distributed(timeout=60)  # a rank that dies ends the others within a minute
    generator = torch.Generator().manual_seed(seed)  # in the same state on every rank
    objective = zograd.zero_order(
        method="antithetic", num_samples=24, sigma=0.3, evaluator=evaluator, generator=generator
    )(loss)
    weights = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    curve = [(0, landing_speed(weights))]
    with zograd.Tracker() as tracker:
        for step in tqdm(range(1, steps + 1), f"seed {seed}", unit="step", disable=hidden):
            optimizer.zero_grad()
            objective(weights).backward()
            optimizer.step()
            if step % 5 == 0 or step == steps:
                curve.append((step, landing_speed(weights)))
    return weights.detach(), curve, tracker.evaluations


def save_picture(path, curves):
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for seed, curve in curves.items():
        ax.plot(*zip(*curve, strict=True), label=f"seed {seed}")
    ax.set(xlabel="steps", ylabel="touchdown speed in m/s, mean of 100 flights", yscale="log")
    ax.legend()
    picture.save(figure, path, dpi=90)


def main():
    options = arguments(__doc__, "torchrun_es")
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    steps, seeds = (5, options.seeds[:1]) if options.quick else (100, options.seeds)
    report, curves, digest, counts = Report("torchrun_es", options), {}, hashlib.sha256(), []
    for seed in seeds:
        weights, curves[seed], evaluations = train(seed, steps, hidden=rank > 0)
        digest.update(bytes(weights.view(torch.uint8).tolist()))
        counts.append(evaluations)
    everyone = [None] * ranks
    dist.all_gather_object(everyone, (digest.hexdigest()[:16], counts[0]))
    dist.destroy_process_group()
    assert len({checksum for checksum, _ in everyone}) == 1, everyone
    total = sum(count for _, count in everyone)
    report.row("touchdown speed before, m/s", "", [curve[0][1] for curve in curves.values()], total)
    report.row("touchdown speed after, m/s", "below 4", [curve[-1][1] for curve in curves.values()], total)
    if rank == 0:
        save_picture(options.output, curves)
        report.finish()
        each = " + ".join(str(count) for _, count in everyone)
        print(f"{each} evaluations by {ranks} rank{'s' * (ranks > 1)}; checksum of the parameters {everyone[0][0]}")
    if not options.quick:
        assert all(curve[-1][1] < 4 < curve[0][1] for curve in curves.values()), curves


if __name__ == "__main__":
    main()
