"""Learn which of 80 data sources to trust, through refits by scikit-learn inside the function.

48 of the sources mislabel 80 % of their rows. A call refits a logistic regression on a random half of the rows,
weighted by source, and returns the log loss of 40 of 60 clean rows: no gradient, and noise from which rows it drew. All
values of one step share those rows, and so do the values that each rival compares. All methods have the same number of
evaluations, and the best of a few settings on the seeds 100 to 103 (100 and 101 for hill climb and random search).
There CMA-ES came out ahead of zograd, .917 to .905; on the seeds shown the two are level. A first
step of .3 would take the hill climb to .741 on these.
"""

import math
import warnings

import torch
from tqdm import tqdm

from tasks.report import Report, arguments
from zograd import Tracker, zero_order

try:
    import cma
    import numpy as np
    from matplotlib.figure import Figure
    from sklearn.exceptions import ConvergenceWarning

    from tasks import picture
    from tasks.sources import SOURCES, Sources, sigmoid
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install scikit-learn matplotlib cma`.") from error

PAIRS, STEPS = 4, 80


def zograd(task, seed, evaluations):
    """Adam on antithetic estimates."""

    @zero_order(method="antithetic", num_samples=PAIRS, sigma=1.0)
    def loss(logits, draw):
        return task.loss(logits.numpy(), draw)

    torch.manual_seed(seed)
    logits = torch.zeros(SOURCES, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5, betas=(0.8, 0.95))
    with Tracker(budget=evaluations) as tracker:
        for step in range(evaluations // (2 * PAIRS + 1)):
            optimizer.zero_grad()
            loss(logits, (seed, step)).backward()
            optimizer.step()
    return logits.detach().numpy(), tracker.evaluations


def cma_es(task, seed, evaluations):
    """The mean of its last distribution; one draw of rows a generation."""
    search = cma.CMAEvolutionStrategy(np.zeros(SOURCES), 1.0, {"seed": seed + 1, "verbose": -9})
    count = 0
    for generation in range(evaluations):
        candidates = search.ask()
        if count + len(candidates) > evaluations:
            break
        search.tell(candidates, [task.loss(x, (seed, generation)) for x in candidates])
        count += len(candidates)
    return search.result.xfavorite, count


def hill_climb(task, seed, evaluations, step=0.1):
    """(1+1) with the one-fifth rule; parent and child are evaluated anew on the same rows."""
    generator, logits = np.random.default_rng(seed), np.zeros(SOURCES)
    for i in range(evaluations // 2):
        child = logits + step * generator.standard_normal(SOURCES)
        better = task.loss(child, (seed, i)) <= task.loss(logits, (seed, i))
        step *= math.exp(0.2 if better else -0.05)
        logits = child if better else logits
    return logits, 2 * (evaluations // 2)


def random_search(task, seed, evaluations):
    """The best of independent draws; all are evaluated on the same rows."""
    generator = np.random.default_rng(seed)
    draws = 3 * generator.standard_normal((evaluations, SOURCES))
    return min(draws, key=lambda logits: task.loss(logits, (seed, 0))), evaluations


METHODS = {"zograd": zograd, "CMA-ES": cma_es, "hill climb": hill_climb, "random search": random_search}


def without_search(task):
    """Weights that need no search: clean rows only, clean and all rows, and the good sources, if one knew them."""
    bad = torch.tensor(task.bad)
    known = {"clean rows only": bad * 0.0, "clean and all rows": bad * 0.0 + 1, "oracle: good sources": ~bad * 1.0}
    return {name: task.accuracy(weights.numpy()) for name, weights in known.items()}


def save_picture(path, accuracies, task, weights):
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    for k, (name, values) in enumerate(accuracies.items()):
        color = "#0072B2" if name == "zograd" else "#999999"
        left.barh(k, np.mean(values), color=color, alpha=0.6)
        left.plot(values, [k] * len(values), ".", color="black")
    left.set_yticks(range(len(accuracies)), list(accuracies))
    left.invert_yaxis()
    left.set(xlim=(0.3, 1), xlabel="test accuracy, a dot a seed")
    order = np.lexsort((weights, task.bad))
    right.bar(range(SOURCES), weights[order], color=np.where(task.bad[order], "#D55E00", "#0072B2"))
    right.set(title="learned weights (orange: sources that mislabel)", xlabel="source", ylabel="weight")
    picture.save(figure, path)


def main():
    options = arguments(__doc__, "bilevel", seeds=range(5))
    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # 60 iterations are enough here
    seeds = options.seeds[:1] if options.quick else options.seeds
    evaluations = (2 * PAIRS + 1) * (2 if options.quick else STEPS)
    report, tasks, accuracies = Report("bilevel", options), [Sources(seed) for seed in seeds], {}
    learned = {}
    known = {"zograd": "0.906 (prototype)", "clean rows only": "0.857 (prototype)"}
    known["oracle: good sources"] = "0.919 (prototype)"
    with tqdm(total=len(METHODS) * len(seeds), unit="run") as bar:
        for name, method in METHODS.items():
            bar.set_description(name)
            accuracies[name] = []
            for seed, task in zip(seeds, tasks, strict=True):
                logits, count = method(task, seed, evaluations)
                learned[name, seed] = sigmoid(logits)
                accuracies[name].append(task.accuracy(learned[name, seed]))
                bar.update()
            report.row(f"{name}: test accuracy", known.get(name, ""), accuracies[name], count)
    found = [without_search(task) for task in tasks]
    for name in found[0]:
        accuracies[name] = [row[name] for row in found]
        report.row(f"{name}: test accuracy", known.get(name, ""), accuracies[name], 0)
    save_picture(options.output, accuracies, tasks[0], learned["zograd", seeds[0]])
    report.finish()
    print(f"saved {options.output}")
    if not options.quick:
        mean = {name: np.mean(values) for name, values in accuracies.items()}
        for rival in ("hill climb", "random search", "clean rows only", "clean and all rows"):
            assert mean["zograd"] > mean[rival], rival


if __name__ == "__main__":
    main()
