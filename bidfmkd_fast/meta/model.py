"""Define the meta-model: a module whose parameters adapt to a new task in a few gradient steps."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.atomic import read_tensors, write_tensors
from bidfmkd_fast.meta.checks import check_images, check_labels, failures_explained
from bidfmkd_fast.meta.inner_loop import InnerLoop, adapt_parameters, cross_entropy_with
from bidfmkd_fast.models import build_model, model_arguments, model_summary
from bidfmkd_fast.models.head import with_classes

_METADATA_KEY = "bidfmkd_meta_model"


class Classifier:
    """A meta-model adapted to one task, with its own copy of the module.

    `MetaModel.adapt` makes it.

    Args:
        module: the adapted module.
        labels: labels of the support set, int64 `[N]`, the only ones that `predict` returns; None
            for all outputs of the module.
    """

    def __init__(self, module: nn.Module, labels: Tensor | None = None) -> None:
        self._module = module
        self._labels = None if labels is None else labels.unique()

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Compute the logits `[N, n_classes]` of `images` `[N, C, H, W]` in unit range.

        The logits of all outputs are returned, also of those that no label of the support set uses.
        Values a little outside of the range are accepted, since augmented images have them.

        Raises:
            InputError: other images, or values below -0.5 or above 1.5.
        """
        check_images("scores", "images", images, self._module)
        with failures_explained("scores", images):
            return self._module(images)

    def predict(self, images: Tensor) -> Tensor:
        """Return the label with the highest score, int64 `[N]`, for images `[N, C, H, W]`.

        Only labels of the support set are returned: an output of the module beyond them belongs to
        no class of the task. The images are in unit range, as for `scores`.
        """
        scores = self.scores(images)
        if self._labels is None or len(self._labels) == scores.shape[1]:
            return scores.argmax(dim=1)
        return self._labels[scores[:, self._labels].argmax(dim=1)]

    def __repr__(self) -> str:
        return f"Classifier({model_summary(self._module)})"


