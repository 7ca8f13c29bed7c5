"""Fit an int8 language model to new text by forward passes only.

A transformer over characters learns the docstrings of some packages of the standard library by backpropagation. Then
its weights become int8, and so do the inputs of every layer on the way: kernels of integers have no derivative, so that
backpropagation gets no further than the last layer. What stays float are scales, biases and norms, 5312 numbers; they
are fitted to the docstrings of other packages: with ``optim.MeZO``, whose records rebuild the result bit for bit, and
with Adam on estimates by ``LowRank`` directions. One model is pretrained, with
the seed 0; the seeds are those of the fits. Rates and radii were chosen on others, on models of their own. Estimates of
so many numbers gain little a pass: what backpropagation does reach, the last layer, it fits with more gain for fewer.
"""

import copy

import torch
from tqdm import tqdm

import zograd
from tasks.docstrings import AFTER, BEFORE, CHARACTERS, corpus, in_a_row, windows
from tasks.int8_transformer import CONTEXT, Transformer, quantize
from tasks.memory import PeakMemory, resident
from tasks.report import Report, arguments

try:
    from matplotlib.figure import Figure

    from tasks import picture
except ImportError as error:
    raise SystemExit(f"{error}: this example needs `python -m pip install matplotlib`.") from error

BATCH = 8
PRETRAIN, MEZO, LOW_RANK, LAST, DIRECTIONS = 600, 400, 60, 200, 8  # steps, and LowRank's directions a step


def held_out(model, text):
    """Nats a character."""
    with torch.no_grad():
        pieces = list(zip(*(part.split(64) for part in in_a_row(text, CONTEXT)), strict=True))
        return sum(model(x, y).item() * len(x) for x, y in pieces) / sum(len(x) for x, _ in pieces)


def pretrain(text, seed, steps, bar):
    torch.manual_seed(seed)
    model, generator = Transformer(len(CHARACTERS)), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*windows(text, 2 * BATCH, CONTEXT, generator)).backward()
        optimizer.step()
        schedule.step()
        bar.update()
    return model


def by_mezo(frozen, text, seed, steps, bar):
    """The fitted model and the records of the run."""
    model, generator, losses = copy.deepcopy(frozen), torch.Generator().manual_seed(seed), []
    optimizer = zograd.optim.MeZO(model.parameters(), lr=8e-3, sigma=0.02, seed=seed)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps)
    for _ in range(steps):
        batch = windows(text, BATCH, CONTEXT, generator)
        losses.append(optimizer.step(lambda batch=batch: model(*batch)).item())
        schedule.step()
        bar.update()
    return model, optimizer.records, losses


def by_low_rank(frozen, text, seed, steps, bar):
    """The fitted model: scales of a layer are a matrix, whose directions are of rank one."""
    model, generator = copy.deepcopy(frozen), torch.Generator().manual_seed(seed)
    options = {"method": "antithetic", "num_samples": DIRECTIONS, "sigma": 0.02, "evaluator": "vmap"}
    estimated = zograd.nn.ZeroOrder(model, zograd.distributions.LowRank(rank=1), **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.006)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps)
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = estimated(*windows(text, BATCH, CONTEXT, generator))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.update()
    return model, losses


def peaks(model, frozen, text):
    """Bytes of one step of Adam on the float model, of MeZO on the int8 one and of that one's forward pass."""
    batch = windows(text, BATCH, CONTEXT, torch.Generator().manual_seed(0))
    model, frozen = copy.deepcopy(model), copy.deepcopy(frozen)
    adam = torch.optim.Adam(model.parameters())
    mezo = zograd.optim.MeZO(frozen.parameters(), lr=1e-3, seed=0)

    def backpropagation():
        model(*batch).backward()
        adam.step()

    def forward():
        with torch.no_grad():
            frozen(*batch)

    out = []
    for owner, step in (
        (model, backpropagation),
        (frozen, lambda: mezo.step(lambda: frozen(*batch))),
        (frozen, forward),
    ):
        with PeakMemory() as memory:
            step()
        out.append(resident(owner) + memory.peak)
    return out


def by_last_layer(frozen, text, seed, steps):
    """Adam by backpropagation on the tensors that it reaches, and how many those are."""
    model, generator = copy.deepcopy(frozen), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.006)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*windows(text, BATCH, CONTEXT, generator)).backward()
        optimizer.step()
    return model, sum(p.grad is not None for p in model.parameters())


