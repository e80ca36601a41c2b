"""`diptych data`: scenes, check, pack."""

from __future__ import annotations

from pathlib import Path

import click

from diptych.cli.group import Commands, cli
from diptych.errors import UserError


@cli.group(cls=Commands)
def data() -> None:
    """Make data sets, and check them."""


@data.command()
@click.argument("out")
@click.option("--preset", default="simple", show_default=True, help="simple (2 objects) or hard.")
@click.option("--train", type=int, default=4000, show_default=True, help="Pictures to train on.")
@click.option("--val", type=int, default=300, show_default=True, help="Pictures to choose by.")
@click.option("--test", type=int, default=300, show_default=True, help="Pictures to report.")
@click.option("--unseen", type=int, default=300, show_default=True, help="Pictures of combinations not trained on.")
@click.option("--size", type=int, default=128, show_default=True, help="Side in pixels.")
@click.option("--seed", type=int, default=0, show_default=True)
def scenes(out: str, preset: str, train: int, val: int, test: int, unseen: int, size: int, seed: int) -> None:
    """Draw pictures of coloured shapes, with true captions, to OUT."""
    from diptych.data.scenes import write

    made = write(out, preset, train=train, val=val, test=test, unseen=unseen, size=size, seed=seed)
    there = "were there already" if made["kept"] else "drawn"
    click.echo(f"{made['pictures']} pictures of {size} px {there}: {out}")
    click.echo(f"Next: diptych data check {out} --split train")
    click.echo(f"      diptych train demo data.path={out} out=runs/mine")


@data.command()
@click.argument("path")
@click.option("--images", help="The folder that the pictures' paths start from.")
@click.option("--split", help="Check this one only; default: train, val and test, of what there is.")
@click.option("--workers", type=int, default=1, show_default=True, help="Threads that open pictures.")
@click.option("--all", "whole", is_flag=True, help="List every fault, not the first 20 alone.")
@click.option("--clean", metavar="FILE", help="Write what can be used to FILE, as JSON lines.")
def check(path: str, images: str | None, split: str | None, workers: int, whole: bool, clean: str | None) -> None:
    """Say what is in the data set at PATH, and what is wrong with it.

    Every row is read and every picture opened. The exit code is 1 when there are faults.
    """
    from diptych.data.check import SHOWN, check, write_clean
    from diptych.data.readers import splits

    if clean is not None:
        _check_new(clean)
    names = [split] if split else files_by_split(path)
    if names == [None] and clean:  # one file, whose rows may name splits
        names = [*splits(path)] or [None]
    faults, sound = 0, {}
    for name in names:
        found = check(path, images=images, split=name, workers=workers)
        if name and len(names) > 1:
            click.echo(f"\n{name}\n{'─' * len(name)}")
        for line in found.lines(None if whole else SHOWN):
            click.echo(line)
        faults += len(found.faults)
        sound[name] = found.sound
    if clean is not None:
        write_clean(sound, clean)
        click.echo(f"\nWhat can be used is in {clean}. Next: diptych train photos data.path={clean} data.images=/")
    if faults:
        raise click.exceptions.Exit(1)


@data.command()
@click.argument("source")
@click.argument("out")
@click.option("--images", help="The folder that the pictures' paths start from.")
@click.option("--split", help="Pack this one only; default: train, val and test, or all that a file names.")
@click.option("--size-mb", type=click.IntRange(min=1), default=256, show_default=True, help="Size of a shard.")
@click.option("--per-shard", type=click.IntRange(min=1), metavar="N", help="So many pictures a shard, of any size.")
@click.option("--on-bad", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Bad pictures.")
def pack(
    source: str, out: str, images: str | None, split: str | None, size_mb: int, per_shard: int | None, on_bad: str
) -> None:
    """Pack the data set at SOURCE into tar shards in the folder OUT.

    They are in WebDataset's layout, with an index, and can be trained on like SOURCE itself. Pictures stay as they are.
    Stopped at any moment, the same command goes on.
    """
    from diptych.data.check import SHOWN
    from diptych.data.pack import pack
    from diptych.data.readers import splits

    names = [split] if split else files_by_split(source)
    if names == [None]:  # one file, whose rows may name splits
        names = [*splits(source)] or [None]
    limits = {"size_mb": size_mb, "per_shard": per_shard}
    made = pack(source, out, names, images=images, skip=on_bad == "skip", say=click.echo, **limits)
    for name, packed in made.items():
        left_out = packed.left_out
        click.echo(f"{name}: {packed.pictures:,} pictures in {packed.shards:,} shards; {len(left_out):,} left out")
        for fault in left_out[:SHOWN]:
            click.echo(f"- {fault.where}: {fault.message}")
        if len(left_out) > SHOWN:
            click.echo(f"- and {len(left_out) - SHOWN:,} more, which `diptych data check --all {source}` names")
    click.echo(f"Next: diptych train photos data.path={out} out=runs/mine")


def _check_new(file: str) -> None:
    """Before every picture is opened."""
    if not file.endswith(".jsonl"):
        raise UserError(f"--clean {file}: give a name that ends in .jsonl")
    if Path(file).exists():
        raise UserError(f"{file}: a file is there already; give another name")
    if not Path(file).parent.is_dir():
        raise UserError(f"{file}: there is no folder {Path(file).parent}; make it first")


def files_by_split(path: str) -> list[str | None]:
    """The splits of shards, tables and sub-folders, or the usual ones that a folder has a file of each for; else None
    alone: all at once."""
    from diptych.data.readers import splits
    from diptych.data.readers.source import annotation_files, shard_files, table_files

    folder = Path(path).expanduser()
    here = [name for name in ("train", "val", "test") if any(folder.glob(f"{name}.*"))]
    if shard_files(folder) or table_files(folder) or (folder.is_dir() and not annotation_files(folder)):
        here = splits(path)
    return [*here] if len(here) > 1 else [None]
