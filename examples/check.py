"""Look at an objective before trusting its gradient: which sigma, how many directions, which evaluator.

The objective is a loss in float32 with a large level, as simulators have them: differences over a small sigma drown in
rounding, and over a large one in curvature. `zograd.check` shows where both begin, and what lies between.
"""

import argparse

import torch

import zograd

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install matplotlib`.") from error


def loss(x):
    slope = torch.linspace(1.0, 2.0, len(x))
    return 1000 + (slope * (3 * x).sin()).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figure", default="check.png", help="where the picture goes")
    figure_path = parser.parse_args().figure

    x = torch.linspace(-1, 1, 20)
    report = zograd.check(loss, x, budget=4000)
    print(report)

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    report.plot(figure.subplots())
    figure.savefig(figure_path, dpi=120)

    s = report.suggestion
    fn = zograd.zero_order(method=s.method, sigma=s.sigma, num_samples=s.num_samples, evaluator=s.evaluator)(loss)
    truth = torch.func.grad(loss)(x)
    torch.manual_seed(0)
    cosines = torch.stack([torch.cosine_similarity(fn.estimate(x).grad, truth, dim=0) for _ in range(100)])
    print(f"cosine with autograd's gradient, mean of 100 estimates: {cosines.mean():.3f}")
    assert 0.86 < cosines.mean() < 0.94


if __name__ == "__main__":
    main()
