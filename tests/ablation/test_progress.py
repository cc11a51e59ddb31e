"""The bar's time left: from the mean rate since work began, hidden until there is something to go by."""

import io

import pytest
from rich.console import Console

from sana_lab.ablation.progress import ProgressBar, clock, rate, seconds_left


class Watch:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def bar(watch) -> ProgressBar:
    return ProgressBar("sweep", 1000, console=Console(file=io.StringIO()), now=watch)


def test_the_time_left_is_hidden_at_first_and_then_the_mean_rate_of_all_workers(bar, watch):
    watch.now += 30  # processes start
    assert seconds_left(bar.task) is None
    bar.advance(10)
    watch.now += 10
    bar.advance(50)
    assert seconds_left(bar.task) is None
    watch.now += 10
    bar.advance(150)  # 200 steps in the 20 s since the first message, 790 left
    assert (bar.task.completed, rate(bar.task), seconds_left(bar.task)) == (210, 10.0, 79.0)
    watch.now += 20
    bar.advance(200)  # one worker is slow now: the mean stays sensible
    assert (rate(bar.task), seconds_left(bar.task)) == (10.0, 59.0)


def test_steps_done_before_a_resume_are_no_work_of_now(bar, watch):
    bar.advance(10)
    bar.advance(500, resumed=True)
    watch.now += 20
    bar.advance(40)
    assert (bar.task.completed, rate(bar.task)) == (550, 2.0)


def test_a_terminal_shows_a_bar_and_a_file_a_line_a_minute(bar, watch):
    for _ in range(3):
        bar.advance(100, "linear: step 3 of 40")
        watch.now += 35
    assert bar.console.file.getvalue() == "sweep: 30 %, 04:05 left; linear: step 3 of 40\n"
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressBar("sweep", 1000, console=terminal, now=watch) as other:
        other.advance(500, "evaluating softmax")
    assert "50%" in terminal.file.getvalue()
    assert "evaluating softmax" in terminal.file.getvalue()


def test_a_clock_shows_hours_where_there_are_any():
    assert [clock(s) for s in (5.9, 79, 3723)] == ["00:05", "01:19", "1:02:03"]
