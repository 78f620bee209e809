"""Times of single steps: their median, and what is left out of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gradmix.training.loop import clock as clocks
from gradmix.training.loop.clock import Clock
from gradmix.training.loop.step_times import StepTimes
from gradmix.training.runs.results import SteadySteps

CPU = torch.device("cpu")


@pytest.mark.parametrize("scale", [1e-5, 2e-3, 0.5, 600.0], ids=lambda s: f"{s:g} s")
def test_the_median_is_right_to_half_a_bin(scale: float) -> None:
    seconds = np.random.default_rng(0).lognormal(0.0, 0.5, 1001) * scale
    times = StepTimes()
    for value in seconds.tolist():
        times.end_step(value, warm_up=False)
    steady = times.steady()
    assert steady.steps == 1001 and steady.seconds_step == pytest.approx(seconds.sum())
    # Half of a bin, of which 64 double a time.
    assert steady.median == pytest.approx(statistics.median(seconds), rel=2 ** (0.5 / 64) - 1 + 1e-9)


@pytest.mark.parametrize(("seconds", "median"), [(0.0, 2.0**-20), (1e9, 2.0**18)], ids=["no time", "months"])
def test_times_beyond_the_bins_are_counted_in_the_last_ones(seconds: float, median: float) -> None:
    times = StepTimes()
    times.end_step(seconds, warm_up=False)
    assert times.steady().steps == 1 and times.steady().median == pytest.approx(median, rel=0.01)


def test_no_step_no_median() -> None:
    times = StepTimes()
    times.end_step(1.0, warm_up=True)
    assert times.steady().steps == 0 and np.isnan(times.steady().median)


def run(clock: Clock, now: list[float], **parts: float) -> None:
    """A step of the clock, of parts that take so many seconds each."""
    with clock("step"):
        for part, seconds in parts.items():
            with clock(part):
                now[0] += seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    time = [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: time[0])
    yield time


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_first_step_and_the_step_of_a_warm_up_are_left_out(
    device: str, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Event:
        """An event on a device whose time is that of the test, which is read when it is over."""

        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device(device))
    run(clock, now, data=5.0)
    for _ in range(3):
        run(clock, now, data=0.25, selection=0.25, rest=0.5)
    with clock("step"):
        clock.warm_up()
        with clock("selection"):
            now[0] += 9.0
    run(clock, now, data=0.5, selection=0.5, rest=1.0)
    with clock("evaluation"):
        now[0] += 7.0
    steady = clock.steps.steady()
    assert steady == SteadySteps(4, steady.median, seconds_step=5.0, seconds_selection=1.25, seconds_data=1.25)
    assert steady.median == pytest.approx(1.0, rel=0.01)
    assert clock.seconds("step") == 19.0 and clock.seconds("selection") == 10.25


def test_times_go_on_from_a_state_and_the_new_process_warms_up(now: list[float]) -> None:
    first, second = Clock(CPU), Clock(CPU)
    for _ in range(3):
        run(first, now, data=1.0)
    state = first.steps.state_dict()
    run(first, now, data=64.0)
    StepTimes.check(state)
    second.steps.load_state_dict(state)
    run(second, now, data=8.0)
    run(second, now, data=1.0)
    assert second.steps.steady().steps == 3 and second.steps.steady().seconds_data == 3.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"counts": torch.zeros(3, dtype=torch.int64)}, "step_times.counts"),
        ({"counts": -torch.ones(38 * 64, dtype=torch.int64)}, "step_times.counts: got -1"),
        ({"sums": {"step": 1, "selection": 0.0, "data": 0.0}}, "step_times.sums.step"),
    ],
    ids=["other bins", "less than none", "no float"],
)
def test_a_state_of_another_form_is_refused(change: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        StepTimes.check(StepTimes().state_dict() | change)
