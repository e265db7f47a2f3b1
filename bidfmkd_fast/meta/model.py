"""The inner loop, and the meta-model: a module whose parameters adapt to a new task in a few gradient steps."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.atomic import read_tensors, write_tensors
from bidfmkd_fast.meta.checks import check_images, check_labels, failures_told
from bidfmkd_fast.meta.stacked import can_stack, stacked_forward, stacked_parameters
from bidfmkd_fast.models import build_model, model_arguments, model_summary

_METADATA_KEY = "bidfmkd_meta_model"
Task = TypeVar("Task")


def forward(module: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits `[N, n_classes]` of `module` under `parameters`; a Conv4 with batch statistics as a
    stack of one task.

    The module runs in the mode it is in and is left as it was: it gets copies of its buffers, so a
    batch norm that tracks running statistics updates a copy that is thrown away.
    """
    if can_stack(module):
        return stacked_forward(module, stacked_parameters(parameters, 1), images[None])[0]
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, {**parameters, **buffers}, (images,))


Forward = Callable[[nn.Module, Mapping[str, Tensor], Tensor], Tensor]


def adapt_parameters(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    steps: int,
    learning_rate: float,
    first_order: bool = False,
    create_graph: bool = True,
    forward: Forward = forward,
) -> dict[str, Tensor]:
    """The inner loop: `steps` steps of `theta <- theta - learning_rate * d/dtheta
    loss(f_theta(images))`.

    `loss` maps logits `[N, n_classes]` to a scalar; `forward(module, parameters, images)` makes the
    logits. Parameters without `requires_grad`, or without influence on `loss`, stay as they are.
    The result hangs on `parameters` by a graph through every step (second order); with
    `first_order` the inner gradients count as constants, so that d(result)/d(parameters) is the
    identity; with `create_graph=False` it is cut off, for adaptation that nothing is trained
    through, and shares no memory with `parameters`.
    """
    if steps < 0:
        raise InputError(f"adapt: steps must be 0 or more; got {steps}")
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise InputError(f"adapt: learning_rate must be finite and 0 or more; got {learning_rate}")
    adapted = dict(parameters)
    if not create_graph:
        adapted = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in adapted.items()
        }
    trained = [name for name, value in adapted.items() if value.requires_grad]
    if not trained:
        raise InputError(
            "adapt: the module has no parameter that requires a gradient, so nothing can adapt"
        )
    with torch.enable_grad():
        for _ in range(steps):
            gradients = torch.autograd.grad(
                loss(forward(module, adapted, images)),
                [adapted[name] for name in trained],
                create_graph=create_graph and not first_order,
                allow_unused=True,
            )
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is None:
                    continue
                if create_graph:
                    adapted[name] = adapted[name] - learning_rate * gradient
                else:
                    adapted[name] = (
                        adapted[name].detach() - learning_rate * gradient
                    ).requires_grad_()
    return adapted


def outer_step(
    optimizer: torch.optim.Optimizer,
    tasks: Iterable[Task],
    task_loss: Callable[[Task], tuple[Tensor, Tensor]],
) -> tuple[float, float]:
    """One optimizer step on the sum over `tasks` of `task_loss(task)[0]`; the means of both values
    that it returns.

    A "task" may be a stack of them, with one value each, `[E]`. It is differentiated before the
    next one starts, so the graph of one is alive at a time.
    """
    optimizer.zero_grad(set_to_none=True)
    losses, scores = [], []
    for task in tasks:
        loss, score = task_loss(task)
        loss.sum().backward()
        losses.append(loss.detach().flatten())
        scores.append(score.detach().flatten())
    if not losses:
        raise InputError("outer step: tasks is empty; give at least one")
    mean_loss = float(torch.cat(losses).mean())
    gradients = [
        value.grad
        for group in optimizer.param_groups
        for value in group["params"]
        if value.grad is not None
    ]
    if not (math.isfinite(mean_loss) and all(gradient.isfinite().all() for gradient in gradients)):
        optimizer.zero_grad(set_to_none=True)
        raise InputError(
            f"outer step: the loss is {mean_loss} or its gradient is not finite; the step was not taken; "
            "lower inner_lr or outer_lr"
        )
    optimizer.step()
    return mean_loss, float(torch.cat(scores).mean())


