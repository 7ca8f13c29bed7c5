"""Kinds of modules and of state, as people write them, each as small as shows what is special about it.

``KINDS`` has them by name. A kind's function makes the module, whose ``forward`` returns the objective, and its
inputs. The oracle in ``zoo.py`` calls it again for each evaluation, so that whatever it returns must be new: classes
with state of their own are made inside.
"""

from __future__ import annotations

import functools
import itertools
import random
import tempfile
import threading
import weakref
from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Kind:
    """One kind: how it is made, and what the oracle has to know about it.

    Attributes:
        name: the function's.
        make: returns the module and its inputs.
        draws: whether ``forward`` draws from torch's global stream.
        generator: whether the module holds a generator that ``forward`` draws from.
        lazy: whether the first call makes the parameters.
        compiled: whether torch.compile makes code of it.
        unused: the parameters that no evaluation reads.
        fused: whether torch takes another path with grad mode off, with other values.
        process: whether ``forward`` writes to what all threads of the process share, and cannot run in two at once.
        reordered: whether torch.vmap draws in another order than a plain call, by the layout of what is drawn for.
    """

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    draws: bool = False
    generator: bool = False
    lazy: bool = False
    compiled: bool = False
    unused: tuple[str, ...] = ()
    fused: bool = False
    process: bool = False
    reordered: bool = False


KINDS: dict[str, Kind] = {}


def kind(make=None, **facts):
    """Register a kind."""
    if make is None:
        return functools.partial(kind, **facts)
    KINDS[make.__name__] = Kind(make.__name__, make, **facts)
    return make


def score(out):
    """Weigh all entries of a result, each by another weight, so that none can hide behind another."""
    flat = out.reshape(-1)
    return (flat * torch.linspace(0.5, 1.5, flat.numel(), dtype=flat.dtype) + flat.square()).sum()


class Scored(nn.Module):
    """A module whose result is scored."""

    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(*layers) if len(layers) > 1 else layers[0]

    def forward(self, *args):
        return score(self.net(*args))


class Own(nn.Module):
    """A linear layer and something done to its result: what kinds with state of their own begin from."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3)

    def forward(self, x):
        return score(self.use(self.a(x)))


def x(*shape):
    return torch.randn(*(shape or (4, 2)))


# -------------------------------------------------------------------------------------------------------- normalization


@kind
def batch_norm_1d():
    return Scored(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh()), (x(),)


@kind
def batch_norm_2d():
    return Scored(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU()), (x(2, 1, 3, 3),)


@kind
def batch_norm_3d():
    return Scored(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)), (x(2, 1, 2, 2, 2),)


@kind
def batch_norm_in_eval_mode():
    net = Scored(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh())
    net(x())
    return net.eval(), (x(),)


@kind
def batch_norm_without_affine():
    return Scored(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)), (x(),)


@kind
def batch_norm_with_cumulative_average():
    return Scored(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=None)), (x(),)


@kind
def batch_norm_without_running_statistics():
    return Scored(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)), (x(),)


@kind
def batch_norm_read_after_its_update():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            return score(self.norm(self.a(x))) + self.norm.running_mean.sum() + self.norm.num_batches_tracked

    return Read(), (x(),)


@kind
def group_norm():
    return Scored(nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4)), (x(2, 1, 4),)


@kind
def layer_norm_and_rms_norm():
    return Scored(nn.Linear(2, 3), nn.LayerNorm(3), nn.RMSNorm(3)), (x(),)


@kind
def instance_norm_with_running_statistics():
    return Scored(nn.Conv1d(1, 2, 2), nn.InstanceNorm1d(2, affine=True, track_running_stats=True)), (x(2, 1, 5),)


@kind
def spectral_norm_by_hook():
    return Scored(torch.nn.utils.spectral_norm(nn.Linear(2, 3)), nn.Tanh()), (x(),)


@kind
def spectral_norm_parametrized():
    layer = parametrizations.spectral_norm(nn.Linear(2, 3))
    layer.parametrizations.weight[0]._u.copy_(
        nn.functional.normalize(x(3), dim=0)
    )  # before the power iteration settles
    return Scored(layer, nn.Tanh()), (x(),)


@kind
def weight_norm_by_hook():
    return Scored(_old_weight_norm(nn.Linear(2, 3)), nn.Tanh()), (x(),)


def _old_weight_norm(layer):
    from torch.nn.utils.weight_norm import WeightNorm

    WeightNorm.apply(layer, "weight", 0)  # as `torch.nn.utils.weight_norm` does behind its FutureWarning
    return layer


@kind
def weight_norm_parametrized():
    return Scored(parametrizations.weight_norm(nn.Linear(2, 3)), nn.Tanh()), (x(),)


@kind
def orthogonal_parametrized():
    return Scored(parametrizations.orthogonal(nn.Linear(2, 2))), (x(),)


@kind
def parametrization_with_a_buffer():
    class Drifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, weight):
            with torch.no_grad():
                self.seen.add_(weight.detach().sum())
            return weight * (1 + self.seen)

    layer = nn.Linear(2, 3)
    parametrize.register_parametrization(layer, "weight", Drifts(), unsafe=True)
    return Scored(layer), (x(),)


@kind
def fake_quantization_observer():
    observer = torch.ao.quantization.MovingAverageMinMaxObserver
    fake = torch.ao.quantization.FakeQuantize(observer, quant_min=0, quant_max=255, dtype=torch.quint8)
    return Scored(nn.Linear(2, 3), fake).float(), (x().float(),)


# -------------------------------------------------------------------------------------------------------------- drawing


@kind(draws=True)
def dropout():
    return Scored(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1)), (x(),)


@kind(draws=True)
def dropout_of_channels():
    return Scored(nn.Conv2d(1, 3, 2), nn.Dropout2d(0.5)), (x(2, 1, 3, 3),)


@kind(draws=True)
def alpha_dropout():
    return Scored(nn.Linear(2, 3), nn.SELU(), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.3)), (x(),)


@kind(draws=True)
def rrelu():
    return Scored(nn.Linear(2, 3), nn.RReLU()), (x(),)


@kind(draws=True)
def noise_layer():
    class Noise(Own):
        def use(self, h):
            return h + torch.randn(h.shape) * torch.rand(()) + torch.randint(0, 3, (3,))

    return Noise(), (x(),)


@kind
def dropout_in_eval_mode():
    return Scored(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1)).eval(), (x(),)


# ---------------------------------------------------------------------------------------------- sequences and attention


class First(nn.Module):
    """The first of the results of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return score(self.layer(*args)[0])


