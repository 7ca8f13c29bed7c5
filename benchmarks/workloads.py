"""What is timed: a loss of torch tensors, where it begins, and how many directions an estimate has."""

import itertools
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class Workload:
    """A loss of a list of tensors, and the same as a module."""

    name: str
    loss: object  # a function of a list of tensors
    params: list
    num: int
    module: object = None  # the same as a module, with its input
    inputs: tuple = ()

    @property
    def size(self):
        return sum(p.numel() for p in self.params)


def quadratic(device, d, num=1000):
    x = torch.randn(d, device=device).requires_grad_()
    return Workload(f"quadratic, d = {d}, N = {num}", lambda ps: (ps[0] * ps[0]).sum(), [x], num)


def python_function(device, num=100):
    def loss(ps):
        total = 0.0
        for value in ps[0].tolist():  # nothing that torch could follow or vectorize
            total += abs(round(value)) + 0.1 * value * value
        return torch.tensor(total)

    x = torch.randn(10, device=device).requires_grad_()
    return Workload(f"a Python function, d = 10, N = {num}", loss, [x], num)


class Classifier(torch.nn.Module):
    """A network with its loss, so that the module returns the objective."""

    def __init__(self, network, labels):
        super().__init__()
        self.network = network
        self.labels = labels

    def forward(self, x):
        return F.cross_entropy(self.network(x), self.labels)


def mlp(device, widths, batch, num, name):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    network = torch.nn.Sequential(*(x for layer in layers for x in (layer, torch.nn.ReLU())))[:-1].to(device)
    x, labels = torch.randn(batch, widths[0]).to(device), torch.randint(0, widths[-1], (batch,)).to(device)
    params = [p.detach().clone().requires_grad_() for p in network.parameters()]

    def loss(ps):
        hidden = x
        for k in range(0, len(ps) - 2, 2):
            hidden = F.relu(F.linear(hidden, ps[k], ps[k + 1]))
        return F.cross_entropy(F.linear(hidden, ps[-2], ps[-1]), labels)

    return Workload(name, loss, params, num, Classifier(network, labels), (x,))


def of_module(name, module, inputs, num):
    """The workload of a module that returns its loss, and the same as a function of its trained parameters."""
    trained = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters() if p.requires_grad}

    def loss(ps):
        return torch.func.functional_call(module, dict(zip(trained, ps, strict=True)), inputs)

    return Workload(name, loss, list(trained.values()), num, module, inputs)


class Transformer(torch.nn.Module):
    """An encoder with an embedding and a linear head."""

    def __init__(self, tokens=1000, width=320, depth=8):
        super().__init__()
        self.embedding = torch.nn.Embedding(tokens, width)
        layer = torch.nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, depth)
        self.out = torch.nn.Linear(width, tokens)

    def forward(self, tokens):
        return self.out(self.encoder(self.embedding(tokens))).mean(dim=1)


def transformer(device, num=8):
    torch.manual_seed(0)
    module = Classifier(Transformer().to(device), torch.randint(0, 1000, (4,)).to(device)).train()
    tokens = torch.randint(0, 1000, (4, 64)).to(device)
    return of_module(f"transformer, 10.5M parameters, N = {num}", module, (tokens,), num)


def batch_norm(device, num=16):
    """A convolutional network in training mode: each evaluation moves the running statistics of its three layers."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 16, 3), torch.nn.Conv2d(16, 32, 3), torch.nn.Conv2d(32, 32, 3)]
    blocks = [x for c in layers for x in (c, torch.nn.BatchNorm2d(c.out_channels), torch.nn.ReLU())]
    network = torch.nn.Sequential(*blocks, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10))
    module = Classifier(network, torch.randint(0, 10, (16,))).to(device).train()
    return of_module(f"BatchNorm net, N = {num}", module, (torch.randn(16, 3, 16, 16).to(device),), num)


def frozen_backbone(device, num=8):
    """A head of 16,010 parameters on a frozen backbone of 10.2M."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(*(x for _ in range(4) for x in (torch.nn.Linear(1600, 1600), torch.nn.ReLU())))
    network = torch.nn.Sequential(backbone.requires_grad_(False), torch.nn.Linear(1600, 10))
    module = Classifier(network, torch.randint(0, 10, (4,))).to(device)
    return of_module(f"frozen backbone of 10M, N = {num}", module, (torch.randn(4, 1600).to(device),), num)


class Holder(Classifier):
    """A classifier that holds 100 attributes beside its network: numbers, names, lists, dicts and tensors."""

    def __init__(self, network, labels):
        super().__init__(network, labels)
        kinds = (
            float,
            str,
            lambda k: [k, str(k)],
            lambda k: {"at": k, "seen": []},
            lambda k: torch.full((8,), 1.0 * k),
        )
        for k in range(100):
            setattr(self, f"attribute_{k}", kinds[k % len(kinds)](k))


def attributes(device, num=16):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    module = Holder(network, torch.randint(0, 10, (32,))).to(device)
    return of_module(f"100 attributes, N = {num}", module, (torch.randn(32, 8).to(device),), num)


WORKLOADS = {
    "python": python_function,
    "quadratic10": lambda device: quadratic(device, 10),
    "quadratic1000": lambda device: quadratic(device, 1000),
    "one": lambda device: quadratic(device, 10, num=1),
    "small100": lambda device: mlp(device, (8, 64, 64, 10), 32, 100, "MLP 64-64, N = 100"),
    "small1000": lambda device: mlp(device, (8, 64, 64, 10), 32, 1000, "MLP 64-64, N = 1000"),
    "large": lambda device: mlp(device, (512, 1024, 512, 10), 64, 32, "MLP, 1.05M parameters, N = 32"),
    "transformer": transformer,
    "batch_norm": batch_norm,
    "backbone": frozen_backbone,
    "attributes": attributes,
}
