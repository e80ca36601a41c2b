"""A run's held-out figures and its report."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diptych.aside import aside
from diptych.data import readers
from diptych.data.readers.faults import Fault
from diptych.data.records import Record
from diptych.errors import UserError
from diptych.evaluate import captioning, java, scenes
from diptych.evaluate import gallery as galleries
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.report import (
    DIRECTIONS,
    Candidate,
    Example,
    ReportData,
    choose_examples,
    summary_lines,
    write_report,
)
from diptych.evaluate.retrieval import ranks
from diptych.generate import Search
from diptych.objectives import gather
from diptych.train import processes, skipped
from diptych.train.paired import splits
from diptych.train.run import load, settings_of, split_of
from diptych.train.watch import Silent, Watch

SHOWN = 12  # pictures of a report's gallery


class Run(Protocol):
    """A trained run of pictures and captions, opened. learned: which of "itc", "itm" and "lm"."""

    folder: Path
    settings: Any
    model: Any

    @property
    def learned(self) -> list[str]: ...

    def gallery(self, records: Sequence[Record], views: int, watch: Watch, faults: list[Fault]) -> Gallery: ...

    def fingerprints(self) -> dict[str, str]: ...


@dataclass
class Evaluated:
    """What one split gave. results: of `retrieval`, by ITC and re-ranked; tables: title → rows for the report."""

    gallery: Gallery
    scores: Tensor
    results: list[dict]
    said: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def evaluate(
    folder: str | Path,
    split: str | None = None,
    rerank: int | None = None,
    views: int | None = None,
    report: bool = True,
    say: Callable[[str], None] = print,
    java_metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates a run on one of its splits, tells of it, and writes results.json in its folder and, with `report`,
    report.html. Where torchrun started several processes they share the work, to the same results.

    split: "train", "val" or "test"; test when None, or val where there is none. rerank: how many candidates ITM
    re-ranks; views: of each picture; java_metrics: "meteor", "spice", of captions. The recipe's where not given.
    """
    settings = settings_of(Path(folder))
    chosen = _chosen(settings, {"rerank": rerank, "views": views, "java_metrics": [*java_metrics] or None}, folder)
    with processes.joined(settings.train.timeout):
        return _evaluate(load(folder), split, chosen, report, say)


def held_out(folder: Path, split: str | None = None, limit: int | None = None) -> list[Record]:
    """The first `limit` records of a run's split, as `split_of` chooses it. UserError where the data is not at hand."""
    parts = splits(settings_of(folder))
    return parts[split_of(folder, parts, split)][:limit]


def _chosen(settings: Any, asked: dict[str, Any], folder: str | Path) -> Any:
    """The recipe's evaluation section with what is asked for besides. UserError for what the model has not."""
    given = {name: it for name, it in asked.items() if it is not None}
    for name in given:
        if name not in type(settings.evaluation).model_fields:
            raise UserError(f"--{name.replace('_', '-')}: {folder} is a {settings.program}, which has no use for it")
    chosen = settings.evaluation.model_copy(update=given)
    java.check(getattr(chosen, "java_metrics", ()))
    return chosen


def _evaluate(run: Run, split: str | None, chosen: Any, report: bool, say: Callable[[str], None]) -> dict[str, Any]:
    first = processes.is_first()
    watch = Watch(run.folder, say=say) if first else Silent(run.folder)
    faults: list[Fault] = []
    parts = splits(run.settings, faults=faults)
    split = split_of(run.folder, parts, split)
    found = figures(run, parts[split], chosen, watch, faults)
    for result in found.results:
        for line in ["", *summary_lines(result)]:
            watch.say(line)
    if scenes.is_scenes(run.settings.data.path) and split == "test":
        _unseen(run, found, chosen, watch)
    for title, rows in found.tables.items():
        for line in ["", title, *table_lines(rows)]:
            watch.say(line)
    record = {
        "split": split,
        "retrieval": found.results,
        "tables": found.tables,
        "captions": found.said,
        "pictures": [{"image": r.image, "image_id": r.image_id, "captions": r.captions} for r in found.gallery.records],
    }
    if first:
        with aside(run.folder / "results.json") as file:
            text = json.dumps(record, indent=1, ensure_ascii=False)
            file.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file name may be no UTF-8
    if first and report:
        left_out = dict.fromkeys([*skipped.read(run.folder), *faults])
        path = write_report(run.folder / "report.html", report_data(run, found, split, [*left_out]))
        watch.say(f"\nreport: {path}")
    return record


def figures(
    run: Run,
    records: Sequence[Record],
    chosen: Any,
    watch: Watch,
    faults: list[Fault],
) -> Evaluated:
    """Retrieval by ITC and re-ranked, captions, and, on scenes, what their truth tells, of what the run has learned.
    chosen: its settings' evaluation section. `faults` hears of pictures that can't be used."""
    folder, learned = run.settings.data.path, run.learned
    gallery = run.gallery(records[: chosen.limit], chosen.views, watch, faults)
    scores = galleries.similarities(run.model, gallery)
    found = Evaluated(gallery, scores, [galleries.by_itc(scores, gallery)])
    if "itm" in learned and chosen.rerank:
        top = min(chosen.rerank, len(gallery.texts))
        watch.say(f"re-ranking each query's top {top}")
        again = galleries.reranked(run.model, gallery, scores, top, chosen.combine, chosen.itm_weight)
        found.results.append(again[0])
    if "lm" in learned and chosen.captions:
        count = min(chosen.captions, len(gallery.records))
        search = Search(beams=chosen.beams, max_length=chosen.max_length, min_length=chosen.min_length)
        found.said = galleries.captions(run.model, gallery, count, search)
        references = [record.captions for record in gallery.records[:count]]
        rows = gather.shared([found.said], lambda said: captioning.score_rows(said, references, chosen.java_metrics))
        found.tables["Captions beside their references"] = rows[0]
    if scenes.is_scenes(folder):
        _scene_figures(run, found, str(folder))
    return found