@kind
def rnn():
    return First(nn.RNN(2, 2)), (x(3, 1, 2),)


@kind
def lstm():
    return First(nn.LSTM(1, 1, bidirectional=True)), (x(3, 1, 1),)


@kind
def gru():
    return First(nn.GRU(1, 1, num_layers=2)), (x(3, 1, 1),)


@kind(draws=True)
def lstm_with_dropout():
    return First(nn.LSTM(1, 1, num_layers=2, dropout=0.5)), (x(3, 1, 1),)


@kind
def gru_of_a_packed_sequence():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(2, 2)

        def forward(self, x):
            return score(self.layer(nn.utils.rnn.pack_padded_sequence(x, [3, 2]))[1])

    return Packed(), (x(3, 2, 2),)


@kind
def recurrent_state_kept_between_calls():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.state = nn.GRUCell(2, 2), None

        def forward(self, x):
            self.state = self.cell(x, self.state)
            return score(self.state)

    return Stateful(), (x(2, 2),)


class Attends(nn.Module):
    """Self-attention, scored."""

    def __init__(self, **options):
        super().__init__()
        self.layer, self.options = nn.MultiheadAttention(2, 1, batch_first=True), options

    def forward(self, x):
        return score(self.layer(x, x, x, **self.options)[0])


@kind
def multihead_attention():
    return Attends(), (x(1, 3, 2),)


@kind
def multihead_attention_without_weights():
    return Attends(need_weights=False), (x(1, 3, 2),)


@kind
def multihead_attention_in_eval_mode():
    return Attends(need_weights=False).eval(), (x(1, 3, 2),)


@kind
def scaled_dot_product_attention():
    class Dot(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(2, 6)

        def forward(self, x):
            q, k, v = self.qkv(x).view(1, 1, 3, 6).chunk(3, -1)
            return score(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    return Dot(), (x(1, 3, 2),)


class Encodes(nn.Module):
    """An encoder of padded sequences, scored with what it says of the padding."""

    def __init__(self, dropout, nested=True):
        super().__init__()
        layer = nn.TransformerEncoderLayer(2, 2, 2, dropout=dropout, batch_first=True)
        self.layer = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)

    def forward(self, x, padding):
        return score(self.layer(x, src_key_padding_mask=padding))


def _padded():
    return x(2, 3, 2), torch.tensor([[False, False, False], [False, False, True]])


@kind(draws=True, reordered=True)
def transformer_encoder():
    return Encodes(0.3), _padded()


@kind(fused=True)
def transformer_encoder_in_eval_mode_padded():
    return Encodes(0.3).eval(), _padded()


@kind(fused=True)
def transformer_encoder_in_eval_mode_padded_not_nested():
    return Encodes(0.3, nested=False).eval(), _padded()


@kind
def transformer_decoder_layer_in_eval_mode():
    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(2, 1, 2, dropout=0.1, batch_first=True)

        def forward(self, x):
            return score(self.layer(x, x))

    return Decodes().eval(), (x(1, 2, 2),)


# ----------------------------------------------------------------------------------------------- embeddings and sharing


@kind
def embedding_with_padding():
    return Scored(nn.Embedding(4, 2, padding_idx=0), nn.Linear(2, 1)), (torch.tensor([0, 1, 3]),)


@kind
def embedding_with_max_norm():
    return Scored(nn.Embedding(4, 2, max_norm=0.5), nn.Linear(2, 1)), (torch.tensor([0, 1, 3]),)


@kind
def embedding_bag():
    return Scored(nn.EmbeddingBag(4, 2, mode="mean"), nn.Linear(2, 1)), (torch.tensor([[0, 1], [3, 1]]),)


@kind
def tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(4, 2), nn.Linear(2, 4)
            self.head.weight = self.words.weight

        def forward(self, t):
            return score(self.head(self.words(t)))

    return Tied(), (torch.tensor([0, 1, 3]),)


@kind
def parameter_list_and_dict():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.list = nn.ParameterList([torch.randn(2) for _ in range(3)])
            self.dict = nn.ParameterDict({"a": torch.randn(2), "b": self.list[0]})

        def forward(self, x):
            return score((x * self.dict["a"] + self.dict["b"]) * self.list[1] + sum(self.list))

    return Lists(), (x(),)


@kind
def module_list_and_dict():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.list, self.dict = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()]), nn.ModuleDict({"b": nn.Linear(2, 2)})

        def forward(self, x):
            for layer in self.list:
                x = layer(x)
            return score(self.dict["b"](x))

    return Lists(), (x(),)


