"""Define ResNet-10 and ResNet-18 of few-shot learning."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.memory import check_memory


class ResNet(nn.Module):
    """A residual network for small images.

    A 3x3 convolution with batch norm (the stem), four stages of residual blocks, the mean over
    space, and one linear layer. Images `[N, in_channels, H, W]` float32 -> logits `[N, n_classes]`;
    H and W are at least 8. The stages have 1, 2, 4 and 8 times `width` channels (64 in the papers),
    and every stage but the first halves the image. A stage has one block in ResNet-10 and two in
    ResNet-18.

    As in the code of the paper (Hu et al., ICML 2023, arXiv 2305.18413), which follows Chen et al.,
    ICLR 2019 (arXiv 1904.04232), the stem keeps the image's size and has no ReLU, and convolutions
    start from Kaiming's normal distribution by fan-out. `batch_statistics` is as for `Conv4`.

    Raises:
        InputError: a size below 1, fewer than two classes, an image side below 8, or weights that
            no memory here holds.
    """

    blocks_per_stage: int

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        image_size: tuple[int, int],
        width: int = 64,
        *,
        batch_statistics: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        height, breadth = image_size
        if min(height, breadth) < 8:
            raise InputError(
                f"{name}: image_size must be at least (8, 8), for three halvings; got "
                f"{(height, breadth)}"
            )
        for what, value, least in (
            ("in_channels", in_channels, 1),
            ("n_classes", n_classes, 2),
            ("width", width, 1),
        ):
            if value < least:
                raise InputError(f"{name}: {what} must be at least {least}; got {value}")
        check_memory(
            name,
            f"a network of width={width}",
            4 * 9 * (8 * width) ** 2 * self.blocks_per_stage,  # the last stage alone
            "lower the width",
        )
        self.in_channels = in_channels
        self.n_classes = n_classes
        self.image_size = (height, breadth)
        self.width = width
        self.batch_statistics = batch_statistics
        track = not batch_statistics
        self.stem = _convolution_and_norm(in_channels, width, 3, 1, track)
        blocks = []
        before = width
        for stage in range(4):
            for block in range(self.blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_Block(before, width << stage, stride, track))
                before = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(images)).mean((2, 3)))


class ResNet10(ResNet):
    """A `ResNet` with one block per stage."""

    blocks_per_stage = 1


class ResNet18(ResNet):
    """A `ResNet` with two blocks per stage."""

    blocks_per_stage = 2


class _Block(nn.Module):
    """A residual block: two 3x3 convolutions plus a shortcut.

    The shortcut is the identity, or a 1x1 convolution where the number of channels changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, track: bool) -> None:
        super().__init__()
        self.first = _convolution_and_norm(in_channels, out_channels, 3, stride, track)
        self.second = _convolution_and_norm(out_channels, out_channels, 3, 1, track)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = _convolution_and_norm(in_channels, out_channels, 1, 1, track)

    def forward(self, x: Tensor) -> Tensor:
        # Slicing and then convolving with stride 1 equals a strided 1x1 convolution. The strided
        # convolution is avoided because oneDNN's backward pass writes past its memory on fewer than
        # 16 channels-last channels (oneDNN issue 6035).
        beside = self.shortcut(x[..., :: self.stride, :: self.stride])
        return functional.relu(self.second(functional.relu(self.first(x))) + beside)


def _convolution_and_norm(
    in_channels: int, out_channels: int, side: int, stride: int, track: bool
) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, side, stride, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, track_running_stats=track))
