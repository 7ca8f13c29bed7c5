"""Fit a simulator that is another program, crashes now and then and is sometimes slow; kill this script at any time.

The program throws a ball through wind and drag and prints where it bounces. It is run by `subprocess`, ends with an
error in 4 of 100 runs and takes ten times as long in 30 of 100. Four threads wait for it, failed runs are made again,
and every value is in a journal as soon as it is there: after `kill -9`, start the script again, and it goes on where it
stopped, with the same numbers in the end. A bar of tqdm shows how many runs there were, and how fast.
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import zograd
from zograd.evaluators import Journal, Pool
from zograd.failures import Retry

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install matplotlib`.") from error

PROGRAM = """
import math, os, sys, time

angle, speed, spin = map(float, sys.argv[1:4])
luck = os.urandom(2)
time.sleep(0.03 if luck[0] < 77 else 0.003)  # three in ten runs take ten times as long
if luck[1] < 10:
    os.abort()  # and four in a hundred end here
x, y, vx, vy, path = 0.0, 1.0, speed * math.cos(angle), speed * math.sin(angle), []
for step in range(400):
    drag = 0.02 * math.hypot(vx, vy)
    vx, vy = vx + 0.01 * (-drag * vx - spin * vy - 0.3), vy + 0.01 * (-drag * vy + spin * vx - 9.81)
    x, y = x + 0.01 * vx, y + 0.01 * vy
    if y < 0:  # it bounces, and loses some speed
        y, vx, vy = -y, 0.8 * vx, -0.7 * vy
    path.append((round(x, 3), round(y, 3)))
    if abs(vy) < 0.3 and y < 0.05:
        break
print(" ".join(f"{a},{b}" for a, b in path))
"""
TARGET = 9.0  # meters, where the ball should come to rest
CLEAR = (4.0, 2.5)  # a wall on the way: so far away, so high
START = (0.3, 6.0, 0.0)


def run(program, throw):
    """Where the ball is, step by step."""
    command = [sys.executable, "-S", "-E", program, *map(str, throw.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [tuple(map(float, pair.split(","))) for pair in done.stdout.split()]


def miss(throw, program):
    """How far it rests from the target, and how much it lacks at the wall; no derivative anywhere."""
    return judged(run(program, throw))


def judged(path):
    height = max((y for x, y in path if abs(x - CLEAR[0]) < 0.1), default=0.0)
    return abs(path[-1][0] - TARGET) + 2 * max(0.0, CLEAR[1] - height)


def train(options, program):
    throw = torch.tensor(START, requires_grad=True)
    optimizer = torch.optim.Adam([throw], lr=0.15, betas=(0.8, 0.99))
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, options.steps)  # a straight line to zero
    misses = []
    with ThreadPoolExecutor(4) as threads, zograd.Tracker(progress=True) as tracker:
        loss = zograd.zero_order(
            method="antithetic",
            num_samples=options.samples,
            sigma=0.15,
            evaluator=Journal(Pool(threads, timeout=60), options.folder / "run.journal"),
            failures=Retry(5),  # the crashes have nothing to do with the throw
            generator=torch.Generator().manual_seed(options.seed),
        )(miss)
        for _ in range(options.steps):
            optimizer.zero_grad()
            value = loss(throw, program)
            value.backward()
            torch.nn.utils.clip_grad_norm_([throw], 5.0)
            optimizer.step()
            schedule.step()
            misses.append(value.item())
    return throw.detach(), misses, tracker


def same_again(program, throw):
    """The path of a throw, whatever crashes meanwhile."""
    while True:
        try:
            return run(program, throw)
        except subprocess.CalledProcessError:
            continue


def save_picture(path, program, throw, misses):
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values, color in (("first throw", torch.tensor(START), "#999999"), ("learned", throw, "#0072B2")):
        left.plot(*zip(*same_again(program, values), strict=True), color=color, label=name)
    left.plot([CLEAR[0]] * 2, [0, CLEAR[1]], color="#D55E00", linewidth=4, label="wall")
    left.plot([TARGET], [0], "k*", markersize=12, label="target")
    left.set(xlabel="meters", ylabel="height", title="a ball thrown by another program")
    left.legend()
    right.plot(misses, color="#0072B2")
    right.set(xlabel="step", ylabel="miss", title="what training sees", ylim=(0, None))
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("simulator-run"), help="for program, journal and picture")
    parser.add_argument("--output", type=Path, help="the picture (default: simulator.png in the folder)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=8, help="directions a step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    program = options.folder / "ball.py"
    program.write_text(PROGRAM, encoding="utf-8")
    throw, misses, tracker = train(options, str(program))
    picture = options.output or options.folder / "simulator.png"
    save_picture(picture, str(program), throw, misses)
    first, last = misses[0], judged(same_again(str(program), throw))
    print(f"miss {first:.2f} at first, {last:.2f} at the end; throw {[round(v, 5) for v in throw.tolist()]}")
    print(f"{tracker.evaluations} runs of the program, {tracker.failures} of them failed and were made again")
    print(f"picture: {picture}")
    if options.steps >= 60:
        assert last < first / 4, "the throw did not improve"


if __name__ == "__main__":
    main()