@kind
def shared_submodule():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Sequential(self.a, nn.BatchNorm1d(2), self.a)
            self.plain = [self.a]  # a list that torch does not know

        def forward(self, x):
            return score(self.plain[0](self.b(self.a(x))))

    return Shared(), (x(),)


@kind
def frozen_backbone():
    backbone = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh()).requires_grad_(False)
    return Scored(backbone, nn.Linear(4, 1)), (x(),)


@kind
def momentum_encoder():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x):
            with torch.no_grad():
                for t, o in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    t.mul_(0.9).add_(o, alpha=0.1)
            return score(self.online(x) - self.target(x))

    return Momentum(), (x(),)


@kind
def momentum_encoder_by_data():
    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x):
            for t, o in zip(self.target.parameters(), self.online.parameters(), strict=True):
                t.data = t.data * 0.9 + o.detach() * 0.1
            return score(self.online(x) - self.target(x))

    return Momentum(), (x(),)


class _Codebook(Own):
    """Vector quantization whose codes follow what they are given."""

    def use(self, h):
        near = (h.detach().unsqueeze(1) - self.codes).square().sum(-1).argmin(1)
        chosen = self.codes[near]
        with torch.no_grad():
            hits = nn.functional.one_hot(near, 3).to(h.dtype)
            self.codes.mul_(0.9).add_(0.1 * (hits.t() @ h.detach()))
        return h + chosen


@kind
def codebook_of_a_buffer():
    net = _Codebook()
    net.register_buffer("codes", torch.randn(3, 3))
    return net, (x(),)


@kind
def codebook_of_a_frozen_parameter():
    net = _Codebook()
    net.codes = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    return net, (x(),)


@kind(unused=("head.weight", "head.bias"))
def unused_head():
    net = Scored(nn.Linear(2, 3))
    net.head = nn.Linear(3, 2)
    return net, (x(),)


@kind
def branch_that_points_alone_take():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.tensor(-0.01)), nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return self.b * x.sum() if self.a > 0 else self.a

    return Branch(), (x(),)


@kind
def mixed_precision():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3).float(), nn.Linear(3, 1).double()

        def forward(self, x):
            return score(self.b(self.a(x.float()).double()))

    return Mixed(), (x(),)


# -------------------------------------------------------------------------------------------------- state, plain Python


@kind
def tensor_attribute_written_in_place():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(3)

        def use(self, h):
            self.mean.mul_(0.5).add_(h.detach().mean(0))
            return h - self.mean

    return Kept(), (x(),)


@kind
def tensor_attribute_written_by_its_data():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(3)

        def use(self, h):
            self.mean.data[:] = self.mean * 0.5 + h.detach().mean(0)
            return h - self.mean

    return Kept(), (x(),)


@kind
def tensor_attribute_assigned():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.mean = torch.zeros(3)

        def use(self, h):
            self.mean = self.mean * 0.5 + h.detach().mean(0)
            return h - self.mean

    return Kept(), (x(),)


@kind
def numpy_attribute_written_in_place():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.mean = np.zeros(3)

        def use(self, h):
            self.mean *= 0.5
            self.mean += h.detach().numpy().mean(0)
            return h - torch.from_numpy(self.mean)

    return Kept(), (x(),)


@kind
def list_of_tensors_written_in_place():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.means = [torch.zeros(3), torch.zeros(3)]

        def use(self, h):
            for mean in self.means:
                mean.mul_(0.5).add_(h.detach().mean(0))
            return h - sum(self.means)

    return Kept(), (x(),)


