"""Black boxes in this process: a torch module served fast and closed (`TorchBlackBox`), or any function."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bidfmkd_fast.black_box.base import BlackBox
from bidfmkd_fast.black_box.ledger import Budget
from bidfmkd_fast.black_box.spec import APISpec
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError
from bidfmkd_fast.seeds import seeded

# A micro-batch's largest activation: small enough for the last-level cache, large enough to keep the convolutions busy.
_CPU_ACTIVATION_BYTES = 8 << 20
_GPU_ACTIVATION_BYTES = 1 << 30
# Folding and memory format change scores by rounding (1e-6 of the largest, deep nets 1e-5); a wrong fold by far more.
_SAME_SCORES = 1e-4


class FunctionBlackBox(BlackBox):
    """An API behind any function. Each call costs one request.

    Args:
        function: images `[N, C, H, W]` float32 in `spec.input_range` -> scores `[N, n_classes]`, a floating tensor. It
            runs without autograd and gets a copy of the images, so it may work in place.
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap.

    Raises:
        InputTypeError: `function` cannot be called.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], spec: APISpec, *, budget: Budget | None = None) -> None:
        super().__init__(spec, budget=budget)
        if not callable(function):
            raise InputTypeError(f"{self.name}: function must be callable; got {type(function).__name__}")
        self._answer = lambda images: function(images.clone())

    def _score(self, images: Tensor) -> Tensor:
        return self._answer(images)


