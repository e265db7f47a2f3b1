"""Run the kernels as torch ops. This room knows tensors only, neither APIs nor models."""

from bidfmkd_fast.ops.backend import use_backend
from bidfmkd_fast.ops.functions import estimate_gradient, kd_loss, perturb, zo_kd_gradient

__all__ = ["estimate_gradient", "kd_loss", "perturb", "use_backend", "zo_kd_gradient"]
