"""The package index's torchvision beside torch's CPU build, where both are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def version_of(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


KEPT = []
"""Libraries of operators, which are there as long as their object is."""

# torchvision's operators are compiled for CUDA in the build of the package index, so that they cannot be loaded beside
# torch's CPU build; on import torchvision describes two of them to torch, which must know them by then. The adapters'
# tests call none of them.
if torch.version.cuda is None and version_of("torchvision") and "+cpu" not in version_of("torchvision"):
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    KEPT.append(library)
