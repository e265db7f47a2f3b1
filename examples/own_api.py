"""Put a black box around an API of your own, in ten lines.

Usage: `python examples/own_api.py`. Anything that scores a batch of images can be an API: a Python
function, a command, a vendor's client. Here it is a function that tells bright images from dark.
"""

from __future__ import annotations

import torch
from torch import Tensor

import bidfmkd_fast as bf


def my_api(images: Tensor) -> Tensor:
    """Score images `[N, 3, 16, 16]` in [0, 1]: probabilities `[N, 2]` of "bright" and "dark"."""
    brightness = images.mean((1, 2, 3))
    bright = torch.sigmoid(20 * (brightness - 0.5))
    return torch.stack([bright, 1 - bright], dim=1)


def main() -> None:
    spec = bf.APISpec(
        n_classes=2,
        image_shape=(3, 16, 16),
        scores_kind="probabilities",
        class_names=("bright", "dark"),
        price_per_1000=1.5,
    )
    api = bf.FunctionBlackBox(my_api, spec, budget=bf.Budget(max_queries=20_000))

    # Images that the API calls "bright" and "dark", recovered from its scores alone.
    config = bf.RecoveryConfig(
        steps=60, num_directions=8, generator_width=8, directions="lowres", grid=2, mu=0.2
    )
    recovered = bf.recover(api, n_per_class=4, config=config)
    for image, label, scores in zip(
        recovered.images, recovered.labels, recovered.scores, strict=True
    ):
        wanted, answer = spec.names[int(label)], int(scores.argmax())
        print(
            f"wanted {wanted:6}  brightness {image.mean():.2f}  "
            f"the API says {scores[answer]:.2f} {spec.names[answer]}"
        )
    asked = api.ledger
    print(f"{asked.queries:,} queries, {asked.requests:,} requests, cost {asked.cost:.2f}")


if __name__ == "__main__":
    main()
