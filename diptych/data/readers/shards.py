"""Tar shards in WebDataset's layout (github.com/webdataset): the members KEY.jpg, KEY.json, KEY.txt are one sample.

A key ends at the first dot of a member's last name; what follows is its extension. Captions are the .json's `caption`
and `captions`, else its `text`, else the whole .txt; the image id is the .json's `image_id`, else the key.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from diptych.data import files
from diptych.data.readers.faults import listed, shown
from diptych.data.readers.schemas import Parse, Row
from diptych.data.readers.source import PICTURE_SUFFIXES, not_utf8
from diptych.data.tables import SUFFIXES

PICTURES = (*(suffix[1:] for suffix in PICTURE_SUFFIXES), "img")  # img: what `data pack` calls any other kind
SUFFIX = re.compile(rf"(?:{'|'.join(map(re.escape, (files.TAR, *SUFFIXES)))})\Z")
MANIFEST = "pack.json"
USUAL = ("train", "restval", "val", "valid", "validation", "dev", "test")


def split_of(name: str) -> str:
    """What stands before the number in a shard's name: `train` of `train-000003.tar` and of
    `train-00003-of-00009.parquet`, "" of `000003.tar`."""
    return re.sub(r"[-_.]*[0-9]*(-of-[0-9]+)?\Z", "", re.sub(SUFFIX, "", name), count=1)


def labelled(tars: Sequence[Path], wanted: str | None = None) -> list[tuple[Path, str]]:
    """Each shard and its split. Shards without a name before the number are to be trained on, and so are all where they
    have one name that is no usual split's (`part`, `coyo`); by that name, or their folder's, they are found too."""
    names = [split_of(tar.name) for tar in tars]
    alone = len(set(names)) == 1
    labels = []
    for tar, name in zip(tars, names, strict=True):
        if name not in USUAL and (alone or not name):
            name = wanted if wanted and wanted in (name, tar.parent.name) else "train"
        labels.append((tar, name))
    return labels


def shards(parse: Parse, tars: Sequence[Path]) -> Iterator[Row]:
    """The samples of the split asked for, in the order of the shards and of their members."""
    _hear_of_a_stop(parse)
    keys: set[str] = set()
    for tar, label in labelled(tars, parse.split):
        if parse.takes(label, tar.name):
            try:
                yield from _shard(tar, parse, keys)
            except OSError as error:
                parse.tell.fault("bad shard", tar.name, f"can't be read: {error.strerror}")


def _hear_of_a_stop(parse: Parse) -> None:
    """A fault for each split that `data pack` has not packed whole; it would be trained on in part, or not be known."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # another's pack.json, or none
        for split, made in json.loads((parse.file / MANIFEST).read_bytes())["splits"].items():
            done = made["shards"][-1]["end"] if made["shards"] else 0
            if done < made["records"]:
                told = f"{done} of {made['records']} pictures of '{split}' are packed"
                parse.tell.fault("packed in part", MANIFEST, f"{told}: give the `data pack` command again")


def _shard(tar: Path, parse: Parse, keys: set[str]) -> Iterator[Row]:
    """keys: of the shards before; this one's are added."""
    index = files.index_of(str(tar))
    if index.fault:
        parse.tell.fault("bad shard", tar.name, index.fault)
    samples: dict[str, dict[str, str]] = {}  # key → extension → member
    twice: dict[str, str] = {}
    for member in index.members():
        folder, slash, last = member.name.rpartition("/")
        stem, _, extension = last.partition(".")
        if not stem or not extension:  # `._a.jpg`, `LICENSE`: no part of a sample
            continue
        key, extension = folder + slash + stem, extension.lower()
        if extension in samples.setdefault(key, {}):
            twice[key] = member.name
        samples[key][extension] = member.name
    for key, sample in samples.items():
        where = f"{tar.name}, sample {key}"
        if key in twice:
            parse.tell.fault("member twice", where, f"has {shown(twice[key])} twice: a key is one sample's")
        else:
            yield from _sample(tar, sample, key if key not in keys else f"{tar.stem}/{key}", where, parse)
    keys.update(samples)


def _sample(tar: Path, sample: dict[str, str], name: str, where: str, parse: Parse) -> Iterator[Row]:
    """sample: extension → member. name: its image id, where it has no other."""
    pictures = [extension for extension in sample if extension in PICTURES]
    if not pictures:
        tell = parse.tell.fault if {"json", "txt"} & sample.keys() else parse.tell.note
        found = listed([*sample])
        tell("no picture", where, f"has no picture, as KEY.jpg or KEY.png, without a dot in KEY (found {found})")
        return
    if len(pictures) > 1:
        parse.tell.note("several pictures", where, f"has {listed(pictures)}: only the first is used")
    about = _about(tar, sample["json"], parse) if "json" in sample else {}
    if about is None:
        return
    texts = _captions(about)
    if not texts and "txt" in sample:
        text = _text(tar, sample["txt"], parse)
        if text is None:
            return
        texts = [text]
    if not texts:
        parse.tell.skip("no caption", where, "has no caption: neither a .txt, nor caption, captions or text in a .json")
        return
    captions = [caption for text in texts for caption in parse.caption(text, where)]
    image_id = parse.image_id(name if about.get("image_id") is None else about["image_id"], where)
    if captions and image_id is not None:
        yield Row((os.path.abspath(_path(tar, sample[pictures[0]])),), captions, image_id, where)


def _captions(about: dict[str, Any]) -> list:
    """Those of a sample's .json, of any type; none where it has no such key."""
    keys = [key for key in ("caption", "captions") if key in about] or ["text"]
    values = [about[key] for key in keys if key in about]
    return [text for value in values for text in (value if isinstance(value, list) else [value])]


def _about(tar: Path, member: str, parse: Parse) -> dict[str, Any] | None:
    """What a sample's .json says, or None after a fault."""
    text, where = _text(tar, member, parse), f"{tar.name}, member {member}"
    if text is None:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}, column {error.colno}"
        parse.tell.fault("not JSON", place, f"not JSON: {error.msg}")
        return None
    except (RecursionError, ValueError):  # a number of more digits than Python takes
        parse.tell.fault("not JSON", where, "is nested too deep, or holds too long a number")
        return None
    if not isinstance(content, dict):
        parse.tell.fault("bad row", where, f"is not an object: {shown(content)}")
        return None
    return content


def _path(tar: Path, member: str) -> str:
    return os.path.join(tar, *member.split("/"))


def _text(tar: Path, member: str, parse: Parse) -> str | None:
    """The text of a member, or None after a fault."""
    content = files.read(_path(tar, member))
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        parse.tell.fault("not UTF-8", f"{tar.name}, member {member}, line {line}", not_utf8(error))
        return None