@kind
def dict_of_tensors_written_in_place():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.kept = {"mean": torch.zeros(3), "deep": {"largest": torch.zeros(())}}

        def use(self, h):
            self.kept["mean"].mul_(0.5).add_(h.detach().mean(0))
            self.kept["deep"]["largest"].copy_(torch.maximum(self.kept["deep"]["largest"], h.detach().max()))
            return h - self.kept["mean"] * self.kept["deep"]["largest"]

    return Kept(), (x(),)


@kind
def dict_and_counts_assigned():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.kept, self.counts = OrderedDict(mean=torch.zeros(3)), defaultdict(int)

        def use(self, h):
            self.counts["calls"] += 1
            self.kept["mean"] = self.kept["mean"] * 0.5 + h.detach().mean(0)
            self.kept[f"call {self.counts['calls']}"] = h.detach()
            return h - self.kept["mean"] * self.counts["calls"]

    return Kept(), (x(),)


@kind
def dict_subclass_and_set():
    class Cache(dict):
        pass

    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.cache, self.seen = Cache(n=0), set()

        def use(self, h):
            self.cache["n"] += 1
            self.seen.add(self.cache["n"])
            return h * len(self.seen)

    return Kept(), (x(),)


@kind
def deque_of_results():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.last = deque(maxlen=2)

        def use(self, h):
            self.last.append(h.detach())
            return h + sum(self.last)

    return Kept(), (x(),)


Moments = namedtuple("Moments", "mean square")


@kind
def namedtuple_of_tensors_written_in_place():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.moments = Moments(torch.zeros(3), torch.zeros(3))

        def use(self, h):
            self.moments.mean.mul_(0.5).add_(h.detach().mean(0))
            self.moments.square.mul_(0.5).add_(h.detach().square().mean(0))
            return h - self.moments.mean + self.moments.square

    return Kept(), (x(),)


@dataclass
class Statistics:
    """Statistics of results, in a record."""

    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    count: int = 0


@kind
def dataclass_written_in_place():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.statistics = Statistics()

        def use(self, h):
            self.statistics.count += 1
            self.statistics.mean.lerp_(h.detach().mean(0), 1 / self.statistics.count)
            return h - self.statistics.mean

    return Kept(), (x(),)


@kind
def frozen_dataclass_of_tensors_written_in_place():
    @dataclass(frozen=True)
    class Frozen:
        mean: torch.Tensor

    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.statistics = Frozen(torch.zeros(3))

        def use(self, h):
            self.statistics.mean.lerp_(h.detach().mean(0), 0.5)
            return h - self.statistics.mean

    return Kept(), (x(),)


class RunningMean:
    """An observation filter, no module."""

    def __init__(self):
        self.mean, self.count, self.history = torch.zeros(3), 0, [np.zeros(2)]

    def update(self, h):
        self.count += 1
        self.mean = self.mean + (h.detach().mean(0) - self.mean) / self.count
        self.history[0] += self.count
        return self.mean * float(self.history[0].sum())


@kind
def held_object_with_assigned_attributes():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.filter = RunningMean()

        def use(self, h):
            return h - self.filter.update(h)

    return Kept(), (x(),)


@kind
def held_object_with_slots():
    class Slotted:
        __slots__ = ("count", "mean")

        def __init__(self):
            self.mean, self.count = torch.zeros(3), 0

    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.filter = Slotted()

        def use(self, h):
            self.filter.count += 1
            self.filter.mean.add_(h.detach().mean(0))
            return h - self.filter.mean / self.filter.count

    return Kept(), (x(),)


@kind
def object_held_by_two_modules():
    class Part(Own):
        def __init__(self, filter):
            super().__init__()
            self.filter = filter

        def use(self, h):
            return h - self.filter.update(h)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            filter = RunningMean()
            self.one, self.other = Part(filter), Part(filter)

        def forward(self, x):
            return self.one(x) + self.other(x)

    return Both(), (x(),)


@kind
def class_attribute():
    class Kept(Own):
        calls = 0
        mean = torch.zeros(3)

        def use(self, h):
            type(self).calls += 1
            self.mean.mul_(0.5).add_(h.detach().mean(0))
            return h * self.calls - self.mean

    return Kept(), (x(),)


@kind
def python_counter():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def use(self, h):
            self.calls += 1
            return h * self.calls

    return Kept(), (x(),)


@kind
def iterator():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.calls = itertools.count(1)

        def use(self, h):
            return h * next(self.calls)

    return Kept(), (x(),)


@kind
def result_kept_with_its_graph():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.kept = None

        def use(self, h):
            previous, self.kept = self.kept, h
            return h if previous is None else h + previous

    net = Kept()
    with torch.enable_grad():
        net(x())  # what is kept now is no leaf: it does not deep-copy
    return net, (x(),)


