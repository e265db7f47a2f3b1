"""Check the token bucket on a simulated clock: pace, bursts, and no needless wait."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bidfmkd_fast.black_box.remote.rate_limit import RateLimit
from bidfmkd_fast.errors import InputError


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def limited(clock: Clock, images: float | None, requests: float | None) -> RateLimit:
    return RateLimit(images, requests, clock=lambda: clock.now, sleep=clock.sleep)


def test_no_limit_never_waits() -> None:
    clock = Clock()
    limit = limited(clock, None, None)
    for _ in range(1000):
        limit.wait(10**6)
    assert clock.now == 0


def test_a_second_may_be_used_at_once_then_the_pace_holds() -> None:
    clock = Clock()
    limit = limited(clock, 100, None)
    sent = []
    for _ in range(30):
        limit.wait(20)
        sent.append(clock.now)
    assert sent[:6] == [0.0] * 6  # a whole second's worth, and one more on credit
    assert sent[-1] == pytest.approx((29 * 20 - 100) / 100)


@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(0, 3)), min_size=1, max_size=40),
    st.floats(0.5, 200),
    st.floats(0.5, 20),
)
@example(
    [(1, 0.0), (1, 0.0), (7, 0.0), (1, 0.0)], 3.0, 1.0
)  # one pace fills up while the other is waited for
def test_over_any_stretch_no_more_than_the_pace_allows(
    calls: list[tuple[int, float]], images_per_second: float, requests_per_second: float
) -> None:
    clock = Clock()
    limit = limited(clock, images_per_second, requests_per_second)
    sent: list[tuple[float, int]] = []
    for n_images, pause in calls:
        clock.now += pause
        limit.wait(n_images)
        sent.append((clock.now, n_images))
    for first in range(len(sent)):
        for last in range(first + 1, len(sent)):
            seconds = sent[last][0] - sent[first][0]
            images = sum(
                n for _, n in sent[first:last]
            )  # the last is on credit until the next one waits for it
            assert images <= images_per_second * seconds + max(1, images_per_second) + 1e-6
            assert (
                last - first <= requests_per_second * seconds + max(1, requests_per_second) + 1e-6
            )


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_pace_must_be_above_0(rate: float) -> None:
    with pytest.raises(InputError, match="images_per_second must be above 0"):
        RateLimit(rate)
