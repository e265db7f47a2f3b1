"""Prepare an epoch of the joint distillation against the same training written plainly in torch."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases.steps import PlainConv4
from benchmarks.harness import OURS, Prepared, case
from bidfmkd_fast.models import Conv4
from bidfmkd_fast.seeds import seeded, torch_generator
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.survey.joint_distillation import Surveyed, distil_jointly

N_PICTURES, N_APIS, N_CLASSES, SEED = 320, 10, 5, 0
CONFIG = SurveyConfig(n_images=N_PICTURES, epochs=1, batch_size=64)


def plainly_jittered(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Turn, scale and shift images one after the other, by `draws` `[N, 4]`."""
    jittered = []
    for image, draw in zip(images, (CONFIG.jitter * (2 * draws - 1)).tolist(), strict=True):
        angle, scale, right, down = draw
        cos, sin = (1 + scale) * math.cos(angle), (1 + scale) * math.sin(angle)
        theta = image.new_tensor([[cos, -sin, 1.2 * right], [sin, cos, 1.2 * down]])[None]
        grid = F.affine_grid(theta, [1, *image.shape], align_corners=False)
        jittered.append(
            F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)
        )
    return torch.cat(jittered)


def plainly_distilled(module: nn.Module, images: torch.Tensor, scores: torch.Tensor) -> None:
    """Train features and a head per API for one epoch; images `[N, C, H, W]`, scores `[A, N, n]`.

    All are on one device.
    """
    body = nn.Sequential(module.blocks, nn.Flatten())
    with seeded(SEED, "survey", "heads"):
        heads = nn.ModuleList(
            nn.Linear(module.classifier.in_features, scores.shape[2]) for _ in scores
        ).to(images.device)
    optimizer = torch.optim.Adam([*module.parameters(), *heads.parameters()], CONFIG.learning_rate)
    n_batches = len(images) // CONFIG.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_batches)
    order = torch.randperm(len(images), generator=torch_generator(SEED, "survey", "order"))
    jitter = torch.rand(len(images), 4, generator=torch_generator(SEED, "survey", "jitter"))
    for rows, draws in zip(
        order.to(images.device).tensor_split(n_batches), jitter.tensor_split(n_batches), strict=True
    ):
        features = body(plainly_jittered(images[rows], draws))
        loss = torch.stack(
            [
                F.kl_div(
                    (head(features) / CONFIG.temperature).log_softmax(1),
                    (teacher[rows] / CONFIG.temperature).softmax(1),
                    reduction="batchmean",
                )
                for head, teacher in zip(heads, scores, strict=True)
            ]
        ).mean()
        optimizer.zero_grad()
        (CONFIG.temperature**2 * loss).backward()
        optimizer.step()
        schedule.step()


def prepare_joint_distillation() -> Prepared:
    """Prepare one epoch over 320 pictures of 3x32x32 with a Conv4 and ten APIs of five classes."""
    module = Conv4(3, N_CLASSES, (32, 32), batch_statistics=True)
    plain = PlainConv4(module)
    pictures = torch.randint(256, (N_PICTURES, 3, 32, 32), dtype=torch.uint8)
    scores = 3 * torch.randn(N_APIS, N_PICTURES, N_CLASSES)
    answered = torch.ones(N_PICTURES, dtype=torch.bool)
    surveyed = [Surveyed(own, answered, "logits") for own in scores]

    def ours(start: nn.Module = module) -> nn.Module:
        trained = copy.deepcopy(start)
        list(distil_jointly(trained, pictures, surveyed, CONFIG, SEED))
        return trained

    def plainly() -> nn.Module:
        trained = copy.deepcopy(plain)
        plainly_distilled(trained, pictures.float() / 255, scores)
        return trained

    def check() -> None:
        wanted = dict(plainly().named_parameters())
        for name, value in ours().named_parameters():
            if not name.startswith("classifier"):
                torch.testing.assert_close(value, wanted[name], rtol=1e-2, atol=2e-3)

    return Prepared(contenders={OURS: ours, "plain torch": plainly}, check=check)


case("survey/epoch_of_320x3x32x32_10_apis")(prepare_joint_distillation)
