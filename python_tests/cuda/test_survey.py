"""Compare the joint distillation on a CUDA device with that on the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from bidfmkd_fast.models import build_model
from bidfmkd_fast.runtime.full_float32 import full_float32
from bidfmkd_fast.seeds import seeded
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.survey.joint_distillation import Surveyed, distil_jointly
from bidfmkd_fast.survey.pictures import SharedPictures


@pytest.mark.parametrize("all_answered", [True, False])
def test_it_learns_what_it_learns_on_the_cpu(
    device: torch.device, all_answered: bool, seed: int
) -> None:
    """Compare 4 epochs of batches of 85 and 86 pictures; a graph serves if all are answered."""
    shape, n = (3, 32, 32), 256
    pictures = SharedPictures(seed).as_bytes(n, shape)
    draws = torch.Generator().manual_seed(seed)
    scores = [torch.randn(n, n_classes, generator=draws) for n_classes in (3, 5)]
    answered = torch.ones(n, dtype=torch.bool)
    answered[200:] = all_answered
    with seeded(seed, "module"):
        start = build_model(
            "conv4", in_channels=3, n_classes=5, image_size=(32, 32), batch_statistics=True
        )
    config = SurveyConfig(n_images=n, epochs=4, batch_size=80)
    epochs = []
    for where in (torch.device("cpu"), device):
        module = copy.deepcopy(start).to(where)
        surveyed = [
            Surveyed(scores[0].to(where), answered, "logits"),
            Surveyed(scores[1].to(where), torch.ones_like(answered), "logits"),
        ]
        with full_float32(), warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # of a step without its graph
            epochs.append(list(distil_jointly(module, pictures.to(where), surveyed, config, seed)))
        assert not module.classifier.weight.any()
    for ours, theirs in zip(*epochs, strict=True):
        assert abs(ours.loss - theirs.loss) < 1e-2 * ours.loss
