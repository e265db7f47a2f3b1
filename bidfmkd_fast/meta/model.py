"""Define the meta-model: a module whose parameters adapt to a new task in a few gradient steps."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.files.tensors import read_tensors, write_tensors
from bidfmkd_fast.meta.checks import check_device, failures_explained
from bidfmkd_fast.meta.classifier import META_MODEL_KEY, Classifier, with_labels
from bidfmkd_fast.meta.fixed_statistics import fix_statistics
from bidfmkd_fast.meta.hub import find_weights, push, save_folder
from bidfmkd_fast.meta.inner_loop import InnerLoop, adapt_parameters, cross_entropy_with
from bidfmkd_fast.meta.labels import number_classes
from bidfmkd_fast.meta.model_images import images_of, module_shape
from bidfmkd_fast.models import build_model, model_arguments, model_summary
from bidfmkd_fast.models.head import with_classes

if TYPE_CHECKING:
    from bidfmkd_fast.meta.evaluate import Evaluation
    from bidfmkd_fast.training.run import Run


class MetaModel:
    """A module and the settings with which it adapts to a task.

    Args:
        module: any `nn.Module` from images `[N, C, H, W]` in unit range, [0, 1], to logits `[N,
            n_classes]`.
        adapt_steps: gradient steps that `adapt` takes by default.
        adapt_learning_rate: learning rate that `adapt` uses by default.

    Raises:
        InputError: a setting is out of range.
    """

    def __init__(
        self, module: nn.Module, *, adapt_steps: int = 10, adapt_learning_rate: float = 0.01
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InputTypeError(
                f"MetaModel: module must be a torch.nn.Module; got {type(module).__name__}"
            )
        if adapt_steps < 0:
            raise InputError(f"MetaModel: adapt_steps must be 0 or more; got {adapt_steps}")
        if not (math.isfinite(adapt_learning_rate) and adapt_learning_rate > 0):
            raise InputError(
                "MetaModel: adapt_learning_rate must be finite and above 0; got "
                f"{adapt_learning_rate}"
            )
        self.module = module
        self.adapt_steps = adapt_steps
        self.adapt_learning_rate = adapt_learning_rate
        self._factors: dict[str, float] = {}  # of the rates of a last layer that has grown

    def __repr__(self) -> str:
        settings = (
            f"adapt_steps={self.adapt_steps}, adapt_learning_rate={self.adapt_learning_rate:g}"
        )
        return f"MetaModel({model_summary(self.module)}; {settings})"

    def adapt(
        self,
        images: object,
        labels: object = None,
        steps: int | None = None,
        learning_rate: float | None = None,
        *,
        transductive: bool = False,
        invert: bool = False,
    ) -> Classifier:
        """Return a classifier for the task of the given support set.

        It takes `steps` steps of gradient descent on the cross entropy. The module itself does not
        change.

        Pictures are brought to the size and channels of the model by the rule of `bidfmkd convert`
        (`data.readers.images.to_pixels`): turned upright as their camera says (EXIF), made grey or
        RGB, and resized bilinearly without regard to their proportions. A module of the user's own
        takes pictures of one size as they are.

        Args:
            images: the support images: a tensor `[N, C, H, W]`, float in unit range or uint8; a
                NumPy array `[N, H, W, C]` or grey `[N, H, W]` of the same ranges; a list of Pillow
                images, of paths or of arrays `[H, W, C]`; or a folder with a folder of pictures per
                class, or a CSV with the columns `file,label`.
            labels: a string or an integer per image, `[N]`, of 2 to 1,000 classes; None for a
                folder or a CSV. Labels of an int64 tensor that are 0 or more and below 1,000 name
                the outputs of the module. A task may have more classes than the module has outputs:
                then the last layer grows (`models.head.with_classes`).
            steps: gradient steps; `adapt_steps` when None.
            learning_rate: `adapt_learning_rate` when None; times its growth for a grown last layer.
            transductive: False fixes the statistics of batch norm (variance unbiased) to those of
                the support set under the adapted parameters and puts the classifier into `eval()`,
                so that every image is classified by itself. True evaluates as the paper and MAML
                do, and as `evaluate` does by default: batch norm uses the statistics of the images
                that are classified together. The answer for one image then depends on the others
                of its batch, and is poor for a batch of one.
            invert: True exchanges black and white in these images and in all that the classifier
                is asked about. Use it where the module learned from inverted images
                (`load_dataset(..., invert=True)`) and the pictures are not inverted themselves.

        Raises:
            InputError: images or labels of the wrong rank, length, range or device, a file that is
                no picture, or another number of classes; `InputTypeError` if they are of the wrong
                type.
        """
        images, labels = with_labels("adapt", images, labels)
        if isinstance(labels, Tensor):
            check_device(labels, self.module)
        classes, targets = number_classes("adapt", labels)
        support = images_of("adapt", images, self.module, invert=invert)
        if len(targets) != len(support):
            raise InputError(
                f"adapt: labels must be [N] with N = {len(support)}, one per image; got "
                f"[{len(targets)}]"
            )
        targets = targets.to(support.device)
        with failures_explained("adapt", support):
            own = self.for_classes("adapt", classes.n_outputs, support[:2])
            adapted = adapt_parameters(
                own.module,
                dict(own.module.named_parameters()),
                cross_entropy_with(targets),
                support,
                own.inner_loop(steps, learning_rate),
                create_graph=False,
            )
            module = copy.deepcopy(own.module)
            module.load_state_dict(adapted, strict=False)
            if not transductive:
                fix_statistics(module, support)
        shape = module_shape(module) or (support.shape[1], support.shape[2], support.shape[3])
        return Classifier(module, classes, shape, transductive=transductive, invert=invert)

    def for_classes(self, operation: str, n_classes: int, images: Tensor) -> MetaModel:
        """Return the meta-model for tasks of `n_classes` classes; `images` are some that it takes.

        A last layer that grows learns at a rate that grows with it: the cross entropy is a mean
        over the images, so that with K times the classes a row gets K times less gradient.

        Raises:
            InputError: the module has fewer outputs, and its last layer cannot grow.
        """
        known = model_arguments(self.module) is not None  # its last layer was registered last
        module = with_classes(operation, self.module, n_classes, None if known else images)
        if module is self.module:
            return self
        grown = MetaModel(
            module,
            adapt_steps=self.adapt_steps,
            adapt_learning_rate=self.adapt_learning_rate,
        )
        before = dict(self.module.named_parameters())
        grown._factors = {
            name: len(parameter) / len(before[name])
            for name, parameter in module.named_parameters()
            if parameter.shape != before[name].shape
        }
        return grown

    def inner_loop(self, steps: int | None = None, learning_rate: float | None = None) -> InnerLoop:
        """Return the settings of `adapt`, with those of the meta-model in place of None."""
        return InnerLoop(
            self.adapt_steps if steps is None else steps,
            self.adapt_learning_rate if learning_rate is None else learning_rate,
            factors=self._factors,
        )

    def save(self, path: str | Path) -> None:
        """Write the safetensors file `path`, and its folder if there is none.

        The file holds parameters, buffers, adaptation settings and, for a module that
        `models.build_model` makes, its architecture.

        Raises:
            InputError: the file cannot be written.
        """
        about = {
            "adapt_steps": self.adapt_steps,
            "adapt_learning_rate": self.adapt_learning_rate,
            "architecture": model_arguments(self.module),
        }
        write_tensors(Path(path), self.module.state_dict(), {META_MODEL_KEY: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, module: nn.Module | None = None) -> MetaModel:
        """Load the meta-model that `save` wrote to `path`, on the CPU.

        The weights go into `module` if it is given. It is needed for a file whose architecture
        `models.build_model` does not know.

        Raises:
            InputError: the file is missing, damaged, no meta-model, or of another architecture.
        """
        try:
            state, metadata = read_tensors(Path(path))
            about = json.loads(metadata[META_MODEL_KEY])
            steps, learning_rate = about["adapt_steps"], about["adapt_learning_rate"]
            architecture = about["architecture"]
        except InputError as error:
            raise InputError(f"MetaModel.load: {path} is not a saved meta-model: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"MetaModel.load: {path} is not a saved meta-model: {error!r}"
            ) from error
        if spoilt := [name for name, value in state.items() if value.isnan().any()]:
            raise InputError(f"MetaModel.load: {path} holds NaN in {', '.join(spoilt)}")
        if module is None:
            if architecture is None:
                raise InputError(
                    f"MetaModel.load: {path} holds no architecture to build; pass the module as "
                    "module="
                )
            module = build_model(**architecture | {"image_size": tuple(architecture["image_size"])})
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"MetaModel.load: {path} does not fit the module: {reason}") from error
        return cls(module, adapt_steps=steps, adapt_learning_rate=learning_rate)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        run: Run | str | Path | None = None,
        evaluation: Evaluation | Sequence[Evaluation] | None = None,
        license: str | None = None,
    ) -> None:
        """Write a folder with the weights, `config.json` and a model card, `README.md`.

        Args:
            folder: the folder; made if it is missing. Nothing in it is written over.
            run: the run that made this model, or its folder; the card then says what was asked.
            evaluation: what `evaluate` has returned, once or several times, for the card.
            license: of the weights, such as "apache-2.0", for the card.

        Raises:
            InputError: a file is there or cannot be written, or the run does not fit.
        """
        place, name = Path(folder).expanduser(), Path(folder).expanduser().resolve().name
        save_folder("MetaModel.save_pretrained", self, place, run, evaluation, license, name)

    def push_to_hub(
        self,
        repo: str,
        *,
        run: Run | str | Path | None = None,
        evaluation: Evaluation | Sequence[Evaluation] | None = None,
        license: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a meta-model of bidfmkd_fast",
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; return the commit's URL.

        Args:
            repo: the repository, user/name; made if it is missing, else it gets a new commit.
            run, evaluation, license: as for `save_pretrained`.
            private: of a new repository; None for the account's default.
            token: a token of the hub; None for the one of `hf auth login`.
            message: of the commit.

        Raises:
            InputError: huggingface_hub is missing, the hub fails, or as for `save_pretrained`.
        """
        about = {"run": run, "evaluation": evaluation, "licence": license}
        return push("MetaModel.push_to_hub", self, repo, private, token, message, **about)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_folder: str | Path,
        *,
        module: nn.Module | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> MetaModel:
        """Load a meta-model from a folder, or from a repository of the Hugging Face Hub.

        Only the safetensors file is read; for a folder without the package huggingface_hub.

        Args:
            repo_or_folder: the folder; if there is none of this name, the repository, user/name.
            module: as for `load`.
            revision, token: branch, tag or commit, and token of the hub; None for the defaults.

        Raises:
            InputError: there is no such folder or repository, or as for `load`.
        """
        found = find_weights("MetaModel.from_pretrained", repo_or_folder, revision, token)
        return cls.load(found, module)
