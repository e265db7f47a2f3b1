"""Put pictures into the page as PNG: recovered images, and pictures of the survey with answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from bidfmkd_fast.priors import procedural_images
from bidfmkd_fast.survey.answers import KeptAnswers, told
from bidfmkd_fast.training.grids import draw_grid, picture_of
from bidfmkd_fast.training.run import RecoveredSet

if TYPE_CHECKING:
    from PIL import Image


class Picture(NamedTuple):
    """A picture of the page: its address with the whole PNG in it, and its size in pixels."""

    address: str
    width: int
    height: int
    about: str


class AskedPicture(NamedTuple):
    """A picture of the survey, and what each API answered; an empty text without an answer."""

    picture: Picture
    answers: list[str]


def recovered_grids(shown: Sequence[Sequence[RecoveredSet]]) -> list[Picture]:
    """Draw every set as a grid with a labelled row per class."""
    return [
        _picture(
            draw_grid([found]),
            f"Images of the {found.part} set recovered from {found.api_name}, a row for each of "
            f"{len(found.class_names)} classes",
        )
        for pair in shown
        for found in pair
        if found.images.shape[1] in (1, 3)
    ]


def asked_pictures(answers: Sequence[KeptAnswers]) -> list[AskedPicture]:
    """Draw the first pictures of a survey again, from its seed and their numbers.

    They have the size that the first API takes. All APIs were asked about the same scenes.
    """
    first = answers[0]
    rows = []
    for number in first.numbers.tolist():
        drawn = procedural_images(1, first.image_shape, seed=first.pictures, first=number)[0]
        rows.append(
            AskedPicture(
                _picture(picture_of(drawn), f"Procedural picture {number}"),
                [told(asked, number) for asked in answers],
            )
        )
    return rows


def _picture(image: Image.Image, about: str) -> Picture:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    code = base64.b64encode(file.getvalue()).decode()
    return Picture(f"data:image/png;base64,{code}", image.width, image.height, about)
