"""Processes that start at once: a server imports what they need, and forks one for each.

One that imports torch, and what diptych builds upon, takes seconds before it does anything; one that was forked is as
fresh, and takes none. The server itself computes nothing, so that no thread of torch's is lost in a fork.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Self

REPOSITORY = Path(__file__).resolve().parents[1]
COMMANDS = ("torch._dynamo", "torchvision", "timm", "diptych.cli", "diptych.train.run", "diptych.train.evaluation")


@dataclass
class Asked:
    """One process: a Python file run with words, and where what it says is added to a file."""

    script: str
    words: Sequence[str]
    out: str
    err: str
    folder: str = "."
    environment: dict[str, str] = field(default_factory=dict)


class Forks:
    """A server; `with` ends it, and all that it started."""

    def __init__(self, *imports: str):
        """imports: modules, or Python files, with all that they import."""
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", *imports],
            cwd=REPOSITORY,
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, asked: Sequence[Asked], seconds: int) -> list[int | None]:
        """Exit codes; None for one that did not end in so many seconds, and was killed."""
        assert self.server.stdin and self.server.stdout
        print(json.dumps([seconds, [asdict(each) for each in asked]]), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@cache
def commands() -> Forks:
    """The server of this test run's commands."""
    found = Forks(*COMMANDS)
    atexit.register(found.end)
    return found


def diptych(folder: Path, *words: str, size: int = 1, seconds: int = 300) -> subprocess.CompletedProcess[str]:
    """`diptych WORDS` in a folder, in one process, or in as many as torchrun would start: what all of them say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    script = str(REPOSITORY / "diptych" / "__main__.py")
    with tempfile.TemporaryDirectory() as said:
        files = [(f"{said}/{rank}.out", f"{said}/{rank}.err") for rank in range(size)]
        places = [meet | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {} for rank in range(size)]
        asked = [Asked(script, words, *file, str(folder), place) for file, place in zip(files, places, strict=True)]
        codes = commands().run(asked, seconds)
        out, err = (
            "".join(Path(name).read_text(encoding="utf-8") for name in names) for names in zip(*files, strict=True)
        )
    if None in codes:
        raise subprocess.TimeoutExpired(["diptych", *words], seconds, out, err)
    return subprocess.CompletedProcess(["diptych", *words], next(filter(None, codes), 0), out, err)


def serve(imports: Sequence[str]) -> None:
    for name in imports:
        runpy.run_path(name, run_name="imported") if name.endswith(".py") else import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        seconds, asked = json.loads(line)
        until = time.monotonic() + seconds
        print(json.dumps([_ended(child, until) for child in [_started(Asked(**one)) for one in asked]]), file=answers)
        answers.flush()


def _started(asked: Asked) -> int:
    if child := os.fork():
        return child
    os.chdir(asked.folder)
    os.environ.update(asked.environment)
    written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for to, (name, how) in enumerate(((os.devnull, os.O_RDONLY), (asked.out, written), (asked.err, written))):
        opened = os.open(name, how, 0o666)
        os.dup2(opened, to)
        os.close(opened)
    sys.argv = [asked.script, *asked.words]
    runpy.run_path(asked.script, run_name="__main__")
    sys.exit()


def _ended(child: int, until: float) -> int | None:
    """Its exit code, below 0 for a signal; killed, and None, where it goes on beyond `until`."""
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(found[1])


if __name__ == "__main__":
    serve(sys.argv[1:])
