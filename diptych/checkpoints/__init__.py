"""Checkpoints of others, theirs ↔ ours: `load(model, path, table)`, `save(model, path, table)`, and the tables.

`hf`, `lavis` and `timm` hold the tables, `rules` what they are made of, `starts` what begins a model from another.
"""

from __future__ import annotations

from diptych.checkpoints.io import load, save

__all__ = ["load", "save"]
