"""Signs that a run is dying, said in words while there is time to stop it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

from diptych.train.loop import Step

RECENT = 50  # steps that a figure is compared with
QUIET = 200  # steps before the same thing is said again, and before embeddings are judged: all are alike at the start
SPIKE = 2.0  # times the median of recent losses, and as many times further off than the farthest of them
COOLEST, WARMEST = 0.0011, 0.5  # temperatures between which contrast works
ANEW = "begin anew, another out=FOLDER, with a lower train.lr"
ALIKE = 0.97  # mean cosine between embeddings of different pictures, or texts, that tells nothing apart


class Health:
    """Hears of every step and tells `say` of loss spikes, a dead temperature, collapsed embeddings, steps left out."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.vitals: dict[str, deque[float]] = {}
        self.told: dict[str, int] = {}

    def hear(self, step: Step) -> None:
        if step.skipped is not None:
            self.say(f"warning: step {step.number} is left out: {step.skipped}")
            return
        self._spike(step)
        for name, value in step.vitals.items():
            self.vitals.setdefault(name, deque(maxlen=RECENT)).append(value)
        usual = {name: statistics.median(values) for name, values in self.vitals.items() if len(values) == RECENT}
        temperature = usual.get("temperature")
        if temperature is not None and temperature <= COOLEST:
            self._warn(step, "temperature", f"the temperature is at its floor ({temperature:.4f}): ITC has no gradient "
                       f"but for the hardest pairs; {ANEW}")  # fmt: skip
        if temperature is not None and temperature >= WARMEST:
            self._warn(step, "temperature", f"the temperature is {temperature:.2f}: ITC hardly tells pairs apart; "
                       f"{ANEW}, or a lower qformer.temperature")  # fmt: skip
        for name in ("picture_likeness", "text_likeness"):
            if step.number >= QUIET and usual.get(name, 0.0) > ALIKE:
                what = f"embeddings of different {name.removesuffix('_likeness')}s"
                self._warn(step, name, f"{what} are all but the same (mean cosine {usual[name]:.3f}): they have "
                           f"collapsed; {ANEW}, or a larger train.batch")  # fmt: skip

    def _spike(self, step: Step) -> None:
        loss = step.losses["loss"]
        if len(self.losses) == RECENT:
            usual, most = statistics.median(self.losses), max(self.losses)
            if loss > SPIKE * abs(usual) and loss - usual > SPIKE * (most - usual):
                self._warn(step, "spike", f"the loss is {loss:.3g}, and was about {usual:.3g}: if it stays there, "
                           f"{ANEW}")  # fmt: skip
        self.losses.append(loss)

    def _warn(self, step: Step, what: str, line: str) -> None:
        if step.number - self.told.get(what, -QUIET) >= QUIET:
            self.told[what] = step.number
            self.say(f"warning: step {step.number}: {line}")
