"""A plugin of pytest: a line for every test that came to its end, so that the process may be ended at any moment."""

from __future__ import annotations

import json
import os

import pytest

VARIABLE = "GRADMIX_OUTCOMES"
"""The environment variable with the file's path."""

SHOWN = 1000
"""Characters kept of a failure, from its end, where the error stands."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write node id, outcome and failure: of a test's call, or of a setup or teardown that failed or skipped it."""
    if report.when != "call" and report.outcome == "passed":
        return
    text = report.longreprtext[-SHOWN:] if report.outcome == "failed" else ""
    with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
        print(json.dumps([report.nodeid, report.outcome, text]), file=file)
