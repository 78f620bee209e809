"""The command line: flags, run folders, errors in one line, Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fresh import run_python
from small_pictures import draw_small_pictures
from synthetic_runs import make_result

from gradmix import __version__, cli
from gradmix.training.config import TrainConfig, load_config, to_yaml
from gradmix.training.loop import trainer
from gradmix.training.reports.saving import save_run
from gradmix.training.runs.results import RunResult, load_run, load_runs

Calls = list[tuple[TrainConfig, str, int]]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """Replaces training by made-up results, in an empty working directory; returns the calls."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("GRADMIX_DEBUG", raising=False)
    draw_small_pictures(monkeypatch)
    calls: Calls = []

    def train_one(config: TrainConfig, method: Any, seed: int, *, on_step: Callable[..., None], **_: Any) -> RunResult:
        calls.append((config, method, seed))
        for task in (1, 2, 3):
            for step in range(5):
                done = 5 * (task - 1) + step + 1
                on_step(trainer.Progress(method, seed, task, 3, 1, 1, done, 15, 0.5 if step == 0 else None))
        own = replace(config, methods=(method,), seeds=(seed,))
        return replace(make_result(method, seed), config=own)

    monkeypatch.setattr(trainer, "train_one", train_one)
    return calls


def run(*args: str) -> int:
    return cli.main(list(args))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    (line,) = captured.splitlines()
    assert line.startswith("gradmix: error: ")
    return line


# ------------------------------------------------------------------------------------------------------------ training


def test_train_writes_runs_and_table(trained: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--methods", "er", "gradmix-class", "--seeds", "0", "1", "--output", "out") == 0
    assert [(m, s) for _, m, s in trained] == [("er", 0), ("er", 1), ("gradmix-class", 0), ("gradmix-class", 1)]
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "config.yaml", "summary.json", "summary.md", "compare.png", "er", "gradmix-class",
    }  # fmt: skip
    assert (out / "gradmix-class" / "seed-1" / "alignment.png").is_file()
    assert [(r.method, r.seed) for r in load_runs(out).values()] == [(m, s) for _, m, s in trained]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert f"{'er':<13}  seed 0  task 2 of 3" in lines
    assert any(line.startswith("gradmix-class  seed 1  average accuracy 0.") for line in lines)
    assert lines[-2] == "Run folder: out"
    assert lines[-1] == "Which classes' mixtures were kept: out/gradmix-class/seed-1/alignment.png"


def test_flags_reach_the_configuration(trained: Calls) -> None:
    flags = (
        "--methods mixup --seeds 3 --benchmark split-digits --data-dir d --class-order-seed 5 --validation 0.2 "
        "--tasks 3 --no-normalise --samples-per-class 9 --amp bf16 --channels-last --checkpoint 0 --mix-control anti "
        "--model mlp --lr 1e-3 --momentum 0.5 --weight-decay 0.1 --lr-milestones 0.5 0.75 --epochs 2 --batch 7 "
        "--augment none --replay-policy reservoir --replay-size 50 --replay-batch 9 --replay-tau 2 --mix-alpha 0.4 "
        "--mix-originals --mix-estimator mixed --mix-policy best --mix-threshold -0.5 --mix-refresh 3 "
        "--mix-candidates balanced --mix-class-samples 4 --device cpu --threads 1 --output out"
    )
    assert run("train", *flags.split()) == 0
    config = trained[0][0]
    text = """
        methods: [mixup]
        seeds: [3]
        data: {benchmark: split-digits, data_dir: d, class_order_seed: 5, validation: 0.2, tasks: 3, normalise: false,
               samples_per_class: 9}
        optim: {model: mlp, lr: 1e-3, momentum: 0.5, weight_decay: 0.1, lr_milestones: [0.5, 0.75], epochs: 2,
                batch: 7, augment: none, amp: bf16, channels_last: true}
        replay: {policy: reservoir, size: 50, batch: 9, tau: 2, stream: shuffled}
        mix: {alpha: 0.4, originals: true, estimator: mixed, policy: best, threshold: -0.5, refresh: 3,
              candidates: balanced, class_samples: 4, control: anti}
        checkpoint: 0
        device: cpu
        threads: 1
        output: out
    """
    Path("c.yaml").write_text(text)
    assert config == load_config("c.yaml")


def test_saved_config_repeats_the_run_and_flags_override_it(trained: Calls) -> None:
    assert run("train", "--methods", "gradmix-class", "--seeds", "4", "--mix-alpha", "0.3", "--output", "a") == 0
    saved = "a/gradmix-class/seed-4/config.yaml"
    assert run("train", "--config", saved, "--output", "b") == 0
    assert trained[1] == (replace(trained[0][0], output=Path("b")), "gradmix-class", 4)
    assert run("train", f"--config={saved}", "--seeds", "6", "--mix-alpha", "0.5", "--output", "c") == 0
    config, method, seed = trained[2]
    assert (method, seed, config.mix.alpha, config.optim) == ("gradmix-class", 6, 0.5, trained[0][0].optim)


