"""Draw procedural pictures, to ask APIs about where no real picture is at hand."""

from bidfmkd_fast.priors.library import KINDS, draw_pictures, procedural_images

__all__ = ["KINDS", "draw_pictures", "procedural_images"]
