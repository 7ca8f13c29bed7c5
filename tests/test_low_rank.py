"""Low-rank directions: the factored points are the dense ones, on modules as they are."""

import copy

import pytest
import torch
from torch import nn

import zograd
from problems import Directions
from zograd import ZeroOrderWarning, zero_order
from zograd._base.trees import Space
from zograd.distributions import LowRank
from zograd.distributions.factored import Factored
from zograd.nn import ZeroOrder

torch.manual_seed(0)
X, IMAGES, SEQUENCE = torch.randn(3, 6), torch.randn(2, 2, 8, 8), torch.randn(4, 2, 8)
TOKENS = torch.tensor([[1, 2, 3], [0, 5, 1]])


class Loss(nn.Module):
    """A smooth value of a module's output; the module is as its author wrote it."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        out = self.module(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        return (out.double() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sin().sum()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        return self.out(self.embedding(tokens).tanh())


class Uses(nn.Module):
    def __init__(self, use, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x):
        return self.use(x, self.weight)


def edited(x, w):
    w = w.clone()
    w[0] += 1
    return x @ w.t()


def edited_in_place(x, w):
    before = x @ w.t()
    w[0].mul_(2)
    w.T[1].add_(1)
    return torch.cat([before, x @ w.t(), nn.functional.linear(x, w)])


USES = {
    "T": lambda x, w: x @ w.T,
    "t": lambda x, w: x.mm(w.t()),
    "mT": lambda x, w: torch.matmul(x, w.mT),
    "transpose": lambda x, w: x @ w.transpose(0, 1),
    "T twice": lambda x, w: nn.functional.linear(x, w.T.T),
    "permute": lambda x, w: x @ w.permute(1, 0),
    "left": lambda x, w: w @ x.t(),
    "left of a vector": lambda x, w: w @ x[0],
    "right of a vector": lambda x, w: x[0] @ w.t(),
    "mv": lambda x, w: torch.mv(w, x[0]),
    "slicing": lambda x, w: x[:, :2] @ w[:, :2].t() + w[1:2, :1],
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "addmm": lambda x, w: torch.addmm(x[0, :5], x, w.t()),
    "elementwise": lambda x, w: (x.unsqueeze(1) * w).sum(2),
    "gram": lambda x, w: w @ w.t(),
    "norm": lambda x, w: x @ (w / w.norm()).t(),
    "data": lambda x, w: x @ w.data.t() + w.detach().sum(),
    "stack": lambda x, w: torch.stack([w, w]).sum(0) @ x.t(),
    "shape": lambda x, w: x @ w.view(w.shape[0], w.size(1)).t() * w.dim() * len(w),
    "bilinear": lambda x, w: nn.functional.bilinear(x, x, w.unsqueeze(2).expand(-1, -1, 6)),
    "matmul by keyword": lambda x, w: torch.matmul(input=x, other=w.t()),
    "mm by keyword": lambda x, w: torch.mm(input=x, mat2=w.t()) + x.mm(mat2=w.t()),
    "mv by keyword": lambda x, w: torch.mv(w, vec=x[0]) + torch.mv(input=w, vec=x[1]),
    "transpose by keyword": lambda x, w: x @ torch.transpose(w, dim0=0, dim1=1) + x @ w.transpose(dim0=0, dim1=1),
    "t by keyword": lambda x, w: x @ torch.t(input=w),
    "linear by keyword": lambda x, w: nn.functional.linear(input=x, weight=w, bias=x[0, :5]),
    "edited": edited,
    "edited in place": edited_in_place,
}
MODULES = {
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)), X),
    "sequence": lambda: (nn.Linear(8, 5), SEQUENCE),
    "cnn": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        IMAGES,
    ),
    "padded cnn": lambda: (nn.Conv2d(2, 3, 3, padding="same", dilation=2), IMAGES),
    "circular cnn": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), IMAGES),
    "conv1d": lambda: (nn.Conv1d(2, 3, 4), IMAGES.flatten(2)),
    "conv1d without a batch": lambda: (nn.Conv1d(2, 3, 4), IMAGES[0].flatten(1)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2), IMAGES.unsqueeze(2).expand(-1, -1, 3, -1, -1)),
    "transposed": lambda: (nn.ConvTranspose2d(2, 3, 2), IMAGES),
    "transformer, eval": lambda: (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).eval(), SEQUENCE),
    "transformer, train": lambda: (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), SEQUENCE),
    "attention": lambda: (nn.MultiheadAttention(8, 2), SEQUENCE, SEQUENCE, SEQUENCE),
    "cross-attention": lambda: (nn.MultiheadAttention(8, 2), SEQUENCE, SEQUENCE[:2], SEQUENCE[:2]),
    "embedding": lambda: (nn.Embedding(6, 4, padding_idx=1), TOKENS),
    "bag": lambda: (nn.EmbeddingBag(6, 4), TOKENS),
    "tied": lambda: (Tied(), TOKENS),
    "normalized": lambda: (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)), X),
    "bilinear layer": lambda: (nn.Bilinear(6, 6, 3), X, X),
    **{f"use: {name}": lambda use=use: (Uses(use, 5, 6), X) for name, use in USES.items()},
}


def estimates(module, inputs, **options):
    """By shared products and by dense points."""
    options = {"method": "antithetic", "num_samples": 5, "sigma": 0.1, "seed": 3, **options}
    return [
        ZeroOrder(Loss(copy.deepcopy(module)), evaluator=evaluator, **options).estimate(*inputs)  # forward may edit it
        for evaluator in (zograd.evaluators.Vmap(3), zograd.evaluators.Loop())
    ]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's, of attention with masks
@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_shared_products_are_the_dense_ones(name, dtype, rank):
    torch.manual_seed(1)
    module, *inputs = MODULES[name]()
    module = module.to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    shared, exact = estimates(module, inputs, distribution=LowRank(rank))
    precision = 1e-5 if dtype == torch.float32 else 1e-12
    scale = float(exact.coefficients.abs().max())
    torch.testing.assert_close(
        shared.coefficients, exact.coefficients, rtol=precision, atol=precision * (1 + 10 * scale)
    )
    for key, gradient in exact.grad.items():
        wanted = float(gradient.abs().max())
        torch.testing.assert_close(shared.grad[key], gradient, rtol=0, atol=10 * precision * (wanted + 1))
    assert scale > 1e-3


MASKS = {
    "float": torch.randn(4, 4),
    "bool": torch.ones(4, 4).triu(1).bool(),
    "by head": torch.randn(4, 4, 4),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_attention_with_masks(mask, weights):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            how = {"attn_mask": MASKS.get(mask), "need_weights": weights}
            out, probabilities = self.attention(x, x, x, **how)
            return out.sum() + (probabilities.square().sum() if weights else 0)

    shared, exact = estimates(Attention(), [SEQUENCE], distribution=LowRank())
    torch.testing.assert_close(shared.coefficients, exact.coefficients, rtol=1e-4, atol=1e-5)


BLIND = torch.arange(4).view(4, 1).eq(0).expand(4, 4)  # the first sees nothing


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("mask", [BLIND, torch.zeros(4, 4).masked_fill(BLIND, -torch.inf)], ids=["bool", "float"])
def test_attention_of_a_row_that_sees_nothing(mask):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.layer(x, x, x, attn_mask=mask, need_weights=False)[0]

    shared, exact = estimates(Attention(), [SEQUENCE], distribution=LowRank())
    torch.testing.assert_close(shared.coefficients, exact.coefficients, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_attention_with_padding_falls_back():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

        def forward(self, x):
            return self.layer(x, src_key_padding_mask=torch.tensor([[False] * 3 + [True], [False] * 4]))

    shared, exact = estimates(Padded(), [SEQUENCE], distribution=LowRank())
    torch.testing.assert_close(shared.coefficients, exact.coefficients, rtol=1e-4, atol=1e-5)


def test_linear_layers_do_not_make_the_sum(monkeypatch):
    monkeypatch.setattr(Factored, "sum_of_parts", lambda self: pytest.fail("dense"))
    for name in ("mlp", "sequence", "conv1d", "attention", "transformer, train", "tied", "use: T twice", "use: mv"):
        module, *inputs = MODULES[name]()
        ZeroOrder(Loss(module), LowRank(), "antithetic", 4, 0.1, evaluator="vmap").estimate(*inputs)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_name_the_loop(layer):
    module = layer(8, 5)
    with pytest.raises(RuntimeError, match=r'cannot be vectorized by `evaluator="vmap"`: use `evaluator="loop"`'):
        ZeroOrder(Loss(module), LowRank(), evaluator="vmap").estimate(SEQUENCE)
    assert ZeroOrder(Loss(module), LowRank(), evaluator="loop").estimate(SEQUENCE).grad


def test_half_precision_modules():
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    shared, exact = estimates(module, [X.bfloat16()], distribution=LowRank(), sigma=0.5)
    torch.testing.assert_close(shared.coefficients, exact.coefficients, rtol=0.1, atol=0.2)
    assert shared.grad["module.module.0.weight"].dtype == torch.bfloat16


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("value", [lambda w: w.tanh().sum(), lambda w: nn.functional.embedding(TOKENS, w).tanh().sum()])
def test_points_are_in_full_precision_under_autocast(value, rank):
    options = {"method": "antithetic", "num_samples": 4, "sigma": 1e-2, "seed": 0}
    params = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    plain = zero_order(LowRank(rank), **options)(value).estimate(params)
    for evaluator in ("loop", "vmap"):
        with autocast():
            estimate = zero_order(LowRank(rank), evaluator=evaluator, **options)(value).estimate(params)
        torch.testing.assert_close(estimate.coefficients, plain.coefficients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_shared_products_have_the_dtype_of_autocast(rank):
    def fn(w):
        out = nn.functional.linear(X, w)
        room = torch.zeros_like(out, dtype=torch.bfloat16)
        room[[0, 1]] = out[:2]  # refuses another dtype
        return room.float().sum()

    fn = zero_order(LowRank(rank), num_samples=2, evaluator="vmap")(fn)
    with autocast():
        assert fn.estimate(torch.randn(5, 6)).grad.isfinite().all()


def test_a_function_of_tensors_and_frozen_ones():
    frozen = torch.randn(6, 8)

    def fn(params, x):
        return (x @ frozen @ params["w"]).square().mean() + params["b"].sum()

    params = {"w": torch.randn(8, 3), "b": torch.randn(3)}
    options = {"method": "forward", "num_samples": 6, "sigma": 0.1, "seed": 1}
    found = [zero_order(LowRank(2), evaluator=e, **options)(fn).estimate(params, X) for e in ("vmap", "loop", "vmap")]
    torch.testing.assert_close(found[0].grad["w"], found[1].grad["w"], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[0].grad["w"], found[2].grad["w"])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_covariance_is_the_identity(rank):
    space = Space.of((torch.zeros(4, 3), torch.zeros(2), torch.zeros(3, 2, 2)))
    directions = Directions(LowRank(rank), space, 11, 200_000)
    covariance, fourth = torch.zeros(26, 26), torch.zeros(26)
    zeros = tuple(torch.zeros(shape) for shape in space.shapes)
    for lo, hi in directions.blocks():
        parts = directions.distribution.parts(space, directions.noise(lo, hi))
        eps = torch.cat([p.flatten(1) for p in directions.distribution.shift(space, zeros, parts, (1.0,) * 3)], dim=1)
        covariance += eps.t() @ eps / 200_000
        fourth += eps.pow(4).sum(0) / 200_000
    # The variance of a product of two entries is at most 9 (rank 1), so a standard error is below 0.007; 676 entries
    # within 6 of them: a false alarm once in a million.
    torch.testing.assert_close(covariance, torch.eye(26), rtol=0, atol=0.045)
    # E eps^4 = 3 + 6 / rank for a matrix entry, 3 for the dense leaf: the family is what it says.
    kurtosis = torch.full((26,), 3 + 6 / rank)
    kurtosis[12:14] = 3
    torch.testing.assert_close(fourth, kurtosis, rtol=0.15, atol=0)


def test_sums_and_dots_are_those_of_the_dense_directions():
    space = Space.of((torch.zeros(4, 3), torch.zeros(2), torch.zeros(()), torch.zeros(0, 3), torch.zeros(3, 2, 2)))
    family, c, v = LowRank(2), torch.randn(9, 1), torch.randn(27)
    directions = Directions(family, space, 3, 9)
    noise = directions.noise(0, 9)
    zeros = tuple(torch.zeros(shape) for shape in space.shapes)
    moved = family.shift(space, zeros, family.parts(space, noise), (1.0,) * 5)
    eps = torch.cat([p.reshape(9, -1) for p in moved], dim=1)
    torch.testing.assert_close(family.add_sum(space, noise, c, None), (c * eps).sum(0))
    torch.testing.assert_close(family.add_sum(space, noise, c, v.clone()), v + (c * eps).sum(0))
    torch.testing.assert_close(family.dot(space, noise, v), (eps @ v).unsqueeze(1))


@pytest.mark.parametrize("value", [torch.ops.aten.sum, lambda w: torch.ops.aten.mul(w, 2.0).sum()])
def test_what_gets_past_the_rules_is_an_error_or_right(value):
    f = zero_order(LowRank(), num_samples=3, evaluator="vmap", seed=1)(value)
    exact = f.replace(evaluator="loop").estimate(torch.ones(3, 4)).coefficients
    try:
        outcome = f.estimate(torch.ones(3, 4)).coefficients
    except RuntimeError as error:
        outcome = str(error)
    assert 'use `evaluator="loop"`' in outcome if isinstance(outcome, str) else torch.allclose(outcome, exact)


def test_the_sum_of_directions_never_holds_a_dense_one():
    space = Space.of((torch.zeros(512, 512),))
    directions = Directions(LowRank(), space, 3, 64)
    assert directions.block == 64
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        directions.add_sum(0, torch.ones(64, 1), None)
    assert max(sizes) == 512 * 512  # the sum itself; the directions would be 64 times that


def test_a_rank_above_the_smaller_dimension_is_warned_of():
    f = zero_order(LowRank(rank=5))(lambda w: w.sum())
    with pytest.warns(
        ZeroOrderWarning, match=r"`LowRank\(rank=5\)` is above the smaller dimension of a leaf of shape \(7, 4\), 4"
    ):
        f.estimate(torch.zeros(7, 4))


@pytest.mark.parametrize(
    ("rank", "error", "says"),
    [
        (0, ValueError, "at least 1, got 0"),
        (1.5, TypeError, "an int, got float 1.5"),
        (True, TypeError, "an int, got bool True"),
    ],
)
def test_the_rank_is_checked(rank, error, says):
    with pytest.raises(error, match=rf"`LowRank\(rank=...\)` must be {says}"):
        LowRank(rank)


def test_slices_are_refused_before_fn_is_called():
    f = zero_order(LowRank(), batch_dim=0)(lambda x: pytest.fail("called"))
    with pytest.raises(
        ValueError, match=r"`zero_order\(LowRank\(rank=1\), batch_dim=0\)`: LowRank has no form by slices"
    ):
        f.estimate(torch.zeros(3, 4))


def test_settings_make_it_what_it_is():
    assert LowRank(2) == LowRank(2) != LowRank(1)
    assert repr(LowRank(2)) == "LowRank(rank=2)"
    assert len({LowRank(1), LowRank(1)}) == 1


@pytest.mark.parametrize("num", [1, 40])
def test_the_gradient_does_not_depend_on_the_chunk(num):
    def values(x):  # equal values whatever the chunk
        return x.round().sum()

    first, *rest = [
        zero_order(LowRank(), "antithetic", (0,), num, 1.0, evaluator=zograd.evaluators.Vmap(c), seed=2)(
            values
        ).estimate(torch.zeros(30, 40))
        for c in (1, 7, 40)
    ]
    for other in rest:
        assert torch.equal(other.coefficients, first.coefficients)
        assert torch.equal(other.grad, first.grad)


@pytest.mark.parametrize(("shape", "num"), [((40, 30), 2000), ((2000, 1500), 50), ((40_000, 100), 50)])
def test_every_tile_of_blocks_of_many_rows_has_a_stream_of_its_own(shape, num, monkeypatch):
    tiles = []
    monkeypatch.setattr(
        LowRank, "fill", lambda _, out, generator: tiles.append((generator.initial_seed(), out.numel()))
    )
    space = Space.of((torch.empty(shape),))
    directions = Directions(LowRank(), space, 3, num)
    assert directions.block * sum(shape) <= max(2**16, space.size)
    for lo, hi in directions.blocks():
        directions.noise(lo, hi)
    assert len({key for key, _ in tiles}) == len(tiles)
    assert sum(length for _, length in tiles) == num * sum(shape)


def test_a_block_of_a_large_matrix_is_summed_in_one_product():
    directions = Directions(LowRank(), Space.of((torch.empty(40_000, 100),)), 3, 40)
    assert [hi - lo for lo, hi in directions.blocks()] == [16, 16, 8]
    # A block holds no more than the parameters do.
    assert Directions(LowRank(), Space.of((torch.empty(40_000, 2), torch.empty(90_000))), 3, 40).block == 1
