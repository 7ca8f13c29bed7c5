"""Learn digits through a block without a gradient in the middle of a network: a simulator, hard signs, a quantizer.

Encoder and head are linear and train by backpropagation. The block maps each sample by itself, so that one estimate
can take a direction of its own for every sample of the batch from the same calls: ``batch_dim=0``. Beside it stand one
population over the whole batch, an encoder left as it was drawn, and, where the block has one, the straight-through
estimator. Each method has a sigma near its best of .1, .3, .6 and 1 on the seeds 100 and 101.
"""

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from tasks.black_box import bouncing_balls, five_levels, flights, hard_signs
from tasks.report import Report, arguments
from zograd import Tracker, check_slices, zero_order

try:
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits

    from tasks import picture
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install scikit-learn matplotlib`.") from error

TRAIN, BATCH, EPOCHS = 1200, 60, 20

# Inputs, outputs, sigma by sample and over the whole batch, and the accuracies of the prototype: with 4 directions a
# sample, and with the encoder frozen. It had its own widths and schedule, so that they say what to expect roughly.
BLOCKS = {
    bouncing_balls: (16, 108, 0.3, 0.1, 0.928, 0.536),
    hard_signs: (48, 48, 0.6, 0.6, 0.950, 0.695),
    five_levels: (16, 16, 0.6, 0.6, 0.957, 0.586),
}


def digits(seed):
    """The images in [0, 1] and their labels, shuffled."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def straight_through(block):
    """The block forward, and the identity on [-1, 1] backward."""

    def layer(x):
        inside = x.clamp(-1, 1)
        return inside + (block(x) - inside).detach()

    return layer


def methods(block):
    """A layer in place of the block for each method; None where the encoder stays as it was drawn."""
    _, _, by_sample, over_batch, _, _ = BLOCKS[block]
    options = {"method": "antithetic", "evaluator": "vmap"}
    layers = {
        f"N = {n} by sample": zero_order(**options, num_samples=n, sigma=by_sample, batch_dim=0)(block)
        for n in (4, 16, 64)
    }
    layers["N = 64 over the batch"] = zero_order(**options, num_samples=64, sigma=over_batch)(block)
    if block is not bouncing_balls:
        layers["straight-through"] = straight_through(block)
    layers["frozen encoder"] = None
    return layers


def train(block, layer, seed, epochs, bar):
    """Test accuracy after each epoch, measured with the plain block; the evaluations; the encoder."""
    images, labels = digits(seed)
    torch.manual_seed(seed)
    inputs, outputs, *_ = BLOCKS[block]
    encoder, head = torch.nn.Linear(64, inputs), torch.nn.Linear(outputs, 10)
    encoder.requires_grad_(layer is not None)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.02)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, epochs * TRAIN // BATCH)  # a straight line to zero
    accuracies = []
    with Tracker() as tracker:
        for _ in range(epochs):
            for batch in torch.randperm(TRAIN).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(head((layer or block)(encoder(images[batch]))), labels[batch]).backward()
                optimizer.step()
                schedule.step()
            with torch.no_grad():
                predicted = head(block(encoder(images[TRAIN:]))).argmax(dim=1)
            accuracies.append((predicted == labels[TRAIN:]).double().mean().item())
            bar.set_postfix_str(f"accuracy {accuracies[-1]:.3f}", refresh=False)
            bar.update()
    plain = 0 if tracker.evaluations else epochs * TRAIN // BATCH
    return accuracies, tracker.evaluations + plain, encoder


def draw_flights(axes, encoder, seed):
    """How a trained encoder launches the balls for three digits."""
    images, labels = digits(seed)
    for column, (ax, digit) in enumerate(zip(axes, (0, 1, 4), strict=True)):
        with torch.no_grad():
            paths = flights(encoder(images[labels == digit][:12]))
        for ball, color in enumerate(("#0072B2", "#D55E00", "#009E73", "#CC79A7")):
            for path in paths[:, :, ball]:
                ax.plot(*path.T.numpy(), color=color, alpha=0.35, linewidth=0.9)
            ax.plot(*paths[:, 4::4, ball].flatten(0, 1).T.numpy(), ".", color=color, markersize=3)
        for line in (1 / 3, 2 / 3):
            ax.axhline(line, color="gray", linewidth=0.5)
            ax.axvline(line, color="gray", linewidth=0.5)
        ax.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal", title=f"launches for {digit}")
        if column == 0:
            ax.set_ylabel("box and sensor grid")


def save_picture(path, curves, encoder, seed):
    figure = Figure(figsize=(12, 7), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.2, 1))
    for ax, (block, of_block) in zip(upper.subplots(1, 3, sharey=True), curves.items(), strict=True):
        for (name, runs), color in zip(of_block.items(), colors(of_block), strict=True):
            mean = torch.tensor(runs).mean(dim=0)
            ax.plot(range(1, len(mean) + 1), mean, color=color, label=f"{name}: {mean[-1]:.3f}")
        ax.set(title=block.__name__.replace("_", " "), xlabel="epochs", ylim=(0.3, 1))
        ax.grid(alpha=0.3)
        ax.legend(loc="lower right", fontsize=8)
    upper.axes[0].set_ylabel("test accuracy, mean over seeds")
    draw_flights(lower.subplots(1, 3), encoder, seed)
    picture.save(figure, path, dpi=90)


def colors(names):
    known = {"N = 4": "#56B4E9", "N = 16": "#0072B2", "N = 64 by": "#003A5D", "N = 64 over": "#D55E00"}
    known |= {"straight": "#009E73", "frozen": "#999999"}
    return [next(color for start, color in known.items() if name.startswith(start)) for name in names]


def main():
    options = arguments(__doc__, "black_box_layer", seeds=(0, 1, 2, 3, 4))
    seeds, epochs = (options.seeds[:1], 1) if options.quick else (options.seeds, EPOCHS)
    report, curves, last = Report("black_box_layer", options), {}, None
    total = epochs * len(seeds) * sum(len(methods(block)) for block in BLOCKS)
    with tqdm(total=total, unit="epoch") as bar:
        for block, (inputs, *_, prototype, prototype_frozen) in BLOCKS.items():
            assert check_slices(block, torch.randn(BATCH, inputs, generator=torch.Generator().manual_seed(0)))
            known = {"N = 4 by sample": prototype, "frozen encoder": prototype_frozen}
            curves[block] = {}
            for name, layer in methods(block).items():
                bar.set_description(f"{block.__name__}, {name}")
                runs, evaluations, encoders = zip(*(train(block, layer, s, epochs, bar) for s in seeds), strict=True)
                curves[block][name] = runs
                if (block, name) == (bouncing_balls, "N = 64 by sample"):
                    last = encoders[0]
                what = f"{block.__name__.replace('_', ' ')}, {name}: test accuracy"
                reference = f"{known[name]:.3f} (prototype)" if name in known else ""
                report.row(what, reference, [run[-1] for run in runs], evaluations[0])
    save_picture(options.output, curves, last, seeds[0])
    report.finish()
    print(f"saved {options.output}")
    if not options.quick:
        for of_block in curves.values():
            end = {name: torch.tensor(runs)[:, -1] for name, runs in of_block.items()}
            assert (end["N = 4 by sample"] > end["frozen encoder"] + 0.05).all()
            assert end["N = 4 by sample"].mean() > end["N = 64 over the batch"].mean()


if __name__ == "__main__":
    main()
