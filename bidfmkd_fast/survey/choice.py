"""Choose the pictures of the survey's second round: each class of each API equally often.

Pictures that are drawn at random are unequal: an API gives most of them a few of its classes, and
the others are hardly learned. A backbone that has learned from the first round's answers predicts
what the APIs would answer to further pictures of the library, at no query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.tensors import read_tensors, write_tensors
from bidfmkd_fast.priors import draw_pictures
from bidfmkd_fast.seeds import seeded, torch_generator
from bidfmkd_fast.survey.backbone import features_of

CANDIDATES = 8  # scenes that are looked at for each one that is chosen
_PIECE_NUMBERS = 256 * 3 * 32 * 32  # of the images that are looked at together
_SURE = 4  # times as many as are chosen: the scenes most likely of a class, of which some are drawn


def choose_scenes(
    module: nn.Module,
    heads: nn.ModuleList,
    picture_seed: int,
    image_shape: Sequence[int],
    n_first: int,
    n_chosen: int,
    batch_size: int,
    seed: int,
    looked_at: Callable[[int], object] = lambda n: None,
) -> Tensor:
    """Choose `n_chosen` of the next `CANDIDATES` times as many scenes after the first `n_first`.

    The classes of all APIs take turns in random order. In its turn a class takes one of those
    scenes to which its head gives the class with the highest probability of all candidates, drawn
    from four times as many as it will take.

    Args:
        module: a backbone that was distilled from the answers to the first pictures; its dropout
            layers are switched off.
        heads: its heads, one per API.
        picture_seed: seed of the survey's pictures.
        image_shape: (C, H, W) of the images that the backbone takes.
        n_first: pictures that were asked about.
        n_chosen: scenes to choose.
        batch_size: pictures of a step of the training, for which there is memory.
        seed: seed of the draw.
        looked_at: is told how many further candidates have been looked at.

    Returns:
        int64 `[n_chosen]` on the CPU, different scenes in rising order.
    """
    device = next(module.parameters()).device
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.eval()
    n_classes = sum(cast(nn.Linear, head).out_features for head in heads)
    kept = _SURE * -(-n_chosen // n_classes)
    # The highest probabilities of each class so far, and of which scenes; -1 stands for none.
    best = torch.full((n_classes, 1), -1.0, device=device)
    scene_of = torch.full((n_classes, 1), -1, device=device)
    # As many small images at once as a CPU is quick with; of large ones as many as training takes.
    piece = max(batch_size, min(256, _PIECE_NUMBERS // math.prod(image_shape)))
    candidates = torch.arange(n_first, n_first + CANDIDATES * n_chosen, device=device)
    features = None
    # Pieces of like size, since the backbone's batch norm uses the statistics of a piece.
    for scenes in candidates.tensor_split(-(-len(candidates) // piece)):
        images = draw_pictures(scenes, torch.zeros_like(scenes), image_shape, picture_seed)
        features = features or features_of(module, images[:2])
        with torch.no_grad(), seeded(seed, "survey", "choice", int(scenes[0])):
            out = features(images)
            shares = torch.cat([head(out).softmax(1) for head in heads], 1).T  # [classes, n]
        n_before = best.shape[1]
        best, columns = torch.cat([best, shares], 1).topk(min(kept, n_before + len(scenes)), dim=1)
        old = scene_of.gather(1, columns.clamp(max=n_before - 1))
        new = scenes[(columns - n_before).clamp(min=0)]
        scene_of = torch.where(columns < n_before, old, new)
        looked_at(len(scenes))
    return _in_turns(scene_of.cpu(), n_chosen, candidates.cpu(), seed)


def _in_turns(sure: Tensor, n_chosen: int, candidates: Tensor, seed: int) -> Tensor:
    """Let the classes take scenes in turns; `sure` `[classes, kept]` are those each may take."""
    draws = torch_generator(seed, "survey", "choice")
    waiting = [iter(row[torch.randperm(len(row), generator=draws)].tolist()) for row in sure]
    taken: set[int] = {-1}
    while len(taken) <= n_chosen:
        before = len(taken)
        for number in torch.randperm(len(waiting), generator=draws).tolist():
            if len(taken) > n_chosen:
                break
            taken.add(next((scene for scene in waiting[number] if scene not in taken), -1))
        if len(taken) == before:  # the classes agree on all that they may take
            others = (scene for scene in candidates.tolist() if scene not in taken)
            taken.update(itertools.islice(others, n_chosen + 1 - len(taken)))
    return torch.tensor(sorted(taken - {-1}), dtype=torch.int64)


def write_choice(path: Path, scenes: Tensor, picture_seed: int, n_first: int) -> None:
    """Keep the chosen scenes in a file, so that a run that was cut off asks about no others.

    Raises InputError if it cannot be written.
    """
    write_tensors(path, {"scenes": scenes}, _about(picture_seed, n_first))


def read_choice(path: Path, n_chosen: int, picture_seed: int, n_first: int) -> Tensor:
    """Read the chosen scenes, int64 `[n_chosen]`.

    Raises InputError if the file is damaged, or belongs to another survey.
    """
    tensors, about = read_tensors(path)
    scenes = tensors.get("scenes", torch.empty(0))
    if (
        about != _about(picture_seed, n_first)
        or scenes.dtype != torch.int64
        or scenes.shape != (n_chosen,)
        or bool((scenes[1:] <= scenes[:-1]).any())
        or int(scenes[0]) < n_first
        or int(scenes[-1]) >= n_first + CANDIDATES * n_chosen
    ):
        raise InputError(
            f"survey: {path} does not name the {n_chosen:,} pictures that this survey has chosen; "
            "restore the file of this run"
        )
    return scenes


def _about(picture_seed: int, n_first: int) -> dict[str, str]:
    return {"pictures": str(picture_seed), "n_first": str(n_first)}
