"""zograd beside TorchOpt: scale, variance, and what users run into."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torchopt
from checks import checks, raised, told
from torch import nn

import zograd

PEER, PACKAGE = "TorchOpt", "torchopt"
CHECKS, check = checks()


def normal():
    return torch.distributions.Normal(0.0, 1.0)


def theirs(fn, method="antithetic", num=100, sigma=0.1, distribution=None, argnums=0):
    decorate = torchopt.diff.zero_order(distribution or normal(), method, argnums, num_samples=num, sigma=sigma)
    return decorate(fn)


def ours(fn, method="antithetic", num=100, sigma=0.1, distribution=None, **options):
    return zograd.zero_order(distribution, method, num_samples=num, sigma=sigma, **options)(fn)


def gradient(fn, x):
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(fn(x), x)[0]


def both(fn, x, **options):
    return gradient(theirs(fn, **options), x), gradient(ours(fn, **options), x)


def total(x):
    return x.sum()


@check('`method="forward"`, f(x) = sum(x), sigma 0.1: the slope, which is 1')
def forward_scale():
    slopes = [g.item() for g in both(total, torch.zeros(1), method="forward", num=10000)]
    return *(f"{s:.4f}" for s in slopes), abs(slopes[0] - 0.01) < 0.005 and abs(slopes[1] - 1) < 0.05


@check('`method="forward"`, f(x) = 1 + sum(x): deviation of the slope over 100 estimates, N = 10, 100, 1000')
def forward_variance():
    def deviations(make):
        fns = (make(lambda x: 1 + x.sum(), method="forward", num=n, sigma=1.0) for n in (10, 100, 1000))
        return [torch.stack([gradient(fn, torch.zeros(1)) for _ in range(100)]).std().item() for fn in fns]

    a, b = deviations(theirs), deviations(ours)
    shown = [", ".join(f"{s:.2f}" for s in d) for d in (a, b)]
    return *shown, a[2] > a[0] / 3 and b[2] < b[0] / 5


@check('`method="forward"`, SGD with rate 0.05, 100 steps on |x - 1|^2 from 5: the loss at the end')
def forward_training():
    def train(make):
        x = torch.zeros(5, requires_grad=True)
        fn, optimizer = make(lambda x: (x - 1).square().sum(), method="forward", sigma=0.1), torch.optim.SGD([x], 0.05)
        for _ in range(100):
            optimizer.zero_grad()
            fn(x).backward()
            optimizer.step()
        return (x - 1).square().sum().item()

    a, b = train(theirs), train(ours)
    return f"{a:.3g}", f"{b:.3g}", a > 1 and b < 1e-3


@check('`method="naive"`, f(x) = 1000 + sum(x), 10 parameters, sigma 0.1, N = 100: relative error')
def naive_baseline():
    def level(x):
        return 1000 + x.sum()

    options = {"method": "naive", "num": 100}
    x, truth = torch.zeros(10), torch.ones(10)
    plain, same = both(level, x, **options)
    centered = gradient(ours(level, **options, shaping=zograd.shaping.leave_one_out), x)
    a, b, c = ((g - truth).norm().item() / truth.norm().item() for g in (plain, same, centered))
    return f"{a:.0f}", f"{b:.0f} as it is, {c:.2f} with `shaping=leave_one_out`", a > 100 and c < 2


@check("`Normal(0, 0.1)` as the distribution, f(x) = sum(x): the slope, which is 1")
def wrong_variance():
    narrow = torch.distributions.Normal(0.0, 0.1)
    slope = gradient(theirs(total, distribution=narrow, num=1000), torch.zeros(1)).item()
    try:
        error = ours(total, distribution=narrow)
    except ValueError as refused:
        error = str(refused)
    helps = "Normal(0, 1)" in error and "sigma=" in error
    return f"{slope:.4f}", "ValueError, which names `Normal(0, 1)` and `sigma=`", slope < 0.02 and helps


@check("`sample` returns 8 draws, (8, 10) for 10 parameters, f(x) = sum(x): the slope, which is 1")
def wrong_shape():
    def sample(sample_shape=()):
        return torch.randn(8, *sample_shape)

    slope = gradient(theirs(total, distribution=sample, num=1000), torch.zeros(10)).mean().item()
    error = raised(lambda: gradient(ours(total, distribution=sample), torch.zeros(10)))
    return f"{slope:.2f}", str(error), abs(slope - 8) < 1 and error == "ValueError"


@check("one evaluation of 100 gives nan")
def nan():
    def make():
        calls = []

        def fn(x):
            calls.append(1)
            return x.sum() * (float("nan") if len(calls) == 50 else 1.0)

        return fn

    g = gradient(theirs(make()), torch.zeros(10))
    error = raised(lambda: gradient(ours(make()), torch.zeros(10)))
    dropped = gradient(ours(make(), failures=zograd.failures.Drop()), torch.zeros(10))
    told_ours = f"{error} by default; with `failures=Drop()` {int(dropped.isnan().sum())} of 10 entries"
    return f"{int(g.isnan().sum())} of 10 entries are nan", told_ours, g.isnan().all() and error == "NonFiniteError"


@check("keyword arguments in the call")
def keywords():
    def scaled(x, scale=1.0):
        return x.sum() * scale

    x = torch.zeros(2, requires_grad=True)
    a, b = (raised(lambda make=make: make(scaled)(x, scale=2.0)) for make in (theirs, ours))
    return str(a), "works", a is not None and b is None


@check("fn returns a Python float")
def floats():
    a, b = (raised(lambda m=m: gradient(m(lambda x: float(x.sum())), torch.zeros(2))) for m in (theirs, ours))
    return str(a), "works", a is not None and b is None


@check("fn returns a vector of 3 residuals")
def vectors():
    def jacobian(make):
        x = torch.zeros(3, requires_grad=True)
        torch.autograd.grad(make(lambda x: 2 * x)(x).sum(), x)

    a, b = raised(lambda: jacobian(theirs)), raised(lambda: jacobian(ours))
    return str(a), "works", a is not None and b is None


@check("an inner training loop with autograd in fn (bilevel)")
def bilevel():
    def inner(rate):
        w = torch.ones(2, requires_grad=True)
        for _ in range(3):
            (g,) = torch.autograd.grad((w * w).sum(), w)
            w = w - rate * g
        return (w * w).sum().detach()

    a, b = (raised(lambda m=m: gradient(m(inner), torch.tensor(0.1))) for m in (theirs, ours))
    return str(a), "works", a is not None and b is None


@check("`torch.func.grad`, `vmap(grad)`, `jacrev` over the decorated function")
def transforms():
    def tried(make):
        x, batch = torch.zeros(2), torch.zeros(3, 2)
        return [
            raised(lambda: torch.func.grad(make(total))(x)),
            raised(lambda: torch.func.vmap(torch.func.grad(make(total)))(batch)),
            raised(lambda: torch.func.jacrev(make(total))(x)),
        ]

    a, b = tried(theirs), tried(ours)
    return ", ".join(map(str, a)), "work", all(a) and not any(b)


@check(
    "`create_graph=True`, h = f^2 where f(x) = x^2 hidden from autograd, at 1: the second derivative of h, which is 12"
)
def second_derivative():
    def second(make):
        x = torch.ones(1, requires_grad=True, dtype=torch.float64)
        h = make(lambda x: (x.detach() ** 2).sum(), num=20000)(x) ** 2
        (g,) = torch.autograd.grad(h, x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0].item()

    a, b = second(theirs), second(ours)
    return f"{a:.2f}, no word", f"{b:.2f}", abs(a - 8) < 1 and abs(b - 12) < 1


@check("`backward(retain_graph=True)` twice: the same gradient?")
def retained():
    def same(make):
        x = torch.ones(3, requires_grad=True)
        loss = make(lambda x: (x**2).sum())(x)
        return torch.equal(*(torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)))

    a, b = same(theirs), same(ours)
    return "yes" if a else "no", "yes" if b else "no", b and not a


@check("a step in place (an optimizer's) between the call and `backward`")
def step_between():
    def run(make):
        x = torch.ones(3, requires_grad=True)
        loss = make(lambda x: (x**2).sum())(x)
        with torch.no_grad():
            x.add_(1)
        loss.backward()

    a, b = raised(lambda: run(theirs)), raised(lambda: run(ours))
    return str(a), "works", a is not None and b is None


@check("autocast around the call: the dtype that fn's matrix products have at the points")
def autocast():
    def seen(make):
        kinds = []

        def fn(w):
            out = torch.ones(2, 2) @ w
            kinds.append(str(out.dtype).removeprefix("torch."))
            return out.float().sum()

        w = torch.zeros(2, 2, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = make(fn, num=2)(w)
        loss.backward()
        return sorted(set(kinds))

    a, b = seen(theirs), seen(ours)
    return ", ".join(a), ", ".join(b), a == ["bfloat16", "float32"] and b == ["bfloat16"]


@check(
    "fn adds noise of deviation 1 by `torch.randn`: deviation of the slope of sum(x), 100 estimates, N = 10, sigma 0.1"
)
def common_random_numbers():
    def deviation(make):
        fn = make(lambda x: x.sum() + torch.randn(()), num=10)
        return torch.stack([gradient(fn, torch.zeros(1)) for _ in range(100)]).std().item()

    a, b = deviation(theirs), deviation(ours)
    return f"{a:.2f}", f"{b:.2f} (both sides of a pair see the same noise)", a > 3 * b


@check("a bfloat16 layer in fn")
def bfloat16():
    def run(make):
        data = torch.ones(4, 3, dtype=torch.bfloat16)
        return gradient(make(lambda w: (data @ w).float().sum()), torch.zeros(3, dtype=torch.bfloat16))

    a, b = raised(lambda: run(theirs)), raised(lambda: run(ours))
    return str(a), "works", a is not None and b is None


@check("complex parameters, f(z) = |z - i|^2 at 0, whose gradient is imaginary")
def complex_parameters():
    def fn(z):
        return (z - 1j).abs().square().sum()

    g = gradient(theirs(fn, num=1000), torch.zeros(1, dtype=torch.complex64)).item()
    error = raised(lambda: gradient(ours(fn), torch.zeros(1, dtype=torch.complex64)))
    return f"imaginary part {g.imag:.2f}", str(error), abs(g.imag) < 0.1 and error == "TypeError"


def module_pair(body, num=1, sigma=0.1, method="antithetic"):
    """A class of either package with the same body; the sampler that TorchOpt asks for is standard."""

    def made(base):
        settings = {"method": method, "num_samples": num, "sigma": sigma}
        sample = {"sample": lambda self, sample_shape=(): torch.randn(sample_shape)}
        return type("Net", (base,), body | sample, **settings)

    return made(torchopt.nn.ZeroOrderGradientModule), made(zograd.nn.ZeroOrderGradientModule)


@check("two layers share a weight, f = the sum of both, N = 1000: the slope by an entry, which is 2")
def tied():
    def init(self):
        nn.Module.__init__(self)
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def slope(kind):
        net = kind()
        return torch.autograd.grad(net(), net.embed.weight)[0].mean().item()

    body = {"__init__": init, "forward": lambda self: self.embed.weight.sum() + self.out.weight.sum()}
    a, b = map(slope, module_pair(body, 1000))
    return f"{a:.2f}", f"{b:.2f}", abs(a - 1) < 0.3 and abs(b - 2) < 0.3


@check("a frozen parameter (`requires_grad=False`) of a module: is it perturbed?")
def frozen():
    seen = []

    def init(self):
        nn.Module.__init__(self)
        self.free = nn.Parameter(torch.zeros(2))
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self):
        seen.append(self.fixed.detach().abs().max().item())
        return self.free.sum() + self.fixed.sum()

    def moved(kind):
        seen.clear()
        kind()().backward()
        return max(seen) > 0

    a, b = map(moved, module_pair({"__init__": init, "forward": forward}))
    return *("yes" if m else "no" for m in (a, b)), a and not b


@check("settings of a module class (N = 50) in a subclass with a `forward` of its own: calls of `forward`")
def inherited():
    calls = []

    def init(self):
        nn.Module.__init__(self)
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self):
        calls.append(1)
        return self.w.sum()

    def counted(kind):
        calls.clear()
        type("Sub", (kind,), {"forward": forward})()().backward()
        return len(calls)

    a, b = map(counted, module_pair({"__init__": init, "forward": forward}, 50))
    return str(a), str(b), a < 50 < b


@check("BatchNorm: updates of the running statistics in one call and backward, antithetic, N = 25")
def batch_norm():
    def init(self):
        nn.Module.__init__(self)
        self.norm = nn.BatchNorm1d(2)

    def updates(kind):
        net = kind()
        net(torch.randn(8, 2)).backward()
        return net.norm.num_batches_tracked.item()

    body = {"__init__": init, "forward": lambda self, x: self.norm(x).square().mean()}
    a, b = map(updates, module_pair(body, 25))
    return str(a), str(b), a == 51 and b == 1


@check("four threads call one module 40 times")
def threads():
    def init(self):
        nn.Module.__init__(self)
        self.w = nn.Parameter(torch.zeros(100))

    def failed(kind):
        net = kind()
        with ThreadPoolExecutor(4) as pool:
            return sum(e is not None for e in pool.map(lambda _: raised(lambda: net().backward()), range(40)))

    a, b = map(failed, module_pair({"__init__": init, "forward": lambda self: self.w.tanh().sum()}, 20))
    return "most calls raise" if a > 20 else "calls raise", "all work" if not b else "calls raise", a and not b


@check("calls of fn in an estimate, antithetic, N = 10")
def calls_of_fn():
    def counted(make):
        calls = []
        gradient(make(lambda x: calls.append(1) or x.sum(), num=10), torch.zeros(2))
        return len(calls)

    a, b = counted(theirs), counted(ours)
    return str(a), str(b), a == b == 21


def main():
    return told([check() for check in CHECKS], PEER)


if __name__ == "__main__":
    sys.exit(not main())
