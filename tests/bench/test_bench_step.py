"""The benchmarks of the training step and of the kernels: they run, and do what they say. No time is judged."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_modules import BENCH, load
from forked import run_script
from patience import PATIENCE

import gradmix
from gradmix.ops import _triton

LEVELS = ["min", "p5", "p20", "p50", "p80", "p95", "max"]
CPU = torch.device("cpu")
STEPS = [f"{variant}_{criterion}" for variant in ("mixed", "originals") for criterion in ("plain", "class", "sample")]
TASKS = [
    "mixed_alignment, N = M = 9, C = 7, d = 5",
    "mixed_alignment, N = M = 33, C = 40, d = 20",
    "class_pair_sums, classes = 7, samples a class = 2, weights = 4, d = 5",
    "cosine_alignment, L = 2, P = Q = 9, K = 33",
    "mixed_gram_alignment, L = 2, P = Q = 9, K = 33",
    "last_layer_gradient, N = 17, C = 7, d = 5",
    "draw_partners, uniform, N = 9, M = 9",
    "draw_partners, best, N = 9, M = 9",
    "draw_partners, uniform, N = 5, M = 70",
    "draw_partners, best, N = 5, M = 70",
]


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "training_step")


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "alignment_kernels")


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "tune_kernels")


def run(script: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # The package that these tests meet, and not some other one that the script might find.
    changed = {"PYTHONPATH": str(Path(gradmix.__file__).parents[1]), "PYTHONIOENCODING": "utf-8", **environment}
    return subprocess.run(
        [sys.executable, str(BENCH / script), *arguments],
        cwd=cwd,
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=PATIENCE,
    )


# ------------------------------------------------------------------------------------------------------- training step


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("step")
    done = run_script(BENCH / "training_step.py", "--quick", "--threads", "1", "--json", "result.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in folder.iterdir()] == ["result.json"]
    return json.loads((folder / "result.json").read_text(encoding="utf-8")), done.stdout


def test_a_step_is_timed_with_and_without_selection(stepped: tuple[dict[str, Any], str]) -> None:
    result, _ = stepped
    assert result["case"] == {
        "network": "resnet-tiny",
        "batch": 5,
        "replay": 4,
        "buffer": 24,
        "classes": 6,
        "dtype": "float32",
        "refresh": 100,
        "steps": 1,
    }
    found = result["step"]
    assert found["buffer_rows"] == 24 and found["features"] == 64
    assert [row["name"] for row in found["rows"]] == STEPS
    for row in found["rows"]:
        assert list(row["seconds"]) == LEVELS
        assert all(value > 0 for value in row["seconds"].values())
        assert row["samples"] == 3
        # The gradients alone are as large as the parameters.
        assert row["peak_memory_bytes"] > 4 * found["parameters"]
        assert ("share" in row) == (row["criterion"] is not None)
    for row in found["rows"]:
        if row["criterion"] is not None:
            assert list(row["share"]) == list(row["extra_over_forward"]) == list(row["selection_seconds"]) == LEVELS
            assert row["share"]["max"] < 1
            assert row["all_finite"] and 0 <= row["mixed_share"] <= 1
    assert list(found["refresh_seconds"]) == ["class", "sample"]
    assert found["absent"].keys() == {"originals_class_graph", "originals_sample_graph"}
    assert found["absent"]["originals_class_graph"] == "CUDA graphs need a CUDA device, got cpu"


def test_the_tables_name_a_forward_pass(stepped: tuple[dict[str, Any], str]) -> None:
    _, text = stepped
    assert "a forward pass of the step's 9 samples: " in text
    assert "originals_class_graph left out: CUDA graphs need a CUDA device, got cpu" in text
    assert text.count("GradMix, class") == 4 and text.count("plain Mixup") == 2


@pytest.mark.parametrize(
    ("originals", "criterion", "passes"),
    [
        (False, None, 1),
        (False, "class", 1),
        (False, "sample", 2),
        (True, None, 2),
        (True, "class", 2),
        (True, "sample", 2),
    ],
    ids=STEPS,
)
def test_a_step_makes_no_forward_pass_too_many(
    step: ModuleType, originals: bool, criterion: str | None, passes: int
) -> None:
    loop = step.Loop(step.QUICK, CPU, 0)
    mixup = None
    if criterion is not None:
        mixup = step.make_mixup(loop, step.Way(originals, criterion), 0)
        loop.select(mixup, loop.outputs())
    seen: list[int] = []
    loop.model.head.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.step(mixup, originals)
    assert seen == [loop.case.rows] * passes
    assert loop.model.training
    assert not any(torch.equal(p, q) for p, q in zip(loop.model.parameters(), before, strict=True))
    assert mixup is None or mixup.refreshes == 1


def test_another_way_takes_up_the_reference_without_a_refresh(step: ModuleType) -> None:
    loop = step.Loop(step.QUICK, CPU, 0)
    first = step.make_mixup(loop, step.Way(True, "class"), 0)
    loop.select(first, loop.outputs())
    second = step.make_mixup(loop, step.Way(False, "class"), 0, first.state_dict())
    loop.select(second, None)
    assert second.refreshes == first.refreshes == 1
    assert torch.equal(second.reference, first.reference)


def test_plain_mixup_mixes_inputs_and_labels_alike(step: ModuleType) -> None:
    loop = step.Loop(step.QUICK, CPU, 0)
    x, y = loop.mixup()
    assert x.shape == loop.x.shape and y.shape == (9, 6)
    assert torch.allclose(y.sum(1), torch.ones(9))
    share = y.gather(1, loop.y[:, None])[:, 0]
    unmixed = share > 1 - 1e-6  # a partner of the same class, or the row itself
    lam = share[~unmixed][0]
    assert torch.allclose(share[~unmixed], lam.expand(int((~unmixed).sum())), atol=1e-6)
    # Each row is lam of itself and the rest of another one.
    rest = (x - lam * loop.x) / (1 - lam)
    nearest = torch.cdist(rest.flatten(1), loop.x.flatten(1)).amin(1)
    assert nearest.max() < 1e-2


def test_a_refresh_is_spread_over_its_interval(step: ModuleType) -> None:
    figures = step.spread_refresh(0.5, 0.45, 30.0, 600)
    # 0.05 s of a refresh in every step of 0.5 s, which without selection takes 0.45 s.
    assert figures["refresh_share"] == pytest.approx(0.05 / 0.55)
    assert figures["share_with_refresh"] == pytest.approx(0.10 / 0.55)
    assert figures["steps_for_one_percent"] == pytest.approx(6000)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"network": "resnet18", "batch": 32, "replay": 32, "dtype": "float32"}),
        (["--preset", "resnet50"], {"batch": 256, "replay": 256, "buffer": 20_000, "dtype": "bfloat16", "steps": 3}),
        (["--preset", "vit-b", "--steps", "1"], {"network": "vit-b", "classes": 1000, "steps": 1}),
        (["--quick", "--refresh", "7"], {"network": "resnet-tiny", "refresh": 7}),
    ],
)
def test_presets(step: ModuleType, arguments: list[str], expected: dict[str, Any]) -> None:
    case = vars(step.parse(arguments).case)
    assert {name: case[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("script", "arguments", "word"),
    [
        ("training_step", ["--batch", "0"], "expected an integer >= 1"),
        ("training_step", ["--json", "no/such/folder/x.json"], "no folder"),
        ("alignment_kernels", ["--seconds", "-1"], "expected a positive number"),
        ("alignment_kernels", ["--device", "nonsense"], "argument --device"),
        ("tune_kernels", ["--device", "cpu", "--compile-only", "--no-compile"], "leave nothing to do"),
    ],
)
def test_what_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    arguments: list[str],
    word: str,
) -> None:
    with pytest.raises(SystemExit):
        load(monkeypatch, script).parse(arguments)
    assert word in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.parametrize("number", range(len(TASKS)), ids=TASKS)
def test_every_way_does_the_work(bodies: ModuleType, number: int) -> None:
    task = list(bodies.tasks(CPU, True))[number]
    assert task.title == TASKS[number]
    inputs = task.make(0)
    truth = task.truth(tuple(v.double() if v.is_floating_point() else v for v in inputs))
    names = [way.name for way in task.ways]
    assert "torch" in names and len(set(names)) == len(names)
    if "triton" in task.refused:
        assert not any("triton" in name or "kernel" in name for name in names)
    else:
        assert any("triton" in name for name in names)
    for way in task.ways:
        error = bodies.deviation(way.finish(inputs, way.run(inputs)), truth, task.signed)
        # The plain form's cosine, at pairs of a row with itself, has no digits: that is its own.
        counted = error["largest"][:1] if way.name == "plain" else error["largest"]
        assert all(value < 3e-6 for value in counted), (way.name, error)
        assert error["decisions_agree"] in (None, 1.0), (way.name, error)


def test_inputs_differ_from_seed_to_seed(bodies: ModuleType) -> None:
    for task in bodies.tasks(CPU, True):
        first, again, other = task.make(0), task.make(0), task.make(1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_class_sums_leave_out_a_row_with_itself(bodies: ModuleType) -> None:
    task = list(bodies.tasks(CPU, True))[2]
    h, z, y, reference, lams = (v.double() if v.is_floating_point() else v for v in task.make(0))
    inner, norm = task.truth((h, z, y, reference, lams))
    assert inner.shape == norm.shape == (4, 7, 7)
    side = gradmix.ops.mixed_alignment.Side(h, z, y)
    pairs = gradmix.ops.mixed_alignment.mixed_alignment_reference(side, side, reference, float(lams[1]))
    expected = pairs.inner[2, 3] + pairs.inner[3, 2]
    assert float(inner[1, 1, 1]) == pytest.approx(float(expected))
    expected = pairs.norm[0:2, 4:6].sum()
    assert float(norm[1, 0, 2]) == pytest.approx(float(expected))


def test_deviation_counts_errors_and_decisions(bodies: ModuleType) -> None:
    truth = (torch.tensor([4.0, -2.0, 1e-9, -1.0]).double(), torch.tensor([1, 2, 3, 4]))
    found = (torch.tensor([4.0, -1.0, -1e-9, 1.0]), torch.tensor([1, 2, 3, 4]))
    # The third is too small to be a decision; the fourth has the wrong sign.
    assert bodies.deviation(found, truth, signed=True) == {"largest": [0.5], "decisions_agree": pytest.approx(2 / 3)}
    assert bodies.deviation((found[1] * 2,), (truth[1],), signed=False) == {"largest": [], "decisions_agree": 0.0}
    nothing = bodies.deviation((torch.tensor([math.nan]),), (torch.tensor([1.0]).double(),), signed=False)
    assert math.isnan(nothing["largest"][0])


def test_kernels_end_to_end(tmp_path: Path) -> None:
    script = BENCH / "alignment_kernels.py"
    done = run_script(script, "--quick", "--threads", "1", "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [task["title"] for task in result["tasks"]] == TASKS
    assert result["rates"]["bytes_per_second"] > 0
    for task in result["tasks"]:
        assert task["bar"] == task["rows"][0]["name"]
        assert any("triton" in name and reason for name, reason in task["refused"].items())
        assert task["title"] in done.stdout
        for row in task["rows"]:
            assert list(row["seconds"]) == list(row["bar_over_this"]) == LEVELS
            assert row["share_of_attainable"] == pytest.approx(row["attainable_seconds"] / row["seconds"]["p50"])
    first = result["tasks"][0]
    n, classes, width = 9, 7, 5
    assert first["flops"] == 8 * n * n * classes + 2 * n * classes * (width + 1) + 2 * n * n * width


def test_kernels_of_no_such_title(bodies: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bodies.main(["--quick", "--only", "no such"]) == 2
    assert "no task's title holds 'no such'" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- tuning

needs_interpreter = pytest.mark.skipif(
    _triton.unavailable_reason() is not None or not _triton.is_interpreted(),
    reason="needs Triton's interpreter: triton installed, and TRITON_INTERPRET=1, which is set where there is no GPU",
)


def tuned(tuning: ModuleType, bodies: ModuleType, number: int, **changed: Any) -> dict[str, Any]:
    task = list(bodies.tasks(CPU, True))[number]
    given = {"precision": "ieee", "wide": False, "repeats": 1, "seconds": 0.01, "until": 0.0} | changed
    found = tuning.tune(task, CPU, *given.values())
    assert found is not None
    return found


@needs_interpreter
@pytest.mark.parametrize("number", [0, 3, 5, 9], ids=[TASKS[k] for k in (0, 3, 5, 9)])
def test_all_configurations_of_a_table_are_timed(tuning: ModuleType, bodies: ModuleType, number: int) -> None:
    task = list(bodies.tasks(CPU, True))[number]
    module = tuning.module_of(task)
    before = module.configuration
    found = tuned(tuning, bodies, number)
    assert module.configuration is before
    table = [" ".join(map(str, c)) for c in tuning.candidates(module, tuning.MODULES[tuning.operator_of(task)], False)]
    assert sorted(row["configuration"] for row in found["rows"]) == sorted(table)
    assert [row["configuration"] for row in found["rows"] if row["chosen"]] == [found["chosen"]]
    assert found["best"] == found["rows"][0]["configuration"]
    assert all(row["in_table"] and row["largest_difference"] < 1e-5 for row in found["rows"])
    assert found["failed"] == {} and found["chosen_over_best"]["min"] > 0


@needs_interpreter
def test_configurations_that_fail_or_come_too_late_are_named(
    tuning: ModuleType, bodies: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tuning.GRIDS, "draw_partners", ((100, 4), (64, 1)))
    found = tuned(tuning, bodies, 9, wide=True, until=time.perf_counter() + PATIENCE)
    assert set(found["failed"]) == {"100 4"}  # a block must be a power of two
    assert "64 1" in [row["configuration"] for row in found["rows"]]
    found = tuned(tuning, bodies, 9, wide=True, until=0.0)
    assert found["failed"] == {"100 4": "no time was left", "64 1": "no time was left"}


@needs_interpreter
def test_split_sums_are_timed_beside_whole_ones(
    tuning: ModuleType, bodies: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tuning.module_of(next(bodies.tasks(CPU, True)))
    counts: list[int] = []
    launch = module._launch

    def note(*arguments: Any) -> Any:
        counts.append(module.parts(1, 1))
        return launch(*arguments)

    monkeypatch.setattr(module, "parts", lambda tiles, terms: 2)
    monkeypatch.setattr(module, "_launch", note)
    found = tuned(tuning, bodies, 0)
    chosen = found["chosen"]
    assert {chosen, f"{chosen}, sums whole"} <= {row["configuration"] for row in found["rows"]}
    assert [row["configuration"] for row in found["rows"] if row["chosen"]] == [chosen]
    assert all(row["largest_difference"] < 1e-5 for row in found["rows"]) and set(counts) == {1, 2}
    assert found["whole_over_split"]["min"] > 0
    tuning.show_tuned(found)
    assert "sums whole / chosen: " in capsys.readouterr().out
    assert tuned(tuning, bodies, 3)["whole_over_split"] is None  # a class table's sums are not split


def test_every_task_has_a_kernel_module_and_a_grid(tuning: ModuleType, bodies: ModuleType) -> None:
    for task in bodies.tasks(CPU, True):
        assert tuning.MODULES[tuning.operator_of(task)] in tuning.GRIDS


def test_tuning_does_not_time_the_interpreter(
    tuning: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tuning.main(["--device", "cpu"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_compile_figures_need_no_gpu(tmp_path: Path) -> None:
    if _triton.unavailable_reason() is not None:
        pytest.skip(str(_triton.unavailable_reason()))
    done = run(
        "tune_kernels.py", "--compile-only", "--only", "draw_partners permute", "--json", "result.json",
        cwd=tmp_path, TRITON_INTERPRET="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["compiled"]
    assert {row["capability"] for row in rows} == {80, 90}
    assert all("draw_partners permute" in row["variant"] and row["registers"] > 0 for row in rows)
    assert rows[0]["variant"] in done.stdout


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def pretence(tmp_path: Path) -> dict[str, str]:
    """An environment whose python3 says what it was asked and writes an empty result; builds fail by ``NO_CUDA``."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("needs bash and timeout")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").write_text(
        "#!/usr/bin/env bash\n"
        "[[ $1 == -c ]] && { echo h100 90a-real; exit 0; }\n"
        '[[ $* == *pip* ]] && { echo "build: ${GRADMIX_CUDA:-} ${CMAKE_CUDA_ARCHITECTURES:-}"; '
        "[[ -z ${NO_CUDA:-} || ${GRADMIX_CUDA:-} == 0 ]]; exit; }\n"
        '[[ $* == *resnet50* ]] && sleep "${NAP:-0}"\n'
        'for word in "$@"; do [[ ${last:-} == --json ]] && echo "$*" >"$word"; last=$word; done\n'
        "exit 0\n"
    )
    (folder / "gradmix").write_text(
        "#!/usr/bin/env bash\n"
        "[[ $1 == experiment ]] && mkdir -p runs/experiments\n"
        'for word in "$@"; do [[ ${last:-} == --json ]] && echo "$*" >"$word"; last=$word; done\n'
        "exit 0\n"
    )
    for program in folder.iterdir():
        program.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def run_on_gpu(out: Path, pretence: dict[str, str], *stages: str, **more: str) -> Any:
    """The script with an output folder, from a copy of the checkout's folder ``bench``."""
    out.mkdir(exist_ok=True)
    shutil.copytree(BENCH, out.parent / "checkout" / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return subprocess.run(
        ["bash", str(out.parent / "checkout" / "bench" / "on_gpu.sh"), str(out), *stages],
        env={**pretence, "OUT": str(out), **more},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def read_archive(out: Path) -> dict[str, str]:
    (archive,) = out.iterdir()
    found = {}
    with tarfile.open(archive) as packed:
        for member in packed.getmembers():
            content = packed.extractfile(member) if member.isfile() else None
            if content is not None:
                found[Path(member.name).name] = content.read().decode()
    return found


def test_one_archive_holds_a_call_s_results(
    tmp_path: Path, pretence: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_on_gpu(tmp_path / "out", pretence)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "build: 1 90a-real" in done.stdout  # for this device alone, which takes half a minute
    found = read_archive(tmp_path / "out")
    assert "on_gpu.log" in found
    results = {name: text.split() for name, text in found.items() if name.endswith(".json")}
    assert {name.split("_h100")[0] for name in results} == {
        "gpu_truth", "calibration", "alignment_kernels", "training_step_resnet50", "training_step_vit-b",
        *(f"selection_throughput_{preset}" for preset in ("imagenet", "imagenet21k", "cifar10", "cifar100")),
        *(f"gradient_engine_{network}" for network in ("resnet18", "resnet50", "vit-b")),
    }  # fmt: skip
    # The scripts know the arguments that they are given.
    for name, (script, *arguments) in results.items():
        if name.startswith("calibration"):
            continue
        if "--device" in arguments:
            arguments[arguments.index("--device") + 1] = "cpu"
        arguments[arguments.index("--json") + 1] = str(tmp_path / "x.json")
        load(monkeypatch, Path(script).stem).parse(arguments)


def test_stages_fit_into_what_a_device_is_lent_for() -> None:
    lines = (BENCH / "on_gpu.sh").read_text("utf-8").splitlines()
    told = {words[1]: words[2] for words in map(str.split, lines) if len(words) > 3 and words[2].isdigit()}
    begun = {words[2]: words[3].rstrip(";") for words in map(str.split, lines) if words[:2] == ["if", "stage"]}
    assert told and told == {name: seconds for name, seconds in begun.items() if name in told}
    # 15 minutes, of which the machine's start takes two; and something must be left for the last stage.
    assert sum(map(int, told.values())) <= 780 - 120


def test_a_build_that_fails_does_not_lose_the_visit(tmp_path: Path, pretence: dict[str, str]) -> None:
    done = run_on_gpu(tmp_path / "out", pretence, "build", "truth", NO_CUDA="1")
    assert done.returncode == 1
    assert "FAILED: env GRADMIX_EXTENSION=1 GRADMIX_CUDA=1" in done.stdout and "build: 0" in done.stdout
    assert "gpu_truth_h100.json" in read_archive(tmp_path / "out")


def test_results_so_far_are_kept_when_time_runs_out(tmp_path: Path, pretence: dict[str, str]) -> None:
    done = run_on_gpu(tmp_path / "out", pretence, "kernels", "step", "engine", LIMIT="4", NAP=str(2 * PATIENCE))
    assert done.returncode == 1
    assert "FAILED: no time was left: python3 bench/gradient_engine.py" in done.stdout
    assert "alignment_kernels_h100.json" in read_archive(tmp_path / "out")


def test_truth_counts_what_every_part_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = load(monkeypatch, "gpu_truth")
    (tmp_path / "test_some.py").write_text(
        "import os, pytest, signal\n"
        "@pytest.mark.parametrize('k', range(5))\n"
        "def test_k(k):\n"
        "    if k == 1: pytest.skip('none')\n"
        "    assert k != 2, 'two is wrong'\n"
        "    if k == 4: os.kill(os.getpid(), signal.SIGKILL)\n"  # as when time is over
    )
    monkeypatch.setattr(truth, "ROOT", tmp_path)
    ids = [f"test_some.py::test_k[{k}]" for k in range(5)]
    shares = truth.split(ids, 2)
    assert shares == [ids[:3], ids[3:]]
    end = time.monotonic() + PATIENCE
    parts = [truth.run_part(share, end, tmp_path / f"{k}.jsonl") for k, share in enumerate(shares)]
    late = truth.run_part(ids, time.monotonic(), tmp_path / "late.jsonl")
    assert late == truth.Part({}, {}) and truth.summary([late], len(ids))["not_reached"] == len(ids)
    found = truth.summary(parts, len(ids))
    assert (found["passed"], found["failed"], found["skipped"], found["not_reached"]) == (2, 1, 1, 1)
    assert found["by_file"] == {"test_some": {"passed": 2, "failed": 1, "skipped": 1}}
    assert list(found["failures"]) == [ids[2], ids[3]]
    assert "two is wrong" in found["failures"][ids[2]]
    assert "ended with -9" in found["failures"][ids[3]]  # its part, by the part's first test
