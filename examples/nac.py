"""Learn how to compose opponents: a meta-solver for Kuhn poker, through best responses that have no derivative.

After Feng et al., "Neural auto-curricula in two-player zero-sum games" (arXiv:2106.02745). A population of policies
grows by best responses to a mixture of itself; who mixes decides how fast the mixture becomes hard to exploit. PSRO
(policy-space response oracles) mixes by a Nash equilibrium of the payoffs, fictitious play evenly ("uniform"),
self-play takes the newest. NAC (neural auto-curricula) learns it: a network maps the payoff matrix of a population of
any size to weights, and its loss is NashConv (what best responses gain in both seats; 0 at an equilibrium) after 5, 10
and 15 responses. An argmax has no derivative, so the gradient comes from values alone. Each call plays 15 rounds for
all perturbed networks and all games at once.

Two kinds of response: "rough" ones, whose probabilities are uniform numbers plus one for the best action, normalized,
and exact ones. All compete on the same 150 populations, which no training saw.

With exact responses PSRO mostly loses to ties: an equilibrium leaves its best responses indifferent, and what they then
do by rule adds little. With noise of 1e-5 on its weights ("ties broken") it arrives at 0, which NAC does not.
"""

import torch
from torch.nn.functional import leaky_relu
from tqdm import tqdm

from tasks import kuhn
from tasks.report import Report, arguments
from zograd import zero_order

