"""Gradients from queries alone: the ask-and-tell estimator and a module that hides it behind autograd."""

from bidfmkd_fast.zeroth_order.estimator import ZerothOrder
from bidfmkd_fast.zeroth_order.module import as_differentiable

__all__ = ["ZerothOrder", "as_differentiable"]
