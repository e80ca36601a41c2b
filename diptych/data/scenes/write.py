"""Scenes on disk: an ordinary COCO captions data set, with the truth beside it.

OUT/images/*.png        PNG, for JPEG is not the same pixels with every decoder, and costs small objects their edges
OUT/SPLIT.json          COCO captions in English; OUT/SPLIT.zh.json in Chinese; train, val, test, test_unseen
OUT/scenes.json         what the set was made from, and the truth of each image id
OUT/negatives.json      of the pictures of val, test and test_unseen: captions that are false by one word
OUT/questions.json      questions on every picture, with all right answers
OUT/ceiling.json        the best recall there can be on test and test_unseen
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diptych.data.scenes.draw import LARGEST, SMALLEST, draw
from diptych.data.scenes.grammar import captions
from diptych.data.scenes.negatives import negatives
from diptych.data.scenes.oracle import ceiling
from diptych.data.scenes.questions import questions
from diptych.data.scenes.words import LANGUAGES
from diptych.data.scenes.world import MOST, SPLITS, VERSION, Scene, preset_named, sample, stream
from diptych.errors import UserError, nearest

CAPTIONS = 5
CHUNK = 64
Json = dict[str, Any]


def write(
    out: str | Path,
    preset: str = "simple",
    *,
    train: int = 4000,
    val: int = 300,
    test: int = 300,
    unseen: int = 300,
    size: int = 128,
    seed: int = 0,
    languages: Sequence[str] = LANGUAGES,
    workers: int = 1,
) -> Json:
    """Make a data set of `train`, `val`, `test` and `unseen` (test_unseen) pictures, `size` × `size` pixels.

    Five captions a picture and language. Picture i of a split depends on (preset, seed, split, i) and `size` alone:
    more pictures, more workers or fewer languages change none of the others. The folder appears whole or not at all.
    An equal data set that is already there is kept.

    Returns what was asked, with `kept` (whether it was there before), `pictures`, and `ceiling` (split → language →
    see `oracle.ceiling`). Raises UserError for a setting that makes no sense and where `out` holds anything else.
    """
    counts = {"train": train, "val": val, "test": test, "test_unseen": unseen}
    info = _checked(preset, counts, size, seed, languages, workers)
    out = Path(out).absolute()
    kept = _same_set_there(out, info)
    if not kept:
        with _aside(out) as folder:
            _fill(folder, info, workers)
    best = json.loads((out / "ceiling.json").read_text(encoding="utf-8"))
    return {**info, "out": str(out), "kept": kept, "pictures": sum(counts.values()), "ceiling": best}


def load_truth(out: str | Path) -> dict[int, Scene]:
    """image id → scene, of a data set that `write` made. Raises UserError where there is none of this version."""
    file = Path(out) / "scenes.json"
    content = _read_truth(file)
    try:
        if content["info"]["version"] != VERSION:
            made = content["info"]["version"]
            raise UserError(f"{file} is of version {made}, not {VERSION}: write the data set anew")
        return {int(image_id): Scene.from_json(row) for image_id, row in content["scenes"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not the truth of a scenes data set ({error!r}): write the data set anew") from None


def _read_truth(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is not there: give the folder of a data set that scenes wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): write the data set anew") from None


def _checked(preset: str, counts: dict[str, int], size: int, seed: int, languages: Sequence[str], workers: int) -> Json:
    """The settings that tell one data set from another."""
    preset_named(preset)
    ranges = {"size": (size, SMALLEST, LARGEST), "seed": (seed, 0, 2**63 - 1), "workers": (workers, 1, 256)}
    ranges |= {split.removeprefix("test_"): (count, 0, MOST) for split, count in counts.items()}
    for name, (value, least, most) in ranges.items():
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UserError(f"{name}={value!r}: give a whole number from {least} to {most}")
    if not sum(counts.values()):
        raise UserError("train, val, test and unseen are all 0: ask for at least one picture")
    languages = (languages,) if isinstance(languages, str) else tuple(languages)
    for language in languages:
        if language not in LANGUAGES:
            raise UserError(f"language '{language}' is not known: give en or zh{nearest(str(language), LANGUAGES)}")
    if not languages:
        raise UserError("languages is empty: give en, zh or both")
    spoken = [language for language in LANGUAGES if language in languages]
    return {"preset": preset, "seed": seed, "version": VERSION, "size": size, "splits": counts, "languages": spoken}


def _same_set_there(out: Path, info: Json) -> bool:
    """Whether `out` holds the very data set asked for. Raises UserError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / "scenes.json").is_file():
        raise UserError(f"{out} is there and holds no scenes data set: give a new folder, or remove it")
    content = _read_truth(out / "scenes.json")
    there = content.get("info") if isinstance(content, dict) else None
    if not isinstance(there, dict):
        raise UserError(f"{out}/scenes.json is not the truth of a scenes data set: give a new folder, or remove it")
    for key, asked in info.items():
        if there.get(key) != asked:
            raise UserError(f"{out} holds a data set with {key} {there.get(key)}, not {asked}: give a new folder, "
                            "or remove it")  # fmt: skip
    pictures, asked = len(list((out / "images").glob("*.png"))), sum(info["splits"].values())
    if pictures != asked:
        raise UserError(
            f"{out}/images holds {pictures} pictures where {asked} were made: give a new folder, or remove it"
        )
    return True


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which becomes `out` when all went well and is removed when not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another folder") from None
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp's is for its owner alone
        os.replace(folder, out)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{out} cannot be written: {reason}; free some room or give another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(folder: Path, info: Json, workers: int) -> None:
    (folder / "images").mkdir()
    chunks = [
        (str(folder), info, split, start, min(start + CHUNK, count))
        for split, count in info["splits"].items()
        for start in range(0, count, CHUNK)
    ]
    rows: dict[str, list[Json]] = {split: [] for split in SPLITS}
    for (_, _, split, _, _), made in zip(chunks, _each(chunks, workers), strict=True):
        rows[split] += made
    everything = [row for split in SPLITS for row in rows[split]]
    for split, language in ((split, language) for split in SPLITS for language in info["languages"]):
        _dump(folder / _name(split, language), _coco(rows[split], split, language, info))
    _dump(folder / "questions.json", {"info": info, "questions": _numbered(everything, "questions")})
    _dump(folder / "negatives.json", {"info": info, "negatives": _numbered(everything, "negatives")})
    best = {
        split: {language: _ceiling(rows[split], language) for language in info["languages"]}
        for split in ("test", "test_unseen")
        if rows[split]
    }
    _dump(folder / "ceiling.json", best)
    _dump(folder / "scenes.json", {"info": info, "scenes": {str(row["id"]): row["scene"] for row in everything}})


