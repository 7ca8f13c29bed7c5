"""Evolution strategies for reinforcement learning: balance a pole, on one process and on two with the same bits.

Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning" (arXiv:1703.03864):
antithetic pairs that begin their episodes alike, centered ranks of the returns, Adam with weight decay. The policy is a
network of 4, 16 and 2 units (114 parameters) on CartPole-v1. Two ranks of torch.distributed then train seed 0 again:
they exchange the returns and a few digests, and end with the parameters of one process, bit for bit.
"""

import functools
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from tasks.report import Report, parser
from zograd import Tracker, zero_order
from zograd.contrib.rl import Episodes
from zograd.evaluators import Distributed
from zograd.shaping import centered_ranks

try:
    import gymnasium
    import numpy as np
    from matplotlib.figure import Figure

    from tasks import picture
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install gymnasium matplotlib`.") from error

PAIRS, SIGMA, RATE, DECAY = 16, 0.1, 0.05, 0.005
BUDGET, TARGET = 250_000, 495  # environment steps, all of them counted but those of the tests; mean of 20 episodes
TESTS = range(10_000, 10_020)  # seeds of the test episodes
SHORT = 40  # updates of the run on two processes


def network(params):
    w1, b1, w2, b2 = (p.numpy() for p in params)
    return lambda observation: int(np.argmax(np.tanh(observation @ w1 + b1) @ w2 + b2))


def first_parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 16), (16,), (16, 2), (2,)]
    return [0.1 * torch.randn(shape, generator=generator) * (len(shape) > 1) for shape in shapes]


def train(seed, evaluator="loop", updates=None, bar=None):
    """Parameters, steps and test returns every fifth update, and evaluations; to the target, or for so many updates."""
    episodes = Episodes(functools.partial(gymnasium.make, "CartPole-v1"), network)
    loss = zero_order(
        method="antithetic",
        num_samples=PAIRS,
        sigma=SIGMA,
        shaping=centered_ranks,
        evaluator=evaluator,
        generator=torch.Generator().manual_seed(seed),
    )(episodes)
    params = [p.requires_grad_() for p in first_parameters(seed)]
    # The paper's code leaves 1/sigma out of the gradient, to which the decay is added; here it is in.
    optimizer = torch.optim.Adam(params, lr=RATE, weight_decay=DECAY / SIGMA)
    curve, update = [], 0
    with Tracker() as tracker:
        while (update < updates) if updates else (episodes.steps < BUDGET and (not curve or curve[-1][1] < TARGET)):
            optimizer.zero_grad()
            loss(params).backward()
            optimizer.step()
            update += 1
            if not updates and (update % 5 == 0 or episodes.steps >= BUDGET):
                trained, detached = episodes.steps, [p.detach() for p in params]
                tested = sum(episodes.returns(detached, TESTS)) / len(TESTS)
                episodes.steps = trained
                curve.append((trained, tested))
                bar.set_postfix_str(f"return {tested:.0f}", refresh=False)
                bar.update(trained - bar.n)
    return [p.detach() for p in params], curve, tracker.evaluations


def one_rank(path, updates):
    """What each of two processes does: train, count the bytes it sends, and write down what it has."""
    dist.init_process_group("gloo")
    sent, send = [0], dist.all_gather

    def counting(everyone, mine, group=None):
        sent[0] += mine.numel() * mine.element_size()
        return send(everyone, mine, group=group)

    dist.all_gather = counting
    params, _, evaluations = train(0, Distributed(timeout=120), updates)
    torch.save((params, sent[0], evaluations), f"{path}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


def two_processes(updates):
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        options = [__file__, "--as-rank", folder, "--updates", str(updates)]
        subprocess.run([*launcher, *options], check=True, capture_output=True)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def checksum(params):
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in params)).hexdigest()[:12]


def save_picture(path, curves):
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for (seed, curve), color in zip(curves.items(), ("#0072B2", "#D55E00", "#009E73") * 9, strict=False):
        ax.plot(*zip(*curve, strict=True), ".-", color=color, label=f"seed {seed}")
    ax.axhline(TARGET, color="gray", linewidth=0.8, linestyle="--")
    ax.set(xlabel="environment steps", ylabel="return, mean of 20 test episodes", title="CartPole-v1, 114 parameters")
    ax.legend()
    picture.save(figure, path, dpi=90)


def main():
    options = parser(__doc__, "es_rl")
    options.add_argument("--as-rank", help="a folder: be one of two processes (used by the script itself)")
    options.add_argument("--updates", type=int, default=SHORT)
    options = options.parse_args()
    torch.set_num_threads(1)
    if options.as_rank:
        return one_rank(options.as_rank, options.updates)
    global BUDGET
    BUDGET, updates = (2000, 2) if options.quick else (BUDGET, options.updates)
    seeds, report, curves, counts = options.seeds[: 1 if options.quick else None], Report("es_rl", options), {}, []
    for seed in seeds:
        with tqdm(total=BUDGET, desc=f"seed {seed}", unit=" steps") as bar:
            _, curves[seed], evaluations = train(seed, bar=bar)
            counts.append(evaluations)
    mean = sum(counts) / len(counts)
    report.row("steps to a test return of 495", "143k to 215k (numpy)", [c[-1][0] for c in curves.values()], mean)
    report.row("test return there, mean of 20 episodes", "500 (numpy)", [c[-1][1] for c in curves.values()], mean)
    alone, _, evaluations = train(0, updates=updates)
    ranks = two_processes(updates)
    report.row(
        "two processes: differing bits", "0", float(len({checksum(alone), *(checksum(r[0]) for r in ranks)}) - 1)
    )
    report.row("two processes: bytes a rank sends in an update", "returns only", ranks[0][1] / updates)
    report.row("two processes: evaluations of the two", f"{evaluations}", sum(r[2] for r in ranks))
    save_picture(options.output, curves)
    report.finish()
    print(f"saved {options.output}")
    assert all(checksum(rank[0]) == checksum(alone) for rank in ranks)
    if not options.quick:
        assert all(steps <= BUDGET and tested >= TARGET for ((steps, tested),) in (c[-1:] for c in curves.values()))
    return None


if __name__ == "__main__":
    main()
