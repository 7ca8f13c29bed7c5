"""What a program written for TorchOpt gets from zograd instead: the same lines with either import, side by side.

Run it where both are installed (`make bench` makes such an environment): it prints the table of docs/migrating.md.
"""

import warnings

import torch
import torchopt as theirs
from torch import nn

import zograd.compat.torchopt as ours

warnings.simplefilter("ignore")
NORMAL = torch.distributions.Normal(0, 1)


def gradient(package, fn, x, **settings):
    torch.manual_seed(0)
    loss = package.diff.zero_order(NORMAL, argnums=0, **settings)(fn)(x)
    return torch.autograd.grad(loss, x)[0]


def forward_slope(package):
    """The gradient of a sum by the forward method, sigma = 0.1, N = 5000: 1 is right."""
    x = torch.ones(5, requires_grad=True)
    slope = gradient(package, lambda x: x.sum(), x, method="forward", num_samples=5000, sigma=0.1).mean()
    return f"{slope:.2g}"


def forward_noise(package):
    """Its deviation times the root of N, for N = 10 and N = 1000, sigma = 1: equal if samples average."""
    return ", ".join(f"{forward_deviation(package, num) * num**0.5:.2g}" for num in (10, 1000))


def forward_deviation(package, num):
    x, rows = torch.ones(1, requires_grad=True), []
    for seed in range(100):
        torch.manual_seed(seed)
        fn = package.diff.zero_order(NORMAL, method="forward", argnums=0, num_samples=num)(lambda x: x.sum())
        rows.append(torch.autograd.grad(fn(x), x)[0])
    return torch.stack(rows).std().item()


def by_keyword(package):
    """A keyword argument."""
    x = torch.ones(3, requires_grad=True)
    fn = package.diff.zero_order(NORMAL, argnums=0)(lambda x, *, scale: scale * x.sum())
    return attempt(lambda: fn(x, scale=2.0).backward())


def a_number(package):
    """A function that returns a Python number."""
    x = torch.ones(3, requires_grad=True)
    return attempt(lambda: package.diff.zero_order(NORMAL, argnums=0)(lambda x: float(x.sum()))(x).backward())


def an_inner_loop(package):
    """A function that trains something by autograd inside."""

    def fn(rate):
        w = torch.ones(2, requires_grad=True)
        (step,) = torch.autograd.grad((w**2).sum(), w)
        return ((w - rate * step) ** 2).sum()

    x = torch.tensor(0.1, requires_grad=True)
    return attempt(lambda: package.diff.zero_order(NORMAL, argnums=0)(fn)(x).backward())


def bad_value(package):
    """A function that is nan at some of its points."""
    x = torch.zeros(3, requires_grad=True)

    def fn(x):
        return x.sum().log() if x.sum() < 0 else x.sum()

    return attempt(lambda: gradient(package, fn, x, num_samples=20))


def two_backwards(package):
    """Two backwards of one loss."""
    x = torch.zeros(3, requires_grad=True)
    torch.manual_seed(0)
    loss = package.diff.zero_order(NORMAL, argnums=0, num_samples=5)(lambda x: (x - 1).square().sum())(x)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    return "equal" if torch.equal(first, second) else "differ"


def module(package, build, **settings):
    class Net(package.nn.ZeroOrderGradientModule, **settings):
        def __init__(self):
            super().__init__()
            build(self)

        def forward(self, x):
            return self.last(self.body(x)).square().mean() if hasattr(self, "last") else self.body(x).square().mean()

        def sample(self, sample_shape=torch.Size()):
            return torch.randn(sample_shape)

    return Net


def batch_norm(package):
    """How often one call with 50 samples updates the statistics of a BatchNorm."""

    def build(self):
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    net = module(package, build, num_samples=50)()
    net(torch.randn(8, 3)).backward()
    return str(int(net.body[1].num_batches_tracked))


def inherited(package):
    """How many points a subclass evaluates whose base was given 200 samples."""
    seen = []

    def build(self):
        self.body = nn.Linear(1, 1, bias=False)

    class Sub(module(package, build, sigma=0.01, num_samples=200)):
        def forward(self, x):
            seen.append(x)
            return self.body(x).sum()

        def sample(self, sample_shape=torch.Size()):
            return torch.randn(sample_shape)

    torch.manual_seed(0)
    Sub()(torch.ones(1, 1)).backward()
    return str(len(seen))


def frozen(package):
    """Whether a frozen layer keeps its values at all points."""
    seen = []

    def build(self):
        self.body, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        self.last.requires_grad_(False)
        self.last.register_forward_hook(lambda layer, *_: seen.append(layer.weight.detach().clone()))

    net = module(package, build, num_samples=5)()
    outcome = attempt(lambda: net(torch.randn(8, 3)).backward())
    kept = all(torch.equal(seen[0], w) for w in seen)
    return outcome if outcome.startswith("raises") else "kept" if kept else "perturbed"


def attempt(run):
    try:
        out = run()
    except Exception as error:
        return f"raises {type(error).__name__}"
    if isinstance(out, torch.Tensor):
        return "nan" if out.isnan().any() else f"{out.item():.3g}" if out.dim() == 0 else "a gradient"
    return "works"


ROWS = [
    forward_slope,
    forward_noise,
    bad_value,
    two_backwards,
    by_keyword,
    a_number,
    an_inner_loop,
    batch_norm,
    inherited,
    frozen,
]


def main():
    print("| the same lines | TorchOpt | zograd |\n|---|---|---|")
    for row in ROWS:
        print(f"| {row.__doc__.rstrip('.')} | {row(theirs)} | {row(ours)} |", flush=True)
    print(f"\nMeasured with TorchOpt {theirs.__version__}, torch {torch.__version__.partition('+')[0]}.")


if __name__ == "__main__":
    main()
