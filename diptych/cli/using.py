"""Commands that use a run: eval, compare, caption, match, complete; and explain."""

from __future__ import annotations

import json
from pathlib import Path

import click

from diptych.cli.checks import check_pictured, check_pictures, is_text
from diptych.cli.group import cli
from diptych.cli.training import scaled
from diptych.errors import UserError


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
    if is_text(run):
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
    check_pictured(before, "compare")
    check_pictured(after, "compare")
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
    check_pictured(run, "caption")
    check_pictures(pictures)
    import diptych
    from diptych.generate import Search

    opened = diptych.load(run)
    chosen = opened.settings.evaluation
    if "lm" not in opened.learned:
        raise UserError(f"{run} has learned no captions: `diptych train photos` learns them, with objectives.lm=1")
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
    check_pictured(run, "match")
    check_pictures([picture])
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
    size = scaled(out.stat().st_size, "B")
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
    if not is_text(run):
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
