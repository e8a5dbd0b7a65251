"""Where pictures lie: their features made comparable, and how alike two pictures are."""

from __future__ import annotations

import numpy as np

LATENT_FEATURES = 8  # mean and standard deviation of the four channels; they stand first, the U-Net's follow
DIRECTIONS = 64  # of the U-Net's features that are kept, those in which pictures differ most
LEARNED_FROM = 2000  # pictures that say what is usual
WIDTH = 8.0  # of the kernel, in squared distances of two usual pictures: nearly linear, which few ratings need


class FeatureSpace:
    """Features of P pictures [P, D], as `library.rating.features` makes them: of the latents, and of the U-Net.

    A kernel for each of the two, exp(-distance^2 / (8 m)) where m is the median squared distance; features have a standard deviation of 1.
    Which of them an opinion depends on, its answers say.
    """

    def __init__(self, features: np.ndarray) -> None:
        self.size = len(features)
        if not len(features):
            features = np.zeros((1, LATENT_FEATURES + 1))
        sample = features[:: max(1, len(features) // LEARNED_FROM)]
        self._blocks, self._widths = [], []
        for columns in (slice(0, LATENT_FEATURES), slice(LATENT_FEATURES, None)):
            own = sample[:, columns].astype(np.float64)
            mean, deviation = own.mean(0), own.std(0) + 1e-6
            directions = np.eye(own.shape[1])
            if own.shape[1] > DIRECTIONS:
                centred = (own - mean) / deviation
                directions = np.linalg.eigh(centred.T @ centred)[1][:, -DIRECTIONS:]
            block = ((features[:, columns] - mean) / deviation) @ directions
            some = block[:: max(1, len(block) // 500)]
            distances = _distances(some, some)[np.triu_indices(len(some), 1)]
            self._blocks.append(block)
            self._widths.append(WIDTH * max(float(np.median(distances)) if len(distances) else 1.0, 1e-12))

    def kernels(self, rows: np.ndarray, columns: np.ndarray) -> list[np.ndarray]:
        """How alike pictures [N] and [M] are by each kind of feature [N, M]: 1 for the same, towards 0."""
        return [np.exp(-_distances(block[rows], block[columns]) / width) for block, width in zip(self._blocks, self._widths, strict=True)]


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distances [N, M]."""
    return ((first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T).clip(0)
