"""The commands. Nothing heavy is imported before a command needs it, so that help comes at once."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diptych import __version__
from diptych.errors import UserError, nearest

if TYPE_CHECKING:
    from diptych.config import Settings
    from diptych.train.cost import Cost

SETTINGS = "[KEY=VALUE]..."
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Mistake(click.ClickException):
    """A user's: one line on stderr, and an exit code."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        who = f"diptych, rank {rank}" if (rank := _rank()) else "diptych"
        click.echo(f"{who}: {' '.join(self.message.splitlines())}", err=True)


def _rank() -> int:
    """Of this process, where torchrun started several."""
    return int(os.environ.get("RANK", "0"))


class Stopped(Mistake):
    """By Ctrl-C."""

    exit_code = 130


class Commands(click.Group):
    """A group that names the nearest command to a misspelt one, and tells a user's mistakes without a traceback."""

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            ctx.fail(f"No such command '{name}'{nearest(name, self.list_commands(ctx))}.")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise Mistake(str(error)) from None
        except KeyboardInterrupt:
            raise Stopped("stopped by Ctrl-C") from None
        except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise Mistake(f"{error.filename}: {error.strerror}") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, message="diptych %(version)s")
def cli() -> None:
    """Train, fine-tune, evaluate and use models of pictures and words.

    Begin with `diptych demo`, or with pictures and captions of your own:
    `diptych train photos data.path=captions.json out=runs/mine`.
    """


def main() -> None:
    """The console script: exit code 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name may be of bytes that are no text
    cli(prog_name="diptych")


@cli.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, metavar=SETTINGS)
@click.option("--resume", is_flag=True, help="Go on with the run in `out`, if it was stopped; else begin it.")
def train(recipe: str, settings: tuple[str, ...], resume: bool) -> None:
    """Train what RECIPE says.

    RECIPE is a name (see `diptych recipes`) or a YAML file. Settings after it win over the recipe's: data.path=PATH
    train.batch=32 out=runs/mine. `diptych show RECIPE` lists all.
    """
    from diptych import config

    chosen = config.load(recipe, settings)
    from diptych.train import run

    folder = run.train(chosen, resume=resume)
    if _rank():
        return
    click.echo(f"\nThe run is in {folder}. Next:")
    for command in _next(folder, chosen):
        click.echo(f"  {command}")


def _next(folder: Path, chosen: Settings) -> list[str]:
    from diptych.config import Stage1Settings

    lines = [f"diptych eval {folder}"]
    if not isinstance(chosen, Stage1Settings):
        text = "a sentence with a [MASK]" if chosen.program == "masked_lm" else "a beginning"
        return [*lines, f'diptych complete {folder} "{text}"']
    if chosen.objectives.lm:
        lines.append(f"diptych caption {folder} PICTURE")
    return [*lines, f'diptych match {folder} PICTURE "a text" "another text"']


@cli.command()
@click.argument("recipe")
@click.argument("settings", nargs=-1, metavar=SETTINGS)
@click.option("--json", "as_json", is_flag=True, help="For machines: one JSON object.")
def show(recipe: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Show the settings of RECIPE, and what a training step will take.

    Parameters, floating-point operations and memory are counted before anything is trained. Without data captions are
    taken to be as long as data.max_tokens allows.
    """
    from diptych import config

    chosen = config.load(recipe, settings)
    if not as_json:
        click.echo(config.dump(chosen))
    if isinstance(chosen, config.TextSettings):
        from diptych.train.text_cost import cost, lines

        found = cost(chosen)
        click.echo(json.dumps({"settings": chosen.model_dump(mode="json"), "cost": found}, indent=1) if as_json
                   else "\n".join(lines(found, _scaled)))  # fmt: skip
        return
    from diptych.data.readers.source import is_here
    from diptych.train import room
    from diptych.train.build import splits
    from diptych.train.cost import cost, to_count

    path = chosen.data.path
    has_data = path is not None and is_here(Path(path))
    records = splits(chosen)["train"] if has_data else None
    built, there = to_count(chosen, records), room.memory()
    found = cost(chosen, built, records)
    turns = room.ways(chosen, built, records, found, there)
    if as_json:
        from dataclasses import asdict

        figures = {**asdict(found), "flops_of_a_step": found.step, "bytes_in_all": found.total}
        figures |= {"bytes_there": there, "turns": {" ".join(typed): total for typed, total in turns.items()}}
        click.echo(json.dumps({"settings": chosen.model_dump(mode="json"), "cost": figures}, indent=1))
        return
    if not has_data:
        where = f"data.path={chosen.data.path} is not there yet" if chosen.data.path else "no data.path is given"
        click.echo(f"{where}: captions are taken to be as long as may be\n")
    for line in [*cost_lines(found), *room_lines(turns, there)]:
        click.echo(line)


