"""Does any input give a wrong gradient, or an error that does not say what is wrong?

hypothesis makes calls of strange tensors (empty, 0-d, strided, expanded, sparse, duplicated, tied, of mixed dtypes,
with nan) and strange settings. What comes back is computed again from the definition, in float64; what is raised must
be a named error: of zograd, or a ValueError or TypeError that shows in backquotes what was typed.
"""

import collections
import random
import sys
import time
import warnings

import torch
from _record import arguments, write
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

import zograd
from zograd.schemes import SCHEMES

NAMED = (
    zograd.BudgetExceeded,
    zograd.JournalError,
    zograd.NonFiniteError,
    zograd.ReplayError,
    zograd.SecondDerivativeError,
    zograd.SharedStreamError,
)
SETTINGS = 8  # for each tree of tensors, since making one takes longer than a call
SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0), (1, 1, 2), (7,)]
DTYPES = [
    torch.float32,
    torch.float32,
    torch.float32,
    torch.float64,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.bool,
]
HALVES = (torch.float16, torch.bfloat16)
RADII = [1.0, 0.1, 1e-3, 10.0, 1e-8, 1e8, 1e30, 1e300, 1e-30, 1e-300, 5e-324, 0.0, -1.0]
ODD_RADII = [float("nan"), float("inf"), True, "0.1", None, [0.1], [0.1, 0.1], {"a": 0.1}, torch.tensor(0.1), 1, ()]
FORMS = ["plain", "strided", "transposed", "expanded", "a view"]
ODD_FORMS = ["sparse", "nan", "inf", "huge", "complex", "quantized"]


def mostly(usual, odd):
    """One of the usual values, or once in twenty times an odd one."""
    return st.integers(0, 19).flatmap(lambda k: st.sampled_from(odd if k == 0 else usual))


@st.composite
def tensors(draw):
    """One strange tensor."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    form = draw(mostly(FORMS, ODD_FORMS))
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if form == "strided":
        values = torch.randn((*shape, 2), generator=generator).to(dtype)[..., 0]
    elif form == "transposed":
        values = torch.randn(shape[::-1], generator=generator).to(dtype).permute(tuple(range(len(shape)))[::-1])
    elif form == "expanded":
        values = torch.randn((), generator=generator).to(dtype).expand(shape)
    elif form == "a view":
        values = torch.randn(20, generator=generator).to(dtype)[3 : 3 + values.numel()].view(shape)
    elif form == "sparse":
        values = values.to_sparse()
    elif form == "quantized":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = torch.quantize_per_tensor(values.float(), 0.1, 0, torch.qint8)
    elif form == "complex":
        values = values.to(torch.complex64)
    elif form in ("nan", "inf", "huge") and dtype.is_floating_point:
        values = values * float({"nan": "nan", "inf": "inf", "huge": "1e38"}[form])
    wanted = draw(st.sampled_from([None, True, False]))
    if wanted is not None and (values.is_floating_point() or values.is_complex()):
        values = values.detach().requires_grad_(wanted)
    return values


@st.composite
def trees(draw):
    """One to three tensors in a structure, maybe one of them twice, or two in the same memory."""
    leaves = draw(st.lists(tensors(), min_size=1, max_size=3))
    twist = draw(st.sampled_from(["none", "none", "none", "duplicated", "tied"]))
    if twist == "duplicated":
        leaves.append(leaves[0])
    elif twist == "tied" and leaves[0].layout == torch.strided and leaves[0].is_contiguous():
        leaves.append(leaves[0].detach().view(-1))
    structure = draw(st.sampled_from(["bare", "tuple", "list", "dict", "nested"]))
    if structure == "bare":
        return leaves[0]
    if structure == "dict":
        return dict(zip("abcd", leaves, strict=False))
    if structure == "nested":
        return {"a": leaves[:1], "b": (*leaves[1:], None, 3)}
    return tuple(leaves) if structure == "tuple" else leaves


def options(chance):
    """Settings, a few of them odd."""

    def mostly(usual, odd):
        return chance.choice(odd if chance.random() < 0.05 else usual)

    families = [None, zograd.distributions.Rademacher(), zograd.distributions.Sphere(), torch.randn]
    return {
        "method": mostly(list(SCHEMES), ["central", 3, None]),
        "num_samples": mostly([1, 2, 3, 5], [0, -1, True, 2.0, "3"]),
        "sigma": chance.choice(chance.choices([RADII[:4], RADII, ODD_RADII], [6, 3, 1])[0]),
        "evaluator": mostly(["loop", "vmap"], ["lop", zograd.evaluators.Loop, 3]),
        "distribution": mostly(families, [torch.distributions.Normal(0, 2), "normal", torch.rand(3)]),
        "argnums": mostly([0, (0,)], [(0, 1), 1, -1, (), "x"]),
        "batch_dim": mostly([None], [0, 1, -1, True]),
        "seed": mostly([0, 1, 2**63 - 1], [2**63, -1, 0.5]),
    }


def leaves_of(tree):
    """The floating tensors of a tree, in the order of the directions."""
    if isinstance(tree, torch.Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, dict):
        return [leaf for k in sorted(tree) for leaf in leaves_of(tree[k])]
    return [leaf for part in tree for leaf in leaves_of(part)] if isinstance(tree, (list, tuple)) else []


def objective(tree, other=None):
    """A sum over the leaves, neither symmetric nor linear."""
    total = torch.zeros((), dtype=torch.float64)
    for k, leaf in enumerate(leaves_of(tree)):
        total = total + (k + 1.0) * curve(leaf).sum()
    return total


def by_slices(tree, other=None):
    """The same for each slice along the first dimension."""
    parts = [curve(leaf) for leaf in leaves_of(tree)]
    return sum((k + 1.0) * (part.flatten(1).sum(dim=1) if part.dim() > 1 else part) for k, part in enumerate(parts))


def curve(leaf):
    """Its own failures would be no finding: where another argument is differentiated, the leaves may be sparse."""
    x = (leaf.to_dense() if leaf.layout != torch.strided else leaf).double()
    return x.sin() + 0.3 * x**2


def one_call(tree, settings, counts):
    """What came of a call: a right gradient, a named error, or what is wrong."""
    fn = by_slices if settings["batch_dim"] == 0 and settings["argnums"] in (0, (0,)) else objective
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", zograd.ZeroOrderWarning)
            decorated = zograd.zero_order(**settings)(fn)
            estimate = decorated.estimate(tree, torch.ones(2))
            grads = leaves_of(estimate.grad)
            out = decorated(tree, torch.ones(2))
            if out.requires_grad:
                out.sum().backward()
    except NAMED as error:
        counts[type(error).__name__] += 1
        return None
    except (TypeError, ValueError) as error:
        counts[type(error).__name__] += 1
        return None if "`" in str(error) else f"unnamed {error!r}"
    except Exception as error:
        return f"crash {error!r}"
    counts["checked"] += 1
    if settings["argnums"] == 1 or settings["batch_dim"] is not None or settings["argnums"] == (0, 1):
        counts["of these by slices or of other arguments: finite and in shape"] += 1
        wide = estimate.directions.space.dtype
        return None if all((torch.isfinite(g) | overflown(g, wide)).all() for g in grads) else "not finite"
    return compared(estimate, tree, settings)


def overflown(grad, wide):
    """Where the gradient, finite in the dtype of the computation, does not fit into a narrower leaf's own."""
    return grad.isinf() & (torch.finfo(grad.dtype).max < torch.finfo(wide).max)


