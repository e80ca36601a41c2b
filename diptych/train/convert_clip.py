"""Runs of dual encoders ↔ OpenAI's files, OpenCLIP's and Hugging Face's folders; `convert.py` calls it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from diptych.checkpoints import clips, hf_clip, openai, openclip, texts
from diptych.errors import UserError
from diptych.models.specs import to_hugging_face
from diptych.settings import ClipSettings
from diptych.train.clip import BuiltClip, continued
from diptych.train.opened import Opened, write_run

OpenedClip = Opened[ClipSettings, BuiltClip]


def from_checkpoint(place: Path, tokenizer: str | None) -> OpenedClip:
    """Whatever `clips.find` knows."""
    found, settings = clips.find(place), ClipSettings(program="clip")
    settings.about = f"converted from {place.name}"
    settings.model.start, settings.text_encoder.tokenizer = str(place), tokenizer
    settings.train.precision = "float32"  # its numbers are the source's
    settings.data.max_tokens = texts.longest(found.config.text)
    notes: list[str] = []
    return OpenedClip(settings, continued(settings, found, notes.append), notes)


def writer(to: str) -> Callable[[OpenedClip, Path], list[str]]:
    if to == "lavis":
        raise UserError("LAVIS has no file of a dual encoder; convert it --to openai, openclip or hf")
    return {"openai": write_openai, "openclip": write_openclip, "hf": write_hf, "diptych": write_run}[to]


def write_openai(opened: OpenedClip, out: Path) -> list[str]:
    """One .safetensors file under OpenAI's names. It has no place for a tokenizer."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: one file under OpenAI's names: give a name that ends in .safetensors")
    return openai.export(opened.built.model, out)


def write_openclip(opened: OpenedClip, out: Path) -> list[str]:
    """A folder that `open_clip.create_model("local-dir:FOLDER")` opens, with the tokenizer."""
    out.mkdir()
    notes = openclip.export(opened.built.model, out)
    opened.built.words.save(out)
    return notes


def write_hf(opened: OpenedClip, out: Path) -> list[str]:
    """A folder that `transformers` opens, with the tokenizer and how pictures are prepared."""
    model = opened.built.model
    pictures = to_hugging_face(model.image.spec)
    out.mkdir()
    notes = hf_clip.export(model, out)
    (out / clips.PICTURES).write_text(json.dumps(pictures, indent=2), encoding="utf-8")
    opened.built.words.save(out)
    return notes
