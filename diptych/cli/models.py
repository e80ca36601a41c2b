"""Commands that carry models in and out: convert."""

from __future__ import annotations

from pathlib import Path

import click

from diptych.cli.group import cli
from diptych.errors import UserError


@cli.command()
@click.argument("source")
@click.argument("out")
@click.option("--to", required=True, metavar="FORMAT", help="lavis, hf, openai, openclip or diptych.")
@click.option("--image-encoder", metavar="FILE|NAME", help="For a LAVIS file without its tower.")
@click.option("--tokenizer", metavar="FOLDER", help="Default: bert-base-uncased's words, from the starter weights.")
@click.option("--heads", type=click.IntRange(min=1), help="Of a LAVIS file's Q-Former; default: 12 for a width of 768.")
@click.option("--image-heads", type=click.IntRange(min=1), help="Of its tower; default: 16 for EVA-g and CLIP-L.")
def convert(
    source: str,
    out: str,
    to: str,
    image_encoder: str | None,
    tokenizer: str | None,
    heads: int | None,
    image_heads: int | None,
) -> None:
    """Convert between runs and checkpoints of others.

    SOURCE is a run, a LAVIS stage-1 file, OpenAI's file of a CLIP, or a folder of OpenCLIP's or of Hugging Face's
    (Blip2ForImageTextRetrieval, CLIPModel, SiglipModel, VisionTextDualEncoderModel, BERT, RoBERTa, GPT-2).

    OUT is a .pth or .safetensors file for lavis, a .safetensors file for openai, else a folder. What a format can't
    hold is said, or refused.
    """
    if not Path(source).exists():
        raise UserError(f"{source}: no such file or folder")
    from diptych.train.convert import Choices, convert

    made = convert(source, out, to, Choices(image_encoder, tokenizer, heads, image_heads), click.echo)
    click.echo(f"converted: {made}")
