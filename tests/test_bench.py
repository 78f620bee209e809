"""The benchmarks: they run, what they write is whole, and every rival really does the work. No time is judged."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import gradmix
from gradmix.ops.mixed_alignment import OPERATOR, mixed_alignment_reference

BENCH = Path(__file__).resolve().parents[1] / "bench"
SCRIPT = BENCH / "selection_throughput.py"
LEVELS = ["min", "p5", "p20", "p50", "p80", "p95", "max"]
BODIES = [body.name for body in OPERATOR.backends if body.name != "reference" and body.available() is None]
RIVALS = [
    *BODIES,
    "row_loop",
    "row_loop_tuned",
    "row_loop_gradients",
    "broadcast",
    "vmap_grad",
    "autograd",
    "reference",
]
CPU = torch.device("cpu")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("_measure")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("selection_throughput")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The package that these tests meet, and not some other one that the script might find.
    environment = {**os.environ, "PYTHONPATH": str(Path(gradmix.__file__).parents[1]), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def quick(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    path = folder / "result.json"
    done = run("--quick", "--json", str(path), *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in folder.iterdir()] == ["result.json"]
    return json.loads(path.read_text(encoding="utf-8")), done.stdout


# ----------------------------------------------------------------------------------------------------- the whole script


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return quick(tmp_path_factory.mktemp("bench"), "--threads", "1", "--m", "19")


def test_result_names_its_conditions(outcome: tuple[dict[str, Any], str]) -> None:
    result, _ = outcome
    assert result["benchmark"] == "selection_throughput"
    assert {
        "cpu",
        "cores",
        "threads",
        "system",
        "python",
        "torch",
        "gradmix",
        "date",
        "load",
        "keeps_freed_memory",
    } <= set(result["machine"])
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"] == torch.__version__
    assert result["sizes"] == {"n": 32, "m": 19, "classes": 20, "features": 64, "own_rows": False}
    assert result["arguments"]["quick"] is True and result["arguments"]["seed"] == 0
    alignment = result["alignment"]
    assert alignment["auto_backend"] in BODIES
    assert alignment["flops"] == 8 * 32 * 19 * 20 + 2 * (32 + 19) * 20 * 65 + 2 * 32 * 19 * 64
    # A mix of confident and unconfident rows.
    assert alignment["favourite_probability"]["p20"] < 0.5 < 0.8 < alignment["favourite_probability"]["p95"]


def test_every_row_is_whole(outcome: tuple[dict[str, Any], str]) -> None:
    rows = outcome[0]["alignment"]["rows"]
    assert [row["name"] for row in rows] == RIVALS
    for row in rows:
        for times in (row["seconds"], *row["speedup_over"].values()):
            assert list(times) == LEVELS
            assert list(times.values()) == sorted(times.values())
            assert times["min"] > 0
        assert row["samples"] == 5 and row["warmups"] >= 2
        assert row["extrapolated"] == (row["pairs_timed"] < 32 * 19)
        assert row["pairs_per_second"] * row["seconds"]["p50"] == pytest.approx(32 * 19)
        assert row["peak_memory_bytes"] >= 2 * 4 * row["pairs_timed"]  # the result itself, inner and cosine
        for name in ("row_loop", "row_loop_tuned"):
            assert (row["name"] == name) == (set(row["speedup_over"][name].values()) == {1.0})
    # 16 pairs of the slow ones; the loop over single pairs is never run in full.
    assert {row["name"] for row in rows if row["extrapolated"]} >= {"row_loop_gradients", "autograd", "reference"}


def test_errors_are_small_and_decisions_agree(outcome: tuple[dict[str, Any], str]) -> None:
    for row in outcome[0]["alignment"]["rows"]:
        for kind, bound in (("error", 3e-6), ("error_huge_logits", 1e-3)):
            error = row[kind]
            assert 0 <= error["inner"] < bound and 0 <= error["cosine"] < bound, (row["name"], kind, error)
            assert error["decisions_agree"] == 1.0, (row["name"], kind)
            assert error["pairs_outside_band"] > 0.9 * error["pairs"] > 0
        if row["name"] in BODIES:
            # Logits of 1e4 cost the factorised form nothing.
            assert row["error_huge_logits"]["inner"] < 3e-6 and row["error_huge_logits"]["cosine"] < 3e-6


def test_the_whole_call_is_timed_too(outcome: tuple[dict[str, Any], str]) -> None:
    rows = outcome[0]["select_pairs"]["rows"]
    assert [row["name"] for row in rows] == ["forward", "step", "sample", "class", "sample_given", "class_given"]
    for row in rows:
        assert list(row["seconds"]) == list(row["this_over_forward"]) == LEVELS
        assert row["seconds"]["min"] > 0


def test_tables_show_every_row(outcome: tuple[dict[str, Any], str]) -> None:
    result, printed = outcome
    for part in ("alignment", "select_pairs"):
        for row in result[part]["rows"]:
            assert row["label"] in printed
    for row in result["alignment"]["rows"]:
        assert (row["label"] + " *" in printed) == row["extrapolated"]
    assert result["machine"]["cpu"] in printed and "N = 32, M = 19 (other rows), C = 20, d = 64" in printed


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    result, printed = quick(tmp_path, "--device", "cuda")
    assert result["machine"]["accelerator"] in printed
    for row in result["alignment"]["rows"]:
        assert row["error"]["inner"] < 3e-6 and row["error"]["decisions_agree"] == 1.0
        assert row["peak_memory_bytes"] >= 2 * 4 * row["pairs_timed"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--n", "0"], "argument --n: got '0', expected an integer >= 1"),
        (["--classes", "many"], "argument --classes: got 'many', expected an integer >= 1"),
        (["--preset", "mnist"], "argument --preset: invalid choice"),
        (["--json", "nowhere/result.json"], "argument --json: no folder"),
        (["--device", "abacus"], "argument --device: got 'abacus'"),
        (["--seconds", "-1"], "argument --seconds: got '-1', expected a positive number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    script: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        script.parse(arguments)
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ([], (256, 256, 1000, 2048, True)),
        (["--quick"], (32, 24, 20, 64, False)),
        (["--foreign"], (256, 256, 1000, 2048, False)),
        (["--preset", "cifar10"], (256, 256, 10, 512, True)),
        (["--preset", "cifar100", "--quick", "--n", "8"], (8, 8, 100, 512, True)),
        (["--preset", "cifar100", "--m", "8"], (256, 8, 100, 512, False)),
        (["--quick", "--classes", "3", "--features", "5"], (32, 24, 3, 5, False)),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else "",
)
def test_sizes(script: ModuleType, arguments: list[str], sizes: tuple[int, ...]) -> None:
    assert script.parse(arguments).sizes == script.Sizes(*sizes)


# ---------------------------------------------------------------------------------------------------------- the rivals


SHAPES = {
    # name: (n, m, classes, features)
    "one pair": (1, 1, 2, 1),
    "one row": (1, 7, 3, 5),
    "one candidate": (6, 1, 4, 3),
    "one class": (3, 4, 1, 6),
    "odd sizes": (7, 5, 11, 13),
    "more classes than pairs": (2, 3, 40, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_truth_is_the_reference_in_float64(script: ModuleType, shape: tuple[int, ...]) -> None:
    p = script.make_problem(script.Sizes(*shape), seed=1).to(torch.float64)
    p = script.replace(p, logits_a=p.features_a @ p.weight.T + p.bias, logits_b=p.features_b @ p.weight.T + p.bias)
    expected = mixed_alignment_reference(
        p.features_a, p.logits_a, p.labels_a, p.features_b, p.logits_b, p.labels_b, p.reference, p.lam
    )
    for through_head in (False, True):
        inner, norm, _ = script.truth(p, through_head)
        torch.testing.assert_close(inner, expected.inner, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(norm, expected.norm, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_rival_does_the_work(script: ModuleType, shape: tuple[int, ...]) -> None:
    """All pairs, at chunks that do and do not divide them."""
    p = script.make_problem(script.Sizes(*shape), seed=2)
    ways = {name: script._Bound(script.by_gradmix, name) for name in BODIES}
    ways |= {
        "row loop": script.by_row_loop,
        "tuned": script.by_tuned_row_loop,
        "gradients": script.by_gradient_row_loop,
    }
    ways |= {"autograd": script.by_autograd, "reference": script.by_reference}
    ways |= {f"broadcast {k}": script._Bound(script.by_broadcast, k) for k in (1, 2, 100)}
    ways |= {f"vmap {k}": script._Bound(script.by_vmap, k) for k in (1, 3, 100)}
    expected, _, expected_cosine = script.truth(p, through_head=False)
    largest = expected.abs().max()
    for name, way in ways.items():
        inner, angle = way(p)
        assert inner.dtype == angle.dtype == torch.float32 and inner.shape == shape[:2], name
        assert (inner - expected).abs().max() <= 1e-5 * largest, name
        assert (angle - expected_cosine).abs().max() <= 1e-5, name


def test_a_wrong_rival_is_found_out(script: ModuleType) -> None:
    """The error columns are not blind: swapped mixing weights, or a sign, show."""
    p = script.make_problem(script.Sizes(9, 8, 5, 6), seed=3)
    swapped = script.Rival("swapped", "", lambda q: script.by_row_loop(script.replace(q, lam=1 - q.lam)))
    negated = script.Rival("negated", "", lambda q: tuple(-v for v in script.by_row_loop(q)))
    assert script.errors(swapped, p)["inner"] > 1e-2
    found = script.errors(negated, p)
    assert found["inner"] == pytest.approx(2, abs=1e-4) and found["decisions_agree"] == 0.0


def test_inputs_depend_on_the_seed_alone(script: ModuleType) -> None:
    sizes = script.Sizes(5, 4, 6, 7)
    before = torch.get_rng_state()
    one, same, other = (script.make_problem(sizes, seed) for seed in (0, 0, 1))
    assert torch.equal(one.logits_a, same.logits_a) and torch.equal(one.reference, same.reference)
    assert not torch.equal(one.logits_a, other.logits_a)
    assert torch.equal(before, torch.get_rng_state())
    huge = script.with_logits_up_to(one, 1e4)
    assert max(float(huge.logits_a.abs().max()), float(huge.logits_b.abs().max())) == pytest.approx(1e4)
    torch.testing.assert_close(huge.features_a @ huge.weight.T + huge.bias, huge.logits_a, rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ measuring


def test_calls_are_interleaved(measure: ModuleType) -> None:
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples = measure.interleaved(calls, CPU, repeats=4, seconds=60)
    assert "".join(seen) == "abcbcacababc"
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}
    seen.clear()
    measure.interleaved(calls, CPU, repeats=100, seconds=0, least=2)
    assert len(seen) == 2 * 3


@pytest.mark.parametrize(("most", "expected"), [(1, 2), (2, 2), (10, 10)])
def test_warm_up_counts_its_calls(measure: ModuleType, most: int, expected: int) -> None:
    seen: list[int] = []
    assert measure.warm_up(lambda: seen.append(0), CPU, most) == len(seen) == expected


def test_a_slow_call_is_warmed_up_less(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SLOW", 0.0)
    seen: list[int] = []
    assert measure.warm_up(lambda: seen.append(0), CPU, 10) == len(seen) == 3


def test_quantiles(measure: ModuleType) -> None:
    found = measure.quantiles([float(k) for k in range(100, -1, -1)])
    assert found == pytest.approx({"min": 0, "p5": 5, "p20": 20, "p50": 50, "p80": 80, "p95": 95, "max": 100})
    assert measure.paired_ratio([2.0, 9.0], [1.0, 3.0])["p50"] == 2.5
    with pytest.raises(ValueError, match="shorter"):
        measure.paired_ratio([1.0, 2.0], [1.0])


def test_peak_memory_counts_what_is_alive_together(measure: ModuleType) -> None:
    outside = torch.zeros(1000)

    def call() -> torch.Tensor:
        one = outside + 1  # 4,000 bytes
        two = one.repeat(2)  # 8,000: 12,000 alive
        del one
        return two[:1000] + 1  # 4,000: 12,000 alive again

    assert 12_000 <= measure.peak_memory(call, CPU) <= 12_200  # and a few scalars


def test_result_file_is_whole_or_not_there(measure: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    measure.write_json(path, {"a": [1.5]})
    with pytest.raises(ValueError, match="JSON"):
        measure.write_json(path, {"a": float("nan")})
    path.with_name("folder.json").mkdir()
    with pytest.raises(OSError):
        measure.write_json(tmp_path / "folder.json", {"a": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1.5]}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.json", "result.json"]


def test_table_without_rich(
    measure: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    measure.show_table("Title", ["", "time"], [["row", "1.00 ms"], ["longer row", "10 s"]], ["a note"])
    assert capsys.readouterr().out.splitlines() == [
        "Title",
        "               time",
        "----------  -------",
        "row         1.00 ms",
        "longer row     10 s",
        "",
        "  a note",
        "",
    ]


def test_a_rich_table_is_never_cut(measure: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    cells = [f"cell number {k} [bold]" for k in range(20)]
    measure.show_table("Title", cells, [cells])
    printed = capsys.readouterr().out
    assert all(printed.count(cell) == 2 for cell in cells)


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        ("show_time", 12.345, "12.3 s"),
        ("show_time", 0.0123, "12.3 ms"),
        ("show_time", 123e-6, "123 µs"),
        ("show_time", 5e-9, "5.00 ns"),
        ("show_time", 1550.0, "1550 s"),
        ("show_count", 2_500_000.0, "2.50 M"),
        ("show_count", 110.0, "110"),
        ("show_bytes", 3 << 20, "3.0 MiB"),
        ("show_bytes", 512, "0.5 KiB"),
    ],
)
def test_figures_for_people(measure: ModuleType, function: str, value: float, expected: str) -> None:
    assert getattr(measure, function)(value) == expected
