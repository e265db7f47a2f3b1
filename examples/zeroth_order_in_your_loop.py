"""Use gradients from queries in a training loop of your own.

Usage: `python examples/zeroth_order_in_your_loop.py`. A generator learns to make images that a
black box assigns to a wanted class. The black box runs under `no_grad`: it gives no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import bidfmkd_fast as bf


def main() -> None:
    torch.manual_seed(0)
    shape, n_pixels = (3, 16, 16), 3 * 16 * 16
    victim = nn.Sequential(nn.Flatten(), nn.Linear(n_pixels, 32), nn.ReLU(), nn.Linear(32, 10))
    generator = nn.Sequential(nn.Linear(16, n_pixels), nn.Sigmoid(), nn.Unflatten(1, shape))
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-2)
    latents, labels = torch.randn(20, 16), torch.arange(20) % 10

    def losses_of(images: Tensor, wanted: Tensor) -> Tensor:
        """Ask the black box: images `[N, 3, 16, 16]` -> cross entropies with their labels `[N]`."""
        return functional.cross_entropy(victim(images), wanted, reduction="none")

    zo = bf.ZerothOrder(num_directions=20, mu=0.05, seed=0)
    for step in range(201):
        # Each image has 21 points: itself and a small step along each direction. They are asked
        # in chunks, and each gets the label of its image. The loss is a scalar, whose backward()
        # sends the estimated gradient through the generator.
        loss = zo.estimate(losses_of, generator(latents), arguments=[labels])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")

    # The same behind autograd: scores forward, estimated gradient backward.
    teacher = bf.as_differentiable(victim, num_directions=20, mu=0.05)
    functional.cross_entropy(teacher(generator(latents)), labels).backward()
    print("gradient through as_differentiable:", f"{generator[0].weight.grad.norm():.3f}")


if __name__ == "__main__":
    main()
