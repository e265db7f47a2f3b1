"""Take one optimisation step of a recovery: the points to ask, and learning from the answers.

Both loops take this step: `stepwise`, which looks at every answer as it comes, and `on_device`,
which a CUDA graph holds. Nothing here reads the value of a tensor on the host, and the images kept
so far are changed in place, as a graph needs. The loops differ in how they ask: through the API's
checks, journal and budget, or through the module alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.cost import takes_directions
from bidfmkd_fast.recovery.image_maker import ImageMaker
from bidfmkd_fast.recovery.objective import Objective
from bidfmkd_fast.recovery.paper_compat import directions_left, surrogate
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.zeroth_order import ZerothOrder


class RecoveryStep:
    """The state of one recovery and its optimisation step.

    Args:
        api: the black box whose images are recovered.
        maker: makes the images and is trained.
        objective: what the images minimise.
        config: the settings; `mu` must be a number if gradients are estimated.
        paper_compat: reproduce the slips of the authors' code (`recovery.paper_compat`).

    Attributes:
        zeroth_order: the gradient estimator; None without steps and for an open box, which gives
            true gradients.
        best: the best images so far.
    """

    def __init__(
        self,
        api: BlackBox,
        maker: ImageMaker,
        objective: Objective,
        config: RecoveryConfig,
        paper_compat: bool = False,
    ) -> None:
        self.api, self.maker, self.objective, self.config = api, maker, objective, config
        self.paper_compat = paper_compat
        self.best = Best(api, objective.labels, by_loss=not paper_compat)
        self.zeroth_order: ZerothOrder | None = None
        if takes_directions(api, config):
            wanted = config.num_directions
            self.zeroth_order = ZerothOrder(
                num_directions=directions_left(wanted) if paper_compat else wanted,
                mu=float(config.mu),
                directions=config.directions,
                grid=config.grid,
                seed=derive_seed(maker.seed, "recovery", "directions"),
            )

    @property
    def labels(self) -> Tensor:
        """Return the wanted labels, int64 `[B]`."""
        return self.objective.labels

    @property
    def mu(self) -> float | None:
        """Return the step length (mu) of the gradient estimates; None if none are made."""
        return None if self.zeroth_order is None else self.zeroth_order.mu

    def points(self, x: Tensor) -> Iterator[Tensor]:
        """Return the points to ask for images x `[B, C, H, W]`, in chunks `[rows, B, C, H, W]`.

        The first row of the first chunk is x itself; the other rows are x plus a step of length mu
        along one random direction per image.
        """
        if self.zeroth_order is None:
            return iter([x[None]])
        return self.zeroth_order.ask_chunks(x, max_images=self.config.max_images)

    def learn(self, x: Tensor, scores: Tensor, student_scores: Tensor | None) -> Tensor:
        """Keep the better images and take one optimiser step.

        Args:
            x: the images, with their graph to generator and latents.
            scores: the API's answers for all points, `[1+q, B, n_classes]`.
            student_scores: the student's `[B, n_classes]` at x; None without a student.

        Returns:
            float32 `[3]`: mean objective, mean objective of the best images so far, and the share
            of images that the API classifies as wanted.
        """
        if self.zeroth_order is None:  # the answers carry a graph to x
            losses = self.objective.losses(scores[0], student_scores)
            loss, losses, scores = losses.mean(), losses.detach(), scores.detach()
        else:
            loss, losses = self.objective.tell(self.zeroth_order, scores, student_scores)
        if self.paper_compat:
            wanted = self.config.num_directions
            loss = loss * (directions_left(wanted) / wanted)
        rank = surrogate(loss, x) if self.paper_compat else losses
        self.best.keep(x.detach(), scores[0], losses, rank)
        self.maker.step(loss)
        matched = (scores[0].argmax(1) == self.labels).float().mean()
        return torch.stack([losses.mean(), self.best.losses.mean(), matched])


class Best:
    """The best images so far with the API's scores and the objective, slot by slot.

    The image with the lowest `rank` is the best. The rank is the objective itself, unless
    `by_loss` is False.
    """

    def __init__(self, api: BlackBox, labels: Tensor, by_loss: bool) -> None:
        n_images, device = len(labels), labels.device
        self.images = torch.zeros(n_images, *api.spec.image_shape, device=device)
        self.scores = torch.zeros(n_images, api.spec.n_classes, device=device)
        self.losses = torch.full((n_images,), torch.inf, device=device)
        self.rank = self.losses if by_loss else self.losses.clone()

    def keep(self, images: Tensor, scores: Tensor, losses: Tensor, rank: Tensor) -> None:
        """Take over the candidates whose rank is lower than that of the images held."""
        wins = rank < self.rank  # [B]
        candidates = [(self.images, images), (self.scores, scores), (self.losses, losses)]
        if self.rank is not self.losses:
            candidates.append((self.rank, rank))
        for held, new in candidates:
            held.copy_(torch.where(wins.view(-1, *[1] * (held.ndim - 1)), new, held))

    def state(self) -> list[Tensor]:
        """Return images, scores, losses and rank, as a journal keeps them."""
        return [self.images, self.scores, self.losses, self.rank]

    def restore(self, state: list[Tensor]) -> None:
        """Go back to a `state`."""
        for held, kept in zip(self.state(), state, strict=True):
            held.copy_(kept)
