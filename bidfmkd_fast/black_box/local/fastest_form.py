"""Find the fastest form of a torch module that still has the module's scores."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bidfmkd_fast.black_box.answers import one_hot
from bidfmkd_fast.black_box.local.conv_relu import fuse_relus
from bidfmkd_fast.black_box.local.folding import fold_batch_norms
from bidfmkd_fast.black_box.local.pooling import replace_max_pools
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError
from bidfmkd_fast.runtime.full_float32 import full_float32
from bidfmkd_fast.seeds import seeded

# The largest activation of a micro-batch on the CPU, in bytes per thread: small enough for the
# last-level cache, large enough to keep the convolutions busy.
_CPU_ACTIVATION_BYTES = 8 << 20
# On a GPU the largest activation takes at most 1/32 of the memory. Large batches run faster there,
# but several APIs run side by side.
_GPU_ACTIVATION_SHARE = 32
# Folding and memory format change scores by rounding (1e-6 of the largest score, in deep networks
# 1e-5). A wrong fold changes them by far more than this limit.
_SAME_SCORES = 1e-4


def images_at_once(image_bytes: int, device: torch.device) -> int:
    """Return how many images to run at once if an activation takes `image_bytes` bytes an image."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        target, most = memory // _GPU_ACTIVATION_SHARE, 16384
    else:
        target, most = _CPU_ACTIVATION_BYTES * torch.get_num_threads(), 4096
    return max(16, min(most, target // image_bytes))


def forward(
    module: nn.Module,
    batches: Sequence[Tensor],
    device: torch.device,
    memory_format: torch.memory_format,
) -> list[Tensor]:
    """Run the module on each batch in full float32, without autograd and without autocast."""
    answers = []
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), full_float32():
        for images in batches:
            # Copy the images: the module may work in place, and images with a single channel become
            # channels-last only in a tensor that is made with that format.
            own = torch.empty(
                images.shape, dtype=images.dtype, device=device, memory_format=memory_format
            )
            answers.append(module(own.copy_(images)))
    return answers


def advice_on_dtype(module: nn.Module) -> str:
    """Return the advice for an error of a module that does not compute in float32; "" if it does.

    Images come in float32, and half precision would drown the differences that recovery measures.
    """
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}
    others = sorted(str(dtype) for dtype in dtypes - {torch.float32})
    return f"; images are float32, so give module.float() for {', '.join(others)}" if others else ""


def fastest_equal(
    plain: nn.Module, spec: APISpec, device: torch.device
) -> tuple[nn.Module, torch.memory_format, int]:
    """Return the fastest form of `plain` with the same scores, and how to run it.

    Two random images are scored by `plain` and by each form. On the CPU the first form with equal
    scores is taken, since the forms are tried in the order of speed. On a GPU no rule tells which
    memory format is faster, so both are timed.

    Returns:
        the module, its memory format, and the bytes that its largest activation takes per image.

    A module that answers with integers, labels, is returned as it is: labels of two images do not
    show whether the scores behind them are still the same.

    Raises:
        InputError: `plain` fails, or does not answer floating scores `[N, n_classes]`; for an API
            of labels, integers `[N]` serve too.
    """
    with seeded(0, "black_box", "local", "trial"):
        images = spec.from_unit(torch.rand(2, *spec.image_shape)).to(device)

    def scores_of(module: nn.Module, memory_format: torch.memory_format) -> Tensor:
        # A module that draws random numbers draws the same ones in every form.
        with seeded(0, "black_box", "local", "forward"):
            return forward(module, [images], device, memory_format)[0]

    largest = _LargestOutput()
    try:
        with largest:
            wanted = scores_of(copy.deepcopy(plain), torch.contiguous_format)
    except Exception as error:
        raise InputError(
            f"{spec.name}: module failed on images {list(images.shape)}: {error}"
            f"{advice_on_dtype(plain)}"
        ) from error
    _check_scores(wanted, spec, images)
    image_bytes = max(images[0].numel() * images.element_size(), largest.bytes // 2)
    if not wanted.is_floating_point():
        return plain, torch.contiguous_format, image_bytes

    equal: list[tuple[float, nn.Module, torch.memory_format]] = []
    forms = [(True, False), (False, False)]
    if device.type == "cuda":
        forms.insert(0, (True, True))
    for (fold, fuse), memory_format in itertools.product(
        forms, (torch.channels_last, torch.contiguous_format)
    ):
        try:
            candidate = _form(plain, fold, fuse, device, memory_format)
            deviation = (scores_of(candidate, memory_format) - wanted).abs().max()
        except Exception:
            # `view`, for instance, fails on channels-last memory. Try the next form; the last
            # resort is `plain`.
            continue
        if deviation > _SAME_SCORES * wanted.abs().max():
            continue
        if device.type != "cuda":
            return candidate, memory_format, image_bytes
        trial = images[:1].expand(images_at_once(image_bytes, device), *spec.image_shape)
        seconds = _seconds(partial(forward, candidate, [trial], device, memory_format), device)
        equal.append((seconds, candidate, memory_format))
        if len(equal) == 2:  # both memory formats of one form
            break
    if not equal:
        return plain, torch.contiguous_format, image_bytes
    _, served, memory_format = min(equal, key=lambda timed: timed[0])
    return served, memory_format, image_bytes


def _form(
    plain: nn.Module,
    fold: bool,
    fuse: bool,
    device: torch.device,
    memory_format: torch.memory_format,
) -> nn.Module:
    """Return a copy of the module in this memory format, optionally folded and fused."""
    candidate = copy.deepcopy(plain)
    if fold:
        fold_batch_norms(candidate)
    candidate.to(memory_format=memory_format)  # type: ignore[call-overload]
    if device.type == "cpu" and memory_format == torch.channels_last:
        replace_max_pools(candidate)
    if fuse:
        fuse_relus(candidate)
    return candidate


def _check_scores(scores: object, spec: APISpec, images: Tensor) -> None:
    """Raise InputError unless the module's answer is floating scores `[2, n_classes]`, or labels
    where the spec says so.
    """
    if spec.labels_only:
        try:
            one_hot(scores, spec, len(images))  # type: ignore[arg-type]
        except BadAnswer as error:
            raise InputError(f"module: {error}") from error
        return
    if not isinstance(scores, Tensor):
        came = type(scores).__name__
    elif tuple(scores.shape) != (2, spec.n_classes) or not scores.is_floating_point():
        came = f"{scores.dtype} {list(scores.shape)}"
    else:
        return
    raise InputError(
        f"{spec.name}: module must map images {list(images.shape)} to floating scores "
        f"[2, {spec.n_classes}]; it returned {came}"
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one run takes on a CUDA device, the mean of three."""
    with torch.cuda.device(device):
        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 3e3


class _LargestOutput(TorchDispatchMode):
    """Notes, inside its block, the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.bytes = max(self.bytes, output.numel() * output.element_size())
        return output
