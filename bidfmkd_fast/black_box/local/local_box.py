"""Define what all black boxes in this process share: answers only as precise as the spec says."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bidfmkd_fast.black_box.answers import as_answered
from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.budget import Budget
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.wire import through_wire
from bidfmkd_fast.errors import InputError


class LocalBlackBox(BlackBox):
    """A black box in this process, which answers as precisely as its spec says and no more.

    Images lose what 8 bits or JPEG would take from them, scores are rounded to `decimals` and cut
    to `top_k`. A service would do the same, so a local API is as hard to learn from.

    Raises:
        InputError: the spec asks for another size, layout or normalisation, and the box does not
            convert images.
    """

    # True in a subclass whose `score` brings the images to the form that the spec asks for.
    _converts_images = False

    def __init__(self, spec: APISpec, *, budget: Budget | None = None) -> None:
        super().__init__(spec, budget=budget)
        if not self._converts_images:
            refuse_wire_fields(spec)

    def _ask(self, images: Tensor, n_requests: int) -> Tensor:
        if not self._converts_images:
            images = through_wire(images, self._spec)
        return as_answered(super()._ask(images, n_requests), self._spec)


def refuse_wire_fields(spec: APISpec) -> None:
    """Raise InputError if the spec asks for another size, layout or normalisation of the images.

    A module in this process gets the images as they are; only services, ONNX files and functions
    get them converted.
    """
    if spec.server_shape not in (None, spec.image_shape) or spec.layout != "NCHW" or spec.mean:
        raise InputError(
            f"{spec.name}: server_shape, layout, mean and std are for services and functions; a "
            "local module gets images [N, *image_shape] in input_range; convert them in the "
            "module, or use FunctionBlackBox(module, spec), which converts them"
        )


def refuse_split(module: nn.Module, name: str, **sizes: int | None) -> None:
    """Raise InputError if a batch size of `sizes` is set and splitting a batch changes the scores.

    Splitting changes the scores if batch norms of the module use the statistics of the whole batch.
    """
    for argument, size in sizes.items():
        if size is not None and uses_batch_statistics(module):
            raise InputError(
                f"{name}: {argument}={size} would change the scores, since the module's batch norm "
                "uses batch statistics; leave it None"
            )


def uses_batch_statistics(module: nn.Module) -> bool:
    """Return True if a batch norm has no running statistics, so that images affect each other."""
    return any(
        isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in module.modules()
    )