def cost_lines(cost: Cost) -> list[str]:
    """A cost as text for 80 columns."""
    lines = [f"{'parameters':<28}{'trained':>14}{'frozen':>14}"]
    for part, count in cost.parameters.items():
        lines.append(f"  {part:<26}{count.trained:>14,}{count.frozen:>14,}")
    totals = [sum(getattr(count, kind) for count in cost.parameters.values()) for kind in ("trained", "frozen")]
    lines.append(f"  {'in all':<26}{totals[0]:>14,}{totals[1]:>14,}")
    lines += ["", f"a training step: {cost.batch} pictures, captions of {cost.tokens} tokens"]
    lines += [f"  {name:<26}{_scaled(value, 'FLOP'):>14}" for name, value in cost.flops.items()]
    once = "once a picture, not in a step" if cost.is_kept else "a picture, in every step"
    lines.append(f"  {'image encoder':<26}{_scaled(cost.image, 'FLOP'):>14}  {once}")
    lines.append(f"  {'a step in all':<26}{_scaled(cost.step, 'FLOP'):>14}")
    lines += ["", f"memory, predicted ({cost.precision})"]
    lines += [f"  {name:<26}{_scaled(value, 'B'):>14}" for name, value in cost.memory.items()]
    if cost.is_kept and "features" not in cost.memory:
        tokens, width = cost.image_tokens
        one = _scaled(2 * tokens * width, "B")
        lines.append(f"  {'features, a picture':<26}{one:>14}  {tokens} × {width}; give data.path for all")
    lines.append(f"  {'in all':<26}{_scaled(cost.total, 'B'):>14}  Python and its libraries come on top")
    return lines


def room_lines(turns: dict[tuple[str, ...], int], there: int) -> list[str]:
    """What to turn where a step does not fit into the memory that is there, for 80 columns."""
    if not turns:
        return []
    lines = ["", f"That is too much for the {_scaled(there, 'B')} of this machine. The same model in less memory:"]
    lines += [f"  {' '.join(typed):<60}{_scaled(total, 'B'):>14}" for typed, total in turns.items()]
    from diptych.train.room import fits

    if not fits(min(turns.values()), there):
        lines.append("None is surely enough: turn train.batch down, or take a smaller model.")
    return lines


