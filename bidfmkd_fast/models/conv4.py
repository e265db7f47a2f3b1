"""Conv4, the four-block network of few-shot learning."""

from __future__ import annotations

from torch import Tensor, nn

from bidfmkd_fast.errors import InputError


class Conv4(nn.Module):
    """Four blocks of convolution 3x3, batch norm, ReLU and max pooling 2x2, then one linear layer.

    Images `[N, in_channels, H, W]` float32 -> logits `[N, n_classes]`; H and W at least 16, one
    halving per block. With `batch_statistics` batch norm always uses the statistics of the batch at
    hand and keeps none: what a meta-model wants, and safe under `torch.func.functional_call` and
    `vmap`. Without it batch norm keeps running statistics, for APIs served in `eval()`. Source:
    Vinyals et al. 2016 (arXiv 1606.04080); 32 filters as in Finn et al. 2017 (arXiv 1703.03400).

    Raises `InputError` for sizes below 1, fewer than two classes, or an image side below 16.
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
                f"Conv4: image_size must be at least (16, 16), for four poolings; got {(height, breadth)}"
            )
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("n_classes", n_classes, 2),
            ("width", width, 1),
        ):
            if value < least:
                raise InputError(f"Conv4: {name} must be at least {least}; got {value}")
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
        self.classifier = nn.Linear(width * (height // 16) * (breadth // 16), n_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(images).flatten(1))


def _block(in_channels: int, out_channels: int, track: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, 3, padding=1, bias=False
        ),  # batch norm takes the mean out: no bias
        nn.BatchNorm2d(out_channels, track_running_stats=track),
        nn.MaxPool2d(2),  # before ReLU: the same values and gradients, and a quarter of ReLU's work
        nn.ReLU(),
    )
