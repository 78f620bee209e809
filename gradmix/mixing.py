"""Former place of gradmix.mixing_weight."""

from __future__ import annotations

from gradmix._moved import moved

__getattr__ = moved(
    __name__,
    "gradmix.mixing_weight",
    {
        "beta_quadrature": "beta_quadrature",
        "draw_lam": "draw_lam",
        "default_generator": "gradmix.runtime.random:default_generator",
    },
)
