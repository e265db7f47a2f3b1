"""Describe and build the form in which a classifier is deployed: one module, images in, out.

The module takes pictures that have been brought to the classifier's size; all else that
`Classifier.predict_proba` does is inside it. What must be done before is described in words and as
JSON, which every exported file carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.model_images import inverted

if TYPE_CHECKING:
    from bidfmkd_fast.meta.classifier import Classifier

INPUT, OUTPUT = "images", "probabilities"
FORMAT = 1  # of the JSON that `about` returns
_CHANNELS = {1: ["grey"], 3: ["red", "green", "blue"]}


class DeployedClassifier(nn.Module):
    """Map images `[N, C, H, W]` in unit range to probabilities `[N, n_classes]`.

    Args:
        module: images to logits `[N, n_outputs]`.
        outputs: the output of `module` for each class, int64 `[n_classes]`.
        invert: whether black and white are exchanged first.
    """

    outputs: Tensor

    def __init__(self, module: nn.Module, outputs: Tensor, invert: bool) -> None:
        super().__init__()
        self.module = module
        self.invert = invert
        self.register_buffer("outputs", outputs)

    def forward(self, images: Tensor) -> Tensor:
        scores = self.module(inverted(images) if self.invert else images)
        return scores.index_select(1, self.outputs).softmax(1)


def check_steady(operation: str, classifier: Classifier) -> None:
    """Raise an InputError if the answer for one image depends on the others of its batch."""
    if classifier.transductive:
        raise InputError(
            f"{operation}: the classifier is transductive, so its answer for one picture depends "
            "on the others of the batch; adapt again without transductive=True"
        )


def about(classifier: Classifier) -> dict[str, Any]:
    """Return what a program must know to use the exported file: plain values for JSON."""
    from bidfmkd_fast import __version__

    n_channels = classifier.image_shape[0]
    return {
        "format": FORMAT,
        "written_by": f"bidfmkd_fast {__version__}",
        "input": INPUT,
        "output": OUTPUT,
        "dtype": "float32",
        "layout": "NCHW",
        "image_shape": list(classifier.image_shape),
        "channels": _CHANNELS.get(n_channels, [f"channel {n}" for n in range(n_channels)]),
        "range": [0.0, 1.0],
        "resize": "bilinear",
        "inverted_inside": classifier.invert,
        "classes": classifier.classes_.tolist(),
    }


def description(classifier: Classifier) -> str:
    """Return the same in words, for the person who deploys the file."""
    channels, height, width = classifier.image_shape
    modes = {1: "make it grey (0.299 R + 0.587 G + 0.114 B)", 3: "make it RGB"}
    mode = modes.get(channels, f"bring it to {channels} channels")
    inside = (
        "Black and white are exchanged inside the file, so give pictures as they are. "
        if classifier.invert
        else ""
    )
    n_classes = len(classifier.classes_)
    return (
        f"Image classifier of {n_classes} classes. Input `{INPUT}`: float32 "
        f"[N, {channels}, {height}, {width}], any N, values 0 to 1. To prepare a picture, turn it "
        f"upright as its camera says (EXIF), {mode}, resize it to height {height} and width "
        f"{width} without cropping and regardless of its proportions (Image.resize of Pillow with "
        "BILINEAR, which smooths where it shrinks), and divide its bytes by 255; no other "
        f"normalisation. {inside}Output `{OUTPUT}`: float32 [N, {n_classes}], one per class in the "
        "order of `classes` in the JSON beside this text; each row sums to 1, and the answer for a "
        "picture does not depend on the others."
    )
