"""The benchmark of exact gradients: every way does the work, and the table says which is fastest. No time is judged."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench_modules import load

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, in attention


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "exact_gradients")


def test_a_run_reports_what_it_measured(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = ["perceptron", "resnet-tiny", "vit-tiny"]
    sizes = ["--samples", "6", "--classes", "3"]
    path = tmp_path / "r.json"
    assert bench.main(["--network", *networks, *sizes, "--repeats", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [(found["network"], found["samples"], found["classes"]) for found in result["cases"]] == [
        (name, 6, 3) for name in networks
    ]
    for found in result["cases"]:
        assert list(found["over_step"]) == ["pass_a_class", "class", "class_sum", "loop", "vmap_grad", "sample"]
        assert all(ratio["p50"] > 0 for ratio in found["over_step"].values())
        assert found["difference"]["pass_a_class"] == found["difference"]["loop"] == 0
        assert all(difference <= bench.AGREEMENT for difference in found["difference"].values())
    printed = capsys.readouterr().out
    # One way of each table is the fastest.
    assert printed.count(")*") == 2 * len(networks)


def test_a_way_with_other_gradients_is_no_way(bench: ModuleType) -> None:
    ways = bench.Problem(bench.Case("perceptron", 4, 2), torch.device("cpu"), 0, torch.float64).ways()
    assert set(bench.check_agreement(ways)) == {way.name for way in ways}
    whole = ways[-1].whole()
    with pytest.raises(RuntimeError, match="gradmix: differs by"):
        bench.check_agreement([*ways[:-1], ways[-1]._replace(whole=lambda: whole * (1 + 1e-7))])


def test_more_classes_than_a_network_has_are_refused(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["--network", "perceptron", "--classes", "11"])
    assert "--classes: got 11, expected at most the 10 of perceptron" in capsys.readouterr().err