def one_seed(seed, model, text, held, short, bar):
    """Held-out nats of each fitted model; whether the replay has MeZO's bits; the pieces."""
    bar.set_description(f"fitting, seed {seed}")
    frozen = quantize(copy.deepcopy(model))
    fitted, records, losses = by_mezo(frozen, text, seed, 10 if short else MEZO, bar)
    low_rank, more = by_low_rank(frozen, text, seed, 3 if short else LOW_RANK, bar)
    last_layer, reached = by_last_layer(frozen, text, seed, 3 if short else LAST)
    again = copy.deepcopy(frozen)
    zograd.replay(records, again.parameters())
    same = all(map(torch.equal, again.parameters(), fitted.parameters()))
    return (
        [held_out(each, held) for each in (frozen, fitted, low_rank, last_layer)],
        same,
        (records, losses, more, reached),
    )


def save_picture(path, table, losses, more, memory):
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for nats in table:
        left.plot(range(3), nats[:3], "o-", color="#0072B2", alpha=0.6)
    left.set_xticks(range(3), ["frozen", "MeZO", "LowRank"])
    left.set(title="held out, a line a seed", ylabel="nats a character", xlim=(-0.3, 2.3))
    for values, passes, name in ((losses, 2, "MeZO"), (more, 2 * DIRECTIONS + 1, "LowRank, Adam")):
        smooth = torch.tensor(values).cumsum(0) / torch.arange(1, len(values) + 1)
        middle.plot(torch.arange(1, len(values) + 1) * passes, smooth, label=name)
    middle.set(title="training loss, mean so far", xlabel="forward passes")
    middle.legend()
    names = ("Adam, float32", "MeZO, int8", "forward, int8")
    right.barh(names, [b / 2**20 for b in memory], color=["#D55E00", "#0072B2", "#999999"])
    right.set(title="peak memory of a step", xlabel="MiB of tensors")
    picture.save(figure, path)


def main():
    options = arguments(__doc__, "finetune_forward_only", seeds=range(5))
    seeds = options.seeds[:1] if options.quick else options.seeds
    report, (before, _), (text, held) = Report("finetune_forward_only", options), corpus(BEFORE), corpus(AFTER)
    steps = (20, 10, 3) if options.quick else (PRETRAIN, MEZO, LOW_RANK)
    with tqdm(total=steps[0] + sum(steps[1:]) * len(seeds), unit="step", desc="pretraining") as bar:
        model = pretrain(before, 0, steps[0], bar)
        report.row("nats a character, float32, not fitted", "", held_out(model, held))
        runs = [one_seed(seed, model, text, held, options.quick, bar) for seed in seeds]
    nats, same = torch.tensor([run[0] for run in runs]), [run[1] for run in runs]
    records, losses, more, reached = runs[0][2]
    memory = peaks(model, quantize(copy.deepcopy(model)), text)
    save_picture(options.output, nats.tolist(), losses, more, memory)
    report.row("nats a character, int8, not fitted", "", nats[0, 0].item())
    gains, passes = nats[:, :1] - nats[:, 1:], (2 * len(losses), (2 * DIRECTIONS + 1) * len(more), 2 * LAST)
    names = ("MeZO", "LowRank", "backpropagation into the last layer")
    for name, gain, count in zip(names, gains.T, passes, strict=True):
        reference = "> 0 at 2 standard errors" if name != names[2] else ""
        report.row(f"gain by {name}, nats a character", reference, gain.tolist(), count, seconds=0)
    report.row("replays from the records with the same bits, share", "1", sum(same) / len(same), seconds=0)
    report.row("bytes of the records", "", records.nbytes, seconds=0)
    report.row(f"tensors of {len(records.shapes)} that backpropagation reaches", "", reached, seconds=0)
    for name, peak in zip(("Adam, float32", "MeZO, int8", "forward pass, int8"), memory, strict=True):
        report.row(f"peak MiB of a step, {name}", "", peak / 2**20, seconds=0)
    report.finish()
    print(f"saved {options.output}")
    assert all(same)
    assert memory[1] < memory[0]
    if not options.quick:
        ours = gains[:, :2]
        assert (ours.mean(dim=0) > 2 * ours.std(dim=0) / len(seeds) ** 0.5).all()


if __name__ == "__main__":
    main()
