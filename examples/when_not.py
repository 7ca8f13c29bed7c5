"""Where zeroth order is the wrong tool: a metric as the loss, a smooth problem of few parameters, a differentiable one.

1. F1 and average precision of a rare class have no gradient, and zograd trains a linear classifier on them; the plain
   rival is cross-entropy with a penalty, and a threshold chosen on the training rows. A narrow radius climbs the metric
   of the training rows and overfits; a wide one smooths it until it ends about where cross-entropy does.
2. Ten ridge penalties of a regression, by the validation error of the refit: smooth, deterministic, ten numbers. A
   (1+1) hill climb needs fewer evaluations, and autograd through the refit fewer still.
3. A network of 2410 weights that autograd differentiates: an estimate takes of the order of d evaluations.

Rates, penalties and the wide radius did best for each method, of a few, on seeds from 100 to 107.
"""

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from tasks.report import Report, arguments
from zograd import Tracker, distributions, zero_order

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits

    from tasks import picture
    from tasks.penalties import descend, diabetes, hill_climb, lowest, refit_error
    from tasks.rare_class import average_precision, by_cross_entropy, f1, rare_class, scores
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install scikit-learn matplotlib`.") from error

RADII = {0.1: 0.03, 1.0: 0.1}  # and the learning rate with each
BUDGET = 400  # evaluations of the bilevel problem
TARGET = 0.1  # training loss of the network


def by_zograd(metric, sigma, rows, labels, seed, steps):
    def loss(weights):
        return 1 - metric(scores(weights, rows), labels)

    estimated = zero_order(method="antithetic", num_samples=32, sigma=sigma, evaluator="vmap")(loss)
    torch.manual_seed(seed)
    weights = torch.zeros(rows.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=RADII[sigma])
    for _ in range(steps):
        optimizer.zero_grad()
        estimated(weights).backward()
        optimizer.step()
    return weights.detach()


def metrics_as_losses(report, seeds, steps, bar):
    """Metric of training and held-out rows: zograd's beside that of cross-entropy, one pair a seed."""
    pairs = {}
    for name in ("digits", "cancer"):
        for metric in (f1, average_precision):
            for sigma in RADII:
                bar.set_description(f"{metric.__name__} of {name}")
                found = {"training": [], "held-out": []}
                for seed in seeds:
                    train, test = rare_class(name, seed)
                    fits = by_zograd(metric, sigma, *train, seed, steps), by_cross_entropy(*train)
                    for which, (rows, labels) in zip(found, (train, test), strict=True):
                        found[which].append([metric(scores(fit, rows), labels).item() for fit in fits])
                    bar.update()
                title = f"{name}, {metric.__name__.replace('_', ' ')}, sigma {sigma:g}"
                for which, values in found.items():
                    pairs[title, which] = torch.tensor(values)
                    ours, rival = pairs[title, which].T
                    reference = f"{rival.mean():.3f} (cross-entropy)"
                    report.row(f"{title}: {which} rows", reference, ours.tolist(), 65 * steps)
    return pairs


def bilevel(seeds, bar):
    """Error above the lowest one after each evaluation, by method."""
    curves = {"zograd": [], "(1+1) hill climb": [], "autograd": []}
    for seed in seeds:
        bar.set_description("smooth bilevel")
        data, start = diabetes(seed), torch.full((10,), 2.0, dtype=torch.float64)

        def error(x, data=data):
            return refit_error(x, *data)

        torch.manual_seed(seed)
        estimated = zero_order(distributions.Orthogonal(), "antithetic", num_samples=10, sigma=0.3)(error)
        runs = [
            descend(estimated, start, 1.0, BUDGET, cost=2 * 10 + 1),
            hill_climb(error, start, BUDGET, seed),
            descend(error, start, 0.3, BUDGET, cost=2),  # a backward pass counts as an evaluation
        ]
        floor = min(lowest(error, start), *(run[-1] for run in runs))
        for curve, run in zip(curves.values(), runs, strict=True):
            curve.append([value - floor for value in run])
        bar.update()
    return {name: torch.tensor(runs, dtype=torch.float64) for name, runs in curves.items()}


def network_loss(weights, images, labels):
    w1, b1, w2, b2 = weights
    return cross_entropy(torch.tanh(images @ w1 + b1) @ w2 + b2, labels)


def to_target(loss, lr, seed, most, bar):
    """Evaluations until the training loss is below the target, and the losses on the way."""
    data = load_digits()
    images, labels = torch.tensor(data.data[:500], dtype=torch.float32) / 16, torch.tensor(data.target[:500])
    torch.manual_seed(seed)
    weights = [torch.randn(64, 32) / 8, torch.zeros(32), torch.randn(32, 10) / 32**0.5, torch.zeros(10)]
    optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr=lr)
    bar.set_description("differentiable network")
    evaluations, losses = [], []
    with Tracker() as tracker:
        while not losses or (losses[-1] > TARGET and len(losses) < most):
            optimizer.zero_grad()
            value = loss(weights, images, labels)
            value.backward()
            optimizer.step()
            losses.append(value.item())
            evaluations.append(tracker.evaluations or 2 * len(losses))
    bar.update()
    return evaluations, losses


def save_picture(path, pairs, curves, networks):
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for k, which in enumerate(("training", "held-out")):
        means = torch.stack([pair.mean(dim=0) for (_, part), pair in pairs.items() if part == which])
        for ours, rival in means.tolist():
            left.plot([k - 0.1, k + 0.1], [ours, rival], "-", color="#BBBBBB", zorder=1)
        left.plot([k - 0.1] * len(means), means[:, 0], "o", color="#0072B2", label=None if k else "zograd")
        left.plot([k + 0.1] * len(means), means[:, 1], "s", color="#D55E00", label=None if k else "cross-entropy")
    left.set(title="A metric as the loss", ylabel="F1 or average precision", xlim=(-0.5, 1.5))
    left.set_xticks([0, 1], ["training rows", "held-out rows"])
    for (name, runs), color in zip(curves.items(), ("#0072B2", "#D55E00", "#009E73"), strict=True):
        middle.semilogy(runs.mean(dim=0).clamp(min=1e-6), color=color, label=name)
    middle.set(title="Ten smooth penalties", xlabel="evaluations", ylabel="error above the lowest, mean over seeds")
    for (name, runs), color in zip(networks.items(), ("#0072B2", "#009E73"), strict=True):
        right.loglog(*runs[0], color=color, label=name)
    right.set(title="A differentiable network", xlabel="evaluations", ylabel="training loss")
    for ax in (left, middle, right):
        ax.legend()
        ax.grid(alpha=0.3)
    picture.save(figure, path)


def main():
    options = arguments(__doc__, "when_not", seeds=range(10))
    report, seeds = Report("when_not", options), options.seeds[:1] if options.quick else options.seeds
    with tqdm(total=11 * len(seeds), unit="run") as bar:
        pairs = metrics_as_losses(report, seeds, 10 if options.quick else 300, bar)
        curves = bilevel(seeds, bar)
        for at in (100, 200, BUDGET):
            reference = f"{curves['(1+1) hill climb'][:, at - 1].mean():.4f} (hill climb)"
            report.row(
                f"bilevel error above the lowest after {at}", reference, curves["zograd"][:, at - 1].tolist(), at
            )
        estimated = zero_order(method="antithetic", num_samples=16, sigma=0.03, evaluator="vmap")(network_loss)
        most = 10 if options.quick else 3000
        networks = {
            name: [to_target(loss, lr, seed, most, bar) for seed in seeds]
            for name, loss, lr in (("zograd", estimated, 0.05), ("autograd", network_loss, 0.1))
        }
    counts = {name: [run[0][-1] for run in runs] for name, runs in networks.items()}
    reference = f"{sum(counts['autograd']) / len(seeds):.0f} (autograd)"
    mean = sum(counts["zograd"]) / len(seeds)
    report.row(f"evaluations of a network to training loss {TARGET}", reference, counts["zograd"], mean)
    save_picture(options.output, pairs, curves, networks)
    report.finish()
    print(f"saved {options.output}")
    if not options.quick:
        ours, rival = torch.stack([pair.mean(dim=0) for (_, which), pair in pairs.items() if which == "held-out"]).T
        assert ours.mean() < rival.mean()
        assert curves["(1+1) hill climb"][:, 99].mean() < curves["zograd"][:, 99].mean()
        assert min(counts["zograd"]) > 20 * max(counts["autograd"])


if __name__ == "__main__":
    main()
