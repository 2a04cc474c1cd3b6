"""One model that is good at every depth: early-exit losses and layer dropout.

LayerSkip (Elhoushi et al., arXiv 2404.16710). All depths share the final norm and the output
adapter, so each prefix is an ordinary recommender: cut to k blocks, it is the model at exit k.
LayerSkip drops blocks for some sequences of a batch and computes them all the same; here a step
drops them for the whole batch and saves their time, as LayerDrop does (arXiv 1909.11556).
"""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from depthprobe.models.parts import check_readable
from depthprobe.models.recommender import Recommender
from depthprobe.models.skipping import after_blocks, skip_blocks
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Elastic, Recipe
from depthprobe.training.features import target_states
from depthprobe.training.losses import catalogue_loss
from depthprobe.training.objectives import Batch, target_vectors


def dropout_rates(depth: int, most: float) -> np.ndarray:
    """``most (2^(l / (L - 1)) - 1)`` of each block: never the first, the last with ``most``, (L,).

    >>> dropout_rates(3, 0.1).round(4).tolist()
    [0.0, 0.0414, 0.1]
    """
    return np.asarray(most * (2 ** (np.arange(depth) / max(1, depth - 1)) - 1))


class ElasticObjective(nn.Module):
    """A recommender with the loss of its whole depth and of some exits."""

    def __init__(self, model: Recommender, settings: Elastic, recipe: Recipe) -> None:
        """Put a model together with its loss; refused where its exits can't be read out."""
        super().__init__()
        check_readable(model.backbone, streams=False)
        self.model, self.settings, self.recipe = model, settings, recipe

    def forward(self, batch: Batch) -> Tensor:
        """The whole model's loss plus the weighted mean of the drawn exits', a scalar.

        What is dropped and which exits are taken is drawn from the batch's ``draw``: the same in
        all parts and processes of a step.
        """
        model, settings, depth = self.model, self.settings, self.model.depth
        draws = np.random.default_rng(batch.draw)
        dropped = draws.random(depth) < dropout_rates(depth, settings.dropout)
        exits = draws.permutation(np.arange(1, depth))[: settings.exits]
        skipped = np.flatnonzero(dropped).tolist() if self.training else []
        with skip_blocks(model.backbone, skipped), tap_blocks(model.backbone) as tap:
            vectors = target_vectors(model, batch, self.recipe)  # (N, d)
        loss = self._loss(vectors, batch)
        for depth_of_exit in exits.tolist():
            state = target_states(model, tap.states[depth_of_exit], batch)  # (N, D)
            normed = after_blocks(model.backbone, state[:, None])[:, 0]
            own = model.read_out(normed.to(vectors.dtype))
            loss = loss + settings.weight / len(exits) * self._loss(own, batch)
        return loss

    def _loss(self, vectors: Tensor, batch: Batch) -> Tensor:
        items = self.model.item_matrix()
        return catalogue_loss(vectors, items, batch.targets, recipe=self.recipe)
