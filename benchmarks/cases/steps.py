"""Prepare whole steps of recovery, replay and evaluation, ours and written plainly in torch."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import bidfmkd_fast as bf
from benchmarks.baselines import paper_order
from benchmarks.harness import OURS, Prepared, case
from bidfmkd_fast.meta import InnerLoop, MetaModel, outer_replay_step
from bidfmkd_fast.models import Conv4, build_model

B, SHAPE, N_CLASSES = 150, (3, 32, 32), 5


class PlainGenerator(nn.Module):
    """The paper's generator as it is usually written."""

    def __init__(self, width: int, latent_dim: int = 256) -> None:
        super().__init__()
        self.width, self.side = width, SHAPE[1] // 4
        self.project = nn.Linear(latent_dim, 2 * width * self.side**2)
        self.draw = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, SHAPE[0], 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latents: Tensor) -> Tensor:
        return self.draw(self.project(latents).view(-1, 2 * self.width, self.side, self.side))


def prepare_recovery(settings: bf.RecoveryConfig, plain_settings: bf.RecoveryConfig) -> Prepared:
    """Prepare steps of recovering 150 images of 32 x 32 x 3 from a Conv4 API.

    A step is: generator, points, API, gradient, Adam. Ours is a whole call of `recover`, which also
    makes the generator, the latents and the optimiser. The plain version makes them beforehand.
    """
    module = build_model(
        "conv4", in_channels=3, n_classes=N_CLASSES, image_size=SHAPE[1:], width=32
    ).eval()
    api = bf.TorchBlackBox(module, bf.APISpec(n_classes=N_CLASSES, image_shape=SHAPE))
    labels = torch.arange(N_CLASSES).repeat_interleave(B // N_CLASSES)
    generator, latents = (
        PlainGenerator(plain_settings.generator_width),
        nn.Parameter(torch.randn(B, 256)),
    )
    optimizer = torch.optim.Adam(
        [latents, *generator.parameters()], lr=plain_settings.learning_rate, betas=(0.5, 0.999)
    )

    def losses(points: Tensor) -> Tensor:
        with torch.no_grad():
            scores = module(points.flatten(0, 1))
        return F.cross_entropy(scores, labels.repeat(len(points)), reduction="none").view(-1, B)

    def plain(splits: int) -> None:
        for _ in range(settings.steps):
            optimizer.zero_grad()
            x = generator(latents)
            with torch.no_grad():
                gradient = paper_order(
                    x,
                    plain_settings.num_directions,
                    plain_settings.mu,
                    plain_settings.directions,
                    losses,
                    splits,
                )
            (x * gradient).flatten(1).sum(1).mean().backward()
            optimizer.step()

    def ours() -> bf.Recovered:
        return bf.recover(api, B // N_CLASSES, config=settings)

    def check() -> None:
        images = torch.rand(8, *SHAPE)
        torch.testing.assert_close(api(images), module(images).detach(), rtol=1e-4, atol=1e-5)

    contenders = {OURS: ours, "plain, 5 splits (a)": partial(plain, 5)}
    if plain_settings.num_directions < 50:
        contenders["plain, one call"] = partial(plain, 1)  # all points fit into one call of the API
    return Prepared(contenders=contenders, check=check)


PAPER = bf.RecoveryConfig(
    steps=1,
    num_directions=100,
    mu=0.005,
    directions="sphere",
    generator_width=64,
    learning_rate=1e-3,
)
DEFAULT = bf.RecoveryConfig(steps=1)
DEFAULT_STEPS = bf.RecoveryConfig(steps=5)


class PlainConv4(nn.Module):
    """The meta-model as it is usually written, with the parameters of ours."""

    def __init__(self, module: Conv4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(
                        block[0].in_channels, block[0].out_channels, 3, padding=1, bias=False
                    ),
                    nn.BatchNorm2d(block[0].out_channels, track_running_stats=False),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                )
                for block in module.blocks
            )
        )
        self.classifier = nn.Linear(module.classifier.in_features, module.classifier.out_features)
        self.load_state_dict(module.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(images).flatten(1))


def random_episode(n_shot: int, n_query: int) -> bf.Episode:
    return bf.Episode(
        support_images=torch.rand(5 * n_shot, 3, 32, 32),
        support_labels=torch.arange(5).repeat_interleave(n_shot),
        query_images=torch.rand(5 * n_query, 3, 32, 32),
        query_labels=torch.arange(5).repeat_interleave(n_query),
        classes=tuple(range(5)),
    )


def plain_adapt(
    module: nn.Module, episode: bf.Episode, steps: int, learning_rate: float, graph: bool
) -> dict[str, Tensor]:
    parameters = {
        name: value if graph else value.detach().requires_grad_()
        for name, value in module.named_parameters()
    }
    for _ in range(steps):
        loss = F.cross_entropy(
            functional_call(module, parameters, (episode.support_images,)), episode.support_labels
        )
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=graph)
        parameters = {
            name: value - learning_rate * g
            for (name, value), g in zip(parameters.items(), gradients)
        }
        if not graph:
            parameters = {
                name: value.detach().requires_grad_() for name, value in parameters.items()
            }
    return parameters


