"""A small transformer over characters, in float32 and with the integer arithmetic of int8 inference."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, layer_norm

WIDTH, HEADS, LAYERS, CONTEXT, GROUP = 64, 4, 2, 64, 32


class Int8Linear(nn.Module):
    """A linear layer on weights of int8 with a float step for each output and group of 32 inputs, times a scale of 1.

    Inputs are rounded to int8 with one scale a token. The sums of products stay below 2**24, so that float32 holds the
    integers exactly. Backpropagation ends here.
    """

    def __init__(self, linear):
        super().__init__()
        groups = linear.weight.detach().unflatten(1, (-1, GROUP))
        step = groups.abs().amax(dim=2) / 127
        self.register_buffer("weight", (groups / step.unsqueeze(2)).round().to(torch.int8))
        self.register_buffer("step", step)
        self.scale = nn.Parameter(torch.ones_like(step))
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        """The products of integers, in floats again."""
        x = x.detach()  # as in kernels of int8, which have no derivative
        unit = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6) / 127
        tokens = (x / unit).round().to(torch.int8).unflatten(-1, (-1, GROUP)).float()
        sums = torch.einsum("...gi,ogi->...og", tokens, self.weight.float())
        return (sums * (self.step * self.scale)).sum(dim=-1) * unit + self.bias


class Int8Embedding(nn.Module):
    """An embedding of int8 with a float step for each entry, times a scale of 1."""

    def __init__(self, embedding):
        super().__init__()
        step = embedding.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("weight", (embedding.weight.detach() / step).round().to(torch.int8))
        self.register_buffer("step", step)
        self.scale = nn.Parameter(torch.ones_like(step))

    def forward(self, tokens):
        """The entries of some tokens."""
        return self.weight[tokens].float() * (self.step * self.scale)[tokens]


class Norm(nn.Module):
    """Layer normalization."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        """Normalize each token."""
        return layer_norm(x, (WIDTH,), self.gain, self.shift)


class Block(nn.Module):
    """Causal attention and a network of two layers, each added to what came in."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = Norm(), Norm()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        """Of (..., tokens, width), the same shape."""
        length = x.shape[-2]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).transpose(-2, -4).unbind(-3)
        mask = torch.full((length, length), -torch.inf).triu(1)
        attention = (q @ k.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5 + mask).softmax(dim=-1)
        x = x + self.out((attention @ v).transpose(-2, -3).flatten(-2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Characters in, the mean cross-entropy of the next ones out, in nats."""

    def __init__(self, vocabulary):
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = Norm(), nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens, following):
        """The loss of (batch, tokens) and the tokens that follow each."""
        x = self.characters(tokens) + self.places(torch.arange(tokens.shape[-1]))
        return cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, -2), following.flatten())


def quantize(module):
    """Replace every linear layer and embedding inside by its int8 form; scales, biases and norms stay float."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, Int8Embedding(child))
        else:
            quantize(child)
    return module
