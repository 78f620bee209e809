"""Verdicts, the file that keeps them, and the choice that obeys them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_stand_in import (
    CPU,
    KEY,
    agree,
    choose,
    corners,
    install,
    make_cell,
    make_measurement,
    make_problem,
    make_table,
    start_processes,
    write_often,
)
from models import MLP

from gradmix import doctor
from gradmix.calibration import agreement, key, lookup, summary, table
from gradmix.calibration.key import key_of
from gradmix.calibration.lookup import CalibratedWorth
from gradmix.calibration.table import TableError, find, path_of, read, write
from gradmix.calibration.verdicts import Call, Measurement, Verdicts
from gradmix.estimators import resolve
from gradmix.estimators.base import Network
from gradmix.ops.mixed_alignment import OPERATOR as MIXED_ALIGNMENT


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    install(monkeypatch, tmp_path)
    yield
    lookup.forget()


def call(samples: tuple[int, int] = (8, 8), features: int = 5, dtype: str = "float32", kind: str = "") -> Call:
    return Call(dtype, kind, {"samples": samples, "features": (features, features)})


def refusal(*measurements: Measurement, of: Call | None = None, **lost: str) -> str | None:
    return Verdicts(measurements, lost.get("lost", {})).refusal("gram", "triton", of or call())


# ------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("asked", "reason"),
    {
        "at a corner": (call(), None),
        "between the corners": (call((20, 31), 7), None),
        "up to the largest": (call((8, 64), 50), None),
        "below": (call((7, 8)), "samples 7 is outside of the 8 to 64"),
        "above": (call((64, 65)), "samples 65 is outside of the 8 to 64"),
        "above on another axis": (call(features=51), "features 51 is outside of the 5 to 50"),
        "another dtype": (call(dtype="float16"), "not been measured on this device for float16"),
        "another kind": (call(kind="label vectors"), "not been measured on this device for label vectors, float32"),
    }.values(),
)
def test_a_call_is_on_where_the_enclosing_cells_won(asked: Call, reason: str | None) -> None:
    found = refusal(*corners(), of=asked)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(("low", "on"), [(1.05, True), (1.0499, False), (0.5, False), (9.0, True)])
def test_five_per_cent_in_the_lower_quantile_at_every_corner(low: float, on: bool) -> None:
    cells = corners()
    cells[3] = make_measurement(64, 50, low)
    assert (refusal(*cells, of=call((9, 9), 6)) is None) == on
    assert refusal(*cells) is None, "the slow corner does not enclose the smallest call"
    if not on:
        expected = (
            f"on this device it was {low:.2f} times as fast as torch at samples 64, features 50, and is used from"
        )
        assert expected in str(refusal(*cells, of=call((9, 9), 6)))


def test_sizes_between_the_two_sides_of_the_pairs_count() -> None:
    cells = [*corners(), *(make_measurement(32, features, 0.9) for features in (5, 50))]
    assert refusal(*cells, of=call((8, 8))) is None and refusal(*cells, of=call((64, 64))) is None
    assert "at samples 32" in str(refusal(*cells, of=call((8, 64))))


@pytest.mark.parametrize("status", ["wrong", "crashed"])
@pytest.mark.parametrize("timed", [True, False])
def test_one_faulty_cell_switches_off_its_dtype(status: Any, timed: bool) -> None:
    other = [replace(m, cell=replace(m.cell, dtype="bfloat16")) for m in corners()]
    bad = Measurement(make_cell(61, 3, timed=timed, kind="odd"), status, "a sentence")
    assert refusal(*corners(), *other, bad) == (
        f"it is off on this device: {status} at odd, float32, samples 61, features 3: a sentence"
    )
    assert refusal(*corners(), *other, bad, of=call(dtype="bfloat16")) is None


def test_a_lost_operator_is_off_in_every_dtype() -> None:
    lost = {"gram triton": "crashed at samples 8: the process was ended by SIGSEGV"}
    assert refusal(*corners(), lost=lost) == f"it is off on this device: {lost['gram triton']}"
    assert refusal(*corners(), lost={"gram cuda": "crashed"}) is None


def test_a_corner_that_was_skipped_is_not_measured() -> None:
    cells = corners()
    cells[3] = Measurement(cells[3].cell, "skipped", "the device's memory does not suffice")
    assert "not been measured on this device at samples 64, features 50" in str(refusal(*cells, of=call((9, 9), 6)))
    assert refusal(*cells) is None


# ----------------------------------------------------------------------------------------------------------------- file


def saved(*measurements: Measurement, **values: Any) -> Path:
    made = make_table(*(measurements or corners()), **values)
    path = path_of(made.key)
    write(made, path)
    return path


def test_a_table_is_read_as_it_was_written() -> None:
    odd = Measurement(make_cell(61, 3, timed=False), "wrong", "a sentence", None, 2.5)
    made = make_table(*corners(), odd, quick=True)
    made = replace(made, verdicts=replace(made.verdicts, lost={"gram cuda": "crashed"}))
    path = path_of(KEY)
    write(made, path)
    assert read(path).as_text() == made.as_text() and find(KEY).path == path
    assert read(path).verdicts.measurements == made.verdicts.measurements
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("component", KEY)
def test_a_table_of_another_key_is_ignored_and_the_difference_named(component: str) -> None:
    path = saved()
    here = KEY | {component: "another"}
    found = find(here)
    assert found.table is None
    if component == "device":
        assert found.problem is None  # it is the table of another device, not an old one of this
    elif component in ("kernels", "build"):
        assert found.problem == f"{path}: it was made with another {key.COMPONENTS[component]}"
    else:
        name = key.COMPONENTS[component]
        assert found.problem == f"{path}: it was made with {name} some {component}, this is another"
    # Both stand side by side: another environment does not take this one's table away.
    write(make_table(*corners(), key=here), path_of(here))
    assert find(here).table is not None and find(KEY).table is not None


def test_the_latest_of_several_old_tables_is_named() -> None:
    saved(key=KEY | {"triton": "3.5"}, measured="2025-01-01T00:00:00+00:00")
    saved(key=KEY | {"triton": "3.6"}, measured="2026-01-01T00:00:00+00:00")
    assert str(find(KEY).problem).endswith("it was made with triton 3.6, this is some triton")


def test_a_file_under_the_name_of_another_key_is_not_believed() -> None:
    path = path_of(KEY)
    write(make_table(*corners(), key=KEY | {"driver": "old"}), path)
    assert find(KEY).table is None and "made with driver old" in str(find(KEY).problem)


def change(**values: Any) -> str:
    return json.dumps(json.loads(make_table(*corners()).as_text()) | values)


@pytest.mark.parametrize(
    ("text", "problem"),
    {
        "empty": ("", "damaged: Expecting value"),
        "cut off": (change()[:-200], "damaged: "),
        "not UTF-8": ("\udcff", "damaged: 'utf-8' codec"),
        "no object": ("[]", "got schema None, expected 1"),
        "no schema": ("{}", "got schema None, expected 1"),
        "a later schema": (change(schema=2), "got schema 2, expected 1, which this version of gradmix reads"),
        "no measurements": (change(measurements=None), "damaged: TypeError"),
        "a field too few": (change(measurements=[{"cell": {}}]), "damaged: KeyError"),
        "a field too many": (change(measurements=[corners()[0].as_values() | {"more": 1}]), "damaged: TypeError"),
        "a status": (change(measurements=[corners()[0].as_values() | {"status": "fine"}]), "damaged: ValueError: st"),
        "a ratio": (change(measurements=[corners()[0].as_values() | {"speedup": [1, 2, ""]}]), "damaged: TypeError: s"),
        "a key": (change(key={"device": "some device"}), "damaged: ValueError: key"),
        "a sentence": (change(lost={"gram triton": 3}), "damaged: TypeError: gram triton: got int"),
    }.values(),
)  # fmt: skip
def test_a_file_that_is_no_table_is_a_clear_line_and_no_crash(text: str, problem: str) -> None:
    path = saved()
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    found = find(KEY)
    assert found.table is None and str(found.problem).startswith(f"{path}: {problem}")
    with pytest.raises(TableError, match="json"):
        read(path)
    state = lookup.state_of(CPU)
    assert state.refusal == f"its measurements are not used: {found.problem}: run gradmix calibrate"
    assert doctor.origin_of(state) == state.refusal


def test_a_file_that_cannot_be_read_is_a_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved()

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)  # as of a file that another process has locked
    assert find(KEY).problem == f"{path}: it cannot be read: Permission denied"
    monkeypatch.undo()
    install(monkeypatch, path.parents[2])
    path.unlink()
    path.mkdir()
    assert find(KEY).problem == f"{path}: it cannot be read: Is a directory"


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADMIX_CACHE_DIR", os.devnull)
    for act in (table.check_writable, lambda path: write(make_table(), path)):
        with pytest.raises(OSError) as caught:
            act(path_of(KEY))
        assert caught.value.filename == str(path_of(KEY))
    assert find(KEY) == (None, None, None)


def test_a_full_disk_leaves_the_former_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved()
    before = path.read_text()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(make_table(), path)
    assert caught.value.filename == str(path)
    assert path.read_text() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def test_of_two_processes_that_write_at_once_one_whole_file_stays() -> None:
    path = path_of(KEY)
    context = start_processes(write_often, (str(path),), 2)
    seen = set()
    while not context.join(timeout=0.001):
        if path.exists():
            seen.add(read(path).seconds)  # whole at any moment
    assert seen == {0.0, 1.0} and read(path).measured == "number 59"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"GRADMIX_CACHE_DIR": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ("linux", {"GRADMIX_CACHE_DIR": "~/own"}, "/home/me/own"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/gradmix"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/gradmix"),
        ("linux", {"GRADMIX_CACHE_DIR": ""}, "/home/me/.cache/gradmix"),
        ("darwin", {}, "/home/me/Library/Caches/gradmix"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/gradmix/Cache"),
        ("win32", {}, "/home/me/AppData/Local/gradmix/Cache"),
    ],
)
def test_where_tables_lie(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRADMIX_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert str(table.cache_folder()) == expected


def test_without_a_home_the_folder_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GRADMIX_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    problem = "environment variable GRADMIX_CACHE_DIR: expected a folder, as Could not determine home directory."
    assert find(KEY) == (None, None, problem) and choose() == "torch"
    with pytest.raises(TableError, match=problem):
        path_of(KEY)


# ------------------------------------------------------------------------------------------------------------------ key


CHANGES: dict[str, Callable[[pytest.MonkeyPatch, Path], Any]] = {
    "device": lambda patch, _: patch.setitem(PROPERTIES, "name", "Other GPU"),
    "capability": lambda patch, _: patch.setitem(PROPERTIES, "minor", 1),
    "multiprocessors": lambda patch, _: patch.setitem(PROPERTIES, "multi_processor_count", 114),
    "memory": lambda patch, _: patch.setitem(PROPERTIES, "total_memory", 1),
    "driver": lambda patch, _: patch.setattr(key, "_driver", lambda: "999.1"),
    "torch": lambda patch, _: patch.setattr(torch, "__version__", "9.9"),
    "runtime": lambda patch, _: patch.setattr(torch.version, "cuda", "99.0"),
    "triton": lambda patch, _: patch.setattr(key.importlib.metadata, "version", lambda name: "9.9"),
    "gradmix": lambda patch, _: patch.setattr(key, "__version__", "9.9"),
    "kernels": lambda _, folder: (folder / "ops" / "operator.py").write_text("x = 2"),
    "build": lambda _, folder: (folder / "_C.so").write_bytes(b"other"),
}
PROPERTIES = {"name": "Big GPU", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 80 << 30}


@pytest.mark.parametrize("component", key.COMPONENTS)
def test_a_change_of_device_or_installation_changes_its_component_alone(
    component: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "operator.py").write_text("x = 1")
    (tmp_path / "_C.so").write_bytes(b"one")
    monkeypatch.setattr(key._extension, "folders", lambda: [tmp_path])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**PROPERTIES))
    key_of.cache_clear()
    before = key_of(torch.device("cuda", 0))
    assert list(before) == list(key.COMPONENTS) and before["capability"] == "9.0" and all(before.values())
    CHANGES[component](monkeypatch, tmp_path)
    assert key_of(torch.device("cuda", 0)) == before, "it is read once"
    key_of.cache_clear()
    after = key_of(torch.device("cuda", 0))
    key_of.cache_clear()
    assert [name for name in before if before[name] != after[name]] == [component]
    assert key.digest(before) != key.digest(after)


def test_a_report_of_another_build_is_another_build(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    for report in (None, {"cuda": {"built": True}}, {"cuda": {"built": False}}):
        monkeypatch.setattr(key._extension, "build_report", lambda report=report: report)
        hashes.add(key._hash_of_build())
    assert len(hashes) == 3


# ------------------------------------------------------------------------------------------- tables that are shipped


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "tables")
    monkeypatch.setattr(summary, "SHIPPED", tmp_path / "tables")
    return tmp_path / "tables" / f"{key.slug(KEY['device'])}-maintainers.json"


@pytest.mark.parametrize("component", KEY)
def test_a_shipped_table_serves_installations_of_the_same_versions(component: str, shipped: Path) -> None:
    compiled = [replace(m, cell=replace(m.cell, backend="cuda")) for m in corners()]
    write(make_table(*corners(), *compiled), shipped)
    found = find(KEY | {component: "another"}).table
    assert (found is not None) == (component in ("memory", "driver", "build"))
    if found is not None:  # compiled kernels are those of a build
        backends = {m.cell.backend for m in found.verdicts.measurements}
        assert backends == ({"triton"} if component == "build" else {"triton", "cuda"})


def test_the_users_table_goes_before_a_shipped_one_and_an_old_one_does_not(shipped: Path) -> None:
    write(make_table(*corners(2.0)), shipped)
    assert find(KEY).path == shipped and lookup.state_of(CPU).table is not None
    assert "shipped with gradmix" in summary.origin_of(lookup.state_of(CPU))
    own = saved(*corners(0.5))
    assert find(KEY).path == own
    own.unlink()
    saved(*corners(0.5), key=KEY | {"torch": "older"})
    assert find(KEY).path == shipped


# --------------------------------------------------------------------------------------------------------------- choice


def test_without_a_table_everything_is_as_it_was() -> None:
    assert choose() == "torch"
    worth = make_problem().operator.backends[0].worth
    assert worth(torch.ones(8, 5)) == lookup.NOT_MEASURED


def test_auto_obeys_the_table() -> None:
    cells = corners()
    cells[3] = make_measurement(64, 50, 0.9)
    saved(*cells)
    assert [choose(*size) for size in ((8, 5), (8, 50), (64, 5), (64, 50), (7, 5))] == [
        "triton", "triton", "triton", "torch", "torch",
    ]  # fmt: skip
    assert choose(available="triton is not installed") == "torch"


def test_a_name_goes_before_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    saved(*corners(2.0))
    assert choose() == "triton" and choose(backend="torch") == "torch"
    monkeypatch.setenv("GRADMIX_BACKEND", "torch")
    assert choose() == "torch"
    monkeypatch.delenv("GRADMIX_BACKEND")
    lookup.use(CPU, make_table(*corners(0.5)))
    assert choose() == "torch" and choose(backend="triton") == "triton"
    monkeypatch.setenv("GRADMIX_BACKEND", "triton")
    assert choose() == "triton"


def test_the_file_is_read_once_and_calls_do_not_touch_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    saved()
    worth = make_problem().operator.backends[0].worth
    assert worth(torch.ones(8, 5)) is None

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a call went beyond the dictionary")

    monkeypatch.setattr(lookup, "find", refuse)
    assert worth(torch.ones(9, 6)) is None  # other sizes are judged by the table in memory
    monkeypatch.setattr(CalibratedWorth, "_look_up", refuse)
    assert worth(torch.ones(8, 5)) is None and worth(torch.ones(9, 6)) is None


def test_answers_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    saved()
    monkeypatch.setattr(lookup, "_MOST_ANSWERS", 3)
    worth = make_problem().operator.backends[0].worth
    assert [worth(torch.ones(samples, 5)) for samples in range(8, 20)] == [None] * 12
    assert len(lookup._answers) <= 3


def test_the_cpu_path_reads_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Triton's interpreter could run the kernels there."""
    monkeypatch.undo()

    def refuse(*_: Any) -> Any:
        raise AssertionError("a table was looked for")

    monkeypatch.setattr(lookup, "find", refuse)
    monkeypatch.setattr(lookup, "key_of", refuse)
    rows = torch.randn(3, 4), torch.randn(3, 5), torch.tensor([0, 1, 2])
    lams = torch.tensor([0.5], dtype=torch.float64)
    chosen = MIXED_ALIGNMENT.choose("auto", *rows, *rows, torch.randn(5, 5), lams, True, "tf32x3")
    assert chosen.name in ("cpp", "torch")
    assert summary.record_of(CPU) is None


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A group of this process alone, over gloo."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_the_first_processes_table_serves_all(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(*corners(0.5))
    assert choose() == "torch"
    first = KEY, make_table(*corners(2.0))
    sent = []
    monkeypatch.setattr(agreement, "broadcast_object", lambda value, group: sent.append(value) or first)
    agreement.agree(group, CPU)
    assert choose() == "triton" and sent[0][0] == KEY
    agreement.agree(group, CPU)
    assert len(sent) == 1, "it is sent once"


