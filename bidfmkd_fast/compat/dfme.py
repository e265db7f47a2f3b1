"""Estimate the generator's gradient as DFME does (Truong et al., CVPR 2021, arXiv 2011.14779)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bidfmkd_fast.compat import shared
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops.scores import log_probabilities_of
from bidfmkd_fast.zeroth_order.queries import check_model

_OP = "estimate_gradient_objective"
_LOSSES = ("l1", "kl")


def estimate_gradient_objective(
    args: Any,
    victim_model: Callable[[Tensor], Tensor],
    clone_model: Callable[[Tensor], Tensor],
    x: Tensor,
    epsilon: float = 1e-3,
    m: int = 5,
    verb: bool = False,
    num_classes: int = 10,
    device: object = "cpu",
    pre_x: bool = False,
    *,
    parity: bool = False,
    directions: str | None = None,
    max_images: int | None = None,
    seed: int | None = None,
    antithetic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the estimated gradient of the generator's loss in x, and the loss.

    The loss of an image is minus the distance between victim and clone: with `args.loss` "l1" the
    mean over the classes of `|clone - victim|`, with "kl" KL(victim || clone). The caller sends the
    gradient on: `fake.backward(gradient)`.

    By default the gradient is that of the returned loss, the mean over the images. Both models are
    asked in eval mode, and each of their parts is put back into the mode that it was in.

    With `parity=True` scale and modes are the authors':

    - with "l1" the gradient is divided by `num_classes * N`, although the loss is a mean over the
      classes already, so that it is too small by a factor of `num_classes`;
    - with "kl" it is divided by nothing, so that it is too large by a factor of N;
    - without `args.forward_differences` it lacks the factor d, the number of elements of an image;
    - afterwards the victim is in eval mode and the clone in training mode, whatever they were in.

    Args:
        args: a namespace or mapping with `loss`; with "l1" also `no_logits` (take the victim's
            log-probabilities instead of its scores) and, if that is true, `logit_correction`
            ("min" or "mean": subtract an image's lowest or mean log-probability; anything else:
            subtract nothing); with `pre_x` also `G_activation`; with `parity` also
            `forward_differences`. Without parity the factor d is always there, whatever
            `forward_differences` says.
        victim_model: images `[N, *S]` to scores `[N, n_classes]`: any callable. The scores are
            logits, unless the model has a `spec` whose `returned_kind` says otherwise. With "l1"
            and without `no_logits` they are compared with the clone's logits as they are.
        clone_model: images to logits `[N, n_classes]`.
        x: the generator's images `[N, *S]`, of any size.
        epsilon: the step length along a unit direction. The authors' function has a default of
            1e-7, which float32 cannot resolve, and their scripts pass 1e-3.
        m: points per image besides the image itself.
        verb, device: taken for the sake of old calls and ignored; everything runs on x's device.
        num_classes: used with `parity` only, as a divisor.
        pre_x: x is the input of the generator's last non-linearity, and the models are asked at
            `args.G_activation(x + epsilon u)`.
        parity: reproduce the authors' scale and modes.
        directions: `rademacher`, `sphere` or `gaussian`; None for `sphere` with parity, as the
            authors draw them, and otherwise for `rademacher`, which is cheaper and has the same
            variance.
        max_images: most images per call of a model; None for 200 on a
            CPU, and 600 on a GPU or for a service.
        seed: seed of the directions; None to draw it from torch's generator in each call.
        antithetic: make the m points pairs `x + epsilon u`, `x - epsilon u`; not with parity.

    Returns:
        The gradient `[N, *S]` in the dtype of x, without a graph, and the loss, a scalar in
        float32 (float64 if x is).

    Raises:
        InputError: args lacks a field, a value is out of range, the victim gives labels only, or a
            model returned anything but scores.
    """
    x = shared.check_images(_OP, "x", x).detach()
    for name, model in (("victim_model", victim_model), ("clone_model", clone_model)):
        check_model(_OP, name, model)
    losses_of = _losses_of(args, victim_model, clone_model, pre_x)
    scale = 1 / len(x)
    if parity:
        scale = _scale_of_authors(args, x, num_classes)
    zo = shared.new_estimator(
        _OP,
        m,
        epsilon,
        names=("m", "epsilon"),
        parity=parity,
        directions=directions,
        seed=seed,
        antithetic=antithetic,
    )
    with shared.in_eval_mode(victim_model, clone_model):
        at_once = shared.images_at_once(max_images, x, victim_model, clone_model)
        zo.estimate(losses_of, x, at_once)
    if parity:
        _leave_as_authors_do(victim_model, clone_model)
    gradient, losses = zo.gradient, zo.last_loss
    assert gradient is not None and losses is not None
    return (gradient * scale).to(x.dtype), losses.mean().to(shared.full_dtype(x))


def _scale_of_authors(args: Any, x: Tensor, num_classes: int) -> float:
    """Return the factor from the true gradient per image to what the authors' code returns."""
    scale = 1.0 if shared.read(_OP, args, "loss") == "kl" else 1 / (num_classes * len(x))
    return scale if shared.read(_OP, args, "forward_differences") else scale / x[0].numel()


def _leave_as_authors_do(victim_model: object, clone_model: object) -> None:
    """Leave the victim in eval mode and the clone in training mode."""
    for model, mode in ((victim_model, False), (clone_model, True)):
        train = getattr(model, "train", None)  # any callable may be a model
        if train is not None:
            train(mode)


def _losses_of(
    args: Any,
    victim_model: Callable[[Tensor], Tensor],
    clone_model: Callable[[Tensor], Tensor],
    pre_x: bool,
) -> Callable[[Tensor], Tensor]:
    """Return the function from points `[N, *S]` to losses `[N]` in float64."""
    loss = shared.read(_OP, args, "loss")
    if loss not in _LOSSES:
        raise InputError(f"{_OP}: args.loss must be one of {', '.join(_LOSSES)}; got {loss!r}")
    no_logits = loss == "l1" and bool(shared.read(_OP, args, "no_logits"))
    correction = shared.read(_OP, args, "logit_correction") if no_logits else None
    activation = shared.read(_OP, args, "G_activation") if pre_x else None
    if pre_x and not callable(activation):
        raise InputError(
            f"{_OP}: with pre_x args.G_activation must be the generator's last non-linearity, "
            f"such as torch.tanh; got {activation!r}"
        )
    kind = shared.scores_kind_of(victim_model)

    def losses_of(points: Tensor) -> Tensor:
        images = points if activation is None else activation(points)
        victim = shared.ask(_OP, "victim_model", victim_model, images)
        clone = shared.ask(_OP, "clone_model", clone_model, images)
        shared.check_same_classes(_OP, ("victim_model", "clone_model"), victim, clone)
        if loss == "kl":
            return -shared.kl(victim, kind, clone)
        if no_logits:
            victim = log_probabilities_of(victim, kind)
            if correction == "min":
                victim = victim - victim.amin(-1, keepdim=True)
            elif correction == "mean":
                victim = victim - victim.mean(-1, keepdim=True)
        return -(clone - victim).abs().mean(-1)

    return losses_of
