"""The bar's time left: from the mean rate since work began, hidden until there is something to go by."""

import io

import pytest

from sana_lab.ablation.progress import Bar


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bar(clock) -> Bar:
    made = Bar("sweep", 1000, settle=10.0, file=io.StringIO())
    made._time = clock
    return made


def left(bar: Bar) -> str:
    return str(bar).split("<")[1].split(" ")[0]


def test_the_time_left_is_hidden_at_first_and_then_the_mean_rate_of_all_workers(bar, clock):
    clock.now += 30  # processes start
    assert left(bar) == "?"
    bar.advance(10)
    clock.now += 5
    bar.advance(50)
    assert left(bar) == "?"
    clock.now += 5
    bar.advance(50)  # 100 steps in the 10 s since the first were told, 890 left
    assert (bar.n, bar.rate, left(bar)) == (110, 10.0, "01:29")
    clock.now += 10
    bar.advance(100)  # one worker is slow now: the mean stays sensible
    assert (bar.rate, left(bar)) == (10.0, "01:19")


def test_steps_done_before_a_resume_are_no_work_of_now(bar, clock):
    bar.advance(10)
    bar.advance(500, counts=False)
    clock.now += 10
    bar.advance(20)
    assert (bar.n, bar.rate) == (530, 2.0)
