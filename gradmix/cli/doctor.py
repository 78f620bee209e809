"""``gradmix doctor``: versions, devices and backends, and why something is missing."""

from __future__ import annotations

import argparse
import json


def main(args: list[str]) -> int:
    """Print the report of :mod:`gradmix.doctor`."""
    parser = argparse.ArgumentParser(
        prog="gradmix doctor",
        description="Show versions, devices and backends, and why something is missing.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(args)
    from gradmix import doctor

    report = doctor.report()
    print(json.dumps(report, indent=2) if options.json else doctor.format_report(report).rstrip("\n"))
    return 0
