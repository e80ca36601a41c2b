"""Commands that measure what a model's space of pictures and texts is worth: zeroshot, probe, pairs, health."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from diptych.cli.checks import check_pictured
from diptych.cli.group import cli, rank
from diptych.errors import UserError

RUN = click.argument("run", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")


def measured(run: Path, what: str, measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds of the model of `run` in use. Processes that torchrun started share the work."""
    check_pictured(run, what)
    import diptych
    from diptych.train import processes

    with processes.joined(600):
        return measure(diptych.load(run).model)


def tell(found: dict[str, Any], lines: Callable[[dict[str, Any]], Sequence[str]], as_json: bool) -> None:
    if rank():
        return
    click.echo(json.dumps(found, ensure_ascii=False, indent=1) if as_json else "\n".join(lines(found)))


@cli.command()
@RUN
@click.argument("folder")
@click.option("--names", metavar="FILE", help="What classes are called, where folders are named otherwise.")
@click.option("--prompts", metavar="FILE", help="One a line, with {} for the name; default: a few of ours.")
@JSON
def zeroshot(run: Path, folder: str, names: str | None, prompts: str | None, as_json: bool) -> None:
    """Classify FOLDER/CLASS/*.jpg by the names of their classes alone."""
    from diptych.evaluate import zeroshot

    asked = prompts or zeroshot.PROMPTS
    found = measured(run, "zeroshot", lambda model: zeroshot.in_folder(model, folder, names, asked))
    tell(found, zeroshot.lines, as_json)


@cli.command()
@RUN
@click.argument("train")
@click.argument("test")
@click.option("--val", metavar="FOLDER", help="To choose the strength by; default: a fifth of TRAIN.")
@click.option("--names", metavar="FILE", help="What classes are called, where folders are named otherwise.")
@click.option("-k", type=click.IntRange(min=1), default=20, show_default=True, help="Neighbours that vote.")
@JSON
def probe(run: Path, train: str, test: str, val: str | None, names: str | None, k: int, as_json: bool) -> None:
    """Classify pictures by a linear probe, and by nearest neighbours, on RUN's embeddings.

    TRAIN and TEST are folders of FOLDER/CLASS/*.jpg.
    """
    from diptych.evaluate import probe

    found = measured(run, "probe", lambda model: probe.in_folders(model, train, test, val, names, k))
    tell(found, probe.lines, as_json)


@cli.command()
@RUN
@click.argument("path")
@click.option("--images", metavar="FOLDER", help="Where the pictures lie, when not beside PATH.")
@JSON
def pairs(run: Path, path: str, images: str | None, as_json: bool) -> None:
    """Tell a true caption from one that is false by a word.

    PATH is a SugarCrepe file, a folder of them, or a folder of drawn scenes.
    """
    from diptych.evaluate import pairs

    asked = pairs.read_pairs(path, images)
    tell(measured(run, "pairs", lambda model: pairs.hard_pairs(model, asked)), pairs.lines, as_json)


@cli.command()
@RUN
@click.option("--split", help="Of the run's data; default: test, or val where there is none.")
@click.option("--limit", type=click.IntRange(min=2), default=2000, show_default=True, help="Pictures, at most.")
@click.option("--out", type=click.Path(path_type=Path), help="A picture of it, .png or .svg.")
@JSON
def health(run: Path, split: str | None, limit: int, out: Path | None, as_json: bool) -> None:
    """Say whether pictures and texts fill their space: alignment, uniformity, gap.

    A space that has collapsed, or two clouds that lie apart, show here before recall falls.
    """
    from diptych.evaluate import health

    if out is not None and out.suffix not in (".png", ".svg"):
        raise UserError(f"--out {out}: give a name that ends in .png or .svg")

    def measure(model: Any) -> dict[str, Any]:
        from diptych.train.evaluation import held_out

        records = held_out(run, split, limit)
        texts = [text for record in records for text in record.captions]
        owners = [place for place, record in enumerate(records) for _ in record.captions]
        return health.health(model, [record.image for record in records], texts, owners)

    found = measured(run, "health", measure)
    tell(found, health.lines, as_json)
    if out is not None and not rank():
        health.draw(out, found)
        click.echo(f"drawn: {out}", err=as_json)
