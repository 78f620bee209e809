"""The growth of cost: formulas, what is timed, and that docs/scaling.md shows what scripts say. No time is judged."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from bench_modules import BENCH, load
from torch.utils.flop_counter import FlopCounterMode

import gradmix
from gradmix.ops.last_layer_gradient import last_layer_gradient
from gradmix.ops.mixed_alignment import Side, mixed_alignment_torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
CPU = torch.device("cpu")


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "cost_growth")


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "communication_volume")


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("values", "results", "expected"),
    [
        ([1, 10, 100], [5.0, 50.0, 500.0], 1.0),
        ([64, 128, 256], [1.0, 4.0, 16.0], 2.0),
        ([3000, 10_000, 21_841], [7.0, 7.0, 7.0], 0.0),
        ([4, 16], [2.0, 1.0], -0.5),
    ],
    ids=["linear", "square", "constant", "falling"],
)
def test_slope(growth: ModuleType, values: list[int], results: list[float], expected: float) -> None:
    assert growth.slope(values, results) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "places"),
    [((10, 100, 1000), [1, 2]), ((10, 99, 1000), [2]), ((7,), [0]), ((1000, 10, 100), [0, 2])],
    ids=str,
)
def test_the_last_decade_ends_at_the_largest(growth: ModuleType, values: tuple[int, ...], places: list[int]) -> None:
    assert growth.last_decade(values) == places


def test_an_exponent_is_of_the_last_decade_alone(growth: ModuleType) -> None:
    points = [{"value": v, "flops": v**2, "product_flops": 8 * v} for v in (1, 100, 400, 1000)]
    # Constant at first, then as the power 1.5, in three rounds of unlike speed.
    samples = [[9.0] * 3, *([speed * v**1.5 for speed in (1.0, 3.0, 2.0)] for v in (100, 400, 1000))]
    found = growth.exponent(points, samples)
    assert (found["from"], found["to"]) == (100, 1000)
    assert found["measured"]["min"] == pytest.approx(1.5) == found["measured"]["max"]
    assert (found["flops"], found["product_flops"]) == (pytest.approx(2.0), pytest.approx(1.0))
    assert growth.exponent(points[:1], samples[:1]) is None


@pytest.mark.parametrize(("classes", "rows"), [(1, 32), (64, 2048), (65, 65 * 31), (1000, 2000), (5000, 5000)])
def test_rows_of_a_class_table(growth: ModuleType, volume: ModuleType, classes: int, rows: int) -> None:
    assert growth.table_rows(classes) == rows
    setting = volume.Setting(volume.NETWORKS[0], 2, 512, classes)
    assert setting.table == 4 * rows * (2048 + classes) / 2  # half of them lie with the other process
    assert (volume.TABLE_ROWS, volume.CLASS_SAMPLES) == (growth.TABLE_SAMPLES, growth.CLASS_SAMPLES)


def test_work(growth: ModuleType) -> None:
    sizes = growth.Sizes(6, 6, 5, 3, own_rows=True)
    work = growth.selection_work(sizes)
    assert (work.products, work.all) == (8 * 6 * 6 * 5, 8 * 6 * 6 * 5 + 2 * 6 * 5 * 4 + 2 * 6 * 6 * 3)
    assert growth.reference_work(sizes, 7).all == 2 * 7 * 5 * 4
    table = growth.table_work(sizes, 2)
    assert table.products == 5 * 8 * 64 * 64 * 5
    assert table.all == table.products + 2 * 64 * 5 * 4 + 2 * 64 * 64 * 3


# ----------------------------------------------------------------------------------------------------- what is timed


def test_points_do_the_work(growth: ModuleType) -> None:
    base = growth.Sizes(6, 6, 5, 3, own_rows=True)
    points = growth.points_of("classes", (4, 9), base, CPU, seed=1)
    for point in points:
        pairs, aligned = point.calls["selection"](), point.calls["alignment"]()
        assert pairs.num_classes == point.value and aligned.inner.shape == (6, 6)
        problem = growth.make_problem(growth.replace(base, classes=point.value), 1)
        norm = aligned.norm * problem.reference.norm()
        torch.testing.assert_close(pairs.alignment, aligned.inner / norm, rtol=1e-4, atol=1e-5)
    assert [p.calls["alignment"]().inner.shape for p in growth.points_of("rows", (2, 7), base, CPU, 0)] == [
        (2, 2),
        (7, 7),
    ]
    assert [p.work.all for p in growth.points_of("features", (2, 3), base, CPU, 0)][1] == base.flops


@pytest.mark.parametrize("rows", [1, 256, 300], ids=["one", "a chunk", "a chunk and a rest"])
def test_the_reference_is_the_mean_over_all_rows(growth: ModuleType, rows: int) -> None:
    base = growth.Sizes(6, 6, 5, 3, own_rows=True)
    (point, _) = growth.points_of("buffer", (rows, 301), base, CPU, seed=2)
    problem = growth.make_problem(growth.replace(base, n=301, m=1, own_rows=False), 2)
    residual = torch.softmax(problem.logits_a[:rows].double(), 1)
    residual -= torch.nn.functional.one_hot(problem.labels_a[:rows], 5)
    expected = residual.T @ torch.nn.functional.pad(problem.features_a[:rows].double(), (0, 1), value=1.0) / rows
    torch.testing.assert_close(point.calls["reference"]().double(), expected, rtol=1e-4, atol=1e-6)


def test_the_table_has_all_of_its_classes(growth: ModuleType) -> None:
    base = growth.Sizes(6, 6, 5, 3, own_rows=True)
    for point in growth.points_of("table", (2, 5), base, CPU, seed=0):
        table = point.calls["table"]()
        assert table.inner.shape == (5, *(point.value,) * 2)
        assert table.inner.isfinite().all()


CASE = {"network": "resnet-tiny", "batch": 5, "replay": 3, "buffer": 4, "classes": 6}


def test_the_replayed_rows_make_the_reference(growth: ModuleType) -> None:
    loop = growth.make_loop(growth.Case(**CASE), CPU, 0)
    loop.model.eval()
    outputs = loop.outputs()
    pairs = growth.ReplayedReference(loop, 3).select(loop.x, loop.y, outputs=outputs)
    expected = gradmix.select_pairs(
        loop.model,
        (loop.x[5:], loop.y[5:]),
        (loop.x, loop.y),
        criterion="sample",
        generator=torch.Generator().manual_seed(3),
    )
    torch.testing.assert_close(pairs.alignment, expected.alignment, rtol=1e-4, atol=1e-5)
    assert torch.equal(pairs.partner, expected.partner)


def test_the_buffer_has_as_many_rows_as_told(growth: ModuleType) -> None:
    loop = growth.make_loop(growth.Case(**CASE), CPU, 0)
    assert [len(part) for part in loop.buffer] == [4, 4]


def test_every_way_makes_a_step_and_only_one_reads_the_buffer(
    growth: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = growth.make_loop(growth.Case(**CASE), CPU, 0)
    passes: list[int] = []
    loop.model.register_forward_hook(lambda _m, given, _o: passes.append(len(given[0])))
    counted = {}
    for name, step in growth.steps_of(loop, 0).items():
        step()  # the first call of a GradMix makes its reference
        before = loop.model.head.weight.clone()
        passes.clear()
        step()
        assert not torch.equal(loop.model.head.weight, before)
        counted[name] = sorted(passes)
    assert counted == {"plain": [8, 8], "kept": [8, 8], "replayed": [8, 8], "each": [4, 8, 8]}
    assert set(counted) == {way.name for way in growth.WAYS}


@pytest.mark.parametrize(
    ("axis", "value", "expected"),
    [("rows", 9, {"batch": 5, "replay": 4}), ("classes", 70, {"classes": 70}), ("buffer", 2, {"buffer": 2})],
)
def test_a_case_along_an_axis(growth: ModuleType, axis: str, value: int, expected: dict[str, int]) -> None:
    case = vars(growth.changed_case(growth.Case(**CASE), axis, value))
    assert case == {**vars(growth.Case(**CASE)), **expected}


@pytest.mark.parametrize("reason", ["out of memory", "something else"])
def test_a_point_without_room_is_kept_as_such(growth: ModuleType, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    make_loop = growth.make_loop

    def without_room(case: Any, *rest: Any) -> Any:
        if case.buffer == 9:
            raise RuntimeError(reason)
        return make_loop(case, *rest)

    monkeypatch.setattr(growth, "make_loop", without_room)
    monkeypatch.setattr(growth, "ran_out", lambda error: "out of memory" in str(error))
    monkeypatch.setattr(growth, "peak_memory", lambda *_: 1)
    given = {"case": growth.Case(**CASE), "device": CPU, "seed": 0, "repeats": 2, "seconds": 0.01}
    if reason == "something else":
        with pytest.raises(RuntimeError, match="something else"):
            growth.measure_steps("buffer", [9, 3], **given)
        return
    found = growth.measure_steps("buffer", [9, 3], **given)
    assert [point["value"] for point in found["points"]] == [9, 3] and found["points"][0]["ways"] is None
    assert growth.step_table(found)[1][0][:2] == ["9", "out of memory"]
    ways = found["points"][1]["ways"]
    assert set(ways) == {"plain", "kept", "replayed", "each", "interval"} and found["points"][1]["samples"] == 2
    for name in set(ways) - {"plain"}:
        # Of two samples, the ends are theirs: share = 1 - 1 / ratio, round by round.
        assert ways[name]["share"]["max"] == pytest.approx(1 - 1 / ways[name]["over_plain"]["max"])


def test_a_run_from_end_to_end(
    tmp_path: Path, growth: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(growth, "QUICK", growth.replace(growth.QUICK, step={"buffer": (4, 8)}))
    arguments = ["--quick", "--repeats", "1", "--axes", "buffer", "--json", "x.json", "--plot", "x.svg"]
    assert growth.main(arguments) == 0
    result = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    (alone,), (step,) = result["alone"], result["step"]
    assert [point["value"] for point in alone["curves"][0]["points"]] == [64, 512]
    assert alone["curves"][0]["exponent"]["flops"] == pytest.approx(1.0)
    assert [point["value"] for point in step["points"]] == [4, 8]
    assert all(point["ways"]["replayed"]["peak_memory_bytes"] > 0 for point in step["points"])
    assert "Reference gradient over the buffer's samples" in capsys.readouterr().out
    tables = growth.page_tables(result)
    assert len(tables) == 2 and "by formula: all flops 1.00" in tables[0]
    # A picture of its own that follows the reader's theme: no font, style sheet or picture from elsewhere.
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg") and "prefers-color-scheme:dark" in text and "currentColor" in text
    assert "<image" not in text and "@import" not in text and "url(http" not in text
    growth.draw(tmp_path / "x.png", result)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.png", "x.svg"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--plot", "x.pdf"], "expected a name that ends in .png, .svg"),
        (["--plot", "no/such/x.svg"], "no folder"),
        (["--repeats", "0"], "expected an integer >= 1"),
        (["--axes", "heads"], "invalid choice"),
    ],
)
def test_what_makes_no_sense_is_refused(
    growth: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    with pytest.raises(SystemExit):
        growth.parse(arguments)
    assert word in capsys.readouterr().err


def test_axes_can_be_cut_short(growth: ModuleType) -> None:
    options = growth.parse(["--most-classes", "300", "--most-buffer", "63", "--axes", "classes", "buffer", "rows"])
    found = growth.chosen(options.plan.alone, options)
    assert found == {"classes": [10, 30, 100, 300], "rows": [64, 128, 256, 512, 1024]}


# ------------------------------------------------------------------------------------------------------ communication


@pytest.mark.parametrize(("number", "network"), [(0, "resnet50"), (1, "vit-b")], ids=["resnet50", "vit-b"])
def test_networks_are_what_is_stated(
    volume: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int, network: str
) -> None:
    stated = volume.NETWORKS[number]
    with torch.device("meta"):
        model = load(monkeypatch, "_networks").NETWORKS[network].build("batch", 1000)
        row = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(row)
    assert sum(p.numel() for p in model.parameters()) == stated.parameters
    assert model.head.in_features == stated.features and row.numel() == volume.IMAGE
    assert counter.get_total_flops() == pytest.approx(stated.forward_flops, rel=1e-3)


def test_bytes_by_hand(volume: ModuleType) -> None:
    network = volume.Network("small", parameters=1000, features=7, forward_flops=50.0)
    setting = volume.Setting(network, processes=4, rows=16, classes=3, buffer=100)
    assert setting.gradients == 2 * 3 / 4 * 4 * 1000
    assert setting.outputs == 3 / 4 * 4 * 16 * (7 + 3)
    assert setting.inputs == 3 / 4 * 4 * 16 * 3 * 224 * 224
    assert setting.partners == setting.inputs / 4
    assert setting.reference == 2 * 3 / 4 * 4 * 3 * 8
    assert setting.step_flops == 3 * 50 * 4
    assert setting.selection_flops == 8 * 16 * 16 * 3 + 2 * 16 * 3 * 8 + 2 * 16 * 16 * 7
    assert setting.own_selection_flops == 8 * 4 * 16 * 3 + 2 * 16 * 3 * 8 + 2 * 4 * 16 * 7
    assert setting.local_selection_flops == 8 * 4 * 4 * 3 + 2 * 4 * 3 * 8 + 2 * 4 * 4 * 7
    assert setting.refresh_flops == (50 + 2 * 3 * 8) * 25


def test_figures_in_the_prose_of_the_page(volume: ModuleType) -> None:
    many = volume.Setting(volume.NETWORKS[0], 1, 512, 21_841)
    text = PAGE.read_text(encoding="utf-8")
    stated = {
        "93 G operations of selection": (many.selection_flops / 1e9, 93),
        "to 12.6 T of a step": (many.step_flops / 1e12, 12.6),
        "21,841 classes, 0.7 %": (100 * many.selection_flops / many.step_flops, 0.7),
        "outputs of 512 samples are 49 MB": (4 * 512 * (2048 + 21_841) / 1e6, 49),
        "the reference 179 MB": (4 * 21_841 * 2049 / 1e6, 179),
        "the table itself is 19 GB": (5 * 2 * 4 * 21_841**2 / 1e9, 19),
        "171 at N = 256 and d = 2048": (256 * 2048 / (4 * 256 + 2048), 171),
        "815 at N = 256 and C = 1000": (4 * 256 * 1000 / (256 + 1000), 815),
        "13 steps' passes of 512 samples": (20_000 / (3 * 512), 13),
        "52 steps at 20,000 samples": (20_000 / (6 * 64), 52),
    }
    words = " ".join(text.split())
    for words_of, (found, said) in stated.items():
        assert words_of in words and found == pytest.approx(said, rel=0.06), words_of


def test_one_process_tells_nobody_anything(volume: ModuleType) -> None:
    alone = volume.Setting(volume.NETWORKS[0], 1, 512)
    assert alone.gradients == alone.outputs == alone.inputs == alone.partners == alone.reference == alone.table == 0


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (("show_size", 102_228_128), "102 MB"),
        (("show_size", 999), "999 B"),
        (("show_size", 1.1e12), "1.1 TB"),
        (("show_seconds", 0.00607), "6.07 ms"),
        (("show_flops", 5.27e9), "5.27 G"),
        (("show_share", 1.0, 1000.0), "0.1 %"),
        (("show_share", 26.0, 2.0), "13.0x"),
    ],
)
def test_units(volume: ModuleType, shown: tuple[Any, ...], expected: str) -> None:
    assert getattr(volume, shown[0])(*shown[1:]) == expected


def test_processes_of_a_machine_talk_over_its_own_links(volume: ModuleType) -> None:
    links = [volume.Setting(volume.NETWORKS[0], w, 512).bandwidth for w in (2, 8, 9, 64)]
    assert links == [450e9, 450e9, 50e9, 50e9]


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_shows_the_arithmetic(volume: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    places = [text.index(table) for table in volume.page_tables()]
    assert places == sorted(places)


def test_the_page_shows_what_was_measured(growth: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    result = json.loads((BENCH / "results" / "cost_growth_cpu.json").read_text(encoding="utf-8"))
    tables = growth.page_tables(result)
    assert len(tables) == 8
    places = [text.index(table) for table in tables]
    assert places == sorted(places)


def test_memory_is_what_the_page_states(growth: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "112 N² + 14 N C bytes" in text and "160 R² + 4 R (d + C) bytes" in text
    result = json.loads((BENCH / "results" / "cost_growth_cpu.json").read_text(encoding="utf-8"))
    sizes, seen = growth.Sizes(**result["sizes"]), 0
    for axis in result["alone"]:
        for point in (point for curve in axis["curves"] for point in curve["points"]):
            value, peak = point["value"], point["peak_memory_bytes"]
            rows = value if axis["axis"] == "rows" else sizes.n
            classes = value if axis["axis"] == "classes" else sizes.classes
            if axis["axis"] == "table":
                rows = growth.table_rows(value)
                expected = pytest.approx(160 * rows**2 + 4 * rows * (sizes.features + classes), rel=0.2)
            elif axis["axis"] == "buffer":
                continue
            else:
                expected = pytest.approx(112 * rows**2 + 14 * rows * classes, rel=0.1)
            assert peak == expected, (axis["axis"], value)
            seen += 1
    assert seen == 2 * (8 + 5 + 6) + 4


def test_the_pages_that_the_index_names_exist() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    links = [part.split(")")[0] for part in index.split("](")[1:] if not part.startswith("http")]
    assert "scaling.md" in links and all((ROOT / "docs" / link).is_file() for link in links)


@pytest.mark.parametrize(("n", "classes", "width"), [(4, 6, 2), (5, 6, 10), (7, 3, 1)])
def test_the_products_are_those_of_the_formula(growth: ModuleType, n: int, classes: int, width: int) -> None:
    h, z, y = torch.randn(n, width), torch.randn(n, classes), torch.arange(n) % classes
    reference = last_layer_gradient(h, z, y)

    def in_place(_sum: Any, a: Any, b: Any, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        mixed_alignment_torch(Side(h, z, y), Side(h, z, y), reference, torch.tensor([0.3], dtype=torch.float64))
    expected = growth.selection_work(growth.Sizes(n, n, classes, width, own_rows=True)).all
    # The bias's column is added without a product.
    assert counter.get_total_flops() == expected - 2 * n * classes