@pytest.mark.parametrize("elsewhere", [True, False])
def test_where_installations_differ_no_process_uses_a_kernel(
    elsewhere: bool, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved()
    first = (KEY if elsewhere else KEY | {"driver": "older"}), make_table(*corners())
    monkeypatch.setattr(agreement, "broadcast_object", lambda value, group: first)
    if elsewhere:
        monkeypatch.setattr(agreement, "any_rank", lambda flags, group: torch.tensor([True]))
    agreement.agree(group, CPU)
    assert choose() == "torch"
    why = "another process has another device" if elsewhere else "it was made with driver older, this is some driver"
    assert why in str(lookup.state_of(CPU).refusal)


def test_two_processes_decide_alike(tmp_path: Path) -> None:
    context = start_processes(agree, (str(tmp_path),), 2)
    while not context.join():
        pass
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["triton triton", "torch triton"]


def test_a_selection_with_a_group_agrees_first(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("gradmix.estimators.base.agree", lambda group, device: asked.append((group, device)))
    for processes in (None, group):
        with resolve("feature", Network(MLP(), None, None, 8, "auto", processes)).guard():
            assert asked == ([] if processes is None else [(group, CPU)])


# ---------------------------------------------------------------------------------------------------------------- words


def test_the_summary_says_what_is_on_and_why_the_rest_is_off() -> None:
    def of(backend: str, dtype: str, *measurements: Measurement) -> list[Measurement]:
        return [replace(m, cell=replace(m.cell, backend=backend, dtype=dtype)) for m in measurements]

    some = corners(2.0)
    some[0] = make_measurement(8, 5, 0.7)
    bad = Measurement(make_cell(8, 5), "wrong", "a sentence")
    made = make_table(
        *of("triton", "float32", *some),
        *of("triton", "bfloat16", *corners(0.8)),
        *of("triton", "float16", replace(bad, status="right", reason=None)),
        *of("cuda", "float32", *corners(), bad),
        *of("cuda", "bfloat16", replace(bad, status="skipped", reason="no memory")),
    )
    made = replace(made, verdicts=replace(made.verdicts, lost={"other triton": "crashed at once"}))
    assert [tuple(line) for line in summary.lines_of(made)] == [
        ("gram", "triton", "float32", 3, "on at 3 of 4 sizes: 2.10 to 2.10 times as fast as torch"),
        ("gram", "triton", "bfloat16", 0, "off: right, and 0.90 to 0.90 times as fast as torch"),
        ("gram", "triton", "float16", 0, "off: right, and not timed in this dtype"),
        ("gram", "cuda", "float32", 0, "off: wrong at float32, samples 8, features 5: a sentence"),
        ("gram", "cuda", "bfloat16", 0, "off: not measured: no memory"),
        ("other", "triton", "any dtype", 0, "off: crashed at once"),
    ]
    assert summary.faults_of(made) == [m for m in made.verdicts.measurements if m.status == "wrong"]
    lookup.use(CPU, made)
    assert summary.origin_of(lookup.state_of(CPU)) == (
        "15 calls, measured 2026-11-29T08:00:00+00:00, from the first process"
    )
    assert summary.record_of(CPU) == (
        "measured 2026-11-29T08:00:00+00:00; on: gram (triton, float32, 3 sizes); off: gram (triton, bfloat16), "
        "gram (triton, float16), gram (cuda, float32), gram (cuda, bfloat16), other (triton, any dtype)"
    )


def test_the_doctor_and_a_run_say_what_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradmix.training.loop.environment import describe_environment

    path = saved(*(replace(m, cell=replace(m.cell, operator="cosine_alignment")) for m in corners()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor, "with_index", lambda device: CPU)
    monkeypatch.setattr(
        doctor, "_devices", lambda: {"threads": 1, "torch": [], "torch_reason": None, "extension": None}
    )
    report = doctor.report()
    (device,) = report["calibration"]["devices"]
    assert device["origin"] == f"4 calls, measured 2026-11-29T08:00:00+00:00, {path}"
    assert device["verdicts"][0]["text"].startswith("on at 4 of 4 sizes")
    autos = {operator["name"]: operator["auto"] for operator in report["operators"]}
    assert autos["mixed_alignment"] != "triton", "what was not measured is not preferred"
    reason = next(b for o in doctor.OPERATORS if o.name == "cosine_alignment" for b in o.backends).available()
    assert autos["cosine_alignment"] == ("triton" if reason is None else "torch")
    text = doctor.format_report(report)
    assert "cuda:0           4 calls, measured" in text and "triton     float32: on at 4 of 4 sizes" in text
    assert "on: cosine_alignment (triton, float32, 4 sizes)" in describe_environment(CPU)["kernels"]
    lookup.use(CPU, None)
    assert describe_environment(CPU)["kernels"] == f"none: {lookup.NOT_MEASURED}"