try:
    from matplotlib.figure import Figure
    from scipy.optimize import linprog
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install matplotlib scipy`.") from error

ROUNDS, MEASURED = 15, (5, 10, 15)
AT = [k - 1 for k in MEASURED]
SHAPES = [(1, 16), (1, 16), (32, 16), (1, 16), (16, 16), (1, 16), (16, 1)]
# NashConv after 5, 10 and 15 responses by an implementation in numpy, on other populations.
REFERENCE = {
    ("rough", "NAC"): (0.342, 0.283, 0.257),
    ("rough", "PSRO"): (0.362, 0.308, 0.281),
    ("rough", "uniform"): (0.511, 0.442, 0.411),
    ("rough", "self-play"): (0.55, 0.55, 0.54),
    ("exact", "NAC"): (0.153, 0.066, 0.042),
    ("exact", "PSRO"): (0.271, 0.127, 0.029),
    ("exact", "uniform"): (0.267, 0.176, 0.138),
    ("exact", "self-play"): (0.93, 0.54, 1.45),
}
COLORS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#999999")


# ---- who mixes: (..., n, n) payoffs to (..., n) weights


def network(params):
    """The same network for populations of every size and order; params are (sets, 848)."""
    parts = params.split([rows * columns for rows, columns in SHAPES], dim=1)
    w0, b0, w1, b1, w2, b2, w3 = (part.view(-1, 1, *shape) for part, shape in zip(parts, SHAPES, strict=True))

    def mix(payoffs):
        rows = leaky_relu(payoffs.unsqueeze(-1) * w0.unsqueeze(2) + b0.unsqueeze(2)).mean(dim=-2)
        features = torch.cat([rows, rows.mean(dim=-2, keepdim=True).expand_as(rows)], dim=-1)
        return (leaky_relu(leaky_relu(features @ w1 + b1) @ w2 + b2) @ w3).squeeze(-1).softmax(dim=-1)

    return mix


def first_network():
    return torch.cat([torch.randn(r * c) / (r**0.5 if i % 2 == 0 else 10) for i, (r, c) in enumerate(SHAPES)])


def linear_program(payoffs):
    n, weights = payoffs.shape[-1], []
    every, bounds = [[1.0] * n + [0.0]], [(0, None)] * n + [(None, None)]  # the last variable is the value
    for game in payoffs.reshape(-1, n, n).double():
        wins_less = torch.cat([-game.T, torch.ones(n, 1)], dim=1)  # value - what is won against each, at most 0
        weights.append(linprog([0.0] * n + [-1.0], wins_less, [0.0] * n, every, [1.0], bounds).x[:n])
    return torch.tensor(weights).to(payoffs).view(payoffs.shape[:-1])


def ties_broken(payoffs):
    weights = linear_program(payoffs) + 1e-5 * torch.rand(payoffs.shape[:-1])
    return weights / weights.sum(dim=-1, keepdim=True)


def uniform(payoffs):
    return torch.full(payoffs.shape[:-1], 1 / payoffs.shape[-1])


def newest(payoffs):
    return torch.eye(payoffs.shape[-1])[-1].expand(payoffs.shape[:-1])


RIVALS = {"PSRO": linear_program, "PSRO, ties broken": ties_broken, "uniform": uniform, "self-play": newest}


# ---- a population's history, and learning from it


def play(mix, populations, kind):
    """NashConv after each response, (rounds, *populations), on populations drawn from torch's stream."""
    draws = torch.rand(*populations, 1, 4, 3, 2)
    roughness = torch.rand(ROUNDS, *populations, 4, 3, 2) if kind == "rough" else None
    history = kuhn.self_improve(mix, draws[..., 0] / draws.sum(dim=-1), roughness)
    return torch.stack([next(history) for _ in range(ROUNDS)])


@zero_order(method="antithetic", num_samples=15, sigma=0.1, evaluator="batched")
def exploitability(params, kind, games=5):
    """Both sides of a pair meet the same populations, by common random numbers."""
    return play(network(params), (len(params), games), kind)[AT].mean(dim=(0, 2))


def meta_train(kind, seed, steps):
    torch.manual_seed(seed)
    params = first_network().requires_grad_()
    optimizer = torch.optim.Adam([params], lr=0.05)
    for _ in (progress := tqdm(range(steps), f"{kind} responses, seed {seed}", unit="step")):
        optimizer.zero_grad()
        loss = exploitability(params, kind)
        loss.backward()
        optimizer.step()
        progress.set_postfix_str(f"NashConv {loss.item():.3f}", refresh=False)
    return params.detach()


def compete(kind, seeds, steps, games):
    """NashConv by name, (seeds, rounds, games); rivals have one row."""
    results = {"NAC": [network(meta_train(kind, seed, steps)[None]) for seed in seeds]}
    results |= {name: [mix] for name, mix in RIVALS.items()}
    for name, mixes in (progress := tqdm(results.items(), f"{kind} responses, {games} populations", unit="solver")):
        progress.set_postfix_str(name)
        histories = []
        for mix in mixes:
            torch.manual_seed(2**31)  # the same populations for all, and none that training saw
            histories.append(play(mix, (1, games), kind).squeeze(1))
        results[name] = torch.stack(histories)
    return results


def tell(report, kind, results, evaluations):
    for name, histories in results.items():
        for columns in [range(3)] if kind == "rough" else [[0], [1], [2]]:
            reference = REFERENCE.get((kind, name))
            known = f"{sum(reference[i] for i in columns) / len(columns):.4g} (numpy)" if reference else ""
            values = histories[:, [AT[i] for i in columns]].mean(dim=(1, 2)).tolist()
            after = ", ".join(str(MEASURED[i]) for i in columns)
            what, learned = f"{kind} responses, {name}: NashConv after {after}", name == "NAC"
            report.row(what, known, values if learned else values[0], evaluations if learned else None)


def margins(results, lower, upper, rounds):
    """How far one is below the other over the same populations, in standard errors, by seed."""
    gaps = (results[upper] - results[lower])[:, rounds].mean(dim=1)
    return (gaps.mean(dim=1) / gaps.std(dim=1) * gaps.shape[1] ** 0.5).tolist()


def save_picture(path, results):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (kind, by_name) in zip(figure.subplots(1, 2), results.items(), strict=True):
        for (name, histories), color in zip(by_name.items(), COLORS, strict=True):
            width = 5 if name == "PSRO" else 1.5  # on the left it is seen below "PSRO, ties broken"
            axes.plot(range(1, ROUNDS + 1), histories.mean(dim=(0, 2)), "o-", color=color, label=name, ms=3, lw=width)
        axes.set(title=f"{kind} best responses", xlabel="responses", ylabel="NashConv, mean over populations")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    axes.set_yscale("log")  # of the exact ones alone: the others differ by less than a factor of three
    figure.savefig(path, dpi=90)


def main():
    args = arguments(__doc__, "nac")
    args.seeds = args.seeds[:1] if args.quick else args.seeds
    report = Report("nac", args)
    steps, games = (3, 3) if args.quick else (300, 150)
    results = {}
    for kind in ("rough", "exact"):
        results[kind] = compete(kind, args.seeds, steps, games)
        tell(report, kind, results[kind], steps * 31)
    rough, exact = results["rough"], results["exact"]
    below_psro = margins(rough, "NAC", "PSRO", AT)
    report.row("rough responses: NAC below PSRO, mean of the three, in standard errors", "> 4", below_psro)
    below_uniform = margins(rough, "PSRO", "uniform", AT)
    report.row("rough responses: PSRO below uniform, in standard errors", "> 4", below_uniform[0])
    early = [margins(exact, "NAC", "PSRO", [k]) for k in AT]
    for k, margin in zip(MEASURED, early, strict=True):
        report.row(f"exact responses: NAC below PSRO after {k}, in standard errors", "> 0" if k < 15 else "< 0", margin)
    save_picture(args.output, results)
    report.finish()
    print(f"seeds {args.seeds}; rates and numbers of steps were chosen on the seeds 100 and 101; saved {args.output}")
    if not args.quick:
        assert min(below_psro + below_uniform) > 4
        assert min(margins(exact, "NAC", "uniform", AT)) > 4
        assert min(early[0]) > 4
        assert min(early[1]) > 0


if __name__ == "__main__":
    main()
