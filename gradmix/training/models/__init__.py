"""The models that are trained: the project's own, one family a file, and those from elsewhere."""

from gradmix.training.models.building import MODELS, build_model
from gradmix.training.models.perceptron import MLP
from gradmix.training.models.resnets import BasicBlock, Bottleneck, ImageNetResNet, NarrowResNet, ResNet18
from gradmix.training.models.text_transformer import TextTransformer
from gradmix.training.models.vision_transformer import VisionTransformer

__all__ = [
    "MLP",
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "ImageNetResNet",
    "NarrowResNet",
    "ResNet18",
    "TextTransformer",
    "VisionTransformer",
    "build_model",
]
