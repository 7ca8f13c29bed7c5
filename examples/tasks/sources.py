"""A bilevel problem: which of 80 sources of training rows to trust, judged by refits on 60 clean rows."""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

SOURCES, ROWS, CLEAN = 80, 800, 60  # ten rows a source


class Sources:
    """Handwritten digits from 80 sources, 48 of which write the next digit's label on 80 % of their rows.

    Args:
        seed: of the shuffle, the bad sources and the rows that they mislabel.
    """

    def __init__(self, seed):
        generator = np.random.default_rng(seed)
        data = load_digits()
        order = generator.permutation(len(data.target))
        images, labels = data.data[order] / 16, data.target[order]
        self.bad = generator.permutation(SOURCES) < 0.6 * SOURCES
        self.of_row = np.repeat(np.arange(SOURCES), ROWS // SOURCES)
        wrong = self.bad[self.of_row] & (generator.random(ROWS) < 0.8)
        self.rows = images[:ROWS], np.where(wrong, (labels[:ROWS] + 1) % 10, labels[:ROWS])
        self.clean = images[ROWS : ROWS + CLEAN], labels[ROWS : ROWS + CLEAN]
        self.test = images[ROWS + CLEAN :], labels[ROWS + CLEAN :]

    def loss(self, logits, draw):
        """Refit on 400 of the rows, weighted by source, and score 40 of the clean ones by their log loss.

        Args:
            logits: (80,), of the weights of the sources.
            draw: the seed of which rows: equal for all that are to be compared with each other.
        """
        generator = np.random.default_rng(draw)
        rows = generator.permutation(ROWS)[: ROWS // 2]
        clean = generator.permutation(CLEAN)[: 2 * CLEAN // 3]
        weights = sigmoid(logits)[self.of_row[rows]]
        model = refit(self.rows[0][rows], self.rows[1][rows], weights)
        right = model.predict_proba(self.clean[0][clean])[np.arange(len(clean)), self.clean[1][clean]]
        return -np.log(right.clip(1e-4)).mean()

    def accuracy(self, weights):
        """Of a last refit on all rows, weighted by source, and the clean ones."""
        images, labels = (np.concatenate(pair) for pair in zip(self.rows, self.clean, strict=True))
        model = refit(images, labels, np.concatenate([weights[self.of_row], np.ones(CLEAN)]))
        return model.score(*self.test)


def refit(images, labels, weights):
    """Logistic regression; rows of no weight at all are left out."""
    used = weights > 1e-6
    model = LogisticRegression(tol=1e-2, max_iter=60)
    return model.fit(images[used], labels[used], sample_weight=weights[used])


def sigmoid(logits):
    return 1 / (1 + np.exp(-np.asarray(logits, dtype=float).clip(-30, 30)))
