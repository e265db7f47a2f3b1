"""Define Conv4, the four-block network of few-shot learning."""

from __future__ import annotations

from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.memory import check_memory


class Conv4(nn.Module):
    """Four blocks of convolution 3x3, batch norm, ReLU and max pooling 2x2, then one linear layer.

    Images `[N, in_channels, H, W]` float32 -> logits `[N, n_classes]`. H and W are at least 16,
    since every block halves them. Source: Vinyals et al. 2016 (arXiv 1606.04080); 32 filters as in
    Finn et al. 2017 (arXiv 1703.03400).

    Args:
        in_channels: channels of an image.
        n_classes: number of logits.
        image_size: (H, W).
        width: filters of every block.
        batch_statistics: True makes batch norm use the statistics of the current batch and keep
            none, as a meta-model needs and `torch.func.functional_call` and `vmap` allow. False
            keeps running statistics, for APIs served in `eval()`.

    Raises:
        InputError: a size below 1, fewer than two classes, an image side below 16, or weights that
            no memory here holds.
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        image_size: tuple[int, int],
        width: int = 32,
        *,
        batch_statistics: bool = False,
    ) -> None:
        super().__init__()
        height, breadth = image_size
        if min(height, breadth) < 16:
            raise InputError(
                "Conv4: image_size must be at least (16, 16), for four poolings; got "
                f"{(height, breadth)}"
            )
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("n_classes", n_classes, 2),
            ("width", width, 1),
        ):
            if value < least:
                raise InputError(f"Conv4: {name} must be at least {least}; got {value}")
        features = width * (height // 16) * (breadth // 16)
        check_memory(
            "Conv4",
            f"a network of width={width} for images of {height} x {breadth}",
            4 * (9 * width * (in_channels + 3 * width) + features * n_classes),
            "lower the width or the size of the images",
        )
        self.in_channels = in_channels
        self.n_classes = n_classes
        self.image_size = (height, breadth)
        self.width = width
        self.batch_statistics = batch_statistics
        self.blocks = nn.Sequential(
            *(
                _block(in_channels if i == 0 else width, width, track=not batch_statistics)
                for i in range(4)
            )
        )
        self.classifier = nn.Linear(features, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(images).flatten(1))


def _block(in_channels: int, out_channels: int, track: bool) -> nn.Sequential:
    return nn.Sequential(
        # No bias, since batch norm would remove it.
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels, track_running_stats=track),
        # Pooling before ReLU gives the same values and gradients with a quarter of ReLU's work.
        nn.MaxPool2d(2),
        nn.ReLU(),
    )
