"""The path of CIFAR from its files to the report, on a CPU: the protocol but for the sizes of network and data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from generated_images import write_cifar10

from gradmix import cli
from gradmix.training.reports.arms import from_results
from gradmix.training.runs.experiments import load

pytestmark = pytest.mark.slow


def test_the_protocol_on_generated_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Crops and flips, batch normalisation, bfloat16, channels last, all methods of the full table, and the report."""
    data, specification = tmp_path / "data", tmp_path / "small.yaml"
    write_cifar10(data, 20, 4)
    specification.write_text(
        """
        title: CIFAR's path
        seeds: [0]
        base:
          data: {benchmark: split-cifar10, tasks: 2}
          optim: {model: resnet8, epochs: 4, batch: 32, lr: 0.05, channels_last: true}
          replay: {size: 8, batch: 32}
          threads: 1
        arms:
          - {name: er, method: er}
          - {name: mixup, method: mixup}
          - {name: gradmix, method: gradmix-class}
          - {name: gradmix-sample, method: gradmix-sample}
          - {name: with originals, method: gradmix-sample, mix: {originals: true}, optim: {amp: bf16}}
        differences: [[gradmix-sample, mixup]]
        """
    )
    output = tmp_path / "out"
    assert cli.main(["experiment", str(specification), "--data-dir", str(data), "--output", str(output)]) == 0
    values = from_results(output / "small" / "results.json")
    assert (output / "small" / "report.html").stat().st_size > 10_000
    runs = values["runs"]
    assert len(runs) == 5 and all(run["metrics"]["average_accuracy"] > 0.4 for run in runs)
    assert "gradmix-sample" in capsys.readouterr().out


def test_the_short_experiment_on_real_images(tmp_path: Path) -> None:
    root = os.environ.get("GRADMIX_DATA_DIR")
    if not root or not Path(root, "cifar-10-batches-py").is_dir():
        pytest.skip("GRADMIX_DATA_DIR does not name a directory with cifar-10-batches-py")
    assert cli.main(["experiment", "cifar10-short", "--data-dir", root, "--output", str(tmp_path)]) == 0
    runs = from_results(tmp_path / "cifar10-short" / "results.json")["runs"]
    assert [run["arm"] for run in runs] == [arm.name for arm in load("cifar10-short").arms]
    # Four classes, airplane and automobile first: better than the half that knowing the last task alone would give.
    assert all(run["metrics"]["average_accuracy"] > 0.5 for run in runs)