class Classifier:
    """A meta-model adapted to one task; made by `MetaModel.adapt`, with a copy of the module of
    its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Logits `[N, n_classes]` of `images` `[N, C, H, W]` in unit range. Raises InputError for
        other images.

        A little outside of the range is taken, as augmented images are; below -0.5 or above 1.5 is
        not.
        """
        check_images("scores", "images", images, self._module)
        with failures_told("scores", images):
            return self._module(images)

    def predict(self, images: Tensor) -> Tensor:
        """The label of the highest score, int64 `[N]`, of `images` `[N, C, H, W]` in unit range."""
        return self.scores(images).argmax(dim=1)

    def __repr__(self) -> str:
        return f"Classifier({model_summary(self._module)})"


class MetaModel:
    """A module (any `nn.Module` from images `[N, C, H, W]` to logits `[N, n_classes]`) with its way
    of adapting.

    The meta-model sees images in unit range, [0, 1]. `adapt_steps` and `adapt_learning_rate` are
    what `adapt` uses when it is not told otherwise. Raises InputError for settings out of range.
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
                f"MetaModel: adapt_learning_rate must be finite and above 0; got {adapt_learning_rate}"
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
        """A classifier for the task of `support_images` `[N, C, H, W]` (unit range), labels int64
        `[N]` from 0.

        `steps` steps of gradient descent on the cross entropy. The module itself does not change.

        `transductive=True` is how the paper and MAML evaluate: batch norm uses the statistics of
        the images that are classified together, so the answer for one image depends on the others
        of its batch, and is poor for a batch of one. `transductive=False` fixes the statistics
        (variance unbiased) to those of the support set under the adapted parameters and puts the
        classifier into `eval()`: every image is then classified by itself.

        Raises InputError (InputTypeError) for images or labels of the wrong kind, rank, length,
        range or device.
        """
        check_images("adapt", "support_images", support_images, self.module)
        check_labels(support_labels, support_images)
        with failures_told("adapt", support_images):
            adapted = adapt_parameters(
                self.module,
                dict(self.module.named_parameters()),
                cross_entropy_with(support_labels),
                support_images,
                steps=self.adapt_steps if steps is None else steps,
                learning_rate=self.adapt_learning_rate if learning_rate is None else learning_rate,
                create_graph=False,
            )
            module = copy.deepcopy(self.module)
            module.load_state_dict(adapted, strict=False)
            if not transductive:
                _fix_statistics(module, support_images)
        return Classifier(module)

    def save(self, path: str | Path) -> None:
        """Write the safetensors file `path`: parameters, buffers, adaptation settings and, for a
        module that `models.build_model` makes, its architecture. The folder is made if it is not
        there. Raises InputError where the file cannot be written."""
        about = {
            "adapt_steps": self.adapt_steps,
            "adapt_learning_rate": self.adapt_learning_rate,
            "architecture": model_arguments(self.module),
        }
        write_tensors(Path(path), self.module.state_dict(), {_METADATA_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, module: nn.Module | None = None) -> MetaModel:
        """The meta-model that `save` wrote to `path`, on the CPU.

        Its weights go into `module` if one is given; a file whose architecture `models.build_model`
        does not know needs one. Raises InputError for a file that is missing, damaged, no
        meta-model, or of another architecture.
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
                    f"MetaModel.load: {path} does not tell how to build its module; pass module="
                )
            module = build_model(**architecture | {"image_size": tuple(architecture["image_size"])})
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"MetaModel.load: {path} does not fit the module: {reason}") from error
        return cls(module, adapt_steps=steps, adapt_learning_rate=learning_rate)


def cross_entropy_with(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss `logits [N, n_classes] -> mean cross entropy` for int64 `labels` `[N]`, with a
    check of their range.
    """
    highest = int(labels.max())

    def loss(logits: Tensor) -> Tensor:
        if highest >= logits.shape[1]:
            raise InputError(
                f"adapt: labels must be below {logits.shape[1]}, the module's number of classes; got {highest}; "
                "number the classes of a task from 0"
            )
        return functional.cross_entropy(logits, labels)

    return loss


def _fix_statistics(module: nn.Module, images: Tensor) -> None:
    """Put `module` into `eval()`, its batch norms with the statistics that `images` `[N, C, H, W]`
    have in them.
    """
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
