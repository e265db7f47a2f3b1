"""Gradients from queries in a training loop of your own: `python examples/zeroth_order_in_your_loop.py`.

A generator learns to make images that a black box assigns to a wanted class. The black box is called under `no_grad`:
no gradient comes out of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import bidfmkd_fast as bf


def main() -> None:
    torch.manual_seed(0)
    victim = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.ReLU(), nn.Linear(32, 10)
    ).eval()
    generator = nn.Sequential(
        nn.Linear(16, 3 * 16 * 16), nn.Sigmoid(), nn.Unflatten(1, (3, 16, 16))
    )
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-2)
    latents, labels = torch.randn(20, 16), torch.arange(20) % 10

    @torch.no_grad()
    def losses_of(images: Tensor) -> Tensor:
        """Ask the black box: images `[N, 3, 16, 16]` -> cross entropy with the wanted labels
        `[N]`.
        """
        wanted = labels.repeat(len(images) // len(labels))
        return functional.cross_entropy(victim(images), wanted, reduction="none")

    zo = bf.ZerothOrder(num_directions=20, mu=0.05, seed=0)
    for step in range(201):
        images = generator(latents)
        # 21 points for each image, in chunks, so that the points of all directions need not fit in
        # memory at once.
        losses = [
            losses_of(points.flatten(0, 1)).view(points.shape[:2])
            for points in zo.ask_chunks(images, max_images=200)
        ]
        loss = zo.tell(
            torch.cat(losses)
        )  # a scalar; backward() sends the estimate through the generator
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")

    # The same with the estimate hidden behind autograd: scores forward, estimated gradient
    # backward.
    teacher = bf.as_differentiable(victim, num_directions=20, mu=0.05)
    functional.cross_entropy(teacher(generator(latents)), labels).backward()
    print("gradient through as_differentiable:", f"{generator[0].weight.grad.norm():.3f}")


if __name__ == "__main__":
    main()