def compared(estimate, tree, settings):
    """The gradient by the definition, from the directions."""
    leaves, directions = [leaf.detach() for leaf in leaves_of(tree)], estimate.directions
    scheme, sigma = SCHEMES[settings["method"]], estimate.sigma
    sizes = [leaf.numel() for leaf in leaves]
    dtype = directions.space.dtype
    wanted, scale = torch.zeros(sum(sizes), dtype=torch.float64), torch.zeros(sum(sizes), dtype=torch.float64)
    for i in range(len(directions)):
        eps = directions.noise(i, i + 1)[0][0].clone()
        values = []
        for c in scheme.offsets:
            moved = [
                torch.add(leaf.to(dtype), e.view(leaf.shape), alpha=c * s).to(leaf.dtype) if c else leaf
                for leaf, e, s in zip(leaves, eps.split(sizes), sigma, strict=True)
            ]
            values.append(objective(moved))
        coefficient = sum(w * v for w, v in zip(scheme.weights, values, strict=True))
        size = max(abs(float(v)) for v in values)
        tolerance = 1e-9 * size if estimate.coefficients.dtype == torch.float64 else 1e-4 * size
        if abs(float(estimate.coefficients[i] - coefficient)) > tolerance + 1e-300:
            return f"coefficient {i}: {float(estimate.coefficients[i])!r} for {float(coefficient)!r}"
        wanted += coefficient * eps.double()
        scale += (abs(coefficient) + tolerance) * eps.double().abs()
    radii = torch.cat([torch.full((n,), s, dtype=torch.float64) for n, s in zip(sizes, sigma, strict=True)])
    wanted, scale = (t / len(directions) / radii for t in (wanted, scale))
    got = torch.cat([g.double().reshape(-1) for g in leaves_of(estimate.grad)])
    eps = torch.cat([torch.full((leaf.numel(),), torch.finfo(leaf.dtype).eps, dtype=torch.float64) for leaf in leaves])
    tiny = torch.cat(
        [torch.full((leaf.numel(),), torch.finfo(leaf.dtype).tiny, dtype=torch.float64) for leaf in leaves]
    )
    limits = torch.cat(
        [torch.full((leaf.numel(),), torch.finfo(leaf.dtype).max, dtype=torch.float64) for leaf in leaves]
    )
    rounded = (got - wanted).abs() <= 20 * eps.clamp(min=1e-7) * scale + tiny
    too_large = got.isinf() & (wanted.abs() > limits)  # for the leaf's own dtype
    return None if bool((rounded | too_large).all()) else f"gradient {got.tolist()} for {wanted.tolist()}"


def main():
    """Run.

    Returns:
        The exit status.
    """
    told = arguments(__doc__, 100_000, "calls")
    started, counts, wrong = time.perf_counter(), collections.Counter(), collections.Counter()
    counts["calls"] = 0

    @seeded(told.seed)
    @settings(
        max_examples=-(-told.count // SETTINGS),
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(trees(), st.integers(0, 2**63 - 1))
    def every_call(tree, key):
        chance = random.Random(key)
        for _ in range(SETTINGS):
            counts["calls"] += 1
            chosen = options(chance)
            outcome = one_call(tree, chosen, counts)
            if outcome is not None:
                kind = outcome[:60]
                wrong[kind] += 1
                if wrong[kind] == 1:
                    print(f"{outcome[:400]}\n  {chosen}\n  {tree}", flush=True)

    every_call()
    return write(told, "random bad inputs: right answer or named error", dict(counts), sum(wrong.values()), started)


if __name__ == "__main__":
    sys.exit(main())
