"""Make the images of one set: the generator, the latents, and the optimiser of both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.recovery.augment import augment
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.generator import Generator, check_images, generator_precision, renewed
from bidfmkd_fast.seeds import seeded, torch_generator


class ImageMaker:
    """The generator and the latents of one set of `n_images`, and the optimiser of both.

    Attributes:
        seed: seed of every draw.
        can_restore: whether `state` is complete. It is not with a user's generator, which may keep
            values outside of its state_dict.
    """

    def __init__(
        self,
        api: BlackBox,
        n_images: int,
        config: RecoveryConfig,
        generator: nn.Module | None,
        seed: int,
        device: torch.device | str | None,
    ) -> None:
        self.spec, self.seed, self.augment = api.spec, seed, config.augment
        self.precision = config.generator_precision
        self.can_restore = generator is None
        with seeded(seed, "recovery", "generator"):
            if generator is None:
                self.generator: nn.Module = Generator(
                    api.spec.image_shape, config.latent_dim, config.generator_width
                )
            else:
                self.generator = renewed(generator)
        self.generator.to(device).train()
        draws = torch_generator(seed, "recovery", "latents")
        latents = torch.randn(n_images, config.latent_dim, generator=draws)
        self.latents = nn.Parameter(latents.to(device))
        trained = [
            parameter for parameter in self.generator.parameters() if parameter.requires_grad
        ]
        self.optimizer = torch.optim.Adam(
            [self.latents, *trained],
            lr=config.learning_rate,
            betas=config.betas,
            capturable=self.latents.is_cuda,
        )

    def images(self, step: int) -> Tensor:
        """Make the images of a step, `[B, C, H, W]` in the API's input range, with their graph.

        They are `T(G(z))`, with generator G, latents z, and augmentation T if the settings want it.
        """
        with seeded(self.seed, "recovery", "forward", step):  # a user's generator may draw noise
            images = self.generate()
        if step == 0:
            check_images(images, [len(self.latents), *self.spec.image_shape])
        return self.spec.from_unit(augment(images, self.seed, step) if self.augment else images)

    def generate(self) -> Tensor:
        """Make `G(z)`, `[B, C, H, W]` in unit range, in the generator's precision."""
        with generator_precision(self.precision, self.latents.device):
            images: Tensor = self.generator(self.latents)
        return images.float() if self.precision == "bfloat16" else images

    def step(self, loss: Tensor) -> None:
        """Take one step of the optimiser down the gradient of `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        # Autocast serves the forward pass only; the backward pass uses the types of its tensors.
        precision = "tf32" if self.precision == "bfloat16" else self.precision
        with generator_precision(precision, self.latents.device):
            loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that steps change, by name."""
        tensors = {
            f"generator.{name}": value for name, value in self.generator.state_dict().items()
        }
        tensors["latents"] = self.latents
        for number, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            for name, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{number}.{name}"] = value
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go back to a `state`. Other tensors among `tensors` are ignored."""
        own = {
            name[len("generator.") :]: value
            for name, value in tensors.items()
            if name.startswith("generator.")
        }
        self.generator.load_state_dict(own)
        self.latents.data.copy_(tensors["latents"])
        for number, parameter in enumerate(self.optimizer.param_groups[0]["params"]):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"optimizer.{number}.{name}"]
                # Adam keeps its moments in the memory format of the parameter, and counts steps on
                # the host.
                on_host = name == "step" and not self.latents.is_cuda
                fresh = torch.empty_like(
                    value if name == "step" else parameter,
                    device=None if on_host else parameter.device,
                )
                self.optimizer.state[parameter][name] = fresh.copy_(value)
