"""Adapters for training frameworks, a file for each. ``import gradmix`` imports none of them.

============================================  ======================================================  ==================
module                                        class                                                   needs
============================================  ======================================================  ==================
:mod:`gradmix.integrations.avalanche`         ``GradMixPlugin``, a strategy plugin                    avalanche-lib
:mod:`gradmix.integrations.lightning`         ``GradMixCallback``, a trainer callback                 lightning
:mod:`gradmix.integrations.timm`              ``GradMixup``, called as timm's and torchvision's       nothing
:mod:`gradmix.integrations.transformers`      ``GradMixMixin``, put before ``transformers.Trainer``   transformers
============================================  ======================================================  ==================

An adapter finds in a framework's step the batch, the model and the replayed samples or the buffer, and puts mixed
samples into the loss; the selection is :class:`gradmix.GradMix`, whose settings it passes on.
"""
