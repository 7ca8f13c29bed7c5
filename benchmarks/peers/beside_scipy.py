"""zograd beside ``approx_derivative`` of scipy, which its minimizers use where no gradient is given."""

import sys

import numpy as np
import torch
from checks import checks, raised, told
from scipy.optimize._numdiff import approx_derivative

import zograd

PEER, PACKAGE = "scipy", "scipy"
CHECKS, check = checks()


def ours(fn, distribution=None, num=100, sigma=0.1, **options):
    return zograd.zero_order(distribution, "antithetic", num_samples=num, sigma=sigma, **options)(fn)


@check("a staircase, the sum of round(4 x) / 4, settings left alone: the slope, which is 1 on the whole")
def staircase():
    def steps(x):
        return (np.round(4 * x) / 4).sum()

    a, wide = (float(approx_derivative(steps, np.full(1, 0.3), abs_step=h)[0]) for h in (None, 1.0))
    b = zograd.zero_order(method="antithetic", num_samples=1000, seed=0)(lambda x: (torch.round(4 * x) / 4).sum())
    b = b.estimate(torch.full((1,), 0.3)).grad.item()
    return f"{a:.2f}; {wide:.2f} with `abs_step=1`", f"{b:.2f} (sigma is 1)", a == 0 and abs(b - 1) < 0.2


@check("f(x) = sum(x) with noise of deviation 1e-3, 10 parameters, settings left alone: greatest error of an entry")
def noise():
    source = np.random.default_rng(0)

    def error(step):
        return np.abs(
            approx_derivative(lambda x: x.sum() + 1e-3 * source.normal(), np.zeros(10), abs_step=step) - 1
        ).max()

    a, wide = error(None), error(1.0)
    fn = zograd.zero_order(method="antithetic", num_samples=1000, seed=0)(lambda x: x.sum() + 1e-3 * source.normal())
    b = (fn.estimate(torch.zeros(10)).grad - 1).abs().max().item()
    return f"{a:.0f}; {wide:.4f} with `abs_step=1`", f"{b:.2f} (sigma is 1, 2001 evaluations)", a > 10 and wide < b < 1


@check("fn gives nan at one point")
def nan():
    def broken(x):
        return float("nan") if x[3] > 0 else x.sum()

    a = int(np.isnan(approx_derivative(broken, np.zeros(10))).sum())
    b = raised(lambda: ours(broken, zograd.distributions.Coordinate(), num=None).estimate(torch.zeros(10)))
    return f"{a} of 10 entries nan, no word", str(b), a >= 1 and b == "NonFiniteError"


@check("1000 parameters: the least number of evaluations that gives some gradient")
def evaluations():
    calls = []
    approx_derivative(lambda x: calls.append(1) or x.sum(), np.zeros(1000), method="2-point")
    estimate = ours(lambda x: x.sum(), num=1, seed=0).replace(method="forward").estimate(torch.zeros(1000))
    cosine, b = torch.cosine_similarity(estimate.grad, torch.ones(1000), dim=0), estimate.evaluations
    return f"{len(calls)}, all exact", f"{b}, of a cosine of {cosine:.2f}", len(calls) == 1001 and b == 2


@check("central differences of sin with a step of 1e-4, 10 parameters: greatest difference between the two")
def central():
    x = np.linspace(-1, 1, 10)
    a = approx_derivative(lambda x: np.sin(x).sum(), x, method="3-point", abs_step=1e-4)
    b = ours(lambda x: x.sin().sum(), zograd.distributions.Coordinate(), num=None, sigma=1e-4)
    b = b.estimate(torch.from_numpy(x)).grad.numpy()
    gap = np.abs(a - b).max()
    return f"{gap:.0e}", "the same", gap < 1e-10


@check("an analytic function, sin at 1: the best relative error")
def complex_step():
    def error(g):
        return abs(float(g) / np.cos(1.0) - 1)

    a = error(approx_derivative(lambda x: np.sin(x).sum(), np.ones(1), method="cs")[0])
    fn = ours(lambda x: x.sin().sum(), zograd.distributions.Coordinate(), num=None, sigma=1e-3)
    x = torch.ones(1, dtype=torch.float64)
    b = error(fn.replace(method="fourth_order").estimate(x).grad)
    return f"{a:.0e} by complex steps: better", f"{b:.0e} by `fourth_order`", a < b


@check("100 residuals, each of three neighbors, the pattern known: evaluations of a whole Jacobian")
def sparse():
    calls = []

    def residuals(x):
        calls.append(1)
        return x + np.roll(x, 1) + np.roll(x, -1)

    pattern = np.eye(100) + np.roll(np.eye(100), 1, axis=1) + np.roll(np.eye(100), -1, axis=1)
    approx_derivative(residuals, np.zeros(100), method="2-point", sparsity=pattern)
    fn = ours(lambda x: x + x.roll(1) + x.roll(-1), zograd.distributions.Coordinate(), num=None)
    b = fn.replace(method="forward").estimate(torch.zeros(100)).evaluations
    return f"{len(calls)}: better", str(b), len(calls) < 10 < b


def main():
    return told([check() for check in CHECKS], PEER)


if __name__ == "__main__":
    sys.exit(not main())
