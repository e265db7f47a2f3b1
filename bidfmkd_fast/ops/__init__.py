"""The kernels as torch ops. Knows tensors only."""

from bidfmkd_fast.ops.native import use_backend
from bidfmkd_fast.ops.registration import estimate_gradient, kd_loss, perturb, zo_kd_gradient

__all__ = ["estimate_gradient", "kd_loss", "perturb", "use_backend", "zo_kd_gradient"]
