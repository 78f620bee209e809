"""The benchmarks: they run, what they write is whole, and every rival really does the work. No time is judged."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_modules import BENCH, load
from forked import run_script

from gradmix.ops.mixed_alignment import OPERATOR, Side, mixed_alignment_reference

SCRIPT = BENCH / "selection_throughput.py"
LEVELS = ["min", "p5", "p20", "p50", "p80", "p95", "max"]
BODIES = [body.name for body in OPERATOR.backends if body.name in ("torch", "cpp") and body.available() is None]
RIVALS = [
    *BODIES,
    "plain_torch",
    "plain_numpy",
    "row_loop",
    "row_loop_tuned",
    "row_loop_gradients",
    "broadcast",
    "embeddings",
    "vmap_grad",
    "jvp",
    "broadcast_at_once",
    "embeddings_at_once",
    "autograd",
    "reference",
]
CPU = torch.device("cpu")
# The first forward-mode pass of a process makes torch load rules by a function of its own that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_measure")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "selection_throughput")


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_selection_problem")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_selection_rivals")


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_selection_sweep")


def quick(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    path = folder / "result.json"
    sizes = ("--n", "32", "--m", "24", "--classes", "20", "--features", "64", "--buffer", "200")
    done = run_script(SCRIPT, "--quick", *sizes, "--json", str(path), *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".svg") == ["result.json"]
    return json.loads(path.read_text(encoding="utf-8")), done.stdout


# ----------------------------------------------------------------------------------------------------- the whole script


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("bench")
    plot = ("--plot", str(folder / "plot.svg")) if importlib.util.find_spec("matplotlib") else ()
    result, printed = quick(
        folder, "--threads", "1", "--m", "19", "--no-peers", "--classes-sweep", "7", "3", "7", *plot
    )
    if plot:
        assert "<svg" in (folder / "plot.svg").read_text(encoding="utf-8")
    return result, printed


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
    assert result["sizes"] == {"n": 32, "m": 19, "classes": 20, "features": 64, "own_rows": False, "buffer": 200}
    assert result["arguments"]["quick"] is True and result["arguments"]["seed"] == 0
    alignment = result["alignment"]
    assert alignment["auto_backend"] in BODIES
    assert alignment["flops"] == 8 * 32 * 19 * 20 + 2 * (32 + 19) * 20 * 65 + 2 * 32 * 19 * 64
    assert alignment["least_bytes"] == 4 * ((32 + 19) * (64 + 20 + 2) + 20 * 65 + 2 * 32 * 19)
    rates = alignment["rates"]
    assert rates["bytes_per_second"] > 0 and list(rates["flops_per_second"]) == ["ieee"]
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
        assert row["has_cosine"] == (row["name"] != "jvp")
        if row["name"] == "plain_numpy":
            assert row["peak_memory_bytes"] is None  # torch does not see it
        else:
            assert row["peak_memory_bytes"] >= (1 + row["has_cosine"]) * 4 * row["pairs_timed"]  # the result itself
        rates = outcome[0]["alignment"]["rates"]
        flops, least = outcome[0]["alignment"]["flops"], outcome[0]["alignment"]["least_bytes"]
        attainable = max(flops / rates["flops_per_second"]["ieee"], least / rates["bytes_per_second"])
        assert row["attainable_seconds"] == pytest.approx(attainable)
        assert row["share_of_attainable"] == pytest.approx(attainable / row["seconds"]["p50"])
        for name in ("row_loop", "row_loop_tuned"):
            assert (row["name"] == name) == (set(row["speedup_over"][name].values()) == {1.0})
    # 16 pairs of the slow ones; the loop over single pairs is never run in full.
    assert {row["name"] for row in rows if row["extrapolated"]} >= {"row_loop_gradients", "autograd", "reference"}


def test_errors_are_small_and_decisions_agree(outcome: tuple[dict[str, Any], str]) -> None:
    for row in outcome[0]["alignment"]["rows"]:
        if row["name"] in ("plain_torch", "plain_numpy"):
            # What it has no protection against: products of exponentials that underflow.
            assert row["error_huge_logits"]["inner"] is None and row["error_huge_logits"]["decisions_agree"] < 0.9
            assert row["error"]["inner"] < 3e-6 and row["error"]["decisions_agree"] == 1.0
            continue
        for kind, bound in (("error", 3e-6), ("error_huge_logits", 1e-3)):
            error = row[kind]
            assert 0 <= error["inner"] < bound, (row["name"], kind, error)
            if row["has_cosine"]:
                assert 0 <= error["cosine"] < bound, (row["name"], kind, error)
            else:
                assert error["cosine"] is None
            assert error["decisions_agree"] == 1.0, (row["name"], kind)
            assert error["pairs_outside_band"] > 0.9 * error["pairs"] > 0
        if row["name"] in BODIES:
            # Logits of 1e4 cost the factorised form nothing.
            assert row["error_huge_logits"]["inner"] < 3e-6 and row["error_huge_logits"]["cosine"] < 3e-6


def test_the_whole_call_is_timed_too(outcome: tuple[dict[str, Any], str]) -> None:
    rows = outcome[0]["select_pairs"]["rows"]
    assert [row["name"] for row in rows] == [
        "forward",
        "step",
        "reference",
        "sample",
        "class",
        "sample_given",
        "class_given",
        "kept",
        "class_table",
    ]
    assert outcome[0]["select_pairs"]["buffer_rows"] == 200
    assert "CUDA device" in outcome[0]["select_pairs"]["refused"]["GradMix, CUDA graph"]
    for row in rows:
        assert list(row["seconds"]) == list(row["this_over_forward"]) == LEVELS
        assert row["seconds"]["min"] > 0


def test_tables_show_every_row(outcome: tuple[dict[str, Any], str]) -> None:
    result, printed = outcome
    # A quick look has short labels, and its tables fit 80 columns.
    first, second, third = (
        part.splitlines() for part in re.split(r"\n(?=All pairs|Error against|The whole)", printed)[1:]
    )
    for lines in (first, second):
        assert max(len(line.rstrip()) for line in lines if not line.startswith("  ")) <= 80
    for row in result["alignment"]["rows"]:
        label = re.sub(r", \d+ (samples|pairs) at a time", "", row["label"])
        in_first, in_second = (any(line.startswith(f" {label} ") for line in lines) for lines in (first, second))
        assert in_first and in_second
        assert any(line.startswith(f" {label} * ") for line in first) == row["extrapolated"]
    assert all(row["label"] in "\n".join(third) for row in result["select_pairs"]["rows"])
    assert result["machine"]["cpu"] in printed and "N = 32, M = 19 (other samples), C = 20, d = 64" in printed


def test_the_sweep_has_every_way(outcome: tuple[dict[str, Any], str]) -> None:
    sweep = outcome[0]["sweep"]
    assert sweep["classes"] == [3, 7]
    assert [way["name"] for way in sweep["ways"]] == RIVALS[:-1]
    for way in sweep["ways"]:
        assert "at a time" not in way["label"] and way["label"] in outcome[1]
        for number, point in zip((3, 7), way["points"], strict=True):
            assert point["classes"] == number and point["out_of_memory"] is None
            assert list(point["seconds"]) == LEVELS and point["seconds"]["min"] > 0
            assert point["extrapolated"] == (point["pairs_timed"] < 32 * 19)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    result, printed = quick(tmp_path, "--device", "cuda", "--precision", "ieee", "tf32x3", "tf32")
    assert result["machine"]["accelerator"] in printed
    assert set(result["alignment"]["rates"]["flops_per_second"]) == {"ieee", "tf32x3", "tf32"}
    names = [row["name"] for row in result["alignment"]["rows"]]
    assert {"triton_ieee", "triton_tf32x3", "triton_tf32"} <= set(names)
    for row in result["alignment"]["rows"]:
        if row["precision"] != "tf32":
            assert row["error"]["inner"] < 3e-6 and row["error"]["decisions_agree"] == 1.0
        assert row["queued_seconds"]["min"] > 0
        assert row["peak_memory_bytes"] >= 4 * row["pairs_timed"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--n", "0"], "argument --n: got '0', expected an integer >= 1"),
        (["--classes", "many"], "argument --classes: got 'many', expected an integer >= 1"),
        (["--preset", "mnist"], "argument --preset: invalid choice"),
        (["--json", "nowhere/result.json"], "argument --json: no folder"),
        (["--device", "abacus"], "argument --device: got 'abacus'"),
        (["--buffer", "0"], "argument --buffer: got '0', expected an integer >= 1"),
        (["--classes-sweep", "10", "0"], "argument --classes-sweep: got '0', expected an integer >= 1"),
        (["--precision", "fp8"], "argument --precision: invalid choice"),
        (["--plot", "picture.jpeg"], "argument --plot: got 'picture.jpeg', expected a name that ends in .png"),
        (["--plot", "nowhere/plot.svg"], "argument --plot: no folder"),
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
        ([], (256, 256, 1000, 2048, True, 20_000)),
        (["--quick"], (128, 128, 10, 256, True, 320)),
        (["--foreign"], (256, 256, 1000, 2048, False, 20_000)),
        (["--preset", "cifar10"], (256, 256, 10, 512, True, 500)),
        (["--preset", "cifar100", "--quick", "--n", "8"], (8, 8, 100, 512, True, 2000)),
        (["--preset", "cifar100", "--m", "8"], (256, 8, 100, 512, False, 2000)),
        (["--preset", "imagenet-vit"], (256, 256, 1000, 768, True, 20_000)),
        (["--preset", "imagenet21k"], (256, 256, 21_841, 768, True, 20_000)),
        (["--preset", "tiny-imagenet", "--buffer", "9"], (256, 256, 200, 512, True, 9)),
        (["--quick", "--classes", "3", "--features", "5"], (128, 128, 3, 5, True, 320)),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else "",
)
def test_sizes(script: ModuleType, arguments: list[str], sizes: tuple[int, ...]) -> None:
    assert script.parse(arguments).sizes == script.Sizes(*sizes)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], None),
        (["--classes-sweep", "30", "10", "30"], [10, 30]),
        (["--quick", "--classes-sweep"], [10, 30, 100]),
        (["--classes-sweep"], [10, 30, 100, 300, 1000, 3000, 10_000, 30_000]),
    ],
    ids=["none", "some", "quick", "default"],
)
def test_sweeps(script: ModuleType, arguments: list[str], expected: list[int] | None) -> None:
    assert script.parse(arguments).classes_sweep == expected


def test_a_plot_without_matplotlib(
    script: ModuleType,
    sweeps: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sweeps.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        script.parse(["--plot", str(tmp_path / "plot.png")])
    assert "argument --plot: it needs matplotlib, which is not installed" in capsys.readouterr().err


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
def test_truth_is_the_reference_in_float64(problems: ModuleType, shape: tuple[int, ...]) -> None:
    p = problems.make_problem(problems.Sizes(*shape), seed=1).to(torch.float64)
    p = dataclasses.replace(p, logits_a=p.features_a @ p.weight.T + p.bias, logits_b=p.features_b @ p.weight.T + p.bias)
    a, b = Side(p.features_a, p.logits_a, p.labels_a), Side(p.features_b, p.logits_b, p.labels_b)
    expected = mixed_alignment_reference(a, b, p.reference, p.lam)
    for through_head in (False, True):
        inner, norm, _ = problems.truth(p, through_head)
        torch.testing.assert_close(inner, expected.inner, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(norm, expected.norm, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_rival_does_the_work(
    problems: ModuleType, ways: ModuleType, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """All pairs, at chunks that do and do not divide them."""
    p = problems.make_problem(problems.Sizes(*shape), seed=2).stored_in(dtype)
    named = {name: (lambda q, name=name: ways.by_gradmix(q, name, "tf32x3")) for name in BODIES}
    named |= {
        "plain torch": ways.by_plain_torch,
        "plain numpy": ways.by_plain_numpy,
        "row loop": ways.by_row_loop,
        "tuned": ways.by_tuned_row_loop,
        "gradients": ways.by_gradient_row_loop,
        "broadcast at once": ways.by_broadcast_at_once,
        "embeddings at once": ways.by_embeddings_at_once,
        "autograd": ways.by_autograd,
        "reference": ways.by_reference,
    }
    for way in (ways.by_broadcast, ways.by_vmap, ways.by_jvp, ways.by_embeddings):
        named |= {f"{way.__name__} {k}": ways.Bound(way, k) for k in (1, 3, 100)}
    through_head = ("by_vmap", "by_jvp", "autograd")
    for name, run in named.items():
        expected, norm, expected_cosine = problems.truth(p, through_head=name.startswith(through_head))
        largest = expected.abs().max()
        inner, angle = run(p)
        assert inner.dtype == torch.float32 and inner.shape == shape[:2], name
        assert (inner - expected).abs().max() <= 1e-5 * largest, name
        if name.startswith("by_jvp"):
            assert angle is None
            continue
        assert angle.dtype == torch.float32 and angle.shape == shape[:2], name
        # Without the package's care a residual next to nothing keeps few digits; so does its cosine.
        differences = (angle - expected_cosine).abs()[norm > 1e-3 * norm.max()]
        assert differences.numel() == 0 or differences.max() <= (1e-4 if name.startswith("plain") else 1e-5), name


@pytest.mark.parametrize("peer", ["opacus", "backpack", "kronfluence"])
def test_other_libraries_do_the_work(problems: ModuleType, monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    peers = importlib.import_module("_selection_peers")
    p = problems.make_problem(problems.Sizes(5, 4, 6, 7), seed=4)
    found, refused = peers.usable(p)
    assert set(found) | set(refused) == set(peers.LABELS) and not set(found) & set(refused)
    if peer in refused:
        assert refused[peer].startswith(f"{peer}: ")
        pytest.skip(refused[peer])
    for problem in (p, problems.with_logits_up_to(p, 30.0), p):  # hooks of one head must not serve another
        expected, _, expected_cosine = problems.truth(problem, through_head=True)
        inner, angle = found[peer](problem, 3)
        assert (inner - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (angle is None) == (peer in peers.INNER_ONLY)
        assert angle is None or (angle - expected_cosine).abs().max() <= 1e-5


def test_what_there_is_no_room_for_is_said(
    script: ModuleType, problems: ModuleType, ways: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By counting, before anything is tried: 6 x 5 gradients of 400 bytes, and a mixture's logits twice."""
    p = problems.make_problem(problems.Sizes(6, 5, 10, 9), seed=0)
    monkeypatch.setattr(ways, "free_memory", lambda device: 2 * 2000)
    monkeypatch.setattr(ways, "by_embeddings_at_once", None)
    field = ways.make_field(p, CPU, peers=False)
    said = {way.name: str(way) for way in field.out_of_memory}
    assert said == {
        "broadcast_at_once": "out of memory: would need 2.3 KiB, has 2.0 KiB",
        "embeddings_at_once": "out of memory: would need 11.7 KiB, has 2.0 KiB",
    }
    assert [rival.name for rival in field.rivals] == [name for name in RIVALS if name not in said]
    monkeypatch.setattr(ways, "free_memory", lambda device: 2 * 300)
    assert {"vmap_grad", "embeddings"} <= {way.name for way in ways.make_field(p, CPU, peers=False).out_of_memory}


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_runs_out_of_memory_is_said(
    script: ModuleType, problems: ModuleType, ways: ModuleType, error: RuntimeError
) -> None:
    p = problems.make_problem(problems.Sizes(3, 2, 4, 5), seed=0)

    def greedy(problem: Any) -> Any:
        raise error

    field = ways.Field(
        [ways.Rival("loop", "a loop", ways.by_row_loop), ways.Rival("greedy", "greedy", greedy)], [], {}, ""
    )
    calls = {rival.name: lambda rival=rival: rival.run(p) for rival in field.rivals}
    field, warmed = script.warmed_up(field, calls, CPU, 2)
    assert list(calls) == list(warmed) == ["loop"] and [rival.name for rival in field.rivals] == ["loop"]
    assert [(way.name, str(way)) for way in field.out_of_memory] == [("greedy", "out of memory when tried")]
    broken = ways.Field([ways.Rival("greedy", "", greedy)], [], {}, "")
    with pytest.raises(ValueError, match="another"):
        script.warmed_up(broken, {"greedy": lambda: (_ for _ in ()).throw(ValueError("another"))}, CPU, 2)


