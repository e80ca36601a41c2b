"""What a run goes on without (`data.on_bad=skip`): each row and picture that can't be used, named once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from diptych.data.readers.faults import Fault
from diptych.data.steps import Batch
from diptych.objectives import gather


def read(run: Path) -> list[Fault]:
    """The faults that a run's folder names, each once."""
    found = {}
    for file in sorted(run.glob("skipped*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError, TypeError):  # a line that was being written when the run was killed
                found[Fault(**json.loads(line))] = None
    return [*found]


class Skipped:
    """Adds faults to `skipped.jsonl` in a run's folder, as they are met, each once; the third of several processes to
    `skipped.2.jsonl`."""

    def __init__(self, run: Path):
        rank, _ = gather.world()
        self.run, self.file = run, run / (f"skipped.{rank}.jsonl" if rank else "skipped.jsonl")
        self.known = dict.fromkeys(read(run))
        self.cut = self.file.exists() and not self.file.read_bytes().endswith(b"\n")  # by a kill

    def add(self, faults: Iterable[Fault]) -> None:
        new = [fault for fault in dict.fromkeys(faults) if fault not in self.known]
        if new:
            self.known |= dict.fromkeys(new)
            # a file name that is no UTF-8 is written as JSON escapes it
            with self.file.open("a", encoding="utf-8", errors="backslashreplace") as lines:
                lines.write("\n" if self.cut else "")
                lines.writelines(json.dumps(fault._asdict(), ensure_ascii=False) + "\n" for fault in new)
            self.cut = False

    def heard(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; what they are without is added."""
        for batch in batches:
            self.add(batch.faults)
            yield batch

    def tell(self, say: Callable[[str], None]) -> None:
        """One line, if there is anything to tell."""
        if known := read(self.run):
            kinds = Counter(fault.kind for fault in known).most_common(3)
            told = ", ".join(f"{count} {kind}" for kind, count in kinds)
            say(f"left out, {len(known)} in all ({told}{', …' if len(kinds) == 3 else ''}): see {self.file}")
