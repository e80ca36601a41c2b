"""diptych: train, fine-tune, evaluate and use CLIP, BLIP and BLIP-2 models, all built from one transformer stack.

`diptych.load("runs/mine")` opens a trained run. Importing the package loads nothing heavy.
"""

from __future__ import annotations

from diptych.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load"]


def __getattr__(name: str):
    if name == "load":
        from diptych.train.run import load

        return load
    raise AttributeError(f"module 'diptych' has no attribute '{name}'")
