"""Other libraries' per-sample gradients, sketches and inner products, each behind a function of the same few arguments.

A library is imported only when its function is called. Where it is missing, or cannot serve the network, the function
raises :class:`Absent` with the reason, and the benchmark goes on without it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SampleGradients = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Maps inputs and labels of n samples to {parameter: (n, *its shape)}, gradients of each sample's cross-entropy."""

PACKAGES = {
    "opacus": "opacus",
    "backpack": "backpack-for-pytorch",
    "dattri": "dattri",
    "trak": "traker",
    "kronfluence": "kronfluence",
}
"""Modules and the packages that they come in."""


_Way = Callable[[Tensor, Tensor], Any]


class Absent(Exception):
    """A peer cannot be compared; its message says why."""


def versions() -> dict[str, str | None]:
    """The version of each package in :data:`PACKAGES`; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


# ------------------------------------------------------------------------------------------- whole per-sample gradients


def opacus_gradients(model: nn.Module, x: Tensor, y: Tensor) -> SampleGradients:
    """By the hooks of Opacus' GradSampleModule.

    Opacus takes only modules in training mode and none with buffers. A BatchNorm in evaluation mode is therefore given
    to it as :class:`FixedNorm`, with a rule registered in the way its own rules are.
    """
    opacus = _module("opacus.grad_sample")
    opacus.register_grad_sampler(FixedNorm)(_fixed_norm_gradients)
    inner = _fixed_norms(copy.deepcopy(model)).train()
    with _refusals("opacus"):
        wrapped: Any = opacus.GradSampleModule(inner, loss_reduction="sum")

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        F.cross_entropy(wrapped(x), y, reduction="sum").backward()
        found: dict[str, Tensor] = {}
        for name, parameter in inner.named_parameters():
            found[name] = parameter.grad_sample  # type: ignore[attr-defined]
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
        return found

    return _tried("opacus", gradients, x, y)


def backpack_gradients(model: nn.Module, x: Tensor, y: Tensor) -> SampleGradients:
    """By BackPACK's extension BatchGrad."""
    backpack, extensions = _module("backpack"), _module("backpack.extensions")
    inner = backpack.extend(copy.deepcopy(model))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))

    def gradients(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        with backpack.backpack(extensions.BatchGrad()):
            loss(inner(x), y).backward()
        found = {}
        for name, parameter in inner.named_parameters():
            if not hasattr(parameter, "grad_batch"):
                raise Absent(f"backpack: it has no rule for the layer of {name}")
            found[name] = parameter.grad_batch
            parameter.grad = None
            del parameter.grad_batch
        return found

    return _tried("backpack", gradients, x, y)


class FixedNorm(nn.Module):
    """A BatchNorm as it computes in evaluation mode, without buffers, in any mode."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        # Not buffers; .to() would leave them behind, but the network is where it shall be.
        self.statistics = (norm.running_mean, norm.running_var)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        return F.batch_norm(x, *self.statistics, self.weight, self.bias, training=False, eps=self.eps)


def _fixed_norm_gradients(layer: FixedNorm, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    normal = F.batch_norm(activations[0], *layer.statistics, training=False, eps=layer.eps)
    return {layer.weight: (normal * backprops).sum((2, 3)), layer.bias: backprops.sum((2, 3))}


def _fixed_norms(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        setattr(model, name, FixedNorm(child) if isinstance(child, nn.BatchNorm2d) else _fixed_norms(child))
    return model


# ------------------------------------------------------------------------------------------------------------ sketches


def dattri_logra(model: nn.Module, x: Tensor, y: Tensor, rank: int) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """By the compressors of dattri's LoGra, which serve linear layers: Gaussian matrices of ``rank`` rows a side.

    Returns:
        From inputs and labels of n samples to {layer: (n, rank^2)}, sketches of the samples' gradients. Parameters of
        other layers are frozen in the copy of the model that it works on, so that it spends nothing on them.
    """
    hooks = _module("dattri.algorithm.block_projected_if.core.hook")
    compressors = _module("dattri.algorithm.block_projected_if.core.compressor")
    inner = copy.deepcopy(model).requires_grad_(False)
    names = [name for name, module in inner.named_modules() if type(module) is nn.Linear]
    if not names:
        raise Absent("dattri: the network has no linear layers")
    for name in names:
        inner.get_submodule(name).requires_grad_(True)
    common = {"device": str(x.device), "proj_max_batch_size": 64}
    with _refusals("dattri"):
        made = compressors.setup_model_compressors(
            inner,
            names,
            sparsifier_kwargs={**common, "proj_dim": rank, "proj_type": "normal"},
            projector_kwargs={**common, "proj_dim": -1, "proj_type": "identity"},
            sample_inputs=[x[:1]],
            device=str(x.device),
        )
        manager = hooks.HookManager(inner, names, device=str(x.device))
        manager.set_compressors(made)

    def sketches(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        F.cross_entropy(inner(x), y, reduction="sum").backward()
        # It takes the loss for a mean and multiplies by the batch size.
        return {name: s / len(x) for name, s in zip(names, manager.get_compressed_grads(), strict=True)}

    return _tried("dattri", sketches, x, y)


def trak_projector(parameters: int, rank: int, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """TRAK's BasicProjector of whole gradients, with Rademacher entries.

    It makes its matrix anew for each block of ``rank`` columns, except where there is one block only; so two are asked
    for, and half the time of a call is that of a block.

    Returns:
        From (n, parameters) to (n, 2 rank), and the matrix (parameters, rank) that made its last ``rank`` columns.
    """
    projectors = _module("trak.projectors")
    with _refusals("trak"):
        projector = projectors.BasicProjector(
            parameters, 2 * rank, 0, projectors.ProjectionType.rademacher, device, block_size=rank
        )
    return lambda gradients: projector.project(gradients, model_id=0), projector.proj_matrix


# ------------------------------------------------------------------------------------------------------ inner products


def kronfluence_inner(
    model: nn.Module, x: Tensor, y: Tensor, direction: Mapping[str, Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """By kronfluence's tracked modules, which serve convolutions and linear layers, without preconditioning.

    Returns:
        From inputs and labels of n samples to (n,), the inner products of the samples' gradients with ``direction``,
        over the parameters of these layers.
    """
    analyzer, utils = _module("kronfluence.analyzer"), _module("kronfluence.module.utils")
    tracked, constants = _module("kronfluence.module.tracked_module"), _module("kronfluence.utils.constants")
    inner = copy.deepcopy(model)
    with _refusals("kronfluence"):
        inner = analyzer.prepare_model(inner, None).to(x.device)
    layers = [module for module in inner.modules() if isinstance(module, tracked.TrackedModule)]
    utils.set_mode(inner, tracked.ModuleMode.PAIRWISE_SCORE)
    for layer in layers:
        parts = [direction[f"{layer.name}.weight"].flatten(1)]
        if layer.original_module.bias is not None:
            parts.append(direction[f"{layer.name}.bias"][:, None])
        layer.set_factor(constants.ACCUMULATED_PRECONDITIONED_GRADIENT_NAME, torch.cat(parts, 1)[None])

    def products(x: Tensor, y: Tensor) -> Tensor:
        F.cross_entropy(inner(x), y, reduction="sum").backward()
        total = torch.zeros(len(x), device=x.device)
        for layer in layers:
            total += layer.get_factor(constants.PAIRWISE_SCORE_MATRIX_NAME)[0]
            layer.release_factor(constants.PAIRWISE_SCORE_MATRIX_NAME)
        inner.zero_grad(set_to_none=True)
        return total

    return _tried("kronfluence", products, x, y)


# ------------------------------------------------------------------------------------------------------------- imports


def _module(name: str) -> ModuleType:
    package = PACKAGES[name.split(".")[0]]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{name.split('.')[0]}: package {package} is not installed") from None
    with warnings.catch_warnings(), _refusals(name.split(".")[0]):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@contextlib.contextmanager
def _refusals(peer: str) -> Iterator[None]:
    """Turn whatever a peer raises into :class:`Absent`."""
    try:
        yield
    except Absent:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise Absent(f"{peer}: {type(error).__name__}: {first[:200]}") from error


def _tried(peer: str, function: _Way, x: Tensor, y: Tensor) -> _Way:
    """The function, after a call with two samples; its refusal as :class:`Absent`."""
    with warnings.catch_warnings(), _refusals(peer):
        warnings.simplefilter("ignore")
        function(x[:2], y[:2])
    return function
