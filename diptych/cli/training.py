"""Commands that train: train, show, replay, demo, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diptych.cli.checks import check_run
from diptych.cli.group import cli, rank

if TYPE_CHECKING:
    from diptych.settings import Settings
    from diptych.train.cost import Cost

SETTINGS = "[KEY=VALUE]..."
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


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
    if rank():
        return
    click.echo(f"\nThe run is in {folder}. Next:")
    for command in _next(folder, chosen):
        click.echo(f"  {command}")


def _next(folder: Path, chosen: Settings) -> list[str]:
    from diptych.settings import Stage1Settings, TextSettings

    lines = [f"diptych eval {folder}"]
    if isinstance(chosen, TextSettings):
        text = "a sentence with a [MASK]" if chosen.program == "masked_lm" else "a beginning"
        return [*lines, f'diptych complete {folder} "{text}"']
    if isinstance(chosen, Stage1Settings) and chosen.objectives.lm:
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
    from diptych.settings import ClipSettings, TextSettings

    chosen = config.load(recipe, settings)
    if not as_json:
        click.echo(config.dump(chosen))
    if isinstance(chosen, TextSettings | ClipSettings):
        from diptych.train import clip, step_cost, text_cost

        costed = text_cost.cost(chosen) if isinstance(chosen, TextSettings) else clip.step(chosen)
        click.echo(json.dumps({"settings": chosen.model_dump(mode="json"), "cost": costed}, indent=1) if as_json
                   else "\n".join(step_cost.lines(costed, scaled)))  # fmt: skip
        return
    from diptych.data.readers.source import is_here
    from diptych.train import room
    from diptych.train.cost import cost, to_count
    from diptych.train.paired import splits

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
    lines += [f"  {name:<26}{scaled(value, 'FLOP'):>14}" for name, value in cost.flops.items()]
    once = "once a picture, not in a step" if cost.is_kept else "a picture, in every step"
    lines.append(f"  {'image encoder':<26}{scaled(cost.image, 'FLOP'):>14}  {once}")
    lines.append(f"  {'a step in all':<26}{scaled(cost.step, 'FLOP'):>14}")
    lines += ["", f"memory, predicted ({cost.precision})"]
    lines += [f"  {name:<26}{scaled(value, 'B'):>14}" for name, value in cost.memory.items()]
    if cost.is_kept and "features" not in cost.memory:
        tokens, width = cost.image_tokens
        one = scaled(2 * tokens * width, "B")
        lines.append(f"  {'features, a picture':<26}{one:>14}  {tokens} × {width}; give data.path for all")
    lines.append(f"  {'in all':<26}{scaled(cost.total, 'B'):>14}  Python and its libraries come on top")
    return lines


def room_lines(turns: dict[tuple[str, ...], int], there: int) -> list[str]:
    """What to turn where a step does not fit into the memory that is there, for 80 columns."""
    if not turns:
        return []
    lines = ["", f"That is too much for the {scaled(there, 'B')} of this machine. The same model in less memory:"]
    lines += [f"  {' '.join(typed):<60}{scaled(total, 'B'):>14}" for typed, total in turns.items()]
    from diptych.train.room import fits

    if not fits(min(turns.values()), there):
        lines.append("None is surely enough: turn train.batch down, or take a smaller model.")
    return lines


def scaled(value: float, unit: str) -> str:
    for size, prefix in PREFIXES:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}" if value < 1000 * size else f"{value / size:.0f} {prefix}{unit}"
    return f"{value:.0f} {unit}"


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=click.IntRange(min=0), help="Which of the kept steps; default: the last.")
def replay(run: Path, step: int | None) -> None:
    """Run a step of RUN again whose loss was no finite number.

    Says which part of the model gave the first such number, and which gradients.
    """
    check_run(run)
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
