"""Which bodies of which operators the tests ran: the rest is printed, and fails a whole run unless it needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gradmix.doctor import OPERATORS
from gradmix.ops.backends import Backend, Operator

ran: set[tuple[str, str]] = set()
"""(operator, backend) pairs that were dispatched to and returned."""

SELECTIONS = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "maxfail", "collectonly")
"""Options by which a run is not the whole."""


def not_run() -> dict[tuple[str, str], str | None]:
    """The other pairs, each with the reason why it cannot run on this machine, None where it could have."""
    pairs = {(operator.name, body.name): body.available() for operator in OPERATORS for body in operator.backends}
    return {pair: reason for pair, reason in pairs.items() if pair not in ran}


def watch(choose: Callable[..., Backend]) -> Callable[..., Backend]:
    """``Operator.choose`` whose bodies, when they have run, say so in :data:`ran`."""

    def watched(operator: Operator, *args: Any, **kwargs: Any) -> Backend:
        body = choose(operator, *args, **kwargs)

        def run(*arguments: Any, **named: Any) -> Any:
            result = body.run(*arguments, **named)
            ran.add((operator.name, body.name))
            return result

        return replace(body, run=run)

    return watched


def is_whole(config: pytest.Config) -> bool:
    """Whether everything there is was asked for."""
    source = getattr(config, "args_source", None)
    named = source is None or source.name == "ARGS"
    return not named and not any(getattr(config.option, name, None) for name in SELECTIONS)


def pytest_configure() -> None:
    Operator.choose = watch(Operator.choose)  # type: ignore[method-assign]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of several (pytest-xdist) has ended: what ran there counts."""
    ran.update(map(tuple, getattr(node, "workeroutput", {}).get("bodies_run", ())))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["bodies_run"] = sorted(ran)
        return
    if session.exitstatus == pytest.ExitCode.OK and is_whole(session.config) and None in not_run().values():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not is_whole(terminalreporter.config):
        return
    terminalreporter.section("bodies of operators that no test ran")
    for (operator, backend), reason in sorted(not_run().items()):
        terminalreporter.line(f"{operator}, {backend}: {reason or 'it can run here: a test must run it'}")
