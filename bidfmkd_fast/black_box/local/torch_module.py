"""Black boxes in this process: a torch module served fast and closed (`TorchBlackBox`), or any function."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from bidfmkd_fast.black_box.answers import as_told
from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.ledger import Budget
from bidfmkd_fast.black_box.local.conv_relu import fuse_relus
from bidfmkd_fast.black_box.local.folding import fold_batch_norms
from bidfmkd_fast.black_box.local.pooling import replace_max_pools
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.black_box.wire import through_wire
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError
from bidfmkd_fast.runtime.full_float32 import full_float32
from bidfmkd_fast.seeds import seeded

# A micro-batch's largest activation: small enough for the last-level cache, large enough to keep
# the convolutions busy.
_CPU_ACTIVATION_BYTES = 8 << 20
_GPU_ACTIVATION_SHARE = (
    32  # of a device's memory: large batches run faster there, and several APIs run side by side
)
# Folding and memory format change scores by rounding (1e-6 of the largest, deep nets 1e-5); a wrong
# fold by far more.
_SAME_SCORES = 1e-4


class LocalBlackBox(BlackBox):
    """A black box in this process, which answers as precisely as its spec says and no more.

    Images lose what 8 bits or JPEG would lose of them, scores are rounded to `decimals` and cut to
    `top_k`.

    Raises:
        InputError: the spec asks for another size, layout or normalisation, which only a service
            can want.
    """

    def __init__(self, spec: APISpec, *, budget: Budget | None = None) -> None:
        super().__init__(spec, budget=budget)
        refuse_wire_fields(spec)

    def _ask(self, images: Tensor, n_requests: int) -> Tensor:
        return as_told(super()._ask(through_wire(images, self._spec), n_requests), self._spec)


def refuse_wire_fields(spec: APISpec) -> None:
    """Raise InputError where the spec asks for another size, layout or normalisation than a box in
    this process has.
    """
    if spec.server_shape not in (None, spec.image_shape) or spec.layout != "NCHW" or spec.mean:
        raise InputError(
            f"{spec.name}: server_shape, layout, mean and std are for services; a local API gets images "
            "[N, *image_shape] in input_range; convert them in the module"
        )


def refuse_split(module: nn.Module, name: str, **sizes: int | None) -> None:
    """Raise InputError where a batch size of `sizes` would split what the module's batch norms see
    together.
    """
    for argument, size in sizes.items():
        if size is not None and uses_batch_statistics(module):
            raise InputError(
                f"{name}: {argument}={size} would change the scores, since the module's batch norm uses batch "
                "statistics; leave it None"
            )


def uses_batch_statistics(module: nn.Module) -> bool:
    """Return whether a batch norm of the module has no running statistics, so that images depend
    on one another.
    """
    return any(
        isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in module.modules()
    )


class FunctionBlackBox(LocalBlackBox):
    """An API behind any function. Each call costs one request, or one for every `spec.max_batch`
    images.

    Args:
        function: images `[N, C, H, W]` float32 in `spec.input_range` -> scores `[N, n_classes]`, a
            floating tensor of `spec.scores_kind` (for top-k: the probabilities of all classes). It
            runs without autograd and gets a copy of the images, so it may work in place.
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap.

    Raises:
        InputTypeError: `function` cannot be called.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], spec: APISpec, *, budget: Budget | None = None
    ) -> None:
        super().__init__(spec, budget=budget)
        if not callable(function):
            raise InputTypeError(
                f"{self.name}: function must be callable; got {type(function).__name__}"
            )
        self._answer = lambda images: function(images.clone())

    def score(self, images: Tensor) -> Tensor:
        return self._answer(images)


