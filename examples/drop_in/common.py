"""What the three loops share: an API of five characters, a student, a generator, the options."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import bidfmkd_fast as bf

N_CLASSES, SHAPE, N_LATENT = 5, (1, 28, 28), 32


def conv_net(width: int) -> nn.Module:
    """Return a small classifier of images `[N, 1, 28, 28]`."""
    block = [
        layer
        for n_in in (1, width, width)
        for layer in (
            nn.Conv2d(n_in, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
    ]
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(9 * width, N_CLASSES))


class Generator(nn.Module):
    """Latents `[N, 32]` to images in -1..1, and what they were before the tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(N_LATENT, 16 * 14 * 14)
        self.draw = nn.Sequential(
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(16, 1, 3, padding=1),
        )

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        x_pre = self.draw(self.project(latents).view(-1, 16, 14, 14))
        return x_pre.tanh(), x_pre


def train_api() -> nn.Module:
    """Train the model behind the API on five characters; the loops see its scores only."""
    torch.manual_seed(0)
    data = bf.load_dataset("glyphs")
    rows = data.labels < N_CLASSES
    images, labels = data.images[rows].view(-1, *SHAPE).float() / 127.5 - 1, data.labels[rows]
    api = conv_net(16)
    optimizer = torch.optim.Adam(api.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(api(images), labels).backward()
        optimizer.step()
    return api.eval().requires_grad_(False)


def black_box(api: nn.Module) -> bf.BlackBox:
    """Put the API behind a box that counts its queries and runs it in its fastest form."""
    spec = bf.APISpec(N_CLASSES, SHAPE, input_range=(-1.0, 1.0), name="characters")
    return bf.TorchBlackBox(api, spec)


Make = Callable[[str, int, Callable[[Tensor], Tensor]], Callable[[], float]]


def run(make: Make) -> None:
    """Train with the options of the command line and print the loss five times."""
    parser = ArgumentParser()
    parser.add_argument("--backend", choices=["plain", "ours"], default="ours")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    api = train_api()
    step = make(
        options.backend, options.seed, api if options.backend == "plain" else black_box(api)
    )
    for number in range(1, options.steps + 1):
        loss = step()
        if number % max(1, options.steps // 5) == 0:
            print(f"step {number:4}  loss {loss:.3f}", flush=True)
