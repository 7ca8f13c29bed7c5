"""Train a network that backpropagation cannot: 64 hidden units that output only a sign, on handwritten digits.

The derivative of a sign is zero, so autograd leaves the first layer as it was drawn. zograd estimates the gradient from
values of the loss alone. Both train the same network here: the same first weights, batches, optimizer and steps.
"""

import argparse

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from zograd import zero_order

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits
    from sklearn.metrics import ConfusionMatrixDisplay
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install scikit-learn matplotlib`.") from error

STEPS = 600


def network(params, images):
    w1, b1, w2, b2 = params
    return torch.sign(images @ w1 + b1) @ w2 + b2


def plain_loss(params, images, labels):
    return cross_entropy(network(params, images), labels)


@zero_order(method="antithetic", num_samples=128, sigma=0.1, evaluator="vmap")
def zero_order_loss(params, images, labels):
    return plain_loss(params, images, labels)


def train(loss, name, images, labels, test_images, test_labels, options):
    torch.manual_seed(options.seed)
    params = [torch.randn(64, 64) / 8, torch.zeros(64), torch.randn(64, 10) / 8, torch.zeros(10)]
    batches = torch.randint(len(images), (options.steps, 256))  # all drawn here, so that both losses see the same
    optimizer = torch.optim.Adam([p.requires_grad_() for p in params], lr=0.02)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, options.steps)  # a straight line to zero
    accuracies, norm = [], 0.0
    for batch in (progress := tqdm(batches, name, unit="step")):
        optimizer.zero_grad()
        loss(params, images[batch], labels[batch]).backward()
        optimizer.step()
        schedule.step()
        norm += params[0].grad.norm().item() / options.steps
        with torch.no_grad():
            predicted = network(params, test_images).argmax(dim=1)
        accuracies.append((predicted == test_labels).double().mean().item())
        progress.set_postfix_str(f"held-out accuracy {accuracies[-1]:.3f}", refresh=False)
    return accuracies, norm, progress.format_dict["elapsed"], predicted


def save_picture(path, curves, images, labels, predicted, per_step):
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.25, 1, 1), wspace=0.03)
    left.suptitle("64 sign units learn handwritten digits")
    axes = left.subplots()
    for (name, accuracies), color in zip(curves.items(), ("#0072B2", "#D55E00"), strict=True):
        x = torch.arange(1, len(accuracies) + 1) * per_step
        axes.plot(x.numpy() / 1000, accuracies, color=color, label=f"{name}: {accuracies[-1]:.3f} at the end")
    axes.set(xlabel=f"thousand evaluations by zograd, {per_step} a step", ylabel="held-out accuracy", ylim=(0.5, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")

    middle.suptitle("What zograd's network reads")
    axes = middle.subplots()
    ConfusionMatrixDisplay.from_predictions(labels, predicted, ax=axes, cmap="Blues", colorbar=False)
    axes.set(xlabel="digit read", ylabel="digit written")
    for text in axes.texts:
        text.set_visible(text.get_text() != "0")

    wrong = (predicted != labels).nonzero().flatten().tolist()
    right.suptitle(f"Where it is wrong: {min(len(wrong), 12)} of {len(wrong)} (written → read)")
    grid = right.subplots(3, 4, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for i, axes in zip(wrong, grid.flat, strict=False):
        axes.imshow(images[i].view(8, 8).numpy(), cmap="Greys", vmin=0, vmax=16)
        axes.set_title(f"{labels[i]} → {predicted[i]}", fontsize=11)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split, first weights, batches and directions")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"with fewer than {STEPS}, 0.95 is not asserted")
    parser.add_argument("--output", default="quickstart.png", help="where to save the picture")
    options = parser.parse_args()

    torch.set_num_threads(1)  # matrices this small gain little from a second thread, and lose much where it is not free
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, stratify=labels, random_state=options.seed)
    images, test_images, labels, test_labels = (torch.as_tensor(part) for part in split)
    mean = images.mean(dim=0)
    data = ((images - mean).float() / 8, labels, (test_images - mean).float() / 8, test_labels, options)
    accuracies, norm, seconds, predicted = train(zero_order_loss, "zograd", *data)
    plain_accuracies, plain_norm, plain_seconds, _ = train(plain_loss, "plain autograd", *data)

    per_step = 2 * zero_order_loss.options.num_samples + 1
    curves = {"zograd": accuracies, "plain autograd, same steps": plain_accuracies}
    save_picture(options.output, curves, test_images, test_labels, predicted, per_step)
    print(f"\n{'':32}{'zograd':>14}{'plain autograd':>18}")
    print(f"{'held-out accuracy':32}{accuracies[-1]:14.3f}{plain_accuracies[-1]:18.3f}")
    print(f"{'first-layer gradient, mean norm':32}{norm:14.4f}{plain_norm:18.4f}")
    print(f"{'evaluations of the loss':32}{per_step * options.steps:14,}{options.steps:18,}")
    print(f"{'seconds of training':32}{seconds:14.1f}{plain_seconds:18.1f}")
    print(f"saved {options.output}\nheld-out accuracy {accuracies[-1]:.3f}")
    assert plain_norm == 0
    assert accuracies[-1] >= 0.95 or options.steps < STEPS


if __name__ == "__main__":
    main()
