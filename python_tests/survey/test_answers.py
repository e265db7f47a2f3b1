"""Test the file of answers: what was written is read back, and what is not whole is asked again."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.survey.answers import Answers, count_answers

SPEC = APISpec(3, (1, 16, 16), name="mine")


def scores(first: int, n: int) -> torch.Tensor:
    return (torch.arange(first, first + n)[:, None] + torch.tensor([0.25, 0.5, 1e-30])).float()


def test_answers_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "survey" / "api_000.answers"
    with Answers(path, SPEC, 5, 10) as answers:
        assert answers.missing(4, range(10)) == [(0, 4), (4, 4), (8, 2)]
        answers.add(8, scores(8, 2))  # in any order
        answers.add(0, scores(0, 4))
        assert answers.missing(4, range(10)) == [(4, 4)] and answers.queries == 6
    with Answers(path, SPEC, 5, 10) as answers:
        assert answers.missing(4, range(10)) == [(4, 4)]
        answers.add(4, scores(4, 4))
    with Answers(path, SPEC, 5, 10) as answers:
        assert answers.answered.all() and torch.equal(answers.scores, scores(0, 10))


def test_pieces_keep_their_bounds() -> None:
    """A kill does not shift the calls after it, so a resumed survey asks the same batches."""
    answers = Answers(None, SPEC, 5, 12)
    answers.add(2, scores(2, 3))
    answers.add(9, scores(9, 1))
    assert answers.missing(4, range(12)) == [(0, 2), (5, 3), (8, 1), (10, 2)]
    # A round by itself: the pieces of the second begin where the first ended.
    assert answers.missing(4, range(6)) == [(0, 2), (5, 1)]
    assert answers.missing(4, range(6, 12)) == [(6, 3), (10, 2)]


@pytest.mark.parametrize("lost", [1, 13, 40])
def test_an_answer_that_was_cut_off_is_missing(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "answers"
    with Answers(path, SPEC, 5, 10) as answers:
        answers.add(0, scores(0, 4))
        answers.add(4, scores(4, 4))
    path.write_bytes(path.read_bytes()[:-lost])
    with Answers(path, SPEC, 5, 10) as answers:
        assert answers.missing(4, range(10)) == [(4, 4), (8, 2)]
        answers.add(4, scores(4, 4))
    with Answers(path, SPEC, 5, 10) as answers:
        assert torch.equal(answers.scores[:8], scores(0, 8))


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with Answers(path, SPEC, 5, 4) as answers:
        answers.add(0, scores(0, 4))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    assert Answers(path, SPEC, 5, 4).queries == 0  # the checksum of the record does not fit


@pytest.mark.parametrize("content", [b"", b"something else", b"bidfmkd journal 1\n"])
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "api_000.answers"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"api_000\.answers is damaged, .*remove it to ask anew"):
        Answers(path, SPEC, 5, 4)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"survey: cannot read .*: Is a directory"):
        Answers(tmp_path, SPEC, 5, 4)


@pytest.mark.parametrize(
    ("spec", "seed", "n_images", "said"),
    [
        (SPEC, 6, 4, "pictures is 5 there; got 6"),
        (SPEC, 5, 9, "n_images is 4 there; got 9"),
        (replace(SPEC, scores_kind="probabilities"), 5, 4, "scores_kind is 'logits' there"),
        (replace(SPEC, name="other"), 5, 4, "name is 'mine' there; got 'other'"),
    ],
)
def test_answers_of_another_survey_are_refused(
    tmp_path: Path, spec: APISpec, seed: int, n_images: int, said: str
) -> None:
    path = tmp_path / "answers"
    with Answers(path, SPEC, 5, 4) as answers:
        answers.add(0, scores(0, 4))
    with pytest.raises(InputError, match=said):
        Answers(path, spec, seed, n_images)


def test_a_record_of_the_wrong_size_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "api_000.answers"
    with Answers(path, SPEC, 5, 10) as answers:
        answers.add(0, scores(0, 4))
        assert answers._file is not None
        answers._file.append(b"A" + struct.pack("<III", 4, 5, 3) + bytes(16), first=b"")
    with pytest.raises(InputError, match=r"api_000\.answers is damaged"):
        Answers(path, SPEC, 5, 10)


def test_counting_what_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"survey: cannot read .*: Is a directory"):
        count_answers(tmp_path)