class MetaModel:
    """A module and the settings with which it adapts to a task.

    Args:
        module: any `nn.Module` from images `[N, C, H, W]` in unit range, [0, 1], to logits `[N,
            n_classes]`.
        adapt_steps: gradient steps that `adapt` takes by default.
        adapt_learning_rate: learning rate that `adapt` uses by default.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self, module: nn.Module, *, adapt_steps: int = 10, adapt_learning_rate: float = 0.01
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InputTypeError(
                f"MetaModel: module must be a torch.nn.Module; got {type(module).__name__}"
            )
        if adapt_steps < 0:
            raise InputError(f"MetaModel: adapt_steps must be 0 or more; got {adapt_steps}")
        if not (math.isfinite(adapt_learning_rate) and adapt_learning_rate > 0):
            raise InputError(
                "MetaModel: adapt_learning_rate must be finite and above 0; got "
                f"{adapt_learning_rate}"
            )
        self.module = module
        self.adapt_steps = adapt_steps
        self.adapt_learning_rate = adapt_learning_rate

    def __repr__(self) -> str:
        settings = (
            f"adapt_steps={self.adapt_steps}, adapt_learning_rate={self.adapt_learning_rate:g}"
        )
        return f"MetaModel({model_summary(self.module)}; {settings})"

    def adapt(
        self,
        support_images: Tensor,
        support_labels: Tensor,
        steps: int | None = None,
        learning_rate: float | None = None,
        *,
        transductive: bool = True,
    ) -> Classifier:
        """Return a classifier for the task of the given support set.

        It takes `steps` steps of gradient descent on the cross entropy. The module itself does not
        change.

        Args:
            support_images: `[N, C, H, W]` in unit range.
            support_labels: int64 `[N]`, numbered from 0, below 1,000. A task may have more classes
                than the module has outputs: then the last layer grows (`models.head.with_classes`).
            steps: gradient steps; `adapt_steps` when None.
            learning_rate: learning rate; `adapt_learning_rate` when None.
            transductive: True evaluates as the paper and MAML do: batch norm uses the statistics
                of the images that are classified together. The answer for one image then depends
                on the others of its batch, and is poor for a batch of one. False fixes the
                statistics (variance unbiased) to those of the support set under the adapted
                parameters and puts the classifier into `eval()`, so that every image is classified
                by itself.

        Raises:
            InputError: images or labels of the wrong rank, length, range or device;
                `InputTypeError` if they are of the wrong type.
        """
        check_images("adapt", "support_images", support_images, self.module)
        check_labels(support_labels, support_images)
        n_classes = int(support_labels.max()) + 1
        with failures_explained("adapt", support_images):
            own = self.for_classes("adapt", n_classes, support_images[:2]).module
            adapted = adapt_parameters(
                own,
                dict(own.named_parameters()),
                cross_entropy_with(support_labels),
                support_images,
                self.inner_loop(steps, learning_rate),
                create_graph=False,
            )
            module = copy.deepcopy(own)
            module.load_state_dict(adapted, strict=False)
            if not transductive:
                _fix_statistics(module, support_images)
        return Classifier(module, support_labels)

    def for_classes(self, operation: str, n_classes: int, images: Tensor) -> MetaModel:
        """Return the meta-model for tasks of `n_classes` classes; `images` are some that it takes.

        Raises:
            InputError: the module has fewer outputs, and its last layer cannot grow.
        """
        known = model_arguments(self.module) is not None  # its last layer was registered last
        module = with_classes(operation, self.module, n_classes, None if known else images)
        if module is self.module:
            return self
        return MetaModel(
            module,
            adapt_steps=self.adapt_steps,
            adapt_learning_rate=self.adapt_learning_rate,
        )

    def inner_loop(self, steps: int | None = None, learning_rate: float | None = None) -> InnerLoop:
        """Return the settings of `adapt`, with those of the meta-model in place of None."""
        return InnerLoop(
            self.adapt_steps if steps is None else steps,
            self.adapt_learning_rate if learning_rate is None else learning_rate,
        )

    def save(self, path: str | Path) -> None:
        """Write the safetensors file `path`, and its folder if there is none.

        The file holds parameters, buffers, adaptation settings and, for a module that
        `models.build_model` makes, its architecture.

        Raises:
            InputError: the file cannot be written.
        """
        about = {
            "adapt_steps": self.adapt_steps,
            "adapt_learning_rate": self.adapt_learning_rate,
            "architecture": model_arguments(self.module),
        }
        write_tensors(Path(path), self.module.state_dict(), {_METADATA_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, module: nn.Module | None = None) -> MetaModel:
        """Load the meta-model that `save` wrote to `path`, on the CPU.

        The weights go into `module` if it is given. It is needed for a file whose architecture
        `models.build_model` does not know.

        Raises:
            InputError: the file is missing, damaged, no meta-model, or of another architecture.
        """
        try:
            state, metadata = read_tensors(Path(path))
            about = json.loads(metadata[_METADATA_KEY])
            steps, learning_rate = about["adapt_steps"], about["adapt_learning_rate"]
            architecture = about["architecture"]
        except InputError as error:
            raise InputError(f"MetaModel.load: {path} is not a saved meta-model: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"MetaModel.load: {path} is not a saved meta-model: {error!r}"
            ) from error
        if spoilt := [name for name, value in state.items() if value.isnan().any()]:
            raise InputError(f"MetaModel.load: {path} holds NaN in {', '.join(spoilt)}")
        if module is None:
            if architecture is None:
                raise InputError(
                    f"MetaModel.load: {path} holds no architecture to build; pass the module as "
                    "module="
                )
            module = build_model(**architecture | {"image_size": tuple(architecture["image_size"])})
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"MetaModel.load: {path} does not fit the module: {reason}") from error
        return cls(module, adapt_steps=steps, adapt_learning_rate=learning_rate)


def _fix_statistics(module: nn.Module, images: Tensor) -> None:
    """Put `module` into `eval()` with the batch-norm statistics of `images` `[N, C, H, W]`."""
    module.eval()
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean = images.new_zeros(layer.num_features)
            layer.running_var = images.new_ones(layer.num_features)
            layer.track_running_stats, layer.momentum = True, 1.0
            layer.train()
    with torch.no_grad():
        module(images)
    module.eval()