def _each(chunks: list[tuple], workers: int) -> Iterator[list[Json]]:
    if workers == 1:
        yield from map(_make, chunks)
        return
    # Spawned, for a fork of a process that runs threads (torch's, say) can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_make, chunks)


def _make(chunk: tuple[str, Json, str, int, int]) -> list[Json]:
    """Draw the pictures `start` … `end` of a split, and say all that is said of them."""
    folder, info, split, start, end = chunk
    return [_one(Path(folder), info, split, index) for index in range(start, end)]


def _one(folder: Path, info: Json, split: str, index: int) -> Json:
    scene = sample(info["preset"], info["seed"], split, index)
    name = f"{split}_{index:07d}.png"
    # Level 1: a third of the time of the usual 6, for files a tenth larger.
    draw(scene, info["size"]).save(folder / "images" / name, compress_level=1)
    said, false = {}, []
    for language in info["languages"]:
        place = LANGUAGES.index(language)
        said[language] = captions(scene, language, stream(scene.key, 2 + place), CAPTIONS)
        if split == "train":
            continue
        rng = stream(scene.key, 5 + place)
        for number, caption in enumerate(said[language]):
            whose = {"annotation_id": scene.image_id * CAPTIONS + number, "language": language, "caption": caption}
            for false_one in negatives(caption, scene, rng):
                changed = {"attribute": false_one.attribute, "was": false_one.was, "now": false_one.now}
                false.append({**whose, "negative": false_one.caption, **changed})
    return {
        "id": scene.image_id,
        "file_name": name,
        "split": split,
        "scene": scene.to_json(),
        "captions": said,
        "negatives": false,
        "questions": [asdict(question) for question in questions(scene, stream(scene.key, 4))],
    }


def _name(split: str, language: str) -> str:
    return f"{split}.json" if language == "en" else f"{split}.{language}.json"


def _coco(rows: Iterable[Json], split: str, language: str, info: Json) -> Json:
    images, annotations = [], []
    for row in rows:
        images.append({"id": row["id"], "file_name": row["file_name"], "width": info["size"], "height": info["size"]})
        for number, caption in enumerate(row["captions"][language]):
            annotations.append({"id": row["id"] * CAPTIONS + number, "image_id": row["id"], "caption": caption})
    about = {
        "description": f"diptych scenes, {info['preset']}, {split}, {language}",
        "version": str(info["version"]),
        "seed": info["seed"],
    }
    return {"info": about, "images": images, "annotations": annotations}


def _numbered(rows: Iterable[Json], what: str) -> list[Json]:
    found = [{"image_id": row["id"], "split": row["split"], **item} for row in rows for item in row[what]]
    return [{"id": number, **item} for number, item in enumerate(found)]


def _ceiling(rows: Sequence[Json], language: str) -> Json:
    return ceiling([Scene.from_json(row["scene"]) for row in rows], [row["captions"][language] for row in rows])


def _dump(file: Path, content: Any) -> None:
    with file.open("w", encoding="utf-8") as stream_:
        json.dump(content, stream_, ensure_ascii=False, separators=(",", ":"))
        stream_.write("\n")