# -------------------------------------------------------------------------------------------------------------- buffers


@kind
def buffers_that_are_views_of_each_other():
    class Ring(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("statistics", torch.zeros(2, 3))
            self.register_buffer("mean", self.statistics[0])
            self.register_buffer("scale", self.statistics[1])

        def use(self, h):
            with torch.no_grad():
                self.statistics.copy_(torch.stack([h.mean(0), h.std(0)]))
            return (h - self.mean) / (self.scale + 1)

    return Ring(), (x(),)


@kind
def buffer_that_is_expanded():
    class Mask(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.arange(1.0, 4.0).expand(4, 3))

        def use(self, h):
            return h * self.mask

    return Mask(), (x(),)


@kind
def buffer_that_is_expanded_and_written():
    class Mask(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(1).expand(3))

        def use(self, h):
            self.scale[:1].add_(h.detach().mean())
            return h * self.scale

    return Mask(), (x(),)


class _Graph(Own):
    """A graph convolution."""

    def use(self, h):
        return self.adjacency @ h


@kind
def buffer_that_is_sparse():
    net = _Graph()
    net.register_buffer("adjacency", (torch.rand(4, 4) * (torch.rand(4, 4) < 0.5)).to_sparse())
    return net, (x(),)


@kind
def buffer_that_is_sparse_in_rows():
    net = _Graph()
    dense = torch.rand(4, 4) * (torch.rand(4, 4) < 0.5)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    column = dense.nonzero()[:, 1]
    values = dense[dense != 0]
    # Not by `to_sparse_csr()`, which warns that the layout is in beta state.
    net.register_buffer("adjacency", torch.sparse_csr_tensor(crow, column, values, (4, 4), check_invariants=False))
    return net, (x(),)


@kind
def buffer_that_is_sparse_and_replaced():
    class Grows(_Graph):
        def use(self, h):
            out = super().use(h)
            self.adjacency = (self.adjacency * 0.5).coalesce()
            return out

    net = Grows()
    net.register_buffer("adjacency", (torch.rand(4, 4) * (torch.rand(4, 4) < 0.5)).to_sparse())
    return net, (x(),)


@kind
def buffer_that_is_quantized():
    class Quantized(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("code", torch.quantize_per_tensor(torch.randn(3, 3).float(), 0.1, 0, torch.qint8))

        def use(self, h):
            return h @ self.code.dequantize().to(h.dtype)

    return Quantized(), (x(),)


@kind
def buffers_of_integers_with_scales():
    class Quantized(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("code", torch.randint(-128, 127, (3, 3), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(3) / 100)
            self.register_buffer("calls", torch.zeros((), dtype=torch.uint8))

        def use(self, h):
            self.calls += 1
            return h @ (self.code * self.scale) * self.calls

    return Quantized(), (x(),)


@kind
def buffer_that_is_complex_or_bool():
    class Rotates(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("turn", torch.polar(torch.ones(3), torch.rand(3)))
            self.register_buffer("keep", torch.tensor([True, False, True]))

        def use(self, h):
            self.turn.mul_(self.turn[0].clone())
            self.keep.logical_not_()
            return torch.where(self.keep, (h * self.turn).real, h)

    return Rotates(), (x(),)


@kind
def buffer_that_is_nested():
    class Ragged(Own):
        def __init__(self):
            super().__init__()
            ragged = [torch.randn(1, 3), torch.randn(3, 3)]
            self.register_buffer("bias", torch.nested.nested_tensor(ragged, layout=torch.jagged))

        def use(self, h):
            return torch.cat([h, self.bias.values()])

    return Ragged(), (x(),)


@kind
def buffer_replaced_in_forward():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def use(self, h):
            self.mean = 0.5 * self.mean + h.detach().mean(0)
            return h - self.mean

    return Kept(), (x(),)


@kind
def buffer_that_grows():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("past", torch.zeros(0, 3))

        def use(self, h):
            self.past = torch.cat([self.past, h.detach()])
            return h + self.past.sum(0)

    return Kept(), (x(),)


@kind
def buffer_that_is_none_until_the_first_call():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("first", None)

        def use(self, h):
            if self.first is None:
                self.first = h.detach().mean(0)
            return h - self.first

    return Kept(), (x(),)


@kind
def buffer_registered_in_forward():
    class Kept(Own):
        def use(self, h):
            if not hasattr(self, "first"):
                self.register_buffer("first", h.detach().mean(0), persistent=False)
            return h - self.first

    return Kept(), (x(),)


@kind
def buffer_that_is_not_persistent():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3), persistent=False)

        def use(self, h):
            with torch.no_grad():
                self.mean.lerp_(h.mean(0), 0.5)
            return h - self.mean

    return Kept(), (x(),)


@kind
def buffer_written_by_its_data():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def use(self, h):
            self.mean.data = self.mean.data * 0.5 + h.detach().mean(0)
            return h - self.mean

    return Kept(), (x(),)


@kind
def buffer_written_through_numpy():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def use(self, h):
            self.mean.numpy()[:] += h.detach().numpy().mean(0)
            return h - self.mean

    return Kept(), (x(),)


@kind
def buffer_with_an_alias_in_an_attribute():
    class Kept(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.alias = self.mean.view(3)

        def use(self, h):
            self.alias.lerp_(h.detach().mean(0), 0.5)
            return h - self.mean

    return Kept(), (x(),)


# ----------------------------------------------------------------------------------------------------------- generators


@kind(generator=True)
def generator_of_torch():
    class Draws(Own):
        def __init__(self):
            super().__init__()
            self.chance = torch.Generator().manual_seed(3)

        def use(self, h):
            return h + torch.randn(h.shape, generator=self.chance)

    return Draws(), (x(),)


@kind(generator=True)
def generator_of_numpy():
    class Draws(Own):
        def __init__(self):
            super().__init__()
            self.chance, self.old = np.random.default_rng(3), np.random.RandomState(4)

        def use(self, h):
            return h + torch.from_numpy(self.chance.normal(size=3)) + float(self.old.rand())

    return Draws(), (x(),)


@kind(generator=True)
def generator_of_python():
    class Draws(Own):
        def __init__(self):
            super().__init__()
            self.chance = {"dice": random.Random(3)}

        def use(self, h):
            return h + self.chance["dice"].random()

    return Draws(), (x(),)


# ---------------------------------------------------------------------------------------------------------------- hooks


@kind
def forward_pre_hook():
    net = Own()
    net.use = lambda h: h
    net.seen = []
    net.a.register_forward_pre_hook(lambda m, args: (net.seen.append(args[0].mean()), (args[0] * 2,))[1])
    return net, (x(),)


@kind
def forward_hook_that_keeps_features():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.seen = nn.Linear(2, 3), nn.Linear(3, 1), {}
            self.a.register_forward_hook(self.keep)

        def keep(self, module, args, out):
            self.seen["features"] = out

        def forward(self, x):
            return score(self.b(self.a(x))) + self.seen["features"].square().mean()

    return Kept(), (x(),)


@kind
def forward_hook_that_keeps_features_outside():
    net = Scored(nn.Linear(2, 3), nn.Tanh())
    seen = {}
    net.net[0].register_forward_hook(lambda module, args, out: seen.update(h=out.detach(), n=seen.get("n", 0) + 1))
    return net, (x(),)


@kind
def forward_hook_that_replaces_the_result():
    net = Scored(nn.Linear(2, 3), nn.Tanh())
    net.net[0].register_forward_hook(lambda module, args, out: out * 2, prepend=True)
    net.register_forward_hook(lambda module, args, out: out * 3, always_call=True)
    return net, (x(),)


@kind
def hooks_with_keyword_arguments():
    class Scaled(Own):
        def forward(self, x, *, scale=1.0):
            return score(self.a(x)) * scale

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scaled()
            self.inner.register_forward_pre_hook(
                lambda m, args, kw: (args, {"scale": kw["scale"] * 2}), with_kwargs=True
            )
            self.inner.register_forward_hook(lambda m, args, kw, out: out + kw["scale"], with_kwargs=True)

        def forward(self, x):
            return self.inner(x, scale=1.5)

    return Outer(), (x(),)


@kind
def state_dict_hooks():
    net = Scored(nn.Linear(2, 3), nn.BatchNorm1d(3))
    net.register_state_dict_pre_hook(lambda module, prefix, keep: None)
    net.register_state_dict_post_hook(
        lambda module, state, prefix, meta: state.update({f"{prefix}note": torch.ones(1)})
    )
    net.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: state.pop(f"{prefix}note", None))
    net.register_load_state_dict_post_hook(lambda module, keys: None)
    return net, (x(),)


@kind
def hooks_of_parameters_and_of_the_backward_pass():
    net = Scored(nn.Linear(2, 3), nn.Tanh())
    net.net[0].weight.register_hook(lambda grad: grad * 2)
    net.net[0].register_full_backward_hook(lambda module, into, out: None)
    net.net[0].register_full_backward_pre_hook(lambda module, out: None)
    return net, (x(),)


@kind(process=True)
def hook_of_all_modules():
    class Hooked(Own):
        def forward(self, x):
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, args, out: out * 2 if isinstance(module, nn.Linear) else None
            )
            try:
                return score(self.a(x))
            finally:
                handle.remove()

    return Hooked(), (x(),)


# ------------------------------------------------------------------------------------------ parameters and lazy modules


@kind(lazy=True)
def lazy_linear():
    return Scored(nn.LazyLinear(3), nn.Tanh()), (x(),)


@kind(lazy=True)
def lazy_batch_norm():
    return Scored(nn.Linear(2, 3), nn.LazyBatchNorm1d()), (x(),)


@kind
def lazy_linear_after_its_first_call():
    net = Scored(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    net(x())
    return net, (x(),)


@kind
def attributes_of_parameters():
    net = Own()
    net.use = lambda h: h
    net.a.weight.scale = 2.0
    net.a.weight.infshape = {"base": torch.tensor(3.0)}
    net.a.register_forward_hook(
        lambda m, args, out: (
            out * getattr(m.weight, "scale", 1.0) + getattr(m.weight, "infshape", {}).get("base", torch.tensor(0.0))
        )
    )
    return net, (x(),)


class Scale(nn.Parameter):
    """A parameter that is known by its class."""


@kind
def subclass_of_parameter():
    class Sub(Own):
        def __init__(self):
            super().__init__()
            self.w = Scale(torch.randn(3))

        def use(self, h):
            return h * self.w if isinstance(self.w, Scale) and isinstance(self.w, nn.Parameter) else h

    return Sub(), (x(),)


@kind
def attributes_of_buffers():
    class Marked(Own):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.ones(3))
            self.mean.momentum = 0.25

        def use(self, h):
            with torch.no_grad():
                self.mean.lerp_(h.mean(0), getattr(self.mean, "momentum", 0.5))
            return h - self.mean

    return Marked(), (x(),)


@kind
def parameters_frozen_in_part():
    net = Scored(nn.Linear(2, 3), nn.Linear(3, 1))
    net.net[0].weight.requires_grad_(False)
    return net, (x(),)


@kind
def trained_parameter_written_by_its_data():
    class Clipped(Own):
        def use(self, h):
            self.a.weight.data.clamp_(-0.3, 0.3)
            return self.a(h[:, :2])

    return Clipped(), (x(),)


class _Alias(nn.Module):
    """A weight that is reached by another name, taken once."""

    def __init__(self, alias, weight=lambda alias: alias):
        super().__init__()
        self.a, self.weight = nn.Linear(2, 3), weight
        self.alias = alias(self)

    def forward(self, x):
        return score(torch.tanh(x @ self.weight(self.alias).t() + self.a.bias))


@kind
def alias_by_a_view():
    return _Alias(lambda net: net.a.weight[:]), (x(),)


@kind
def alias_by_detach():
    return _Alias(lambda net: net.a.weight.detach()), (x(),)


@kind
def alias_by_data():
    return _Alias(lambda net: net.a.weight.data), (x(),)


@kind
def alias_by_numpy():
    return _Alias(lambda net: net.a.weight.detach().numpy(), torch.from_numpy), (x(),)


@kind
def alias_by_a_state_dict():
    return _Alias(lambda net: net.a.state_dict(), lambda state: state["weight"]), (x(),)


@kind(unused=("a", "b"))
def weight_kept_in_eval_mode():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(2, 1)), nn.Parameter(torch.randn(1, 2))
            self.merged = None

        def train(self, mode=True):
            self.merged = None if mode else (self.a @ self.b).detach()
            return super().train(mode)

        def forward(self, x):
            return score(x @ (self.a @ self.b if self.merged is None else self.merged))

    return Merged().eval(), (x(),)


# -------------------------------------------------------------------------------------------------- objects and classes


@kind
def module_with_slots():
    class Slotted(Own):
        __slots__ = ("calls", "mean")

        def __init__(self):
            super().__init__()
            object.__setattr__(self, "calls", 0)
            object.__setattr__(self, "mean", torch.zeros(3))

        def use(self, h):
            object.__setattr__(self, "calls", self.calls + 1)
            self.mean.add_(h.detach().mean(0))
            return h * self.calls - self.mean

    return Slotted(), (x(),)


@kind
def property_over_parameters():
    class Positive(Own):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(torch.randn(3))

        @property
        def scale(self):
            return nn.functional.softplus(self.raw)

        @functools.cached_property
        def size(self):
            return float(self.a.weight.numel())

        def use(self, h):
            return h * self.scale * self.size

    return Positive(), (x(),)


@kind
def cached_property_of_a_weight():
    class Positive(Own):
        @functools.cached_property
        def scale(self):
            return self.a.bias.detach().exp()

        def use(self, h):
            return h * self.scale

    return Positive(), (x(),)


@kind
def getattr_that_delegates():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 3)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x):
            return score(x @ self.weight.t() + self.bias)

    return Wrapper(), (x(),)