def _scaled(value: float, unit: str) -> str:
    for size, prefix in PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}" if value < 1000 * size else f"{value / size:.0f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


@cli.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--split", help="train, val or test; default: test, or val where there is none.")
@click.option("--rerank", type=click.IntRange(min=0), metavar="K", help="Candidates ITM re-ranks; default: the run's.")
@click.option(
    "--java-metric",
    "java_metrics",
    multiple=True,
    type=click.Choice(["meteor", "spice"]),
    help="Of captions; runs on Java.",
)
@click.option("--views", type=click.IntRange(1, 6), help="Of each picture, averaged; default: the run's.")
@click.option("--no-report", is_flag=True, help="Write results.json, and no report.html.")
def evaluate(
    run: Path,
    split: str | None,
    rerank: int | None,
    java_metrics: tuple[str, ...],
    views: int | None,
    no_report: bool,
) -> None:
    """Evaluate RUN on a held-out split, and write its report.

    Retrieval by ITC and re-ranked by ITM, generated captions, and chance beside each figure.
    """
    if _is_text(run):
        given = {"--rerank": rerank, "--java-metric": java_metrics or None, "--views": views}
        for option, value in given.items():
            if value is not None:
                raise UserError(f"{option}: {run} is a language model, which has no pictures")
        from diptych.train import text_evaluation

        text_evaluation.evaluate(run, split, click.echo)
        return
    from diptych.train.evaluation import evaluate

    evaluate(run, split, rerank, views, report=not no_report, say=click.echo, java_metrics=java_metrics)


@cli.command()
@click.argument("before", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("after", type=click.Path(path_type=Path), metavar="RUN")
def compare(before: Path, after: Path) -> None:
    """Set two evaluated runs side by side.

    Recall with a paired interval of the difference, and the pictures that changed.
    """
    _check_pictured(before, "compare")
    _check_pictured(after, "compare")
    from diptych.evaluate.compare import compare

    for line in compare(before, after):
        click.echo(line)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("pictures", nargs=-1, required=True, metavar="PICTURE...")
@click.option("--beams", type=click.IntRange(min=1), help="1 is greedy; default: the run's.")
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of objects.")
def caption(run: Path, pictures: tuple[str, ...], beams: int | None, as_json: bool) -> None:
    """Say what is on each PICTURE."""
    _check_pictured(run, "caption")
    _check_pictures(pictures)
    import diptych
    from diptych.generate import Search

    opened = diptych.load(run)
    chosen = opened.settings.evaluation
    if not opened.settings.objectives.lm:
        raise UserError(f"{run} has learned no captions (objectives.lm is 0): train with objectives.lm=1")
    search = Search(beams=beams or chosen.beams, max_length=chosen.max_length, min_length=chosen.min_length)
    said = opened.caption(list(pictures), search=search)
    if as_json:
        rows = [{"picture": p, "caption": c} for p, c in zip(pictures, said, strict=True)]
        click.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for picture, words in zip(pictures, said, strict=True):
        click.echo(f"{picture}: {words}" if len(pictures) > 1 else words)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("picture")
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of objects.")
def match(run: Path, picture: str, texts: tuple[str, ...], as_json: bool) -> None:
    """Say how well each TEXT fits PICTURE.

    ITC is the cosine between the two, from −1 to 1; ITM the probability that they belong together.
    """
    _check_pictured(run, "match")
    _check_pictures([picture])
    for place, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"text {place} of {len(texts)} is empty: give words")
    import diptych

    rows = diptych.load(run).match(picture, list(texts))
    if as_json:
        found = [{"text": text, **row} for text, row in zip(texts, rows, strict=True)]
        click.echo(json.dumps(found, ensure_ascii=False, indent=1))
        return
    shape = {"itm": "7.1%", "itc": "7.3f"}
    told = [name for name in shape if name in rows[0]]
    if not told:
        raise UserError(f"{run} has learned to match nothing (objectives.itc and objectives.itm are 0)")
    click.echo(" ".join(f"{name.upper():>7}" for name in told) + "  text")
    for text, row in zip(texts, rows, strict=True):
        click.echo(" ".join(format(row[name], f">{shape[name]}") for name in told) + f"  {text}")


@cli.command()
@click.argument("text")
@click.option("--model", metavar="FOLDER|ID", help="A BERT, RoBERTa or GPT-2 of the hub's; default: the starter BERT.")
@click.option("--out", type=click.Path(path_type=Path), default="explain.html", show_default=True, help="The page.")
def explain(text: str, model: str | None, out: Path) -> None:
    """Show where a model looks when it reads TEXT.

    Attention by layer and head, drawn on one HTML page that needs no network.
    """
    if not text.strip():
        raise UserError("the text is empty: give words")
    from diptych.explain.page import check_free, write_page

    check_free(out)
    from diptych.checkpoints import starter
    from diptych.checkpoints.texts import open_text, open_tokenizer
    from diptych.explain.maps import of_text

    folder = model or starter.text_folder()
    opened, family = open_text(folder)
    maps = of_text(opened, open_tokenizer(folder), text)
    layers, heads = maps.weights.shape[:2]
    write_page(out, maps, text, f"{model or 'MiniLM-L6-H384, the starter weights'} ({family})")
    size = _scaled(out.stat().st_size, "B")
    click.echo(f"{out} ({size}): {layers} layers × {heads} heads, {len(maps.queries)} tokens. Open it in a browser.")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, required=True, metavar="TEXT...")
