"""Time the survey's own work on a CUDA device: drawing pictures, and the joint distillation."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

import bidfmkd_fast as bf
from benchmarks.cases.steps import PlainConv4
from benchmarks.cases.survey import CONFIG, N_APIS, N_CLASSES, SEED, plainly_distilled
from benchmarks.gpu_harness import rows_of
from benchmarks.harness import OURS, Row
from bidfmkd_fast.models import Conv4
from bidfmkd_fast.survey.joint_distillation import Surveyed, distil_jointly

N_PICTURES, SHAPE = 6400, (3, 32, 32)


def pictures(runs: int) -> Iterator[Row]:
    """Time the drawing of 6400 pictures of 3x32x32, there and on the CPU with a copy."""

    def there() -> None:
        bf.procedural_images(N_PICTURES, SHAPE, device="cuda")

    def copied() -> None:
        bf.procedural_images(N_PICTURES, SHAPE).cuda()

    contenders = {OURS: (there, 1), "on the CPU, copied": (copied, 1)}
    yield from rows_of(f"priors/{N_PICTURES}x3x32x32", contenders, min(runs, 5))


def joint_distillation(runs: int) -> Iterator[Row]:
    """Time an epoch over 6400 pictures with a Conv4 and ten APIs of five classes.

    The capture of the graph is part of the time.
    """
    module = Conv4(3, N_CLASSES, SHAPE[1:], batch_statistics=True).cuda()
    plain = PlainConv4(module).cuda()
    shared = torch.randint(256, (N_PICTURES, *SHAPE), dtype=torch.uint8, device="cuda")
    images = shared.float() / 255
    scores = 3 * torch.randn(N_APIS, N_PICTURES, N_CLASSES, device="cuda")
    answered = torch.ones(N_PICTURES, dtype=torch.bool)
    surveyed = [Surveyed(own, answered, "logits") for own in scores]

    def ours() -> None:
        list(distil_jointly(copy.deepcopy(module), shared, surveyed, CONFIG, SEED))

    def plainly() -> None:
        plainly_distilled(copy.deepcopy(plain), images, scores)

    contenders = {OURS: (ours, 1), "plain torch": (plainly, 1)}
    yield from rows_of(f"survey/epoch_of_{N_PICTURES}x3x32x32_10_apis", contenders, min(runs, 7))
