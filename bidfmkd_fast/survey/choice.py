"""Choose the pictures of the survey's second round: each class of each API equally often.

Pictures that are drawn at random are unequal: an API gives most of them a few of its classes, and
the others are hardly learned. A backbone that has learned from the first half's answers predicts
what the APIs would answer to further pictures of the library, at no query.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import read_tensors, write_tensors
from bidfmkd_fast.priors import draw_pictures
from bidfmkd_fast.seeds import torch_generator
from bidfmkd_fast.survey.backbone import features_of

CANDIDATES = 8  # scenes that are looked at for each one that is chosen
_SURE = 4  # times as many as are chosen: the scenes most likely of a class, of which some are drawn
_CHUNK = 1024


def choose_scenes(
    module: nn.Module,
    heads: nn.ModuleList,
    picture_seed: int,
    image_shape: Sequence[int],
    n_first: int,
    n_chosen: int,
    seed: int,
) -> Tensor:
    """Choose `n_chosen` of the next `CANDIDATES` times as many scenes after the first `n_first`.

    For each class of each API as many are drawn, at random among the scenes to which the head gives
    that class with the highest probability.

    Args:
        module: a backbone that was distilled from the answers to the first pictures.
        heads: its heads, one per API.
        picture_seed: seed of the survey's pictures.
        image_shape: (C, H, W) of the images that the backbone takes.
        n_first: pictures that were asked about.
        n_chosen: scenes to choose.
        seed: seed of the draw.

    Returns:
        int64 `[n_chosen]` on the CPU, different scenes in rising order.
    """
    device = next(module.parameters()).device
    sizes = [cast(nn.Linear, head).out_features for head in heads]
    # As many for each API, whatever its number of classes.
    wanted = [max(1, n_chosen // (len(sizes) * size)) for size in sizes for _ in range(size)]
    kept = _SURE * max(wanted)
    best = torch.full((len(wanted), 0), 0.0, device=device)
    scene_of = torch.full((len(wanted), 0), 0, device=device)
    last = n_first + CANDIDATES * n_chosen
    features = None
    # Pieces of like size, since the backbone's batch norm uses the statistics of a piece.
    pieces = torch.arange(n_first, last, device=device).tensor_split(
        max(1, (last - n_first) // _CHUNK)
    )
    for scenes in pieces:
        images = draw_pictures(scenes, torch.zeros_like(scenes), image_shape, picture_seed)
        features = features or features_of(module, images[:2])
        with torch.no_grad():
            out = features(images)
            shares = torch.cat([head(out).softmax(1) for head in heads], 1).T  # [all classes, n]
        best, rows = torch.cat([best, shares], 1).topk(
            min(kept, best.shape[1] + len(scenes)), dim=1
        )
        scene_of = torch.cat([scene_of, scenes.expand_as(shares)], 1).gather(1, rows)
    draws = torch_generator(seed, "survey", "choice")
    taken: dict[int, None] = {}  # keeps the order
    scene_of = scene_of.cpu()
    for number in torch.randperm(len(wanted), generator=draws).tolist():
        sure = scene_of[number, : _SURE * wanted[number]].tolist()
        free = [scene for scene in sure if scene not in taken]
        order = torch.randperm(len(free), generator=draws)[: wanted[number]]
        taken.update(dict.fromkeys(free[i] for i in order.tolist()))
    # The classes of different APIs may want the same scenes; others in order make up the number.
    others = (scene for scene in range(n_first, last) if scene not in taken)
    chosen = list(taken)[:n_chosen]
    chosen += [next(others) for _ in range(n_chosen - len(chosen))]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


def write_choice(path: Path, scenes: Tensor) -> None:
    """Keep the chosen scenes in a file, so that a run that was cut off asks about no others.

    Raises InputError if it cannot be written.
    """
    write_tensors(path, {"scenes": scenes})


def read_choice(path: Path, n_chosen: int) -> Tensor:
    """Read the chosen scenes, int64 `[n_chosen]`.

    Raises InputError if the file is damaged, or belongs to another survey.
    """
    tensors, _ = read_tensors(path)
    scenes = tensors.get("scenes")
    if scenes is None or scenes.dtype != torch.int64 or scenes.shape != (n_chosen,):
        raise InputError(
            f"survey: {path} does not hold {n_chosen:,} chosen pictures; remove the run and start "
            "it anew"
        )
    return scenes
