"""Parameters replaced where they are used: the same numbers as with the module's parameters exchanged."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from zograd.optim.overlay import Overlay

X = torch.randn(3, 4)
SEQUENCE = torch.randn(2, 5, 8)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        weight = self.embedding.weight
        rest = weight.T[0] + weight[1:2, :1] + torch.einsum("ab->a", weight)
        return self.out(self.embedding(tokens)) + rest


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(3) for _ in range(3)])

    def forward(self):
        a, b, c = self.parts
        numbers = torch.tensor(a.tolist()) + torch.from_numpy(b.detach().numpy()) + float(c.sum()) + c.data
        return torch.stack(list(self.parts)).sum(0) + torch.cat([*self.parts])[:3] + sum(self.parts) + numbers


class Recomputed(nn.Sequential):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


CASES = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), X),
    "half": lambda: (nn.Linear(4, 2).bfloat16(), X.bfloat16()),
    "lstm": lambda: (nn.LSTM(8, 5, 2), SEQUENCE),
    "gru": lambda: (nn.GRU(8, 5), SEQUENCE),
    "convolutions": lambda: (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 2)), torch.randn(2, 2, 6)),
    "normalized": lambda: (nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4)), X),
    "embedding": lambda: (nn.Embedding(5, 3), torch.tensor([1, 2])),
    "tied": lambda: (Tied(), torch.tensor([1, 2, 3, 0, 1, 2])),
    "lists": lambda: (Lists(),),
    "attention": lambda: (nn.MultiheadAttention(8, 2), SEQUENCE, SEQUENCE, SEQUENCE),
    "transformer": lambda: (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3), SEQUENCE),
    "weight norm": lambda: (parametrizations.weight_norm(nn.Linear(4, 3)), X),
    "bilinear": lambda: (nn.Bilinear(4, 4, 2), X, X),
    "checkpointed": lambda: (Recomputed(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), X),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_module_with_other_parameters(case, train):
    torch.manual_seed(0)
    module, *inputs = CASES[case]()
    module.train(train)
    names, params = zip(*module.named_parameters(), strict=True)
    before = [p.detach().clone() for p in params]
    others = [p.detach() + torch.randn_like(p) for p in params]

    def run(how):
        torch.manual_seed(1)
        out = how()
        return (out[0] if isinstance(out, tuple) else out).detach()

    with torch.no_grad():
        wanted = run(lambda: functional_call(module, dict(zip(names, others, strict=True)), tuple(inputs)))
        with Overlay(params, others.__getitem__) as overlay:
            got = run(lambda: module(*inputs))
        plain = run(lambda: module(*inputs))
    fused = case == "transformer" and not train  # torch's fused path is not taken under a function mode
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 if fused else 0)
    assert not torch.equal(got, plain)
    assert overlay.used == set(range(len(params)))
    assert all(map(torch.equal, before, params))


def test_a_replacement_lives_as_long_as_its_use():
    import weakref

    made = []
    params = [nn.Parameter(torch.zeros(3)) for _ in range(4)]

    def replacement(k):
        assert not any(ref() is not None for ref in made)
        out = torch.ones(3)
        made.append(weakref.ref(out))
        return out

    with torch.no_grad(), Overlay(params, replacement):
        total = torch.zeros(())
        for p in params:
            total += p.sum()
        assert (params[0] * params[0]).sum() == 3  # twice in one function: one replacement
    assert total == 12
    assert len(made) == 5


def test_what_tells_of_a_kind_makes_no_replacement():
    p = nn.Parameter(torch.zeros(2, 3))
    with Overlay([p], lambda k: pytest.fail("made")):
        assert (p.shape, p.dtype, p.dim(), p.numel(), len(p), p.requires_grad) == ((2, 3), torch.float32, 2, 6, 2, True)
        assert p.size(1) == 3
        assert p.is_contiguous()
        assert p.is_floating_point()
        assert hash(p) == hash(p)
        assert p.grad is None
        assert p in {p}


WRITES = {
    "add_": lambda p: p.add_(1),
    "setitem": lambda p: p.__setitem__(0, 1.0),
    "iadd": lambda p: p.__iadd__(1.0),
    "out": lambda p: torch.add(p, 1, out=p),
    "inplace": lambda p: nn.functional.relu(p, inplace=True),
    "data": lambda p: setattr(p, "data", torch.ones(3)),
    "init": nn.init.zeros_,
    "foreach": lambda p: torch._foreach_add_([p], 1.0),
    "copy": lambda p: p.copy_(torch.ones(3)),
    "overload": lambda p: torch.ops.aten.add_.Tensor(p, 1),
    "through data": lambda p: p.data.add_(1),
    "through detach": lambda p: p.detach().__setitem__(0, 1.0),
    "through a view": lambda p: p[:2][0].zero_(),
    "through a split": lambda p: torch.relu_(p.split(1)[1]),
    "through out": lambda p: torch.add(p, 1, out=p.detach()),
    "custom operator": torch.library.custom_op(
        "zograd_tests::write", lambda x: x.add_(1), mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
    ),
}


@pytest.mark.parametrize("how", WRITES)
def test_writing_is_refused(how):
    p = nn.Parameter(torch.zeros(3))
    says = r"writes to a parameter in place \(`.*`\): it runs at perturbed"
    with torch.no_grad(), Overlay([p], lambda k: torch.ones(3)), pytest.raises(RuntimeError, match=says):
        WRITES[how](p)
    assert torch.equal(p, torch.zeros(3))


def test_writing_elsewhere_is_not():
    p, x = nn.Parameter(torch.zeros(3)), torch.zeros(3)
    p.grad = torch.ones(3)
    with torch.no_grad(), Overlay([p], lambda k: torch.ones(3)):
        x.add_(p)
        x[:] = x + p
        torch.add(x, p, out=x)
        kept = p * 1
        kept.add_(1)
        p.detach().clone().add_(1)
        p.grad = None
    assert x.tolist() == [3.0] * 3
    assert p.grad is None


def test_an_embedding_that_shortens_its_rows_is_refused():
    module = nn.Embedding(2, 3, max_norm=0.5)
    says = r"in place \(`torch.nn.functional.embedding`\)"
    with Overlay([module.weight], lambda k: torch.ones(2, 3)), pytest.raises(RuntimeError, match=says):
        module(torch.tensor([0]))


OUTSIDE = {
    "detach": lambda p: p.detach(),
    "data": lambda p: p.data,
    "view": lambda p: p[1:],
    "transposed": lambda p: p.t(),
    "parameter": lambda p: nn.Parameter(p.data),
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_what_shares_memory_with_a_parameter_is_refused(how):
    p = nn.Parameter(torch.zeros(3, 2))
    other = OUTSIDE[how](p)
    says = "shares its memory with a trained parameter"
    with torch.no_grad(), Overlay([p], lambda k: torch.ones(3, 2)), pytest.raises(RuntimeError, match=says):
        other.sum()


def test_parameters_side_by_side_in_one_memory_are_apart():
    flat = torch.zeros(6)
    p, frozen = nn.Parameter(flat[:4]), nn.Parameter(flat[4:], requires_grad=False)
    with torch.no_grad(), Overlay([p], lambda k: torch.ones(4)):
        assert p.sum() + frozen.sum() == 4


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, lambda f: lambda p: torch.vjp(f, p)[0]][:2])
def test_a_transform_of_a_parameter_is_refused_and_of_its_copy_is_not(transform):
    p = nn.Parameter(torch.zeros(3))
    with Overlay([p], lambda k: torch.ones(3)):
        with pytest.raises(RuntimeError, match=r"torch.func transform, which hides .* `parameter.clone\(\)`"):
            transform(lambda w: w.square().sum())(p)
        assert transform(lambda w: w.square().sum())(p.clone()).sum() in (3, 6)


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
def test_a_parameter_used_inside_vmap(randomness):
    p = nn.Parameter(torch.zeros(3))
    draw = lambda k: torch.randn(3, generator=torch.Generator().manual_seed(1))  # noqa: E731
    with torch.no_grad(), Overlay([p], draw):
        out = torch.vmap(lambda x: x * p, randomness=randomness)(torch.ones(2, 3))
    assert torch.equal(out, draw(0).expand(2, 3))


@pytest.mark.parametrize("name", ["data_ptr", "untyped_storage", "__dlpack__"])
def test_its_memory_is_not_given_out(name):
    p = nn.Parameter(torch.zeros(3))
    with Overlay([p], lambda k: torch.ones(3)), pytest.raises(RuntimeError, match=rf"memory \(`{name}`\), which holds"):
        getattr(p, name)()


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_module_sees_the_replacements_and_is_not_compiled_again(warm):
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    module = nn.Linear(4, 2)
    compiled = torch.compile(module, backend=backend)
    params = list(module.parameters())
    with torch.no_grad():
        plain = compiled(X) if warm else module(X)
        with Overlay(params, lambda k: params[k].detach() + 1):
            moved = compiled(X)
        assert len(graphs) == warm
        torch.testing.assert_close(moved, nn.functional.linear(X, params[0] + 1, params[1] + 1))
        torch.testing.assert_close(compiled(X), plain)
        assert len(graphs) == 1
