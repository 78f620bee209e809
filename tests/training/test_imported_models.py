"""Models by import path, and those of torchvision, timm and transformers where these can be imported."""

from __future__ import annotations

import importlib
import importlib.util
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gradmix
from gradmix.training.models import build_model

SOURCE = """
import random
import numpy as np
import torch
from torch import nn

torch.rand(3)  # imported once only: what this draws must not reach the weights

class Flat(nn.Module):
    def __init__(self, width, num_classes):
        super().__init__()
        self.fc = nn.Linear(width, num_classes)
    def forward(self, x):
        return self.fc(x.flatten(1))

class Net(Flat):
    def __init__(self, input_shape, num_classes):
        super().__init__(torch.Size(input_shape).numel(), num_classes)

class Makers:
    @staticmethod
    def make(num_classes, input_shape):
        return Net(input_shape, num_classes)

def keyword_only(*, num_classes, input_shape, width=3):
    return Net(input_shape, num_classes)

def first_argument(classes):
    return Flat(12, classes)

def with_others(*args, **kwargs):
    assert not kwargs
    return Flat(12, *args)

def texts(num_classes, vocabulary, input_shape):
    return nn.Sequential(nn.EmbeddingBag(vocabulary, 4), nn.Linear(4, num_classes))

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def dropping(num_classes):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, num_classes)).eval()

def shaken(num_classes):
    model = Flat(12, num_classes)
    with torch.no_grad():
        model.fc.bias[0] = random.random()
        model.fc.bias[1] = float(np.random.rand())
    return model

class Answer:
    def __init__(self, logits):
        self.logits = logits

class Answering(Flat):
    def __init__(self, num_classes):
        super().__init__(12, num_classes)
    def forward(self, x):
        return Answer(super().forward(x))

class Listing(Answering):
    def forward(self, x):
        return [super().forward(x)]

def two_more(num_classes):
    return Flat(12, num_classes + 2)

def labels(num_classes):
    return nn.Sequential(Flat(12, num_classes), Rounded())

class Rounded(nn.Module):
    def forward(self, x):
        return x.long()

def no_module(num_classes):
    return [num_classes]

def raising(num_classes):
    raise RuntimeError("out of paint")

def narrow(num_classes):
    return Flat(11, num_classes)

def needing(num_classes, colour):
    return Flat(12, num_classes)

constant = 3
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    (tmp_path / "workshop").mkdir()
    (tmp_path / "workshop" / "__init__.py").write_text("")
    (tmp_path / "workshop" / "nets.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "workshop" / "broken.py").write_text("raise OSError('no such library')\n")
    (tmp_path / "workshop" / "wanting.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "workshop"]:
        del sys.modules[name]


FOUND = {
    "class": ("workshop.nets:Net", (3, 4), {}),
    "attribute of a class": ("workshop.nets:Makers.make", (3, 4), {}),
    "keywords only": ("workshop.nets:keyword_only", (3, 4), {}),
    "first argument": ("workshop.nets:first_argument", (12,), {}),
    "any arguments": ("workshop.nets:with_others", (3, 4), {}),
    "texts": ("workshop.nets:texts", (7,), {"vocabulary": 20}),
    "parameters made by the first pass": ("workshop.nets:lazy", (3, 4), {}),
    "returned in evaluation mode": ("workshop.nets:dropping", (3, 4), {}),
    "draws from Python and NumPy": ("workshop.nets:shaken", (12,), {}),
    "an object with logits": ("workshop.nets:Answering", (3, 4), {}),
}


@pytest.mark.parametrize("case", FOUND)
def test_a_module_by_import_path(case):
    name, shape, more = FOUND[case]
    torch.manual_seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    first, again, other = (build_model(name, shape, 5, seed=seed, **more) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2], strict=True))
    assert all(module.training for module in first.modules())
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not all(map(torch.equal, first.parameters(), other.parameters()))
    x = torch.randint(20, (4, 7)) if more else torch.rand(4, *shape)
    logits = first(x)
    assert logits.shape == (4, 5) and logits.requires_grad


def test_the_forward_pass_that_checks_leaves_statistics_alone():
    norm = build_model("workshop.nets:dropping", (3, 4), 5)[1]
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_var, torch.ones(12))


def test_selection_finds_the_head_inside():
    model = build_model("workshop.nets:Answering", (3, 4), 5)
    x, y = torch.rand(6, 3, 4), torch.arange(6) % 5
    pairs = gradmix.select_pairs(model, (x, y), (x, y))
    assert pairs.alignment.shape[0] in (5, 6) and torch.isfinite(pairs.alignment).all()


BAD = {
    "module missing": ("nowhere.nets:Net", (12,), ModuleNotFoundError, "'nowhere.nets:Net', but nowhere.nets: No mod"),
    "submodule missing": ("workshop.cars:Net", (12,), ModuleNotFoundError, "workshop.cars: No module named 'workshop"),
    "its import missing": (
        "workshop.wanting:Net",
        (12,),
        ModuleNotFoundError,
        "No module named 'a_module_that_is_nowh",
    ),
    "import fails": ("workshop.broken:Net", (12,), ImportError, "workshop.broken cannot be imported: OSError: no such"),
    "attribute missing": (
        "workshop.nets:Nest",
        (12,),
        ValueError,
        "'workshop.nets:Nest', but workshop.nets has no Nest",
    ),
    "part missing": ("workshop.nets:Makers.nope", (12,), ValueError, "workshop.nets has no Makers.nope"),
    "no callable": (
        "workshop.nets:constant",
        (12,),
        ValueError,
        "workshop.nets:constant is an int, expected a callable",
    ),
    "no module made": ("workshop.nets:no_module", (12,), ValueError, "no_module made a list, expected an nn.Module"),
    "class made": ("builtins:type", (12,), ValueError, "builtins:type made the class int, expected an nn.Module"),
    "raises": (
        "workshop.nets:raising",
        (12,),
        ValueError,
        r"raising\(num_classes=5\) failed: RuntimeError: out of paint",
    ),
    "more wanted": (
        "workshop.nets:needing",
        (12,),
        ValueError,
        r"needing\(num_classes=5\) failed: TypeError: .*colour",
    ),
    "too wide": (
        "workshop.nets:two_more",
        (12,),
        ValueError,
        r"returned torch.float32 \(2, 7\) for 2 samples, expected",
    ),
    "integers": (
        "workshop.nets:labels",
        (12,),
        ValueError,
        r"returned torch.int64 \(2, 5\) for 2 samples, expected float",
    ),
    "a list": ("workshop.nets:Listing", (12,), ValueError, r"returned a list, expected logits \(N, 5\)"),
    "other samples": (
        "workshop.nets:narrow",
        (12,),
        ValueError,
        r"failed on samples \(2, 12\) of torch.float32: RuntimeError",
    ),
    "no attribute": ("workshop.nets:", (12,), ValueError, "got 'workshop.nets:', expected an import path"),
    "no source": (":Net", (12,), ValueError, "got ':Net', expected an import path"),
    "a relative module": (".nets:Net", (12,), ImportError, "'.nets:Net'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_import_paths(case):
    name, shape, kind, message = BAD[case]
    before = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        build_model(name, shape, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_a_library_that_is_not_installed_is_named(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=f"name: got '{library}:resnet50'.*; pip install {library}"):
        build_model(f"{library}:resnet50", (3, 32, 32), 5)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_image_libraries_refuse_other_rows(library):
    with pytest.raises(ValueError, match=rf"input_shape: got \(12,\), expected \(C, H, W\) for {library}:resnet50"):
        build_model(f"{library}:resnet50", (12,), 5)
    with pytest.raises(ValueError, match="vocabulary: got 9, expected None"):
        build_model(f"{library}:resnet50", (12,), 5, vocabulary=9)


# --------------------------------------------------------------------------------------------- where they are installed

_operators: list[torch.library.Library] = []


def library(name):
    """The library, or skip by its name. timm and transformers may import torchvision, so that comes first."""
    if name != "torchvision" and importlib.util.find_spec("torchvision"):
        library("torchvision")
    if not importlib.util.find_spec(name):
        pytest.skip(f"{name} is not installed")
    if name == "torchvision" and name not in sys.modules and not _operators:
        # A torchvision beside a torch of another build has none of its native operators and fails on two. No classifier
        # uses them: so they are declared, if that is what is missing.
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            if "operator torchvision::" not in str(error):
                raise
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]
        _operators.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _operators[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


IMAGES = {
    "torchvision, ResNet": ("torchvision:resnet18", (3, 32, 32)),
    "torchvision, ViT": ("torchvision:vit_b_32", (3, 64, 64)),
    "torchvision, second outputs": ("torchvision:googlenet", (3, 64, 64)),
    "timm, ResNet": ("timm:resnet10t", (1, 32, 40)),
    "timm, ViT": ("timm:vit_tiny_patch16_224", (3, 32, 48)),
    "transformers, MobileNet": ("transformers:mobilenet_v2", (3, 32, 32)),
    "transformers, folder": ("transformers:FOLDER", (2, 16, 24)),
}
TEXTS = {
    "transformers, folder": "transformers:FOLDER",
    "transformers, type": "transformers:distilbert",
}


def small_folder(tmp_path, name, text):
    """A configuration small enough for tests, without weights."""
    transformers = library(name.partition(":")[0])
    if not name.endswith("FOLDER"):
        return name
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    kind = transformers.BertConfig if text else transformers.ViTConfig
    kind(**small, **({} if text else {"patch_size": 8})).save_pretrained(tmp_path / "small")
    return f"transformers:{tmp_path / 'small'}"


@pytest.mark.parametrize("case", IMAGES)
def test_image_models_of_libraries(case, tmp_path):
    name, shape = IMAGES[case]
    name = small_folder(tmp_path, name, text=False)
    before = torch.get_rng_state()
    model, again = (build_model(name, shape, 5, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    x, y = torch.rand(4, *shape), torch.tensor([0, 1, 2, 4])
    logits = model(x)
    assert logits.shape == (4, 5)
    pairs = gradmix.select_pairs(model, (x, y), (x, y), num_classes=5)
    assert pairs.mix()[1].shape == (4, 5)
    F.cross_entropy(logits, y).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("case", TEXTS)
def test_text_models_of_transformers(case, tmp_path):
    name = small_folder(tmp_path, TEXTS[case], text=True)
    model = build_model(name, (7,), 5, seed=3, vocabulary=30).eval()
    x = torch.randint(1, 30, (4, 7))
    x[1, 4:] = 0
    logits = model(x)
    assert logits.shape == (4, 5)
    torch.testing.assert_close(logits[1:2], model(x[1:2, :4]), msg="padding is read")


def test_weights_come_from_the_users_folder_alone(tmp_path):
    transformers = library("transformers")
    configuration = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    pretrained = transformers.BertForSequenceClassification(configuration)
    pretrained.save_pretrained(tmp_path / "own")
    models = [build_model(f"transformers:{tmp_path / 'own'}", (7,), 5, seed=s, vocabulary=30) for s in (1, 1, 2)]
    found = [dict(model.model.named_parameters()) for model in models]
    for label, parameter in pretrained.named_parameters():
        if not label.startswith("classifier"):
            assert torch.equal(parameter, found[0][label]), label
    weights = [parameters["classifier.weight"] for parameters in found]
    assert weights[0].shape == (5, 16) and torch.equal(weights[0], weights[1]) and not torch.equal(*weights[1:])
    with pytest.raises(ValueError, match="vocabulary: got 40, but the weights .* are of 30"):
        build_model(f"transformers:{tmp_path / 'own'}", (7,), 5, vocabulary=40)


UNKNOWN = {
    "torchvision": ("torchvision:resnet51", {}, "torchvision.models has no classifier resnet51"),
    "torchvision, detector": ("torchvision:fasterrcnn_resnet50_fpn", {}, "torchvision.models has no classifier"),
    "torchvision, channels": (
        "torchvision:resnet18",
        {"input_shape": (1, 32, 32)},
        r"failed on samples \(2, 1, 32, 32\)",
    ),
    "torchvision, ViT": ("torchvision:vit_b_32", {"input_shape": (3, 64, 32)}, "expected square images"),
    "timm": ("timm:resnet51", {}, "timm has no model resnet51"),
    "timm, hub": ("timm:hf-hub:somebody/something", {}, "timm has no model hf-hub:somebody/something"),
    "transformers": ("transformers:somebody/something", {}, "a type of model, .* nothing is downloaded"),
    "transformers, text as image": ("transformers:bert", {}, "no classifier of images of that type"),
    "transformers, image as text": ("transformers:vit", {"vocabulary": 9}, "no classifier of texts of that type"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_libraries_unknown_models(case):
    name, more, message = UNKNOWN[case]
    library(name.partition(":")[0])
    shape = (7,) if "vocabulary" in more else (3, 32, 32)
    shape, more = more.get("input_shape", shape), {key: value for key, value in more.items() if key != "input_shape"}
    with pytest.raises(ValueError, match=message):
        build_model(name, shape, 5, **more)


def test_gradmix_itself_imports_none_of_them(tmp_path):
    code = (
        "import sys, gradmix, gradmix.training.models\n"
        "sys.exit(any(name in sys.modules for name in ('torchvision', 'timm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
