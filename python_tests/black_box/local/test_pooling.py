"""Check that pairwise max pooling has the values of torch's max pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bidfmkd_fast.black_box.local.pooling import PairwiseMaxPool2d, replace_max_pools
from bidfmkd_fast.seeds import torch_generator


@pytest.mark.parametrize("size", [(2, 2), (7, 9), (8, 5), (1, 4)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_equals_max_pool(
    size: tuple[int, int], memory_format: torch.memory_format, seed: int
) -> None:
    images = torch.randn(3, 5, *size, generator=torch_generator(seed, "images"))
    images[0, 0, 0, 0] = torch.nan
    pooled = PairwiseMaxPool2d()(images.contiguous(memory_format=memory_format))
    if min(size) < 2:
        assert pooled.numel() == 0
    else:
        torch.testing.assert_close(
            pooled, nn.functional.max_pool2d(images, 2), rtol=0, atol=0, equal_nan=True
        )


def test_only_plain_2x2_pools_are_replaced() -> None:
    hooked = nn.MaxPool2d(2)
    hooked.register_forward_hook(lambda *_: None)
    kept = [
        nn.MaxPool2d(3),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, ceil_mode=True),
        hooked,
    ]
    module = nn.Sequential(nn.MaxPool2d(2), nn.Sequential(nn.MaxPool2d((2, 2))), *kept)
    replace_max_pools(module)
    assert type(module[0]) is PairwiseMaxPool2d
    assert type(module[1][0]) is PairwiseMaxPool2d
    assert [module[i] for i in range(2, 7)] == kept
