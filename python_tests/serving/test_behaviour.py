"""Check what a served model answers, and its faults: shares, storms and draws by request."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.serving import Behaviour, behaviours_of
from bidfmkd_fast.serving.behaviour import FATES

RTOL, ATOL = TOLERANCES["float32"]


def test_each_fate_has_its_share(seed: int) -> None:
    shares = {
        "throttled": 0.1,
        "failed": 0.2,
        "dropped": 0.05,
        "lost": 0.05,
        "nan": 0.1,
        "wrong_shape": 0.1,
    }
    behaviour = Behaviour(**shares)
    n = 20_000
    counts = Counter(behaviour.fate(seed, "api", number) for number in range(n))
    assert set(counts) == set(FATES)
    for fate, share in {**shares, "served": 0.4}.items():
        assert abs(counts[fate] / n - share) < 6 * (share * (1 - share) / n) ** 0.5, fate


def test_fates_depend_on_seed_model_and_number_only(seed: int) -> None:
    behaviour = Behaviour(failed=0.5)
    fates = [behaviour.fate(seed, "a", number) for number in range(200)]
    assert [behaviour.fate(seed, "a", number) for number in reversed(range(200))] == fates[::-1]
    assert [behaviour.fate(seed, "b", number) for number in range(200)] != fates
    assert [behaviour.fate(seed + 1, "a", number) for number in range(200)] != fates


def test_storms_come_at_the_end_of_each_cycle(seed: int) -> None:
    behaviour = Behaviour(storm_every=5, storm_length=2)
    fates = [behaviour.fate(seed, "a", number) for number in range(10)]
    assert fates == (["served"] * 3 + ["throttled"] * 2) * 2


def test_well_behaved_tells_the_very_scores(seed: int) -> None:
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    answer = Behaviour().outputs(scores, "logits", seed, "a", 7)
    assert list(answer) == ["scores"]
    assert np.array_equal(answer["scores"], scores.numpy())


@pytest.mark.parametrize("kind", ["logits", "probabilities", "log_probabilities"])
@pytest.mark.parametrize("wanted", ["probabilities", "log_probabilities"])
def test_kinds_of_scores(kind: str, wanted: str, seed: int) -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).double()
    exact = {
        "logits": logits,
        "probabilities": logits.softmax(1),
        "log_probabilities": logits.log_softmax(1),
    }
    answer = Behaviour(scores_kind=wanted).outputs(exact[kind].float(), kind, seed, "a", 0)[
        "scores"
    ]
    np.testing.assert_allclose(answer, exact[wanted].numpy(), RTOL, ATOL)


def test_rounded_and_top_k(seed: int) -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
    answer = Behaviour(top_k=3, decimals=2).outputs(logits, "logits", seed, "a", 0)
    probabilities = logits.double().softmax(1).numpy()
    assert answer["scores"].shape == answer["labels"].shape == (6, 3)
    assert answer["labels"].dtype == np.int64
    hundredths = answer["scores"].astype(np.float64) * 100
    np.testing.assert_allclose(hundredths, hundredths.round(), 0, 1e-4)
    assert (np.diff(answer["scores"], axis=1) <= 0).all()
    of_labels = np.take_along_axis(probabilities, answer["labels"], 1)
    assert np.abs(of_labels - answer["scores"]).max() <= 0.005 + 1e-6
    left_out = 1 - of_labels.sum(1)  # two classes, each at most the third told, up to the rounding
    assert (left_out <= 2 * (answer["scores"][:, 2] + 0.005 + 1e-6)).all()


def test_drift_grows_with_the_requests_and_has_one_direction(seed: int) -> None:
    logits = torch.zeros(2, 5)
    behaviour = Behaviour(drift=3.0)
    first, later = (
        behaviour.outputs(logits, "logits", seed, "a", number)["scores"] for number in (0, 2000)
    )
    assert np.array_equal(first, logits.numpy())
    again = behaviour.outputs(logits, "logits", seed, "a", 1000)["scores"]
    np.testing.assert_allclose(later, 2 * again, RTOL, ATOL)
    assert np.abs(later).max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"failed": 0.6, "nan": 0.5}, "must sum to at most 1; got 1.1"),
        ({"failed": -0.1}, "failed must be finite and at least 0"),
        ({"latency": float("inf")}, "latency must be finite and"),
        ({"scores_kind": "labels"}, "scores_kind must be one of logits"),
        ({"top_k": 2, "scores_kind": "logits"}, "top_k answers probabilities"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"decimals": 400}, "decimals must be at most 20; got 400"),
        ({"decimals": 1.5}, "decimals must be of type int"),
        ({"dtype": "float16"}, "dtype must be float32 or uint8"),
        (
            {"storm_every": 2, "storm_length": 3},
            "storm_length must be at most storm_every=2; got 3",
        ),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Behaviour(**settings)


def test_behaviours_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "faults.yaml"
    file.write_text("b: {nan: 1.0, max_batch: 8}\n")
    common = Behaviour(decimals=4)
    assert behaviours_of(["a", "b"], common, None) == {"a": common, "b": common}
    assert behaviours_of(["a", "b"], common, file) == {
        "a": common,
        "b": Behaviour(decimals=4, nan=1.0, max_batch=8),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("c: {nan: 1.0}", "names the model 'c'; the pool has a, b"),
        ("b: {nam: 1.0}", "unknown setting 'nam'; known: decimals"),
        ("b: 3", "must map model names to settings"),
        ("b: {nan: 2.0}", "serve: .*faults.yaml: the shares .* must sum to at most 1"),
        ("b: [", "not readable YAML: line 1"),
        ("b: {nan: 1.0}\nb: {nan: 0.0}", "the key 'b' comes twice"),
    ],
)
def test_bad_files(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "faults.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        behaviours_of(["a", "b"], Behaviour(), file)
    with pytest.raises(InputError, match="serve: cannot read .*nowhere.yaml"):
        behaviours_of(["a", "b"], Behaviour(), tmp_path / "nowhere.yaml")
