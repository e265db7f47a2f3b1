"""Procedural pictures: what the APIs are asked about when nobody has a picture."""

from bidfmkd_fast.priors.library import KINDS, draw_pictures, procedural_images

__all__ = ["KINDS", "draw_pictures", "procedural_images"]