class TorchBlackBox(LocalBlackBox):
    """A torch module served as an API: only its scores come out. A call costs one request, or one
    per `max_batch`.

    The module is copied and put in evaluation mode. Batch norms are folded into the convolutions
    before them; the memory format is channels-last (on a GPU whichever is faster there); on the CPU
    2x2 max pools become elementwise maxima; on a GPU a convolution and the ReLU after it become one
    call; large calls run in micro-batches. Each of these is done only if it leaves the scores equal
    up to rounding (measured once, here). It runs in full float32, without autocast and without
    TF32.

    Args:
        module: images `[N, C, H, W]` float32 in `spec.input_range` -> scores `[N, n_classes]` of
            `spec.scores_kind` (for top-k: the probabilities of all classes).
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap.
        device: where the module runs; where its parameters are unless told. Images and scores are
            moved.
        micro_batch: most images run at once; None to choose by the size of the module's
            activations. A module whose batch norms use batch statistics is never split, since that
            would change its scores.

    Raises:
        InputError: the module does not map `[N, *image_shape]` to `[N, n_classes]`, cannot be
            copied, or `micro_batch` or `max_batch` does not suit it (InputTypeError: a wrong type).
    """

    def __init__(
        self,
        module: nn.Module,
        spec: APISpec,
        *,
        budget: Budget | None = None,
        device: torch.device | str | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(spec, budget=budget)
        if not isinstance(module, nn.Module):
            raise InputTypeError(
                f"{self.name}: module must be a torch.nn.Module; got {type(module).__name__}"
            )
        if micro_batch is not None and (
            not isinstance(micro_batch, int) or isinstance(micro_batch, bool)
        ):
            raise InputTypeError(
                f"{self.name}: micro_batch must be an int or None; got {micro_batch!r}"
            )
        if micro_batch is not None and micro_batch < 1:
            raise InputError(f"{self.name}: micro_batch must be at least 1; got {micro_batch}")
        # The closure is the only way to the module: no attribute holds it.
        self._answer, self.device = _serve(module, spec, device, micro_batch)

    def score(self, images: Tensor) -> Tensor:
        return self._answer(images)


def _serve(
    module: nn.Module, spec: APISpec, device: torch.device | str | None, micro_batch: int | None
) -> tuple[Callable[[Tensor], Tensor], torch.device]:
    if device is None:
        device = next(
            (tensor.device for tensor in (*module.parameters(), *module.buffers())),
            torch.device("cpu"),
        )
    try:
        device = torch.empty(0, device=device).device  # with its index
        plain = copy.deepcopy(module).to(device).eval()
    except Exception as error:
        raise InputError(f"{spec.name}: module cannot be copied to {device}: {error}") from error

    served, memory_format, image_bytes = _fastest_equal(plain, spec, device)
    refuse_split(plain, spec.name, micro_batch=micro_batch, max_batch=spec.max_batch)
    sized = micro_batch is None and not uses_batch_statistics(plain)

    def answer(images: Tensor) -> Tensor:
        size = _cache_sized(image_bytes, device) if sized else micro_batch or len(images)
        batches = images.split(size)
        answers = _forward(served, batches, device, memory_format)
        for batch, scores in zip(batches, answers):
            if not isinstance(scores, Tensor) or tuple(scores.shape) != (
                len(batch),
                spec.n_classes,
            ):
                came = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise BadAnswer(
                    f"{spec.name}: module must answer [{len(batch)}, {spec.n_classes}]; it answered {came}"
                )
        return torch.cat(answers)

    return answer, device


def _cache_sized(image_bytes: int, device: torch.device) -> int:
    if device.type == "cuda":
        target, most = (
            torch.cuda.get_device_properties(device).total_memory // _GPU_ACTIVATION_SHARE,
            16384,
        )
    else:
        target, most = _CPU_ACTIVATION_BYTES * torch.get_num_threads(), 4096
    return max(16, min(most, target // image_bytes))


def _forward(
    module: nn.Module,
    batches: Sequence[Tensor],
    device: torch.device,
    memory_format: torch.memory_format,
) -> list[Tensor]:
    answers = []
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), full_float32():
        for images in batches:
            # A copy: the module may work in place, and only an explicit layout makes one-channel
            # images channels-last.
            own = torch.empty(
                images.shape, dtype=images.dtype, device=device, memory_format=memory_format
            )
            answers.append(module(own.copy_(images)))
    return answers


def _fastest_equal(
    plain: nn.Module, spec: APISpec, device: torch.device
) -> tuple[nn.Module, torch.memory_format, int]:
    """The fastest form of `plain` with its scores, the memory format, and the largest activation
    in bytes per image.
    """
    with seeded(0, "black_box", "local", "trial"):
        images = spec.from_unit(torch.rand(2, *spec.image_shape)).to(device)

    def scores_of(module: nn.Module, memory_format: torch.memory_format) -> Tensor:
        with seeded(
            0, "black_box", "local", "forward"
        ):  # the same draws for every form of a module that draws
            return _forward(module, [images], device, memory_format)[0]

    largest = _LargestOutput()
    try:
        with largest:
            wanted = scores_of(copy.deepcopy(plain), torch.contiguous_format)
    except Exception as error:
        raise InputError(
            f"{spec.name}: module failed on images {list(images.shape)}: {error}"
        ) from error
    if (
        not isinstance(wanted, Tensor)
        or tuple(wanted.shape) != (2, spec.n_classes)
        or not wanted.is_floating_point()
    ):
        came = (
            f"{wanted.dtype} {list(wanted.shape)}"
            if isinstance(wanted, Tensor)
            else type(wanted).__name__
        )
        raise InputError(
            f"{spec.name}: module must map images {list(images.shape)} to floating scores [2, {spec.n_classes}]; "
            f"it returned {came}"
        )
    image_bytes = max(images[0].numel() * images.element_size(), largest.bytes // 2)

    equal: list[tuple[float, nn.Module, torch.memory_format]] = []
    forms = (
        [(True, True), (True, False), (False, False)]
        if device.type == "cuda"
        else [(True, False), (False, False)]
    )
    for (fold, fuse), memory_format in itertools.product(
        forms, (torch.channels_last, torch.contiguous_format)
    ):
        try:
            candidate = copy.deepcopy(plain)
            if fold:
                fold_batch_norms(candidate)
            candidate.to(memory_format=memory_format)  # type: ignore[call-overload]
            if device.type == "cpu" and memory_format == torch.channels_last:
                replace_max_pools(candidate)
            if fuse:
                fuse_relus(candidate)
            deviation = (scores_of(candidate, memory_format) - wanted).abs().max()
        except (
            Exception
        ):  # for instance `view` on channels-last: the next form is tried, at last `plain`
            continue
        if deviation > _SAME_SCORES * wanted.abs().max():
            continue
        if device.type != "cuda":  # the order above is the order of speed
            return candidate, memory_format, image_bytes
        trial = images[:1].expand(_cache_sized(image_bytes, device), *spec.image_shape)
        seconds = _seconds(partial(_forward, candidate, [trial], device, memory_format), device)
        equal.append((seconds, candidate, memory_format))
        if len(equal) == 2:  # both formats of the same form
            break
    if not equal:
        return plain, torch.contiguous_format, image_bytes
    _, served, memory_format = min(equal, key=lambda one: one[0])
    return served, memory_format, image_bytes


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one run on a CUDA device: in float32 no rule tells which memory format is the faster
    one.
    """
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
    """Inside the block, notes the bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.bytes = max(self.bytes, output.numel() * output.element_size())
        return output
