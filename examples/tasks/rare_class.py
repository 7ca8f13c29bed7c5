"""Classifiers of a rare class, and the metrics by which they are judged."""

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch.nn.functional import binary_cross_entropy_with_logits


def rare_class(name, seed):
    """Rows and labels to train on, and others: an 8 among digits, or 40 malignant rows among benign ones."""
    raw = load_digits() if name == "digits" else load_breast_cancer()
    rows, labels = torch.tensor(raw.data, dtype=torch.float32), torch.tensor(raw.target)
    labels = labels == (8 if name == "digits" else 0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    positive, negative = order[labels[order]], order[~labels[order]]
    positive = positive if name == "digits" else positive[:40]
    train, test = (torch.cat([positive[half::2], negative[half::2]]) for half in (0, 1))
    rows = ((rows - rows[train].mean(0)) / (rows[train].std(0) + 1e-3)).clamp(-5, 5)
    return (rows[train], labels[train]), (rows[test], labels[test])


def scores(weights, rows):
    """Of a linear classifier; above zero a row counts as of the rare class."""
    return rows @ weights[:-1] + weights[-1]


def f1(scores, labels):
    """Harmonic mean of precision and recall."""
    chosen = scores > 0
    return 2 * (chosen & labels).sum() / (chosen.sum() + labels.sum())


def average_precision(scores, labels):
    """Mean over the rare rows of the precision among all that score as high."""
    hits = labels[scores.argsort(descending=True)].float()
    return (hits.cumsum(0) / torch.arange(1, len(labels) + 1) * hits).sum() / hits.sum()


def by_cross_entropy(rows, labels, penalty=0.01):
    """Logistic regression with an L2 penalty, its threshold the best one for F1 on the same rows."""
    weights = torch.zeros(rows.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(scores(weights, rows), labels.float())
        loss = loss + penalty * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weights = weights.detach()
    levels = scores(weights, rows).sort().values
    thresholds = (levels[1:] + levels[:-1]) / 2
    weights[-1] -= max(thresholds, key=lambda t: f1(scores(weights, rows) - t, labels).item())
    return weights