@click.option("--max-tokens", type=click.IntRange(min=1), default=40, show_default=True, help="New ones, at most.")
@click.option("--beams", type=click.IntRange(min=1), default=1, show_default=True, help="1 is greedy.")
@click.option("--sample", is_flag=True, help="Draw each word by its chance; --seed tells another draw apart.")
@click.option("--seed", type=int, default=0, show_default=True)
def complete(run: Path, texts: tuple[str, ...], max_tokens: int, beams: int, sample: bool, seed: int) -> None:
    """Go on with each TEXT, or fill in its [MASK].

    RUN is a language model: causal_lm and prefix_lm go on, masked_lm fills in.
    """
    if not _is_text(run):
        raise UserError(f"{run} is no language model: `diptych train causal` and `diptych train masked` make one")
    import diptych
    from diptych.generate import Search, new_only

    opened = diptych.load(run)
    if opened.settings.program == "masked_lm":
        for text in texts:
            for place, row in enumerate(opened.fill(text), start=1):
                told = "  ".join(f"{name} {chance:.1%}" for name, chance in row)
                click.echo(f"[MASK] {place}: {told}" if text.count("[MASK]") > 1 else told)
        return
    search = Search(beams=beams, sample=sample, max_length=max_tokens, count=new_only)
    for text, rest in zip(texts, opened.complete(texts, search, seed), strict=True):
        click.echo(f"{text} {rest}" if rest else text)


def _is_text(folder: Path) -> bool:
    """Whether a run is a language model's."""
    _check_run(folder)
    file = folder / "settings.yaml"
    if not file.is_file():
        return False
    from diptych import config

    return isinstance(config.load(str(file)), config.TextSettings)


def _check_run(folder: Path) -> None:
    """Before the seconds that models take to be imported."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the run that `diptych train` made")


def _check_pictured(folder: Path, what: str) -> None:
    if _is_text(folder):
        raise UserError(f"{folder} is a language model, and {what} wants one of pictures")


def _check_pictures(paths: Sequence[str]) -> None:
    from diptych.data import files

    for path in paths:
        if not files.is_file(path):
            raise UserError(f"{path}: there is no such picture")


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
    names = [split] if split else _files_by_split(path)
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

    names = [split] if split else _files_by_split(source)
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


def _files_by_split(path: str) -> list[str | None]:
    """The splits of shards, tables and sub-folders, or the usual ones that a folder has a file of each for; else None
    alone: all at once."""
    from diptych.data.readers import splits
    from diptych.data.readers.source import annotation_files, shard_files, table_files

    folder = Path(path).expanduser()
    here = [name for name in ("train", "val", "test") if any(folder.glob(f"{name}.*"))]
    if shard_files(folder) or table_files(folder) or (folder.is_dir() and not annotation_files(folder)):
        here = splits(path)
    return [*here] if len(here) > 1 else [None]


@cli.command()
@click.argument("source")
@click.argument("out")
@click.option("--to", required=True, metavar="FORMAT", help="lavis, hf or diptych.")
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

    SOURCE is a run, a LAVIS stage-1 file or a folder of Hugging Face's Blip2ForImageTextRetrieval; OUT is a .pth or
    .safetensors file for lavis, else a folder. What a format can't hold is said, or refused.
    """
    if not Path(source).exists():
        raise UserError(f"{source}: no such file or folder")
    from diptych.train.convert import Choices, convert

    made = convert(source, out, to, Choices(image_encoder, tokenizer, heads, image_heads), click.echo)
    click.echo(f"converted: {made}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="Which of the kept steps; default: the last.")
def replay(run: Path, step: int | None) -> None:
    """Run a step of RUN again whose loss was no finite number.

    Says which part of the model gave the first such number, and which gradients.
    """
    _check_run(run)
    from diptych.train.replay import replay

    for line in replay(run, step):
        click.echo(line)


@cli.command()
def demo() -> None:
    """Draw scenes, learn from them and show how well, in minutes."""
    from diptych.train import demo

    demo.main()


@cli.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    import textwrap

    from diptych import config

    names = config.recipes()
    width = max(map(len, names)) + 2
    for name in names:
        about = textwrap.wrap(config.load(name).about, 80 - width) or [""]
        click.echo(name.ljust(width) + ("\n" + " " * width).join(about))
