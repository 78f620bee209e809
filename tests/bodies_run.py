"""Which implementations of operators the tests ran: the rest is printed, and fails a whole run unless it needs a GPU.

What ran is handed on with the report of each test, so that it counts in several processes (pytest-xdist) too, also of a
process that crashes later.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import pytest

from gradmix.doctor import OPERATORS
from gradmix.ops.backends import Backend, Operator

ran: set[tuple[str, str]] = set()
"""(operator, backend) pairs that were dispatched to and returned: in this process, and in those that report to it."""

_reported: set[tuple[str, str]] = set()
_crashed: list[str] = []

SELECTIONS = (
    "keyword",
    "markexpr",
    "deselect",
    "ignore",
    "ignore_glob",
    "lf",
    "stepwise",
    "maxfail",
    "collectonly",
    "setuponly",
    "setupplan",
)
"""Options by which a run is not the whole."""


def not_run() -> dict[tuple[str, str], str | None]:
    """The other pairs, each with the reason why it cannot run on this machine, None where it could have."""
    pairs = {(operator.name, body.name): body.available() for operator in OPERATORS for body in operator.backends}
    return {pair: reason for pair, reason in pairs.items() if pair not in ran}


def watch(choose: Callable[..., Backend]) -> Callable[..., Backend]:
    """``Operator.choose`` whose implementations are noted in :data:`ran` when they have run."""

    def watched(operator: Operator, *args: Any, **kwargs: Any) -> Backend:
        body = choose(operator, *args, **kwargs)

        def run(*arguments: Any, **named: Any) -> Any:
            result = body.run(*arguments, **named)
            ran.add((operator.name, body.name))
            return result

        return replace(body, run=run)

    return watched


def is_whole(config: pytest.Config) -> bool:
    """Whether all tests were asked for: none were named, and the run began where ``testpaths`` are looked up."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return False
    return not any(getattr(config.option, name, None) for name in SELECTIONS)


def pytest_configure() -> None:
    Operator.choose = watch(Operator.choose)  # type: ignore[method-assign]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    news = ran - _reported
    _reported.update(news)
    report.bodies_run = sorted(news)  # type: ignore[attr-defined]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    ran.update(map(tuple, getattr(report, "bodies_run", ())))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of several (pytest-xdist) has ended; without its last message it has crashed."""
    if not hasattr(node, "workeroutput"):
        _crashed.append(node.gateway.id)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # one of several processes: the one that they report to decides
        return
    passed = session.exitstatus == pytest.ExitCode.OK
    if passed and is_whole(session.config) and (_crashed or None in not_run().values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not is_whole(terminalreporter.config):
        return
    terminalreporter.section("implementations of operators that no test ran")
    for (operator, backend), reason in sorted(not_run().items()):
        terminalreporter.line(f"{operator}, {backend}: {reason or 'it can run here: a test must run it'}")
    for name in _crashed:
        terminalreporter.line(f"process {name} ended before it was told to: what it ran last is not counted")
