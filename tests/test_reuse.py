"""Points are made in the memory of earlier ones, unless somebody holds on to them."""

import gc
import weakref

import pytest
import torch

import zograd
from zograd import zero_order
from zograd._base import reuse as _reuse
from zograd._base.reuse import Room

LARGE = 1 << 16
KEEPERS = {
    "the argument itself": lambda x: x,
    "in a container": lambda x: {"best": [x]},
    "a view": lambda x: x[10:20],
    "detached": lambda x: x.detach(),
    "as numpy": lambda x: x.numpy(),
    "a graph": lambda x: (x * torch.ones(LARGE, requires_grad=True)).sum(),
    "its storage": lambda x: x.untyped_storage(),
    "a parameter": torch.nn.Parameter,
    "a frame": lambda x: (y for y in [x, 0]),
    "a closure": lambda x: lambda: x,
    "dlpack": torch.from_dlpack,
}


def contents(kept):
    if isinstance(kept, dict):
        kept = kept["best"][0]
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.empty(0).set_(kept)
    if callable(kept) and not isinstance(kept, torch.Tensor):
        kept = kept()
    if hasattr(kept, "gi_frame"):
        kept = next(kept)
    if isinstance(kept, torch.Tensor) and kept.grad_fn is not None:
        return torch.autograd.grad(kept, kept.grad_fn.next_functions[0][0].next_functions[1][0].variable)[0].clone()
    return torch.as_tensor(kept).detach().clone()


@pytest.mark.parametrize("evaluator", ["loop", "batched"])
@pytest.mark.parametrize("how", KEEPERS)
def test_what_fn_keeps_stays_as_it_was(how, evaluator):
    kept, then = [], []

    def fn(x):
        held = KEEPERS[how](x)
        then.append(contents(KEEPERS[how](x)))
        kept.append(held)
        return x.sum() if evaluator == "loop" else x.sum(dim=1)

    zero_order(method="antithetic", num_samples=3, sigma=0.1, evaluator=evaluator)(fn).estimate(torch.zeros(LARGE))
    for held, before in zip(kept, then, strict=True):
        assert torch.equal(contents(held), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_is_used_again_where_nobody_keeps_it(dtype):
    places = []

    def fn(x):
        places.append((x["a"].data_ptr(), x["b"].data_ptr()))
        return x["a"].sum().float() + x["b"].float().square().mean()

    x = {"a": torch.zeros(LARGE, dtype=dtype), "b": torch.zeros(300, 300, dtype=dtype)}
    zero_order(method="antithetic", num_samples=4, sigma=0.1)(fn).estimate(x)
    assert len(set(places[1:])) == 1  # all but the center


def test_only_what_is_kept_gets_memory_of_its_own():
    kept = []

    def fn(x):
        kept.append(x["a"])
        return x["a"].sum() + x["b"].sum()

    zero_order(num_samples=4)(fn).estimate({"a": torch.zeros(LARGE), "b": torch.zeros(LARGE)})
    assert len({x.data_ptr() for x in kept}) == 5


def test_a_module_runs_in_the_same_memory():
    places = []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(300, 300)

        def forward(self, x):
            places.append(self.linear.weight.data_ptr())
            return self.linear(x).square().sum()

    net = zograd.nn.ZeroOrder(Net(), method="antithetic", num_samples=4)
    net(torch.ones(1, 300))
    assert len(set(places[1:])) == 1


def test_a_room_gives_back_what_is_free():
    room = Room()
    mine = room.give((torch.empty(LARGE), torch.empty(LARGE), torch.empty(5)))
    places = [t.data_ptr() for t in mine]
    second = mine[1]
    del mine
    first, taken, small = room.take()
    assert (first.data_ptr(), taken, small) == (places[0], None, None)  # small ones are made faster than looked after
    assert second.numel() == LARGE
    assert room.take() == ()


def test_a_room_does_not_keep_what_it_gave():
    room = Room()
    room.give((torch.empty(LARGE),))
    (free,) = room.take()
    gone = weakref.ref(free)
    del free
    gc.collect()
    assert gone() is None


def test_without_torch_counting_holders_nothing_is_used_again(monkeypatch):
    monkeypatch.setattr(_reuse, "_ALONE", ())
    room = Room()
    room.give((torch.empty(LARGE),))
    assert room.take() == (None,)
