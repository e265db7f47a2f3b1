"""Estimate gradients from queries alone: by ask and tell, or by a module that autograd can use."""

from bidfmkd_fast.zeroth_order.estimator import ZerothOrder
from bidfmkd_fast.zeroth_order.module import as_differentiable

__all__ = ["ZerothOrder", "as_differentiable"]