class TorchBlackBox(BlackBox):
    """A torch module served as an API: only its scores come out. Each call costs one request.

    The module is copied and put in evaluation mode; batch norms are folded into the convolutions before them, the
    memory format is channels-last and large calls run in cache-sized micro-batches, each as far as it leaves the scores
    equal up to rounding (measured once, here). It runs in full float32, without autocast and without TF32.

    Args:
        module: images `[N, C, H, W]` float32 in `spec.input_range` -> scores `[N, n_classes]` of `spec.scores_kind`.
        spec: what is known of the API.
        budget: cap on what it may cost; None for no cap.
        device: where the module runs; where its parameters are unless told. Images and scores are moved.
        micro_batch: most images run at once; None to choose by the size of the module's activations. A module whose
            batch norms use batch statistics is never split, since that would change its scores.

    Raises:
        InputError: the module does not map `[N, *image_shape]` to `[N, n_classes]`, cannot be copied, or
            `micro_batch` does not suit it (InputTypeError: a wrong type).
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
            raise InputTypeError(f"{self.name}: module must be a torch.nn.Module; got {type(module).__name__}")
        if micro_batch is not None and (not isinstance(micro_batch, int) or isinstance(micro_batch, bool)):
            raise InputTypeError(f"{self.name}: micro_batch must be an int or None; got {micro_batch!r}")
        if micro_batch is not None and micro_batch < 1:
            raise InputError(f"{self.name}: micro_batch must be at least 1; got {micro_batch}")
        # The closure is the only way to the module: no attribute holds it.
        self._answer = _serve(module, spec, device, micro_batch)

    def _score(self, images: Tensor) -> Tensor:
        return self._answer(images)


def _serve(
    module: nn.Module, spec: APISpec, device: torch.device | str | None, micro_batch: int | None
) -> Callable[[Tensor], Tensor]:
    if device is None:
        device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    device = torch.device(device)
    try:
        plain = copy.deepcopy(module).to(device).eval().requires_grad_(False)
    except Exception as error:
        raise InputError(f"{spec.name}: module cannot be copied to {device}: {error}") from error

    served, memory_format, image_bytes = _fastest_equal(plain, spec, device)
    if any(isinstance(layer, _BatchNorm) and layer.running_mean is None for layer in plain.modules()):
        if micro_batch is not None:
            raise InputError(
                f"{spec.name}: micro_batch={micro_batch} would change the scores, since the module's batch norm uses "
                "batch statistics; leave it None"
            )
    elif micro_batch is None:
        target = _GPU_ACTIVATION_BYTES if device.type == "cuda" else _CPU_ACTIVATION_BYTES
        micro_batch = max(16, min(4096, target // image_bytes))

    def answer(images: Tensor) -> Tensor:
        parts = [_forward(served, part, device, memory_format) for part in images.split(micro_batch or len(images))]
        if not all(isinstance(part, Tensor) for part in parts):
            raise BadAnswer(f"{spec.name}: the module must return a tensor; it returned {type(parts[0]).__name__}")
        return torch.cat(parts)

    return answer


def _forward(module: nn.Module, images: Tensor, device: torch.device, memory_format: torch.memory_format) -> Tensor:
    with torch.inference_mode(), torch.autocast(device.type, enabled=False), _full_float32(device):
        # Always a copy: the module may work in place, and only an explicit layout makes one-channel images channels-last.
        own = torch.empty(images.shape, dtype=images.dtype, device=device, memory_format=memory_format).copy_(images)
        return module(own)


def _fastest_equal(plain: nn.Module, spec: APISpec, device: torch.device) -> tuple[nn.Module, torch.memory_format, int]:
    """The fastest form of `plain` with its scores, its memory format, and the bytes of its largest activation per image."""
    with seeded(0, "black_box", "local", "trial"):
        images = spec.from_unit(torch.rand(2, *spec.image_shape)).to(device)
    largest = _LargestOutput(plain)
    try:
        with largest, seeded(0, "black_box", "local", "forward"):
            wanted = _forward(plain, images, device, torch.contiguous_format)
    except Exception as error:
        raise InputError(f"{spec.name}: module failed on images {list(images.shape)}: {error}") from error
    if not isinstance(wanted, Tensor) or tuple(wanted.shape) != (2, spec.n_classes):
        came = list(wanted.shape) if isinstance(wanted, Tensor) else type(wanted).__name__
        raise InputError(f"{spec.name}: module must map [2, *image_shape] to scores [2, {spec.n_classes}]; got {came}")
    image_bytes = max(images[0].numel() * images.element_size(), largest.bytes // 2)

    for fold in (True, False):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            try:
                candidate = copy.deepcopy(plain)
                if fold:
                    _fold_batch_norms(candidate, candidate)
                candidate = candidate.to(memory_format=memory_format)
                with seeded(0, "black_box", "local", "forward"):
                    scores = _forward(candidate, images, device, memory_format)
            except Exception:  # for instance `view` on channels-last: the next form is tried, at last `plain`
                continue
            if scores.shape == wanted.shape and (scores - wanted).abs().max() <= _SAME_SCORES * wanted.abs().max():
                return candidate, memory_format, image_bytes
    return plain, torch.contiguous_format, image_bytes


def _fold_batch_norms(root: nn.Module, part: nn.Module) -> None:
    """Fold, inside `root` and in place, each 2-d batch norm of `part` into the convolution that alone feeds it.

    The trace only tells which feeds which: the module's own `forward` keeps running, with an identity for the batch
    norm. Where `part` cannot be traced its children are tried one by one.
    """
    try:
        graph = torch.fx.symbolic_trace(part).graph
    except Exception:
        for child in part.children():
            _fold_batch_norms(root, child)
        return
    occurrences = Counter(id(layer) for _, layer in root.named_modules(remove_duplicate=False))
    calls = Counter(id(part.get_submodule(str(node.target))) for node in graph.nodes if node.op == "call_module")
    bare = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    layers = dict(part.named_modules())
    for node in graph.nodes:
        source = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(source, torch.fx.Node) or source.op != "call_module":
            continue
        names = (str(source.target), str(node.target))
        convolution, batch_norm = layers[names[0]], layers[names[1]]
        if type(convolution) is not nn.Conv2d or type(batch_norm) is not nn.BatchNorm2d or len(source.users) != 1:
            continue
        if batch_norm.training or batch_norm.running_mean is None:
            continue
        if any(
            occurrences[id(layer)] != 1 or calls[id(layer)] != 1 or _has_hooks(layer)
            for layer in (convolution, batch_norm)
        ):
            continue
        if bare.intersection(names):
            continue
        folded = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), copy.deepcopy(batch_norm).double())
        _replace(part, names[0], folded.to(convolution.weight.dtype))
        _replace(part, names[1], nn.Identity())


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _replace(root: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(root.get_submodule(parent), attribute, layer)


class _LargestOutput:
    """Inside the block, notes the bytes of the largest tensor that any layer of the module returns."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self._module = module

    def __enter__(self) -> None:
        self._handles = [layer.register_forward_hook(self._note) for layer in self._module.modules()]

    def _note(self, layer: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            self.bytes = max(self.bytes, output.numel() * output.element_size())

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


_tf32_lock = Lock()
_tf32_users = 0
_tf32_before: list[str | bool] = []


def _tf32_switches() -> tuple[tuple[Any, ...], str, str | bool]:
    """Where torch keeps its TF32 settings, their attribute, and the value that means full float32."""
    cudnn, product = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(
        cudnn, "conv"
    ):  # the settings per operation, which newer versions of torch do not let one mix with the old
        return (cudnn.conv, cudnn.rnn, product), "fp32_precision", "ieee"
    return (cudnn, product), "allow_tf32", False


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Full float32 inside the block; the process-wide settings come back when the last thread leaves it."""
    global _tf32_users, _tf32_before
    holders, attribute, full = _tf32_switches()
    with _tf32_lock:
        if _tf32_users == 0:
            _tf32_before = [getattr(holder, attribute) for holder in holders]
            for holder in holders:
                setattr(holder, attribute, full)
        _tf32_users += 1
    try:
        yield
    finally:
        with _tf32_lock:
            _tf32_users -= 1
            if _tf32_users == 0:
                for holder, before in zip(holders, _tf32_before):
                    setattr(holder, attribute, before)


def _full_float32(device: torch.device) -> AbstractContextManager[None]:
    return _no_tf32() if device.type == "cuda" else nullcontext()
