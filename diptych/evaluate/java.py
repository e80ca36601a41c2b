"""METEOR and SPICE, which only their authors' Java programs compute, by way of pycocoevalcap.

METEOR 1.5 (Denkowski and Lavie 2014) aligns words, stems, synonyms and paraphrases; SPICE (Anderson et al. 2016,
arXiv:1607.08822) compares what objects, attributes and relations two texts name. Both are fractions.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np

from diptych.errors import UserError

MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")  # SPICE's parser, which no wheel carries
FETCH = "python -m pycocoevalcap.spice.get_stanford_models"
# Java up to 17 reads and writes in the locale's encoding; from 17 on it lets no library look into its own classes,
# as SPICE's do.
OPENED = ("java.lang", "java.util", "java.math", "java.text")
OPTIONS = " ".join(["-Dfile.encoding=UTF-8", *(f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in OPENED)])


def check(names: Sequence[str]) -> None:
    """`UserError` where what `names` ("meteor", "spice") need is missing. Downloads nothing."""
    if not names:
        return
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise UserError("METEOR and SPICE: pycocoevalcap is not installed; pip install 'diptych[java-metrics]'")
    if shutil.which("java") is None:
        raise UserError("METEOR and SPICE: there is no java on the PATH; install a Java runtime")
    library = Path(next(iter(found.submodule_search_locations))) / "spice" / "lib"
    if "spice" in names and not all((library / name).is_file() for name in MODELS):
        raise UserError(f"SPICE: Stanford CoreNLP 3.6.0, its parser, is not in {library}; `{FETCH}` downloads it")


def java_scores(
    said: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, tuple[float, np.ndarray]]:
    """Of texts that are cut already, by name ("METEOR", "SPICE"): the corpus figure, and (I,) of each picture.

    METEOR's corpus figure comes of counts over all pictures, SPICE's is a mean. `UserError` where they can't run.
    """
    check(names)
    ours = {i: [text] for i, text in enumerate(said)}
    theirs = {i: [*row] for i, row in enumerate(references)}
    found = {}
    with _options():
        for name in names:
            try:
                found[name.upper()] = SCORED[name](theirs, ours)
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                told = " ".join(str(error).split())
                raise UserError(
                    f"{name.upper()}: its Java program failed ({told}); `java -version` may tell"
                ) from error
    return found


def _meteor(references: dict[int, list[str]], said: dict[int, list[str]]) -> tuple[float, np.ndarray]:
    whole, each = import_module("pycocoevalcap.meteor.meteor").Meteor().compute_score(references, said)
    return float(whole), np.array(each, dtype=np.float64)


def _spice(references: dict[int, list[str]], said: dict[int, list[str]]) -> tuple[float, np.ndarray]:
    whole, each = import_module("pycocoevalcap.spice.spice").Spice().compute_score(references, said)
    return float(whole), np.array([row["All"]["f"] for row in each], dtype=np.float64)


SCORED = {"meteor": _meteor, "spice": _spice}


@contextmanager
def _options() -> Iterator[None]:
    """Java processes started inside have `OPTIONS`, after those of the person."""
    before = os.environ.get("JDK_JAVA_OPTIONS")
    os.environ["JDK_JAVA_OPTIONS"] = f"{before or ''} {OPTIONS}".strip()
    try:
        yield
    finally:
        if before is None:
            del os.environ["JDK_JAVA_OPTIONS"]
        else:
            os.environ["JDK_JAVA_OPTIONS"] = before