def prepare_replay_step() -> Prepared:
    """Prepare an outer step of replay with a Conv4 at 32 x 32 x 3.

    The step has 4 tasks, 5-way 1-shot with 15 queries, and 5 second-order inner steps.
    """
    module = Conv4(3, 5, (32, 32), batch_statistics=True)
    plain_module = PlainConv4(module)
    episodes = [random_episode(1, 15) for _ in range(4)]
    # With a learning rate of 0 the modules stay the same between runs.
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    plain_optimizer = torch.optim.SGD(plain_module.parameters(), lr=0.0)

    def plain() -> float:
        plain_optimizer.zero_grad()
        losses = []
        for episode in episodes:
            adapted = plain_adapt(plain_module, episode, 5, 0.01, graph=True)
            logits = functional_call(plain_module, adapted, (episode.query_images,))
            losses.append(F.cross_entropy(logits, episode.query_labels))
        loss = torch.stack(losses).sum()
        loss.backward()
        plain_optimizer.step()
        return loss.item() / 4

    def ours() -> dict[str, float]:
        return outer_replay_step(module, optimizer, episodes, InnerLoop(5, 0.01))

    def check() -> None:
        assert math.isclose(ours()["loss"], plain(), rel_tol=1e-4)
        # Rounding changes a gradient by about 1e-5 of its length. Where rounding changes which
        # element wins in a max pool, in plain torch as in ours, the change is up to 3e-2. A
        # first-order gradient would be 0.3 off. So each draw must be within 0.1 of float64, and at
        # least one draw within rounding.
        distances: list[float] = []
        while min(distances, default=math.inf) > 1e-4:
            assert len(distances) < 8, distances
            drawn = episodes if not distances else [random_episode(1, 15)]
            outer_replay_step(module, optimizer, drawn, InnerLoop(5, 0.01))
            exact = _gradients_in_float64(plain_module, drawn)
            gradients = [parameter.grad.double() for parameter in module.parameters()]
            scale = sum(g.square().sum() for g in exact)
            distances.append(
                float(sum((g - e).square().sum() for g, e in zip(gradients, exact)) / scale) ** 0.5
            )
            assert distances[-1] < 0.1, distances

    return Prepared(contenders={OURS: ours, "plain loop": plain}, check=check)


def _gradients_in_float64(module: nn.Module, episodes: list[bf.Episode]) -> list[Tensor]:
    twin = copy.deepcopy(module).double()
    for episode in episodes:
        exact = dataclasses.replace(
            episode,
            support_images=episode.support_images.double(),
            query_images=episode.query_images.double(),
        )
        adapted = plain_adapt(twin, exact, 5, 0.01, graph=True)
        F.cross_entropy(
            functional_call(twin, adapted, (exact.query_images,)), exact.query_labels
        ).backward()
    return [parameter.grad for parameter in twin.parameters()]


def prepare_evaluation(n_shot: int, n_episodes: int = 24) -> Prepared:
    """Prepare a meta-test of a few episodes of the glyphs: Conv4, 10 inner steps, 15 queries.

    The time of the usual 600 episodes is a multiple of this.
    """
    dataset = bf.load_dataset("glyphs")
    module = Conv4(1, 5, (28, 28), batch_statistics=True)
    plain_module = PlainConv4(module)
    meta_model = MetaModel(module, adapt_steps=10, adapt_learning_rate=0.01)
    sampler = bf.EpisodeSampler(dataset, "meta_test", 5, n_shot, 15, seed=0)

    def plain() -> Tensor:
        accuracies = []
        for index in range(n_episodes):
            episode = sampler.episode(index)
            adapted = plain_adapt(plain_module, episode, 10, 0.01, graph=False)
            with torch.no_grad():
                predicted = functional_call(plain_module, adapted, (episode.query_images,)).argmax(
                    1
                )
            accuracies.append((predicted == episode.query_labels).double().mean())
        return torch.stack(accuracies)

    def ours() -> Tensor:
        return bf.evaluate(
            meta_model, dataset, n_way=5, n_shot=n_shot, n_episodes=n_episodes, seed=0
        ).per_episode

    def check() -> None:
        # Rounding may change a prediction whose two best classes are close, which changes the
        # accuracy of an episode by 1/75; an episode may have several such predictions.
        apart = (ours() - plain()).abs()
        assert (apart == 0).double().mean() > 0.5 and apart.mean() < 5e-3, apart

    return Prepared(contenders={OURS: ours, "plain loop": plain}, check=check)


case("recovery/paper_settings")(partial(prepare_recovery, PAPER, PAPER))
case("recovery/defaults_against_paper")(partial(prepare_recovery, DEFAULT, PAPER))
case("recovery/defaults_5_steps")(partial(prepare_recovery, DEFAULT_STEPS, DEFAULT_STEPS))
case("replay/4x5way1shot15query")(prepare_replay_step)
case("evaluation/5way1shot")(partial(prepare_evaluation, 1))
case("evaluation/5way5shot")(partial(prepare_evaluation, 5))