@kind
def module_with_a_lock():
    class Locked(Own):
        def __init__(self):
            super().__init__()
            self.lock, self.calls = threading.Lock(), 0

        def use(self, h):
            with self.lock:
                self.calls += 1
            return h * self.calls

    return Locked(), (x(),)


@kind
def module_with_a_file():
    class Logs(Own):
        def __init__(self):
            super().__init__()
            self.file, self.mean = tempfile.TemporaryFile("w+"), torch.zeros(3)  # noqa: SIM115
            weakref.finalize(self, self.file.close)

        def use(self, h):
            self.mean.add_(h.detach().mean(0))
            return h - self.mean

    return Logs(), (x(),)


@kind
def mode_changed_in_forward():
    class Changes(Own):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def use(self, h):
            out = self.norm(h)
            self.norm.train(not self.norm.training)
            return out

    return Changes(), (x(),)


@kind
def forward_assigned_to_the_instance():
    net = Own()
    old = net.a.forward
    net.a.forward = functools.wraps(old)(functools.partial(lambda module, x: old(x * 2), net.a))  # as accelerate does
    net.use = torch.tanh
    return net, (x(),)


@kind
def partial_of_a_bound_method():
    net = Scored(nn.Linear(2, 3))
    net.net.call = functools.partial(net.net.forward)
    net.forward = lambda x: score(net.net.call(x).tanh())
    return net, (x(),)


