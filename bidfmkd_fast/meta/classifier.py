"""Define the classifier of one task: a meta-model that has adapted to a few labelled pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.tensors import read_tensors, write_tensors
from bidfmkd_fast.meta.checks import failures_explained
from bidfmkd_fast.meta.deployed import DeployedClassifier, check_steady
from bidfmkd_fast.meta.export import export_onnx, export_torch
from bidfmkd_fast.meta.fixed_statistics import keep_statistics
from bidfmkd_fast.meta.labels import Classes, label_values
from bidfmkd_fast.meta.model_images import Shape, images_of
from bidfmkd_fast.models import build_model, model_arguments, model_summary

FORMAT = 2  # of the files that `Classifier.save` writes; format 1 lacks the key "invert"
_METADATA_KEY = "bidfmkd_classifier"
META_MODEL_KEY = "bidfmkd_meta_model"  # of the files that `MetaModel.save` writes
_BATCH = 256  # images that a classifier with fixed statistics runs at once


class Classifier:
    """A meta-model adapted to one task, with its own copy of the module.

    `MetaModel.adapt` makes it, and `Classifier.load` reads one from a file. Images are given in any
    of the forms that `MetaModel.adapt` takes, and are brought to the model's size and channels in
    the same way.

    Args:
        module: the adapted module.
        classes: the classes of the support set, the only ones that `predict` returns.
        image_shape: (C, H, W) of the images that the module takes.
        transductive: whether batch norm uses the statistics of the images that are classified
            together, so that the answer for one image depends on the others.
        invert: whether images are inverted before the module sees them, as its training images
            were.

    Attributes:
        classes_: the labels of the support set, sorted and unique: a NumPy array of int64 or text,
            `[n_classes]`.
    """

    def __init__(
        self,
        module: nn.Module,
        classes: Classes,
        image_shape: Shape,
        *,
        transductive: bool = False,
        invert: bool = False,
    ) -> None:
        self.module = module
        self.classes_ = classes.names
        self.image_shape = image_shape
        self.transductive = transductive
        self.invert = invert
        self._classes = classes

    @torch.no_grad()
    def scores(self, images: object) -> Tensor:
        """Compute the logits `[N, n_outputs]` of `images`, such as `[N, C, H, W]` in unit range.

        The logits of all outputs of the module are returned, also of those that no label of the
        support set uses. Values a little outside of the range are accepted, since augmented images
        have them.

        Raises:
            InputError: images of another form, or values below -0.5 or above 1.5.
        """
        batch = images_of("scores", images, self.module, self.image_shape, invert=self.invert)
        with failures_explained("scores", batch):
            if self.transductive:
                return self.module(batch)
            return torch.cat([self.module(part) for part in batch.split(_BATCH)])

    def predict(self, images: object) -> Tensor | np.ndarray:
        """Return the label with the highest score for each image, `[N]`.

        The labels are those of the user: an int64 tensor if the support labels were a tensor, else
        a NumPy array of int64 or text. Only labels of the support set are returned: an output of
        the module beyond them belongs to no class of the task.

        Raises:
            InputError: as for `scores`.
        """
        return self._classes.labels_of(self._class_scores(images).argmax(dim=1))

    def predict_proba(self, images: object) -> Tensor:
        """Return the probability of each class, `[N, n_classes]` in the order of `classes_`.

        It is the softmax over the scores of the classes; each row sums to 1.

        Raises:
            InputError: as for `scores`.
        """
        return self._class_scores(images).softmax(dim=1)

    def score(self, images: object, labels: object = None) -> float:
        """Return the accuracy in [0, 1] on labelled images.

        A label that is no class of the support set counts as wrong. With `labels` None, `images` is
        a folder with a folder per class, or a CSV, as for `MetaModel.adapt`.

        Raises:
            InputError: as for `scores`, or labels of another number than images; `InputTypeError`
                for text where the classes are integers, or the other way round.
        """
        images, labels = with_labels("score", images, labels)
        wanted = label_values("score", labels)
        if wanted.dtype.kind != self.classes_.dtype.kind:
            kinds = {"U": "strings", "i": "integers"}
            raise InputTypeError(
                f"score: labels must be {kinds[self.classes_.dtype.kind]}, as the classes are; got "
                f"{kinds[wanted.dtype.kind]}"
            )
        predicted = self.classes_[self._class_scores(images).argmax(dim=1).cpu().numpy()]
        if len(predicted) != len(wanted):
            raise InputError(
                f"score: labels must be [N] with N = {len(predicted)}, one per image; got "
                f"[{len(wanted)}]"
            )
        return float((predicted == wanted).mean())

    def _class_scores(self, images: object) -> Tensor:
        """Return the logits of the classes, `[N, n_classes]`."""
        scores = self.scores(images)
        if scores.shape[1] == len(self.classes_):
            return scores
        return scores[:, self._classes.outputs.to(scores.device)]

    def as_module(self) -> nn.Module:
        """Return a module from images `[N, C, H, W]` of `image_shape`, float in unit range, to the
        probabilities `[N, n_classes]` of `predict_proba`.

        The module shares its weights with the classifier.

        Raises:
            InputError: the classifier is transductive.
        """
        check_steady("Classifier.as_module", self)
        outputs = self._classes.outputs.to(next(self.module.parameters()).device)
        return DeployedClassifier(self.module, outputs, self.invert).eval()

    def export_onnx(self, path: str | Path, *, seed: int = 0) -> None:
        """Write the new ONNX file `path`, and its folder if there is none; extra `export`.

        Its input `images` is float32 `[N, C, H, W]` of `image_shape`, values 0 to 1, for any N, and
        its output `probabilities` is float32 `[N, n_classes]` in the order of `classes_`. The
        metadata `bidfmkd_classifier.json` holds class names and image form, `description.txt` the
        same in words. The file is compared with the classifier before it gets its name: on random
        images (`seed`), in batches of 1 and 7, probabilities must agree within 1e-4.

        Raises:
            InputError: the classifier is transductive, a package is missing, `path` exists or
                cannot be written, the module cannot be exported, or the file answers otherwise.
        """
        export_onnx(self, Path(path), seed)

    def export_torch(self, path: str | Path, *, seed: int = 0) -> None:
        """Write the new file `path` for `torch.export.load`, otherwise as `export_onnx` does.

        `bidfmkd_classifier.json` and `description.txt` are among its extra files.

        Raises:
            InputError: as for `export_onnx`, but no package beside torch is needed.
        """
        export_torch(self, Path(path), seed)

    def save(self, path: str | Path) -> None:
        """Write the safetensors file `path`, and its folder if there is none.

        The file holds weights, statistics, class names, image shape and architecture as tensors and
        JSON. `Classifier.load` needs nothing else, neither the run nor its pool.

        Raises:
            InputError: the file cannot be written, or the package cannot rebuild the module.
        """
        architecture = model_arguments(self.module)
        if architecture is None:
            raise InputError(
                f"Classifier.save: the package cannot rebuild a module of class "
                f"{type(self.module).__name__}, so a file would not load; keep the weights of your "
                "own module with torch.save(classifier.module.state_dict(), path), or use a "
                "meta-model of this package"
            )
        about = {
            "format": FORMAT,
            "classes": self.classes_.tolist(),
            "outputs": self._classes.outputs.tolist(),
            "labels_as_tensor": self._classes.as_tensor,
            "image_shape": list(self.image_shape),
            "transductive": self.transductive,
            "invert": self.invert,
            "architecture": architecture,
        }
        write_tensors(Path(path), self.module.state_dict(), {_METADATA_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        """Load the classifier that `save` wrote to `path`, on the CPU.

        Raises:
            InputError: the file is missing, damaged, no classifier, or of another version.
        """
        operation = "Classifier.load"
        try:
            state, metadata = read_tensors(Path(path))
        except InputError as error:
            raise InputError(f"{operation}: {path} is no saved classifier: {error}") from None
        if _METADATA_KEY not in metadata:
            kind = (
                "it is a meta-model: load it with MetaModel.load, adapt it, and save the result"
                if META_MODEL_KEY in metadata
                else "wanted a file that `bidfmkd adapt` or Classifier.save wrote"
            )
            raise InputError(f"{operation}: {path} is no saved classifier; {kind}")
        try:
            about = json.loads(metadata[_METADATA_KEY])
            version = about["format"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{operation}: {path} is damaged: {error!r}") from None
        if version not in range(1, FORMAT + 1):
            raise InputError(
                f"{operation}: {path} has format {version!r}, and this version of bidfmkd_fast "
                f"reads formats 1 to {FORMAT}; install the version that wrote it, or adapt again"
            )
        if spoilt := [name for name, value in state.items() if value.isnan().any()]:
            raise InputError(f"{operation}: {path} holds NaN in {', '.join(spoilt)}")
        try:
            return cls._of_file(about, state)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{operation}: {path} is damaged: {reason}") from None

    @classmethod
    def _of_file(cls, about: dict[str, Any], state: dict[str, Tensor]) -> Classifier:
        """Build the classifier from a file's metadata and tensors; any error means damage."""
        architecture = about["architecture"]
        module = build_model(**architecture | {"image_size": tuple(architecture["image_size"])})
        if not about["transductive"]:
            keep_statistics(module)
            module.eval()
        module.load_state_dict(state)
        names = label_values("Classifier.load", about["classes"])
        outputs = torch.tensor(about["outputs"], dtype=torch.int64)
        shape = tuple(map(int, about["image_shape"]))
        n_outputs = int(architecture["n_classes"])
        if outputs.shape != names.shape or not 0 <= int(outputs.min()) <= outputs.max() < n_outputs:
            raise ValueError("classes and outputs do not fit together")
        if len(shape) != 3 or np.any(np.unique(names) != names):
            raise ValueError("image_shape must have three numbers, and classes must be sorted")
        classes = Classes(names, outputs, bool(about["labels_as_tensor"]))
        transductive, invert = bool(about["transductive"]), bool(about.get("invert", False))
        return cls(module, classes, shape, transductive=transductive, invert=invert)

    def __repr__(self) -> str:
        return f"Classifier({model_summary(self.module)})"


def with_labels(operation: str, images: object, labels: object) -> tuple[object, object]:
    """Return images and labels; where labels are None, those of a class folder or a CSV.

    Raises:
        InputError: labels are missing, or the folder or CSV is not usable (`labelled_files`).
    """
    if labels is not None:
        return images, labels
    from bidfmkd_fast.data.picture_files import labelled_files  # it imports Pillow

    if not isinstance(images, (str, Path)):
        raise InputError(
            f"{operation}: labels are missing; give a label per image, or as images a folder with "
            "a folder of pictures per class"
        )
    return labelled_files(operation, Path(images).expanduser())