def test_default_output_is_new_each_time(trained: Calls, tmp_path: Path) -> None:
    for _ in range(2):
        assert run("train", "--methods", "er", "--seeds", "0") == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(names) == 2 and all(name.startswith("split-digits-2") for name in names)


def test_a_package_that_a_method_needs_is_missed_at_once(
    trained: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)  # as if it were not installed
    assert run("train", "--methods", "er", "randaugment", "--output", "out") == 2
    assert "pip install 'gradmix[policies]'" in error_of(capsys)
    assert trained == [] and not Path("out").exists()


def test_a_draft_left_by_a_killed_process_takes_no_folder(trained: Calls) -> None:
    Path("out").mkdir()
    Path("out/.config.yaml").write_text("methods: [er")
    assert run("train", "--methods", "er", "--seeds", "0", "--output", "out") == 0
    assert load_config("out/config.yaml").methods == ("er",) and not Path("out/.config.yaml").exists()


def test_taken_output_is_refused_before_training(trained: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/mine").write_text("mine")
    assert run("train", "--output", "out") == 2
    assert "out exists and is not empty" in error_of(capsys)
    assert trained == [] and [p.name for p in Path("out").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["train", "--benchmark", "split-mnist", "--data-dir", "nowhere"], ["nowhere"]),
        (["train", "--config", "absent.yaml"], ["absent.yaml", "no such"]),
        (["train", "--config", "bad.yaml"], ["bad.yaml", "mix.alpha", "'x' (str)", "number"]),
        (["train", "--lr", "-1"], ["optim.lr", "-1.0", "above 0"]),
        (["train", "--seeds", "1", "1"], ["seeds", "twice"]),
        (["train", "--output", "bad.yaml"], ["bad.yaml", "not a folder"]),
        (["compare"], ["compare", "run folder"]),
        (["compare", "nowhere"], ["nowhere"]),
        (
            ["train", "--batch-size", "3"],
            ["unknown flag --batch-size", "train --help; did you mean '--batch'?"],
        ),
        (["train", "--seed=3"], ["unknown flag --seed", "did you mean '--seeds'?"]),
        (["train", "--learning-rate", "1"], ["unknown flag --learning-rate", "did you mean '--lr'?"]),
        (["train", "--methods", "er", "--buffer_size", "9"], ["--buffer-size", "did you mean '--replay-size'?"]),
        (["train", "--buffer", "9"], ["did you mean '--replay-size'?"]),
        (["train", "--zzz"], ["train: got the unknown flag --zzz, expected one of those of gradmix train --help"]),
        (["experiment", "digits", "--seed", "3"], ["unknown flag --seed", "did you mean '--seeds'?"]),
        (["trian"], ["trian", "train, experiment, compare, calibrate, doctor"]),
    ],
    ids=" ".join,
)
def test_errors_take_one_line(
    args: list[str], parts: list[str], trained: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.yaml").write_text("mix: {alpha: x}")
    assert run(*args) == 2
    line = error_of(capsys)
    for part in parts:
        assert part in line
    assert trained == []
    assert [p.name for p in Path().iterdir()] == ["bad.yaml"], "nothing is written"


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("fault", ["device", "first step"])
def test_training_that_cannot_begin_leaves_no_folder(
    fault: str, there: bool, trained: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("name: got 'timm:none'")

    if fault == "first step":
        monkeypatch.setattr(trainer, "train_one", fail)
    if there:
        Path("mine/out").mkdir(parents=True)
    device = "cpu" if fault == "first step" else "cuda:99"
    assert run("train", "--methods", "er", "--device", device, "--output", "mine/out") == 2
    assert ("timm:none" if fault == "first step" else "device: got 'cuda:99'") in error_of(capsys)
    assert list(Path().rglob("*")) == ([Path("mine"), Path("mine/out")] if there else [])


@pytest.mark.parametrize(
    "args", [["train", "--lr", "fast"], ["train", "--methods", "erx"], ["train", "--unknown", "1"], ["compare", "--x"]]
)
def test_bad_flags_exit_2(args: list[str], trained: Calls) -> None:
    assert run(*args) == 2
    assert trained == []


def test_debug_shows_the_traceback(trained: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADMIX_DEBUG", "1")
    with pytest.raises(ValueError, match=r"optim\.lr"):
        run("train", "--lr", "-1")


def test_failure_half_way_keeps_what_was_reached(
    trained: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = trainer.train_one

    def fails_second(config: TrainConfig, method: Any, seed: int, **others: Any) -> RunResult:
        if seed == 1:
            raise ValueError("the second run\nis broken")
        return good(config, method, seed, **others)

    monkeypatch.setattr(trainer, "train_one", fails_second)
    assert run("train", "--methods", "er", "--seeds", "0", "1", "--output", "out") == 2
    assert error_of(capsys) == "gradmix: error: the second run is broken"
    assert load_run("out/er/seed-0").seed == 0
    assert Path("out/summary.md").is_file() and not Path("out/er/seed-1").exists()


# ------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("where", ["within training", "between runs"])
def test_ctrl_c_saves_and_stops(
    where: str, trained: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = trainer.train_one

    def stopped(config: TrainConfig, method: Any, seed: int, **others: Any) -> RunResult:
        if seed == 0:
            return good(config, method, seed, **others)
        if where == "between runs":
            raise KeyboardInterrupt
        return replace(make_result(method, seed, reached=1), config=replace(config, methods=(method,), seeds=(seed,)))

    monkeypatch.setattr(trainer, "train_one", stopped)
    assert run("train", "--methods", "er", "mixup", "--seeds", "0", "1", "--output", "out") == 130
    captured = capsys.readouterr()
    assert "the results so far are in out" in captured.err and "Traceback" not in captured.err
    assert "Run folder: out" in captured.out
    statuses = {r.seed: r.status for r in load_runs("out").values()}
    assert statuses == ({0: "complete", 1: "interrupted"} if where == "within training" else {0: "complete"})
    assert Path("out/summary.json").is_file() and not Path("out/mixup").exists()
    if where == "within training":
        assert "er, seed 1: interrupted after 1 of 3 tasks" in " ".join(captured.out.split())


def test_ctrl_c_waits_for_a_result_to_be_saved(trained: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmix.training.reports import saving

    def interrupted_save(result: RunResult, folder: Path) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return save_run(result, folder)

    monkeypatch.setattr(saving, "save_run", interrupted_save)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background
    assert run("train", "--methods", "er", "--seeds", "0", "1", "--output", "out") == 130
    assert [r.seed for r in load_runs("out").values()] == [0]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_anything(
    trained: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gradmix.training.streams import benchmarks

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmarks, "stream_of", stop)
    assert run("train") == 130
    assert capsys.readouterr().err == "gradmix: interrupted\n"


# ---------------------------------------------------------------------------------------------------------- comparing


@pytest.fixture
def saved(trained: Calls) -> Path:
    for method in ("er", "gradmix-class"):
        for seed in (0, 1):
            save_run(make_result(method, seed), f"runs/{method}/seed-{seed}")
    return Path("runs")


def test_compare_parents_and_runs(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", str(saved)) == 0
    whole = capsys.readouterr().out
    assert "gradmix-class - er" in whole and "split-digits" in whole
    # The parent and one of its runs: no run counts twice.
    assert run("compare", str(saved / "er"), str(saved / "gradmix-class"), str(saved / "er" / "seed-0")) == 0
    assert capsys.readouterr().out == whole


def test_compare_formats_and_output(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", str(saved), "--format", "markdown", "--output", "cmp") == 0
    assert capsys.readouterr().out == Path("cmp/summary.md").read_text(encoding="utf-8")
    assert {p.name for p in Path("cmp").iterdir()} == {"summary.json", "summary.md", "compare.png"}
    assert run("compare", str(saved), "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["label"] == "gradmix-class"
    assert run("compare", str(saved), "--output", "cmp") == 2
    assert "cmp exists and is not empty" in error_of(capsys)


def test_compare_refuses_two_benchmarks(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(make_result("er", 7, benchmark="split-mnist"), "other")
    assert run("compare", str(saved), "other") == 2
    assert (
        "different benchmarks cannot be compared: split-digits (such as runs/er/seed-0), split-mnist (such as other)"
        in error_of(capsys)
    )


def test_compare_leaves_out_folders_without_a_run(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", str(saved)) == 0
    whole = capsys.readouterr().out
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text(to_yaml(TrainConfig()))
    Path("notes.txt").write_text("mine")
    assert run("compare", "begun", "notes.txt", str(saved)) == 0
    captured = capsys.readouterr()
    assert captured.out == whole
    assert captured.err == "gradmix: left out, no finished run in it: begun, notes.txt\n"
    assert run("compare", "begun", "notes.txt") == 2
    assert "no finished run in begun, notes.txt, expected one in one of them" in error_of(capsys)
    assert run("compare", "begun") == 2
    assert "begun: no finished run in it" in error_of(capsys)
    assert run("compare", "begun", "absent", str(saved)) == 2
    assert "absent: no such run folder" in error_of(capsys)


def test_compare_counts_a_repeated_run_once(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", str(saved)) == 0
    whole = capsys.readouterr().out
    for method in ("er", "gradmix-class"):
        for seed in (0, 1):
            save_run(make_result(method, seed), f"again/{method}/seed-{seed}")
    save_run(make_result("er", 0, reached=1), "cut/er/seed-0")
    assert run("compare", "cut", str(saved), "again") == 0
    captured = capsys.readouterr()
    assert captured.out == whole
    assert captured.err.splitlines() == [
        "gradmix: 1 run in cut interrupted, of which runs has more: left out",
        "gradmix: 4 runs in again with the same result, to the bit, as in runs: counted once",
    ]


def test_compare_names_the_folders_of_different_results(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(make_result("er", 1, level=0.5), "other/er/seed-1")
    assert run("compare", str(saved), "other") == 2
    assert error_of(capsys) == (
        "gradmix: error: er with seed 1 is there twice with the same settings and different results: in runs and in "
        "other; expected one of them: give the folders to compare without the other"
    )


# --------------------------------------------------------------------------------------------- help, version, doctor


@pytest.mark.parametrize("command", [[], ["train"], ["experiment"], ["compare"], ["calibrate"], ["doctor"]])
def test_help_is_complete_and_fits(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(*command, "--help") == 0
    text = capsys.readouterr().out
    flat = " ".join(text.replace("│", " ").split())
    expected = {
        (): ["train", "experiment", "compare", "calibrate", "doctor", "--version"],
        ("train",): [
            "--config",
            "--resume",
            "--methods",
            "--data-dir",
            "--lr",
            "--replay-size",
            "--mix-alpha",
            "Beta(alpha, alpha)",
        ],
        ("experiment",): ["NAME_OR_FILE", "--jobs", "--report-only", "--dry-run", "--list", "results.json"],
        ("compare",): ["RUN", "--output", "--format"],
        ("calibrate",): ["--device", "--quick", "--json"],
        ("doctor",): ["--json"],
    }[tuple(command)]
    for part in expected:
        assert part in flat
    assert "None" not in flat, "what None means stands as the default"
    assert max(len(line) for line in text.splitlines() if not line.startswith("usage")) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"gradmix {__version__}\n"


def test_no_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "usage: gradmix" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    assert "torch" in capsys.readouterr().out
    assert run("doctor", "--json") == 0
    assert "versions" in json.loads(capsys.readouterr().out)


def test_as_a_module() -> None:
    code = (
        "import runpy, sys; sys.argv = ['gradmix', '--version']\n"
        "try: runpy.run_module('gradmix.cli', run_name='__main__')\n"
        "except SystemExit as stop: print(stop.code)"
    )
    assert run_python(code) == [f"gradmix {__version__}", "0"]


@pytest.mark.parametrize("absent", ["tyro", "rich", "yaml", "matplotlib", "scipy", "sklearn"])
def test_missing_package_is_named(
    absent: str, trained: Calls, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name))
    assert run("train") == 2
    line = error_of(capsys)
    assert {"yaml": "pyyaml", "sklearn": "scikit-learn"}.get(absent, absent) in line
    assert 'pip install "gradmix[train]"' in line and trained == []


def test_core_commands_need_core_packages_only() -> None:
    code = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'yaml', 'matplotlib', 'scipy', 'sklearn'): sys.modules[name] = None\n"
        "from gradmix import cli\n"
        "assert cli.main(['--version']) == cli.main(['--help']) == 0\n"
        "assert not [name for name in sys.modules if name.startswith('gradmix.training')]\n"
        "assert cli.main(['doctor']) == 0\n"
    )
    assert any(line.startswith("gradmix ") for line in run_python(code))


def test_config_of_defaults_is_no_change(trained: Calls) -> None:
    Path("c.yaml").write_text(to_yaml(TrainConfig()))
    few = ("--methods", "er", "--seeds", "0")
    assert run("train", *few, "--config", "c.yaml", "--output", "a") == 0
    assert run("train", *few, "--output", "b") == 0
    (first, _, _), (second, _, _) = trained
    assert replace(first, output=None) == replace(second, output=None)


# -------------------------------------------------------------------------------------------------------- end to end


def test_real_training_repeats_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run(
            "train", *["--methods", "gradmix-class", "--seeds", "0", "--epochs", "1", "--threads", "1", "--output", "a"]
        )
        == 0
    )
    assert run("train", "--config", "a/gradmix-class/seed-0/config.yaml", "--output", "b") == 0
    first, second = load_run("a/gradmix-class/seed-0"), load_run("b/gradmix-class/seed-0")
    assert first.status == "complete" and first.accuracy.shape == (5, 5)
    assert (first.accuracy == second.accuracy).all() and first.config == second.config
    assert len(first.alignments) > 0
    pictures = [
        Path("a/compare.png"),
        *(Path(f"a/gradmix-class/seed-0/{n}.png") for n in ("curve", "heatmap", "alignment")),
    ]
    assert all(file.stat().st_size > 10_000 for file in pictures), "drawn in full"
    assert "average accuracy" in capsys.readouterr().out