def _scene_figures(run: Run, found: Evaluated, folder: str) -> None:
    records = found.gallery.records
    truth = scenes.truths(folder, records)
    best = scenes.ceiling(truth, records)
    for result in found.results:
        result["ceiling"] = best
    if found.said:
        rows = scenes.caption_rows(found.said, truth[: len(found.said)])
        found.tables[f"What {len(found.said)} generated captions claim"] = rows
    learned = [name for name in scenes.SCORES if name.lower() in run.learned]
    rows = scenes.negative_rows(run.model, found.gallery, folder, learned)
    if rows:
        found.tables["True caption above one that is false by a word"] = rows


def _unseen(run: Run, found: Evaluated, chosen: Any, watch: Watch) -> None:
    """Adds a table that sets pictures with colour–shape pairs never trained on beside the others."""
    folder = str(run.settings.data.path)
    if "test_unseen" not in readers.splits(folder):
        return
    dear = {"rerank": 0, "java_metrics": []}  # neither is in the table
    plain = chosen.model_copy(update={name: none for name, none in dear.items() if hasattr(chosen, name)})
    other = figures(run, readers.read(folder, split="test_unseen"), plain, watch, [])
    rows = []
    for name, part in (("seen", found), ("unseen", other)):
        row: dict[str, Any] = {"colour–shape pairs": name, "pictures": len(part.gallery.records)}
        row |= {f"{way} r@1": part.results[0][key]["r@1"] for key, way in DIRECTIONS.items()}
        said = [r["right"] for t in part.tables.values() for r in t if r.get("claim") == scenes.OBJECT]
        rows.append(row | {"object named": said[0] if said else None})
    found.tables["Pictures of colour–shape pairs never trained on"] = rows


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows with the same columns as plain text; a float is a share."""
    cells = [list(rows[0]), *([_cell(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]


def _cell(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else "–" if value is None else str(value)


def report_data(run: Run, found: Evaluated, split: str, left_out: Sequence[Fault] = ()) -> ReportData:
    """What the report shows of a run and of what it gave on `split`; left_out: rows and pictures of no use."""
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in log]
    named = {"itc": "ITC", "itm": "ITM", "lm": "LM"}
    present = [key for key in named if log and key in log[0]]
    told = {key: [float("nan") if row[key] is None else row[key] for row in log] for key in present}
    curves = {named[key]: (steps, values) for key, values in told.items()}
    batches = [row.get("pictures", run.settings.train.batch) for row in log]
    unseen = "; no picture of it was trained on" if split != "train" else ": the very pictures that it was trained on"
    return ReportData(
        title=run.folder.name,
        recipe=run.settings.about or run.settings.program,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        seconds=sum(batch / row["samples_per_second"] for batch, row in zip(batches, log, strict=True)),
        samples=sum(batches),
        losses=curves,
        results=found.results,
        breakdowns=found.tables | _left_out(left_out),
        examples=examples(found),
        settings=run.settings.model_dump(mode="json"),
        fingerprints=run.fingerprints(),
        next_commands=next_commands(run, found.gallery.records[0].image),
        notes=[f"Figures are of the split '{split}'{unseen}."],
    )


def _left_out(faults: Sequence[Fault]) -> dict[str, list[dict[str, Any]]]:
    """A table of all rows and pictures that could not be used; none where there are none."""
    rows = [{"left out": fault.kind, "where": fault.where, "why": fault.message} for fault in faults]
    return {f"Left out: {len(rows)} rows and pictures that could not be used": rows} if rows else {}


def examples(found: Evaluated) -> list[Example]:
    """Pictures with their best five captions, half of them right at rank 1 and half not."""
    gallery, count = found.gallery, len(found.said) or len(found.gallery.records)
    best = ranks(found.scores, gallery.text_ids, gallery.ids)[:count].numpy()
    shown = []
    for i in choose_examples(best, min(SHOWN, count)):
        order = found.scores[i].argsort(descending=True)[:5].tolist()
        ranked = [
            Candidate(gallery.texts[t], float(found.scores[i, t]), bool(gallery.text_ids[t] == gallery.ids[i]))
            for t in order
        ]
        record = gallery.records[i]
        said = found.said[i : i + 1]
        shown.append(Example(record.image, Path(record.image).name, ranked, record.captions, said, int(best[i])))
    return shown


def next_commands(run: Run, picture: str) -> list[tuple[str, str]]:
    """What a person can type next."""
    named = f"{shlex.quote(str(run.folder))} {shlex.quote(picture)}"
    says = [(f"diptych caption {named}", "say what is on a picture")] if "lm" in run.learned else []
    return [
        *says,
        (f'diptych match {named} "a red circle" "a dog"', "how well texts fit a picture"),
        ("diptych train photos data.path=captions.json out=runs/mine", "train on your own pictures and captions"),
    ]
