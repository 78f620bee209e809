"""Models from elsewhere: by import path, or of torchvision, timm and transformers where these are installed.

Nothing is ever downloaded: the weights are random, but for those in a folder of the user's own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gradmix.model.head import logits_of


def is_import_path(name: str) -> bool:
    """Whether a model's name has the form of one from elsewhere, ``SOURCE:NAME``."""
    return ":" in name


def find_builder(
    name: str, input_shape: tuple[int, ...], num_classes: int, vocabulary: int | None
) -> Callable[[], object]:
    """Find the function that builds the model ``name``: all is imported and checked that needs no random numbers.

    ``torchvision:NAME``, ``timm:NAME`` and ``transformers:NAME`` are those libraries' models. transformers' NAME is a
    type of model, such as ``resnet`` or ``bert``, in its standard configuration, or a folder that holds a
    ``config.json`` and, if it has weights too, these; with ``vocabulary`` it classifies texts, else images.

    Any other name is an import path ``package.module:callable``. Of ``input_shape``, ``num_classes`` and
    ``vocabulary`` the callable is given, by name, those that its signature names. One that does not name
    ``num_classes`` is given it as its first argument.

    Args:
        name: ``SOURCE:NAME``.
        input_shape: Shape of one sample.
        num_classes: Width of the output.
        vocabulary: Number of token ids, for a model of texts.

    Returns:
        A callable without arguments.

    Raises:
        ValueError: There is no such model, or the sample's shape does not suit it.
        ModuleNotFoundError: The module is not installed.
        ImportError: The module is there and cannot be imported.
    """
    source, _, rest = name.partition(":")
    if not source or not rest:
        raise ValueError(f"name: got {name!r}, expected an import path such as 'package.module:callable'")
    make: Callable[[], object]
    call = ""
    if source not in LIBRARIES:
        make = _from_import_path(name, source, rest, input_shape, num_classes, vocabulary)
        call = f"({', '.join([*map(repr, make.args), *(f'{k}={v!r}' for k, v in make.keywords.items())])})"
    else:
        if source != "transformers":
            if vocabulary is not None:
                raise ValueError(f"vocabulary: got {vocabulary}, expected None: {name} is a model of images")
            _require_image(name, input_shape)
        make = LIBRARIES[source](name, rest, input_shape, num_classes, vocabulary)

    def build() -> object:
        with _errors_of(name, call):
            return make()

    return build


def check_model(
    name: str, model: object, input_shape: tuple[int, ...], num_classes: int, vocabulary: int | None
) -> nn.Module:
    """The model, in training mode, if a forward pass of two samples of zeros (of ones, for token ids) gives its logits.

    A model that returns an object with ``logits`` is put into :class:`Logits`.

    Raises:
        ValueError: It is no module, fails, or returns something else than float logits ``(2, num_classes)``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"name: {name} made {_describe(model)}, expected an nn.Module")
    samples = torch.zeros(2, *input_shape) if vocabulary is None else torch.ones(2, *input_shape, dtype=torch.int64)
    model.eval()
    try:
        with torch.no_grad():
            output = model(samples)
    except Exception as error:
        raise ValueError(
            f"name: {name} failed on samples {tuple(samples.shape)} of {samples.dtype}: {type(error).__name__}: {error}"
        ) from error
    try:
        logits = logits_of(output)
    except TypeError:
        raise ValueError(
            f"name: {name} returned {_describe(output)}, expected logits (N, {num_classes}) or an object with them"
        ) from None
    if tuple(logits.shape) != (2, num_classes) or not logits.is_floating_point():
        raise ValueError(
            f"name: {name} returned {logits.dtype} {tuple(logits.shape)} for 2 samples, expected float logits "
            f"{(2, num_classes)}"
        )
    if not isinstance(output, Tensor):
        model = Logits(model)
    return model.train()


class Logits(nn.Module):
    """A model that returns an object with ``logits``, returning these alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of samples ``x (N, ...)``."""
        return logits_of(self.model(x))


class TextLogits(Logits):
    """A text model of transformers, called with ids alone: the attention mask is made of them, 0 being padding."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` of ids ``x (N, T)``, int64."""
        return logits_of(self.model(input_ids=x, attention_mask=(x != 0).long()))


def _from_import_path(
    name: str, source: str, rest: str, input_shape: tuple[int, ...], num_classes: int, vocabulary: int | None
) -> partial[object]:
    module = _module(name, source)
    try:
        found: Any = attrgetter(rest)(module)
    except AttributeError:
        raise ValueError(f"name: got {name!r}, but {source} has no {rest}") from None
    if not callable(found):
        raise ValueError(f"name: {name} is {_describe(found)}, expected a callable that makes a model")
    offered = {"input_shape": input_shape, "num_classes": num_classes, "vocabulary": vocabulary}
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:  # a callable of C without a signature
        parameters = {}.values()
    taken = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    named = {key: value for key, value in offered.items() if key in taken}
    first = () if "num_classes" in named else (num_classes,)
    return partial(found, *first, **named)


