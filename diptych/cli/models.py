"""Commands that carry models in and out, and mix them: convert, export, average."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from diptych.cli.checks import check_pictured
from diptych.cli.group import cli
from diptych.errors import UserError

if TYPE_CHECKING:
    from diptych.checkpoints.export import Format

MEASURED = 500  # pictures


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


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--to", type=click.Choice(["onnx", "torch"]), default="onnx", show_default=True, help="torch: .pt2 files."
)
@click.option("--opset", type=int, help="Of ONNX; default: the one that was tested.")
@click.option("--int8", is_flag=True, help="Towers of 8 bits too, and the recall they cost; of ONNX.")
def export(run: Path, out: Path, to: Format, opset: int | None, int8: bool) -> None:
    """Export both towers of a dual encoder to the folder OUT.

    Pictures go in as bytes, unit vectors come out, for any number of rows; export.json says how pictures are prepared.
    What 8 bits cost is measured on the first 500 of RUN's held-out pictures, where they are at hand.
    """
    check_pictured(run, "export")
    import diptych
    from diptych.checkpoints.export import OPSET, export
    from diptych.train.clip import ClipRun

    opened = diptych.load(run)
    if not isinstance(opened, ClipRun):
        raise UserError(f"{run} is a {opened.settings.program}; export is for dual encoders (`diptych train clip`)")
    model = opened.model
    export(model.model, out, model.tokenizer, to, opset or OPSET, int8, model.max_tokens, click.echo)
    click.echo(f"exported: {out}")
    if int8:
        _tell_cost(run, out)


def _tell_cost(run: Path, out: Path) -> None:
    """Of 8 bits, beside the floats."""
    from diptych.evaluate import exported
    from diptych.train.evaluation import held_out

    try:
        records = held_out(run, limit=MEASURED)
    except UserError as error:
        click.echo(f"what 8 bits cost was not measured: {error}")
        return
    click.echo("\n".join(exported.cost_lines(exported.int8_cost(out, records), len(records))))


@cli.command()
@click.argument("start")
@click.argument("tuned")
@click.argument("out")
@click.option("--share", type=click.FloatRange(0, 1), help="0: START; 1: TUNED; default: 0.5.")
@click.option("--guard", metavar="FOLDER", help="Choose the share by FOLDER/CLASS/*.jpg.")
@click.option("--allowed-loss", type=click.FloatRange(0, 1), default=0.02, show_default=True, help="Of the guard.")
@click.option("--names", metavar="FILE", help="What the guard's classes are called; as of zeroshot.")
@click.option("--prompts", metavar="FILE", help="As of zeroshot.")
def average(
    start: str,
    tuned: str,
    out: str,
    share: float | None,
    guard: str | None,
    allowed_loss: float,
    names: str | None,
    prompts: str | None,
) -> None:
    """Write a run whose weights lie between START's and TUNED's.

    Fine-tuning gains what it was tuned to and loses some of the rest; half the way back keeps most of both (WiSE-FT).
    With --guard the share is the one that finds best in TUNED's held-out pictures, of those that lose no more of the
    guard's zero-shot accuracy than is allowed.
    """
    if guard is not None and share is not None:
        raise UserError("--share and --guard: give one; a guard chooses the share")
    if guard is None and (names or prompts):
        raise UserError("--names and --prompts are of the guard's classes: give --guard FOLDER")
    for place in (start, tuned):
        if not Path(place).exists():
            raise UserError(f"{place}: no such file or folder")
    from diptych.settings import GuardSet
    from diptych.train import between

    if guard is None:
        made = between.average(start, tuned, out, 0.5 if share is None else share)
    else:
        asked = GuardSet(path=guard, names=names, prompts=prompts, allowed_loss=allowed_loss)
        made = between.average_within(start, tuned, out, asked, click.echo)
    click.echo(f"averaged: {made}")
