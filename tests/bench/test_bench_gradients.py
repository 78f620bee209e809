"""The benchmark of the gradient engine: it runs, what it writes is whole, and every way really does the work."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_modules import BENCH, load
from forked import run_script
from gradient_truth import by_class, sample_gradients
from torch import nn

SCRIPT = BENCH / "gradient_engine.py"
LEVELS = ["min", "p5", "p20", "p50", "p80", "p95", "max"]
CPU = torch.device("cpu")

# torch's own forward-mode differentiation uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these gain nothing from threads, which on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "gradient_engine")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_peers")


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_networks")


def quick(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    path = folder / "result.json"
    done = run_script(SCRIPT, "--quick", "--json", str(path), *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in folder.iterdir()] == ["result.json"]
    return json.loads(path.read_text(encoding="utf-8")), done.stdout


# ----------------------------------------------------------------------------------------------------- the whole script


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    return quick(tmp_path_factory.mktemp("bench"), "--threads", "1", "--no-peers", "--repeats", "2")


def test_result_names_its_conditions(outcome: tuple[dict[str, Any], str]) -> None:
    result, _ = outcome
    assert result["benchmark"] == "gradient_engine"
    assert {"cpu", "cores", "threads", "torch", "gradmix", "date", "load", "peers"} <= set(result["machine"])
    assert result["machine"]["threads"] == 1
    assert result["case"] == {
        "network": "resnet-tiny",
        "norm": "batch",
        "batch": 8,
        "classes": 3,
        "rank": 4,
        "dtype": "float32",
    }
    assert result["arguments"]["quick"] is True and result["arguments"]["peers"] is False
    found = result["gradients"]
    assert found["parameters"] == 78_002 and found["layers"] == 25
    first, second = found["first_calls_with_two_rows_seconds"]
    assert first > 0 and second > 0
    assert set(found["matrices_seconds"]) == set(found["sketch_entries"]) == {"4", "8"}
    assert "gradmix_cuda" in found["left_out"]


def test_every_row_is_whole(outcome: tuple[dict[str, Any], str]) -> None:
    result, _ = outcome
    rows = {row["name"]: row for row in result["gradients"]["rows"]}
    left_out = result["gradients"]["left_out"]
    ours = {f"gradmix_{key}" for key in ("4", "8", "torch", "cpp", "cuda", "last", "inner")}
    plain = {"forward_backward", "input_gradients", "hooks", "jvp", "vmap_grad", "row_loop"}
    assert set(rows) | set(left_out) == ours | plain and not set(rows) & set(left_out)
    assert plain | {"gradmix_4", "gradmix_8", "gradmix_torch", "gradmix_last", "gradmix_inner"} <= set(rows)
    for row in rows.values():
        for times in (row["seconds"], row["over_forward_backward"]):
            assert list(times) == LEVELS
            assert list(times.values()) == sorted(times.values()) and times["min"] > 0
        assert row["samples"] == 2
        assert row["peak_memory_bytes"] > 0
        assert row["extrapolated"] == (row["rows_timed"] < 8)
        assert row["prepare_seconds"] >= 0 and row["first_call_seconds"] > 0
    assert set(rows["forward_backward"]["over_forward_backward"].values()) == {1.0}
    assert rows["gradmix_8"]["rank"] == 8 and rows["gradmix_4"]["rank"] == 4
    assert rows["gradmix_last"]["layer_names"] == ["head"] and rows["gradmix_4"]["layer_names"] is None


def test_errors_are_small(outcome: tuple[dict[str, Any], str]) -> None:
    for row in outcome[0]["gradients"]["rows"]:
        error = row["error"]
        expected = {"sketches": {"sketch", "squares", "cosine"}, "inner": {"inner"}, "nothing": set()}[row["gives"]]
        assert {kind for kind, value in error.items() if value is not None} == expected, row["name"]
        for kind in expected - {"cosine"}:
            assert 0 <= error[kind]["median"] < 5e-6, (row["name"], kind, error)
            assert error[kind]["median"] <= error[kind]["max"] < 1e-2, (row["name"], kind, error)
        if row["gives"] == "sketches":
            assert 0 < error["cosine"]["rms"] < 1, row["name"]


def test_tables_show_every_row(outcome: tuple[dict[str, Any], str]) -> None:
    result, printed = outcome
    for row in result["gradients"]["rows"]:
        assert row["label"] in printed
        assert (row["label"] + " *" in printed) == row["extrapolated"]
    for name, reason in result["gradients"]["left_out"].items():
        assert f"{name} left out: {reason}" in printed
    assert "resnet-tiny with BatchNorm in evaluation mode, 78,002 parameters in 25 layers; N = 8 samples" in printed


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    result, printed = quick(tmp_path, "--device", "cuda", "--no-peers")
    assert result["machine"]["accelerator"] in printed and "TF32 off" in printed
    for row in result["gradients"]["rows"]:
        for kind in ("sketch", "squares", "inner"):
            assert row["error"][kind] is None or row["error"][kind]["median"] < 1e-5, row["name"]


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--batch", "0"], "argument --batch: got '0', expected an integer >= 1"),
        (["--rank", "many"], "argument --rank: got 'many', expected an integer >= 1"),
        (["--network", "vgg"], "argument --network: invalid choice"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--classes", "11"], "argument --classes: got 11, expected at most the 10 of resnet18"),
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
    ("arguments", "case"),
    [
        ([], ("resnet18", "batch", 32, 10, 16, "float32")),
        (["--quick"], ("resnet-tiny", "batch", 8, 3, 4, "float32")),
        (["--preset", "resnet50"], ("resnet50", "batch", 256, 10, 16, "bfloat16")),
        (["--preset", "vit-b", "--rank", "32"], ("vit-b", "batch", 256, 10, 32, "bfloat16")),
        (["--network", "vit-small", "--batch", "64"], ("vit-small", "batch", 64, 10, 16, "float32")),
        (["--quick", "--norm", "group", "--classes", "2"], ("resnet-tiny", "group", 8, 2, 4, "float32")),
    ],
    ids=lambda value: " ".join(value) or "default" if isinstance(value, list) else "",
)
def test_cases(script: ModuleType, arguments: list[str], case: tuple[Any, ...]) -> None:
    assert script.parse(arguments).case == script.Case(*case)


# ---------------------------------------------------------------------------------------------------------- the problem

CASES = {
    # name: (network, norm, batch, classes, rank)
    "resnet": ("resnet-tiny", "batch", 7, 3, 4),
    "resnet, GroupNorm": ("resnet-tiny", "group", 5, 2, 3),
    "rank above most sides": ("resnet-tiny", "batch", 4, 4, 40),
    "transformer": ("vit-tiny", "batch", 6, 4, 5),
    "one class": ("vit-tiny", "batch", 3, 1, 2),
    "two rows": ("resnet-tiny", "batch", 2, 10, 2),
}


def double(script: ModuleType, case: tuple[Any, ...], seed: int = 3) -> Any:
    """The problem in float64, in which every way must agree to rounding."""
    p = script.make_problem(script.Case(*case), CPU, seed)
    model = copy.deepcopy(p.model).double()
    direction = {name: value.double() for name, value in p.direction.items()}
    frozen = copy.deepcopy(model).requires_grad_(False)
    return script.replace(p, model=model, frozen=frozen, x=p.x.double(), direction=direction)


def prepared(script: ModuleType, case: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    p = double(script, case)
    plan = script.make_plan(p, case[4], seed=5)
    return p, plan, script.find_truth(p, {plan.rank: plan})


def largest_errors(script: ModuleType, way: Any, gives: str, plan: Any, truth: Any, p: Any) -> dict[str, float]:
    rival = script.Rival("", "", lambda: way(len(p.y)), gives, plan, len(p.y))
    found = script.errors(rival, truth)
    return {kind: error["max"] for kind, error in found.items() if error is not None and kind != "cosine"}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_truth_is_a_loop_over_samples(script: ModuleType, case: tuple[Any, ...]) -> None:
    p, plan, truth = prepared(script, case)
    each = sample_gradients(p.model, p.x, p.y)
    for name, expected in by_class(each, p.y, torch.arange(p.classes)).items():
        torch.testing.assert_close(truth.sums[name], expected, rtol=1e-10, atol=1e-14)
    inner = sum((g * p.direction[name]).flatten(1).sum(1) for name, g in each.items())
    torch.testing.assert_close(truth.inner.sum(1), inner, rtol=1e-10, atol=1e-14)
    flat = torch.cat([g.flatten(1) for g in truth.sums.values()], 1)
    expected = nn.functional.normalize(flat) @ nn.functional.normalize(flat).T
    torch.testing.assert_close(truth.cosines(plan.names), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_way_does_the_work(script: ModuleType, case: tuple[Any, ...]) -> None:
    """At chunks that do and do not divide the rows."""
    p, plan, truth = prepared(script, case)
    whole = script.vmap_gradients(p.model)
    ways = {f"vmap {k}": script.by_samples(p, plan, whole, k) for k in (1, 2, 100)}
    ways["loop"] = script.by_samples(p, plan, script.loop_gradients(p.model), 3)
    ways["hooks"] = script.by_hooks(p, plan)
    ways["gradmix"] = script.by_gradmix(p, plan, "all", 5, "auto")
    for name, way in ways.items():
        for _ in range(2):  # hooks must not remember the first call
            found = largest_errors(script, way, "sketches", plan, truth, p)
            assert set(found) == {"sketch", "squares"} and max(found.values()) < 1e-9, (name, found)
    last = plan.only(["head"])
    found = largest_errors(script, script.by_gradmix(p, last, ["head"], 5, "auto"), "sketches", last, truth, p)
    assert max(found.values()) < 1e-9
    for way in (script.by_jvp(p), script.by_gradmix_directions(p)):
        found = largest_errors(script, way, "inner", plan, truth, p)
        assert set(found) == {"inner"} and found["inner"] < 1e-9


def test_a_wrong_way_is_found_out(script: ModuleType) -> None:
    """The errors are not blind: a lost row, a sign, another matrix, a NaN, another direction."""
    p, plan, truth = prepared(script, CASES["resnet"])
    right = script.by_samples(p, plan, script.vmap_gradients(p.model), 4)

    def spoilt(change: Any) -> dict[str, float]:
        def way(rows: int) -> Any:
            result = right(rows)
            change(result)
            return result

        return largest_errors(script, way, "sketches", plan, truth, p)

    assert largest_errors(script, lambda rows: right(rows - 1), "sketches", plan, truth, p)["sketch"] > 1e-2
    assert spoilt(lambda r: r.sums.neg_())["sketch"] == pytest.approx(2)
    assert spoilt(lambda r: r.squares[0, 2].mul_(2))["squares"] == pytest.approx(1)
    nan = spoilt(lambda r: r.sums[0, 0].fill_(torch.nan))["sketch"]
    assert nan != nan
    other_seed = script.by_gradmix(p, plan, "all", 6, "auto")
    assert largest_errors(script, other_seed, "sketches", plan, truth, p)["sketch"] > 0.5
    negated = {name: -value for name, value in p.direction.items()}
    inner = largest_errors(script, script.by_jvp(script.replace(p, direction=negated)), "inner", plan, truth, p)
    assert inner["inner"] == pytest.approx(2)


def test_problem_depends_on_the_seed_alone(script: ModuleType) -> None:
    case = script.Case("resnet-tiny", batch=6, classes=4)
    before = torch.get_rng_state()
    one, same, other = (script.make_problem(case, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.x, same.x) and torch.equal(one.y, same.y) and not torch.equal(one.x, other.x)
    for name, value in one.direction.items():
        assert torch.equal(value, same.direction[name])
    assert one.y.unique().tolist() == [0, 1, 2, 3]
    assert not one.model.training and not any(q.requires_grad for q in one.frozen.parameters())


def test_a_part_of_a_plan(script: ModuleType) -> None:
    p = double(script, CASES["transformer"])
    plan = script.make_plan(p, 3, seed=0)
    names = [plan.names[5], plan.names[1]]
    part = plan.only(names)
    assert part.names == (plan.names[1], plan.names[5])  # in the network's order
    gradients = sample_gradients(p.model, p.x, p.y)
    whole, some = plan.project(gradients), part.project(gradients)
    expected = torch.cat([whole[:, plan.layers[k].part] for k in (1, 5)], 1)
    assert torch.equal(some, expected) and some.shape[1] == part.width


# --------------------------------------------------------------------------------------------------------- the networks


@pytest.mark.parametrize(
    ("name", "norm", "parameters"),
    [
        ("resnet18", "batch", 11_173_962),
        ("resnet18", "group", 11_173_962),
        ("resnet50", "batch", 25_557_032),
        ("vit-b", "batch", 86_567_656),
    ],
)
def test_sizes_of_the_networks(networks: ModuleType, name: str, norm: str, parameters: int) -> None:
    """Those known of these networks."""
    network = networks.NETWORKS[name]
    with torch.device("meta"):
        model = network.build(norm, network.classes)
        logits = model(torch.empty(2, 3, network.image, network.image))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert logits.shape == (2, network.classes)
    kinds = {type(m) for m in model.modules()}
    assert (nn.BatchNorm2d in kinds) == (norm == "batch" and "resnet" in name)
    assert (nn.GroupNorm in kinds) == (norm == "group")


def test_batch_norms_have_seen_rows(networks: ModuleType) -> None:
    model = networks.make_network("resnet-tiny")
    assert not any(m.training for m in model.modules())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 12
    for norm in norms:
        assert int(norm.num_batches_tracked) == 1 and float(norm.running_mean.abs().max()) > 0
    with torch.no_grad():
        logits = model(torch.randn(8, 3, 16, 16))
    assert float(logits.abs().max()) < 20


# ------------------------------------------------------------------------------------------------------------ the peers


def test_a_peer_that_is_not_installed_is_left_out(
    script: ModuleType, peers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(peers.importlib.metadata, "version", missing)
    assert set(peers.versions().values()) == {None}
    p = script.make_problem(script.Case("resnet-tiny", batch=4, classes=2), CPU, 0)
    competitors = script.Rivals(p, {2: script.make_plan(p, 2, 0)}, 0)
    competitors.add_plain()
    plain = [rival.name for rival in competitors.rivals]
    competitors.add_peers()
    assert [rival.name for rival in competitors.rivals] == plain
    assert competitors.absent == {
        "opacus": "opacus: package opacus is not installed",
        "backpack": "backpack: package backpack-for-pytorch is not installed",
        "dattri": "dattri: package dattri is not installed",
        "kronfluence": "kronfluence: package kronfluence is not installed",
        "trak": "trak: package traker is not installed",
    }


@pytest.mark.parametrize("case", [CASES["resnet"], CASES["transformer"]], ids=["resnet", "transformer"])
@pytest.mark.parametrize("peer", ["opacus", "backpack", "dattri", "kronfluence", "trak"])
def test_peers_do_the_work(script: ModuleType, peers: ModuleType, peer: str, case: tuple[Any, ...]) -> None:
    """Where they are installed: within what float32 allows of the truth."""
    version = peers.versions()[peers.PACKAGES[peer]]
    if version is None:
        pytest.skip(f"{peers.PACKAGES[peer]} is not installed")
    if peer == "backpack" and case[0] == "vit-tiny":
        pytest.skip("backpack has no rules for the layers of a transformer")
    p = script.make_problem(script.Case(*case), CPU, 3)
    plan = script.make_plan(p, case[4], 5)
    truth = script.find_truth(p, {plan.rank: plan})
    competitors = script.Rivals(p, {plan.rank: plan}, 5)
    competitors.add_plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        competitors.add_peers()
        rival = next(r for r in competitors.rivals if r.name == peer)
        found = script.errors(rival, truth)
    kinds = {"kronfluence": {"inner"}, "dattri": {"cosine"}, "trak": {"sketch"}}
    assert {k for k, v in found.items() if v is not None} == kinds.get(peer, {"sketch", "squares", "cosine"})
    for kind in ("sketch", "squares", "inner"):
        assert found[kind] is None or found[kind]["median"] < 1e-5, (kind, found)
    if peer == "dattri":
        assert found["cosine"]["rms"] < 3 / case[4]


# ---------------------------------------------------------------------------------------------------------- the timing


def test_times_of_parts_are_extrapolated(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part's time is scaled, and what it comes on top of is added, both from the same round."""
    plan = script.Plan(1, ())
    clock = {"forward_backward": 1.0, "rows": 3.0, "columns": 5.0}
    rivals = [
        script.Rival("forward_backward", "", lambda: None, "nothing", plan, 8),
        script.Rival("rows", "", lambda: None, "sketches", plan, 2, group="samples", sample=lambda: None, scale=4.0),
        script.Rival(
            "columns", "", lambda: None, "block", plan, 8, group="columns", sample=lambda: None, scale=10.0, plus="rows"
        ),
    ]
    seen: list[list[str]] = []

    def interleaved(calls: dict[str, Any], device: torch.device, **limits: Any) -> dict[str, list[float]]:
        seen.append(sorted(calls))
        return {name: [clock[name], 2 * clock[name]] for name in calls}

    monkeypatch.setattr(script, "interleaved", interleaved)
    samples, warmed = script._times(rivals, CPU, repeats=2, warmups=2, seconds=1.0)
    assert seen == [["forward_backward"], ["forward_backward", "rows"], ["columns", "forward_backward", "rows"]]
    assert samples["batch"] == {"forward_backward": [1.0, 2.0]}
    assert samples["samples"] == {"forward_backward": [1.0, 2.0], "rows": [12.0, 24.0]}
    assert samples["columns"]["columns"] == [62.0, 124.0]
    assert warmed == {"forward_backward": 2, "rows": 2, "columns": 0}