def _from_torchvision(
    name: str, rest: str, input_shape: tuple[int, ...], num_classes: int, _vocabulary: int | None
) -> Callable[[], object]:
    models = _module(name, "torchvision").models
    if rest not in models.list_models(module=models):
        raise ValueError(f"name: got {name!r}, but torchvision.models has no classifier {rest}")
    more: dict[str, Any] = {}
    if rest.startswith("vit_"):
        if input_shape[1] != input_shape[2]:
            raise ValueError(f"input_shape: got {input_shape}, expected square images for {name}")
        more["image_size"] = input_shape[1]
    elif rest in ("googlenet", "inception_v3"):
        # Their second outputs, in training only, are for a loss of their own.
        more |= {"aux_logits": False, "init_weights": True}

    return partial(models.get_model, rest, weights=None, num_classes=num_classes, **more)


def _from_timm(
    name: str, rest: str, input_shape: tuple[int, ...], num_classes: int, _vocabulary: int | None
) -> Callable[[], object]:
    timm = _module(name, "timm")
    if not timm.is_model(rest):
        raise ValueError(f"name: got {name!r}, but timm has no model {rest}")
    more: dict[str, Any] = {"num_classes": num_classes, "in_chans": input_shape[0]}
    configuration = timm.get_pretrained_cfg(rest, allow_unregistered=True)
    if getattr(configuration, "fixed_input_size", False):
        more["img_size"] = tuple(input_shape[1:])

    return partial(timm.create_model, rest, pretrained=False, **more)


def _from_transformers(
    name: str, rest: str, input_shape: tuple[int, ...], num_classes: int, vocabulary: int | None
) -> Callable[[], object]:
    transformers = _module(name, "transformers")
    if vocabulary is None:
        _require_image(name, input_shape)
        size = input_shape[1] if input_shape[1] == input_shape[2] else tuple(input_shape[1:])
        wanted: dict[str, Any] = {"num_channels": input_shape[0], "image_size": size}
        family = transformers.AutoModelForImageClassification
    else:
        wanted = {"vocab_size": vocabulary, "pad_token_id": 0}
        family = transformers.AutoModelForSequenceClassification
    folder = Path(rest).expanduser()
    own = (folder / "config.json").is_file()
    with _errors_of(name):
        if own:
            configuration = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        elif rest in transformers.CONFIG_MAPPING:
            configuration = transformers.AutoConfig.for_model(rest)
        else:
            raise ValueError(
                f"name: got {name!r}, expected transformers: and a type of model, such as resnet or bert, or a folder "
                "with a config.json; nothing is downloaded"
            )
    kind = "images" if vocabulary is None else "texts"
    if type(configuration) not in family._model_mapping:
        raise ValueError(f"name: got {name!r}, but transformers has no classifier of {kind} of that type")
    weights = own and any(
        (folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    )
    if weights and getattr(configuration, "vocab_size", vocabulary) != vocabulary:
        raise ValueError(
            f"vocabulary: got {vocabulary}, but the weights in {folder} are of {configuration.vocab_size} token ids"
        )
    # The shape of what is in the folder is its own: weights of another would not fit.
    settings = {} if weights else {key: value for key, value in wanted.items() if hasattr(configuration, key)}
    for key, value in {**settings, "num_labels": num_classes}.items():
        setattr(configuration, key, value)

    def build() -> object:
        if weights:
            model = family.from_pretrained(
                folder, config=configuration, local_files_only=True, ignore_mismatched_sizes=True
            ).float()
        else:
            model = family.from_config(configuration)
        return Logits(model) if vocabulary is None else TextLogits(model)

    return build


LIBRARIES: dict[str, Callable[[str, str, tuple[int, ...], int, int | None], Callable[[], object]]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": _from_transformers,
}


def _module(name: str, module: str) -> ModuleType:
    """The module that a model's name asks for."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = f"; pip install {module}" if error.name == module and module in LIBRARIES else ""
        raise ModuleNotFoundError(f"name: got {name!r}, but {module}: {error}{hint}", name=error.name) from error
    except Exception as error:  # such as a torchvision made for another torch
        raise ImportError(
            f"name: got {name!r}, but {module} cannot be imported: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _errors_of(name: str, call: str = "") -> Iterator[None]:
    """Report errors of foreign code as a ValueError that says which model it was."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("name: "):
            raise
        raise ValueError(f"name: {name}{call} failed: {type(error).__name__}: {error}") from error


def _require_image(name: str, input_shape: tuple[int, ...]) -> None:
    if len(input_shape) != 3:
        raise ValueError(f"input_shape: got {tuple(input_shape)}, expected (C, H, W) for {name}")


def _describe(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{'an' if type(value).__name__[0].lower() in 'aeiou' else 'a'} {type(value).__name__}"
