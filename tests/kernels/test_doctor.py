"""The doctor's report: complete, honest about what is missing, and readable."""

from __future__ import annotations

import json

import pytest
import torch

import gradmix
from gradmix import _extension, doctor
from gradmix.ops.backends import BACKENDS


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(_extension, "_load", lambda: (None, "it was not built: no compiler"))


KEYS = ("versions", "machine", "devices", "extension", "triton", "operators", "backend", "calibration", "extras")
OPERATORS = {
    "mixed_alignment",
    "class_pair_alignment",
    "last_layer_gradient",
    "draw_partners",
    "cosine_alignment",
    "mix_labels",
    "mix_samples",
    "selection",
    "mixed_gram_alignment",
    "class_sketch",
    "sketch_project",
}


def bodies(report, name):
    operator = next(o for o in report["operators"] if o["name"] == name)
    return {body["backend"]: body["reason"] for body in operator["bodies"]}, operator["auto"]


def test_the_report_is_json_and_complete():
    report = doctor.report()
    assert json.loads(json.dumps(report)) == report
    assert set(report) == set(KEYS)
    assert report["versions"]["gradmix"].startswith(gradmix.__version__)
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"]["threads"] == torch.get_num_threads()
    assert {o["name"] for o in report["operators"]} == OPERATORS


def test_every_refusal_has_its_reason():
    report = doctor.report()
    for operator in report["operators"]:
        found, auto = bodies(report, operator["name"])
        assert found["torch"] is None and found[auto] is None
        if operator["name"] != "selection":  # calls of other operators, or a graph of them
            assert set(found) <= set(BACKENDS) and found["reference"] is None
    extension = report["extension"]
    assert extension["available"] == (extension["reason"] is None) == (extension["build"] is not None)
    for part in ("openmp", "cuda"):
        assert extension[part]["built"] != bool(extension[part]["reason"])
    assert bool(report["devices"]["torch"]) != bool(report["devices"]["torch_reason"])


@pytest.mark.skipif(_extension.load() is None, reason=f"no compiled extension: {_extension.unavailable_reason()}")
def test_with_the_extension():
    report = doctor.report()
    found, auto = bodies(report, "class_sketch")
    assert found["cpp"] is None and auto == "cpp"
    text = doctor.format_report(report)
    assert report["extension"]["build"]["compiler"] in text
    native = report["devices"]["extension"]
    assert native["devices"] or native["error"]


def test_without_the_extension(without_extension):
    report = doctor.report()
    found, auto = bodies(report, "class_sketch")
    assert found["cpp"] == "it was not built: no compiler" and auto == "torch"
    assert report["devices"]["extension"] is None
    text = doctor.format_report(report)
    assert "available        no: it was not built: no compiler" in text
    assert "openmp           no: there is no extension to have it" in text


def test_a_missing_extra_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "_is_importable", lambda module: module not in ("yaml", "sklearn"))
    report = doctor.report()
    train = next(extra for extra in report["extras"] if extra["name"] == "train")
    assert train["missing"] == ["pyyaml", "scikit-learn"]
    assert train["install"] == 'pip install "gradmix[train]"'
    assert 'train            missing pyyaml, scikit-learn: pip install "gradmix[train]"' in doctor.format_report(report)
    bench = next(extra for extra in report["extras"] if extra["name"] == "bench")
    assert bench == {"name": "bench", "missing": [], "install": None}


def test_a_folder_that_bears_a_package_name_is_not_that_package(tmp_path, monkeypatch):
    (tmp_path / "hardly_a_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not doctor._is_importable("hardly_a_package")
    assert not doctor._is_importable("no_such_package_at_all")
    assert doctor._is_importable("torch")


@pytest.mark.parametrize(
    ("set_to", "variable", "expected"),
    [
        (None, None, {"preferred": "auto", "source": "the default", "reason": None}),
        (None, "torch", {"preferred": "torch", "source": "GRADMIX_BACKEND", "reason": None}),
        ("reference", None, {"preferred": "reference", "source": "set_backend", "reason": None}),
    ],
)
def test_the_preference_is_told(monkeypatch, set_to, variable, expected):
    monkeypatch.delenv("GRADMIX_BACKEND", raising=False)
    monkeypatch.setattr("gradmix.ops.backends._preferred", set_to)
    if variable:
        monkeypatch.setenv("GRADMIX_BACKEND", variable)
    assert doctor.report()["backend"] == expected


def test_a_bad_preference_does_not_stop_the_doctor(monkeypatch):
    monkeypatch.setattr("gradmix.ops.backends._preferred", None)
    monkeypatch.setenv("GRADMIX_BACKEND", "turbo")
    report = doctor.report()
    assert "GRADMIX_BACKEND" in report["backend"]["reason"] and "turbo" in report["backend"]["reason"]
    assert report["backend"]["reason"] in doctor.format_report(report)


def test_the_text_is_plain_and_has_every_heading():
    text = doctor.format_report(doctor.report())
    headings = [line for line in text.splitlines() if line and not line.startswith(" ")]
    assert headings == [{"extension": "extension gradmix._C"}.get(key, key) for key in KEYS if key != "backend"]
    assert "\x1b" not in text and text.endswith("\n")


def test_a_gpu_is_shown(monkeypatch):
    """What a machine with a GPU prints, from values as such a machine reports them."""
    report = doctor.report()
    report["devices"]["torch"] = [{"device": "cuda:0", "name": "Big GPU", "capability": "9.0", "memory": 80 * 2**30}]
    report["devices"]["torch_reason"] = None
    report["devices"]["extension"] = {
        "error": None,
        "runtime": "13.0",
        "driver": "13.0",
        "devices": [{"name": "Big GPU", "capability": "9.0", "memory": 80 * 2**30}],
    }
    text = doctor.format_report(report)
    assert "cuda:0           Big GPU, capability 9.0, 80.0 GiB" in text
    assert "extension:0      Big GPU, capability 9.0" in text
    assert "no GPU" not in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_torch_and_the_extension_see_the_same_gpus():
    report = doctor.report()["devices"]
    assert len(report["torch"]) == torch.cuda.device_count()
    if report["extension"] and not report["extension"]["error"]:
        assert [d["name"] for d in report["extension"]["devices"]] == [d["name"] for d in report["torch"]]