@kind
def module_reached_past_torch():
    class Held:
        def __init__(self, layer):
            self.layer = layer

    class Hidden(Own):
        def __init__(self):
            super().__init__()
            self.held = Held(self.a)

        def use(self, h):
            return self.held.layer(h[:, :2])

    return Hidden(), (x(),)


# --------------------------------------------------------------------------------------------- compiled and transformed


class Body(nn.Module):
    """Something to compile, with a buffer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return torch.tanh(self.a(x)) * self.calls


@kind
def scripted():
    return Scored(torch.jit.script(Body()), nn.Linear(3, 1)), (x(),)


@kind
def traced():
    return Scored(torch.jit.trace(nn.Sequential(nn.Linear(2, 3), nn.Tanh()), x()), nn.Linear(3, 1)), (x(),)


@kind(compiled=True)
def compiled():
    return torch.compile(Scored(Body()), backend="eager"), (x(),)


@kind(compiled=True)
def compiled_in_place():
    net = Scored(Body())
    net.compile(backend="eager")
    return net, (x(),)


@kind(compiled=True)
def compiled_layer():
    net = Scored(Body(), nn.Linear(3, 1))
    net.net[0].compile(backend="eager")
    return net, (x(),)


@kind
def checkpointed():
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            return score(checkpoint(lambda x: self.b(torch.tanh(self.a(x))), x, use_reentrant=False))

    return Recomputed(), (x(),)


@kind
def derivative_of_the_input():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                energy = self.b(torch.tanh(self.a(x))).sum()
                return score(torch.autograd.grad(energy, x)[0])

    return Force(), (x(),)


@kind
def derivative_of_the_input_by_func():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            return score(torch.func.grad(lambda x: self.b(torch.tanh(self.a(x))).sum())(x))

    return Force(), (x(),)


@kind
def custom_autograd_function():
    class Round(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return (x * 8).round() / 8

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Rounds(Own):
        def use(self, h):
            return Round.apply(h)

    return Rounds(), (x(),)


@kind
def ensemble_by_stack_module_state():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(2, 1) for _ in range(3)])

        def forward(self, x):
            stacked = torch.func.stack_module_state(list(self.parts))
            call = lambda p, b: torch.func.functional_call(self.parts[0], (p, b), (x,))  # noqa: E731
            return score(torch.vmap(call)(*stacked).min(0).values)

    return Ensemble(), (x(),)


@kind
def question_about_requires_grad():
    class Asks(Own):
        def use(self, h):
            return h * 2 if self.a.weight.requires_grad and self.a.weight.grad is None else h

    return Asks(), (x(),)


@kind
def branch_in_a_thread():
    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, x):
            with ThreadPoolExecutor(1) as pool:
                return score(self.a(x) + pool.submit(lambda: self.b(x).tanh()).result())

    return Threaded(), (x(),)


# -------------------------------------------------------------------------------------------------------------- results


class Returns(nn.Module):
    """What ``form`` makes of a result."""

    def __init__(self, form):
        super().__init__()
        self.a, self.form = nn.Linear(2, 2), form

    def forward(self, x):
        return self.form(self.a(x))


@kind
def result_of_several_values():
    return Returns(lambda h: h.square().mean(0)), (x(),)


@kind
def result_that_is_bool():
    return Returns(lambda h: bool((h > 0).sum() > 3)), (x(),)


@kind
def result_that_is_int():
    return Returns(lambda h: int((h > 0).sum())), (x(),)


@kind
def result_that_is_float():
    return Returns(lambda h: h.square().sum().item()), (x(),)


@kind
def result_of_numpy():
    return Returns(lambda h: np.square(h.detach().numpy()).sum()), (x(),)


@kind
def result_that_is_a_tensor_of_integers():
    return Returns(lambda h: (h > 0).sum()), (x(),)


@kind
def result_in_half_precision():
    return Returns(lambda h: h.square().sum().to(torch.bfloat16)), (x(),)
