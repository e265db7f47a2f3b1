"""Check that a recovery that was cut off continues from its journal.

The result must be the same bit for bit, and no answered query may be asked again.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox, OpenBox
from bidfmkd_fast.black_box.step_length import QUERIES
from bidfmkd_fast.errors import APIUnavailable, BadAnswer, InputError
from bidfmkd_fast.recovery import Journal, Recovered, RecoveryConfig, journal, record_file, recover
from bidfmkd_fast.recovery.journal import RECORDS, SNAPSHOT
from bidfmkd_fast.recovery.side_by_side import recover_side_by_side
from bidfmkd_fast.recovery.snapshot_file import checksum

N_CLASSES, N_PER_CLASS = 3, 4
B = N_CLASSES * N_PER_CLASS
CONFIG = RecoveryConfig(
    steps=7, num_directions=4, latent_dim=8, generator_width=4, learning_rate=0.05, augment=True
)
SPEC = APISpec(N_CLASSES, (1, 8, 8), name="one")
WEIGHT = torch.randn(N_CLASSES, 64, generator=torch.Generator().manual_seed(5)).double()


def linear(images: Tensor, weight: Tensor = WEIGHT) -> Tensor:
    """Compute linear scores that do not depend on the size of the batch.

    It computes in float64 and without a matrix product.
    """
    return (images.flatten(1).double()[:, None] * weight).sum(-1).float()


class Box(FunctionBlackBox):
    """Record what is asked, and raise `error` instead of answer number `at` (from 1)."""

    def __init__(
        self, at: int | None = None, error: BaseException | None = None, spec: APISpec = SPEC
    ) -> None:
        self.points: list[Tensor] = []

        def answer(images: Tensor) -> Tensor:
            self.points.append(images.clone())
            if len(self.points) == at:
                raise error or KeyboardInterrupt
            return linear(images)

        super().__init__(answer, spec)


class Forgetful(nn.Module):
    """Generate images that get brighter with every call, a state that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        self.calls = 0

    def forward(self, latents: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(latents) * (1 - 0.5**self.calls)


class Student:
    """Draw new noise at every call, as dropout does."""

    def __init__(self, first: int) -> None:
        self.calls = first

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return linear(images, WEIGHT.flip(1)) + self.calls / 10


CASES: dict[str, dict[str, Any]] = {
    "support set": {},
    "chunks": {"max_images": 24},
    "query set": {"student": True},
    "paper_compat": {"paper_compat": True, "num_directions": 7},
    "auto": {"mu": "auto"},
    "a generator of one's own": {"generator": Forgetful, "mu": "auto"},
}


def make(
    api: FunctionBlackBox | OpenBox, case: str, folder: Path | None = None, **other: Any
) -> Recovered:
    """Recover a set as `CASES[case]` and `other` say, with a journal in `folder` if it is given."""
    settings = CASES[case] | other
    arguments = {
        name: settings.pop(name)
        for name in ("paper_compat", "seed", "callback")
        if name in settings
    }
    student, generator = settings.pop("student", False), settings.pop("generator", lambda: None)()
    n_per_class = settings.pop("n_per_class", N_PER_CLASS)
    config = replace(CONFIG, **settings)
    if folder is None:
        return recover(
            api,
            n_per_class,
            Student(0) if student else None,
            config,
            generator=generator,
            **arguments,
        )
    with Journal(folder) as held:
        own = Student(held.steps) if student else None
        return recover(
            api, n_per_class, own, config, generator=generator, journal=held, **arguments
        )


def assert_same(a: Recovered, b: Recovered) -> None:
    for name in ("images", "labels", "scores", "losses"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.history, a.complete, a.mu) == (b.history, b.complete, b.mu)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a snapshot at every third step."""
    monkeypatch.setattr(journal, "SNAPSHOT_STEPS", 3)
    monkeypatch.setattr(journal, "SNAPSHOT_SECONDS", 0.0)


@pytest.mark.parametrize("case", CASES)
def test_cut_off_at_every_call_and_continued(case: str, tmp_path: Path) -> None:
    whole = Box()
    wanted = make(whole, case)
    for at in range(1, len(whole.points) + 1):
        folder, first, second = tmp_path / str(at), Box(at), Box()
        with pytest.raises(KeyboardInterrupt):
            make(first, case, folder)
        assert_same(make(second, case, folder), wanted)
        asked = first.points + second.points  # only the call that was cut off is made again
        assert torch.equal(torch.cat(asked[: at - 1] + asked[at:]), torch.cat(whole.points))


@pytest.mark.parametrize("case", CASES)
def test_cut_off_at_every_call_in_turn(case: str, tmp_path: Path) -> None:
    """Let every process make one call and die in the second."""
    whole, n_asked = Box(), 0
    wanted = make(whole, case)
    for _ in whole.points[1:]:
        box = Box(2)
        with pytest.raises(KeyboardInterrupt):
            make(box, case, tmp_path / "journal")
        n_asked += len(torch.cat(box.points))
    last = Box()
    assert_same(make(last, case, tmp_path / "journal"), wanted)
    assert len(last.points) == 1
    once = sum(map(len, whole.points))
    assert n_asked + len(last.points[0]) == 2 * once - len(whole.points[0])
    # A set whose journal is whole needs no API, until the journal is removed.
    silent = Box(1)
    assert_same(make(silent, case, tmp_path / "journal"), wanted)
    assert not silent.points
    with Journal(tmp_path / "journal") as held:
        held.remove()
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("error", [APIUnavailable("down"), BadAnswer("NaN"), RuntimeError("boom")])
def test_whatever_ends_a_set_the_same_journal_goes_on(error: Exception, tmp_path: Path) -> None:
    wanted, box = make(Box(), "chunks"), Box(11, error)
    with Journal(tmp_path / "journal") as held:
        config = replace(CONFIG, max_images=24)
        with pytest.raises(type(error)):
            recover(box, N_PER_CLASS, config=config, journal=held)
        assert_same(recover(box, N_PER_CLASS, config=config, journal=held), wanted)
    assert len(box.points) == 1 + 7 * 3


def test_a_callback_that_ends_it_loses_nothing(tmp_path: Path) -> None:
    def stop(record: dict[str, float]) -> None:
        if record["step"] == 4:
            raise KeyboardInterrupt

    first, second = Box(), Box()
    with pytest.raises(KeyboardInterrupt):
        make(first, "support set", tmp_path, callback=stop)
    seen: list[float] = []
    make(second, "support set", tmp_path, callback=lambda record: seen.append(record["step"]))
    assert (len(first.points), len(second.points)) == (5, 2)
    assert seen[-2:] == [5, 6]


def test_another_student_takes_over_where_the_first_one_was_cut_off(tmp_path: Path) -> None:
    """Change the student midway, as when the meta-model has moved on since a service failed.

    Steps that are made again use the recorded scores of the first student.
    """
    with pytest.raises(KeyboardInterrupt):
        make(Box(6), "query set", tmp_path)
    calls: list[Tensor] = []

    def other(images: Tensor) -> Tensor:
        calls.append(images)
        return linear(images)

    whole, rest = Box(), Box()
    make(whole, "query set")
    with Journal(tmp_path) as held:
        recover(rest, N_PER_CLASS, other, CONFIG, journal=held)
    assert len(calls) == len(rest.points) == 2
    assert torch.equal(rest.points[0], whole.points[5])


def test_a_budget_counts_what_is_asked_and_no_more(tmp_path: Path) -> None:
    whole = Box()
    wanted = make(whole, "auto")
    step = 5 * B
    assert whole.ledger.queries == QUERIES + 7 * step
    with pytest.raises(KeyboardInterrupt):
        make(Box(1 + 4), "auto", tmp_path)  # cut off in the fourth step
    # Four steps are left. The first budget lacks one query of them, the second pays the last step.
    for left_over, complete in ((-1, False), (1, True)):
        box = Box()
        box.budget = Budget(max_queries=4 * step + left_over if not complete else step)
        recovered = make(box, "auto", tmp_path)
        assert recovered.complete == complete
        assert box.budget.queries == box.ledger.queries == (step if complete else 3 * step)
        assert len(recovered.history) == (7 if complete else 6)
    assert_same(recovered, wanted)
    nothing = Box()
    nothing.budget = Budget(max_queries=0)
    assert_same(make(nothing, "auto", tmp_path), wanted)


def test_a_budget_that_ends_in_the_middle_of_a_recorded_step(tmp_path: Path) -> None:
    """Ask in calls of 2, 2 and 1 rows; only the first call of the second step was answered."""
    with pytest.raises(KeyboardInterrupt):
        make(Box(3 + 2), "chunks", tmp_path)
    nothing = Box()
    nothing.budget = Budget(max_queries=0)
    recovered = make(nothing, "chunks", tmp_path)
    assert not recovered.complete and len(recovered.history) == 1 and not nothing.points
    images_asked: list[Tensor] = []
    whole = Box()
    make(
        whole,
        "chunks",
        callback=lambda record: images_asked.append(whole.points[3 * int(record["step"])][:B]),
    )
    # The scores of the images themselves, in both steps.
    scores = torch.stack([linear(images) for images in images_asked[:2]])
    losses = nn.functional.cross_entropy(
        scores.flatten(0, 1).double(), recovered.labels.repeat(2), reduction="none"
    )
    best = losses.view(2, B).argmin(0)
    assert torch.equal(recovered.images, torch.stack(images_asked[:2])[best, torch.arange(B)])


def test_sets_made_at_once_have_a_journal_each(tmp_path: Path) -> None:
    def attempt(boxes: list[Box]) -> list[Recovered | Exception]:
        with Journal(tmp_path / "0") as first, Journal(tmp_path / "1") as second:
            made = dict(
                recover_side_by_side(
                    boxes, N_PER_CLASS, [None, None], CONFIG, seeds=[0, 0], journals=[first, second]
                )
            )
        return [made[0], made[1]]

    failed = attempt([Box(4, RuntimeError("boom")), Box()])
    assert isinstance(failed[0], RuntimeError) and isinstance(failed[1], Recovered)
    again = [Box(), Box()]
    wanted = make(Box(), "support set")
    for recovered in attempt(again):
        assert isinstance(recovered, Recovered)
        assert_same(recovered, wanted)
    assert [len(box.points) for box in again] == [4, 0]


# --- files that are damaged, or of another recovery


@pytest.fixture
def cut_off(tmp_path: Path) -> Iterator[Path]:
    """Make a journal of four steps in calls of 2, 2 and 1 rows, with a snapshot after the third."""
    with pytest.raises(KeyboardInterrupt):
        make(Box(4 * 3 + 1), "chunks", tmp_path / "journal")
    yield tmp_path / "journal"


def whole_records(folder: Path) -> list[int]:
    """Return the ends of the records in the file, that of the magic bytes first."""
    data = (folder / RECORDS).read_bytes()
    ends = [len(record_file.MAGIC)]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 8 + struct.unpack_from("<I", data, ends[-1])[0])
    return ends


def test_a_torn_record_is_dropped(cut_off: Path) -> None:
    wanted = make(Box(), "chunks")
    data, ends = (cut_off / RECORDS).read_bytes(), whole_records(cut_off)
    snapshot = (cut_off / SNAPSHOT).read_bytes()
    assert len(ends) == 2 + 12 and ends[-1] == len(data)
    for left, n_asked in (
        (ends[-1] - 1, 10),
        (ends[-2] + 1, 10),
        (ends[-4] + 9, 12),
        (ends[4] + 3, 12),
    ):
        (cut_off / RECORDS).write_bytes(data[:left])
        (cut_off / SNAPSHOT).write_bytes(snapshot)
        box = Box()
        with pytest.warns(
            UserWarning, match=r"the last [\d,]+ bytes of .*records were cut off or are damaged"
        ):
            recovered = make(box, "chunks", cut_off)
        assert_same(recovered, wanted)
        assert len(box.points) == n_asked
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Journal(cut_off)  # the torn bytes are gone


def test_a_flipped_bit_is_noticed(cut_off: Path) -> None:
    wanted, data, ends = (
        make(Box(), "chunks"),
        (cut_off / RECORDS).read_bytes(),
        whole_records(cut_off),
    )
    flipped = bytearray(data)
    flipped[ends[4] + 100] ^= 4  # in the second record of the second step
    (cut_off / RECORDS).write_bytes(flipped)
    (cut_off / SNAPSHOT).unlink()
    box = Box()
    with pytest.warns(UserWarning, match="damaged"):
        assert_same(make(box, "chunks", cut_off), wanted)
    assert len(box.points) == 7 * 3 - 3


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:200], lambda data: data[:-1] + b"\x01"]
)
def test_without_its_snapshot_a_set_is_the_same(
    damage: Callable[[bytes], bytes], cut_off: Path
) -> None:
    (cut_off / SNAPSHOT).write_bytes(damage((cut_off / SNAPSHOT).read_bytes()))
    assert not Journal(cut_off).history
    box = Box()
    assert_same(make(box, "chunks", cut_off), make(Box(), "chunks"))
    assert len(box.points) == 3 * 3


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: b"PK" + data, lambda data: data[:40]]
)
def test_other_files_than_journals_are_refused(
    damage: Callable[[bytes], bytes], cut_off: Path
) -> None:
    (cut_off / RECORDS).write_bytes(damage((cut_off / RECORDS).read_bytes()))
    with pytest.raises(
        InputError,
        match=r"records is damaged, or no journal of a recovery; remove .*journal to ask",
    ):
        Journal(cut_off)


@pytest.mark.parametrize(
    "payload",
    [b"S{bad", b"S[1]", b"M1234", b"A123", b"A" + struct.pack("<6I", 99, 1, 2, 3, 0, 0), b"Z"],
)
def test_whole_records_of_another_program_are_refused(payload: bytes, cut_off: Path) -> None:
    with (cut_off / RECORDS).open("ab") as file:
        file.write(struct.pack("<II", len(payload), zlib.crc32(payload)) + payload)
    with pytest.raises(
        InputError,
        match=r"records is damaged, or no journal of a recovery; remove .*journal to ask",
    ):
        Journal(cut_off)


def test_a_whole_snapshot_of_another_program_is_passed_over(cut_off: Path) -> None:
    other = {"x": torch.ones(2)}
    save_file(other, cut_off / SNAPSHOT, metadata={"crc32": checksum(other)})
    box = Box()
    assert_same(make(box, "chunks", cut_off), make(Box(), "chunks"))
    assert len(box.points) == 3 * 3


@pytest.mark.parametrize(
    ("other", "spec", "message"),
    [
        ({"steps": 9}, SPEC, "config.steps is 7 there; got 9"),
        ({"mu": 0.05}, SPEC, "config.mu is 0.025 there; got 0.05"),
        ({"n_per_class": 5}, SPEC, "n_per_class is 4 there; got 5"),
        ({"seed": 1}, SPEC, "seed is 0 there; got 1"),
        (
            {"paper_compat": True, "num_directions": 5},
            SPEC,
            "paper_compat is False there; got True",
        ),
        ({"generator": Forgetful}, SPEC, "generator is None there; got .'Forgetful'"),
        ({}, replace(SPEC, name="two"), "spec.name is 'one' there; got 'two'"),
        ({}, replace(SPEC, scores_kind="log_probabilities"), "spec.scores_kind is 'logits' there"),
    ],
)
def test_a_journal_of_other_settings_is_refused(
    other: dict[str, Any], spec: APISpec, message: str, cut_off: Path
) -> None:
    box = Box(spec=spec)
    with pytest.raises(
        InputError, match=f"journal keeps the answers of another recovery .{message}.*remove"
    ):
        make(box, "chunks", cut_off, **other)
    assert not box.points
    # The price and the size of a request have no influence on the answers.
    make(Box(spec=replace(SPEC, price_per_1000=3.0, max_batch=9)), "chunks", cut_off)


def test_a_snapshot_without_records_is_not_used(cut_off: Path) -> None:
    """Ask anew if the records were removed, whatever the snapshot holds."""
    (cut_off / RECORDS).unlink()
    box = Box()
    assert_same(make(box, "chunks", cut_off), make(Box(), "chunks"))
    assert len(box.points) == 7 * 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the journal .*file"):
        make(Box(), "support set", tmp_path / "file" / "journal")
    box = Box()
    with pytest.raises(
        InputError, match="the journal .*file must be a folder that can be written to"
    ):
        make(box, "support set", tmp_path / "file")
    assert not box.points


# --- where there is nothing to keep


def test_nothing_is_kept_without_steps_or_of_an_open_box(tmp_path: Path) -> None:
    make(Box(), "support set", tmp_path / "journal", steps=0)
    make(
        OpenBox(nn.Sequential(nn.Flatten(), nn.Linear(64, N_CLASSES)), SPEC),
        "support set",
        tmp_path / "journal",
    )
    with pytest.raises(KeyboardInterrupt):
        make(Box(1), "support set", tmp_path / "journal")
    assert not (tmp_path / "journal").exists()