def test_the_interpreter_is_not_timed(problems: ModuleType, ways: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    field = ways.make_field(problems.make_problem(problems.Sizes(3, 2, 4, 5), seed=0), CPU, peers=False)
    assert field.refused["backend triton"] == ways.INTERPRETED
    assert not any(rival.name.startswith("triton") for rival in field.rivals)


@pytest.mark.parametrize(
    ("pairs", "n", "m", "expected"),
    [(16, 256, 256, (4, 4)), (1, 5, 5, (1, 1)), (768, 32, 24, (32, 24)), (10, 100, 2, (5, 2)), (10, 2, 100, (2, 5))],
)
def test_a_sample_has_the_pairs_asked_for(
    ways: ModuleType, pairs: int, n: int, m: int, expected: tuple[int, int]
) -> None:
    assert ways.block(pairs, n, m) == expected


def test_a_wrong_rival_is_found_out(script: ModuleType, problems: ModuleType, ways: ModuleType) -> None:
    """The error columns are not blind: swapped mixing weights, or a sign, show."""
    p = problems.make_problem(problems.Sizes(9, 8, 5, 6), seed=3)
    swapped = ways.Rival("swapped", "", lambda q: ways.by_row_loop(dataclasses.replace(q, lam=1 - q.lam)))
    negated = ways.Rival("negated", "", lambda q: tuple(-v for v in ways.by_row_loop(q)))
    assert script.errors(swapped, p)["inner"] > 1e-2
    found = script.errors(negated, p)
    assert found["inner"] == pytest.approx(2, abs=1e-4) and found["decisions_agree"] == 0.0
    lost = ways.Rival("lost", "", lambda q: tuple(v * float("nan") for v in ways.by_row_loop(q)))
    assert script.errors(lost, p) == {**found, "inner": None, "cosine": None, "decisions_agree": 0.0}


def test_inputs_depend_on_the_seed_alone(problems: ModuleType) -> None:
    sizes = problems.Sizes(5, 4, 6, 7)
    before = torch.get_rng_state()
    one, same, other = (problems.make_problem(sizes, seed) for seed in (0, 0, 1))
    assert torch.equal(one.logits_a, same.logits_a) and torch.equal(one.reference, same.reference)
    assert not torch.equal(one.logits_a, other.logits_a)
    assert torch.equal(before, torch.get_rng_state())
    huge = problems.with_logits_up_to(one, 1e4)
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


def test_the_attainable_time(monkeypatch: pytest.MonkeyPatch, problems: ModuleType) -> None:
    """By hand: N = 2 own rows, C = 3, d = 4, float32."""
    rates = importlib.import_module("_rates")
    sizes = problems.Sizes(2, 2, 3, 4, own_rows=True)
    assert sizes.flops == 8 * 12 + 2 * 2 * 3 * 5 + 2 * 4 * 4 == 188
    # 2 rows of (4 + 3) numbers and a label, 15 of the reference, 2 x 4 results.
    assert sizes.least_bytes(4) == 2 * (28 + 8) + 60 + 32 == 164
    assert sizes.least_bytes(2) == 2 * (14 + 8) + 60 + 32
    slow_products = rates.Rates({"ieee": 94.0}, 1640.0)
    assert slow_products.attainable_seconds(188, 164, "ieee") == 2.0
    assert slow_products.attainable_seconds(188, 164, "tf32") == 2.0  # not measured
    slow_memory = rates.Rates({"ieee": 1880.0}, 82.0)
    assert slow_memory.attainable_seconds(188, 164, "ieee") == 2.0
    by_precision = rates.Rates({"tf32": 600.0}, 1e9).with_products_at(94.0)
    assert by_precision.flops_per_second == {"tf32": 600.0, "ieee": 94.0, "tf32x3": 200.0}
    assert by_precision.with_products_at(300.0).flops_per_second["tf32x3"] == 300.0


def test_slow_calls_have_rounds_of_their_own(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"loop": 5.0, "quick": 0.1, "slow": 2.0}
    calls: dict[str, Any] = {name: (lambda: None) for name in seconds}
    monkeypatch.setattr(
        script, "seconds_of", lambda call, device: seconds[next(name for name in calls if calls[name] is call)]
    )
    calls |= {name: (lambda name=name: name) for name in seconds}
    taken = script.in_rounds(calls, ["loop"], CPU, repeats=20, seconds=1e-9)
    assert {name: len(taken[name][name]) for name in seconds} == {"loop": 10, "quick": 10, "slow": 5}
    assert set(taken["quick"]) == {"loop", "quick"} and set(taken["slow"]) == {"loop", "slow"}


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
