"""A dual encoder learned from nothing by diptych and by the installed `open_clip_torch`: the same model, beginning with
the same weights, the same batches, in turns, in one run; recall on held-out pictures at each epoch.

    diptych data scenes runs/clip-scenes-data --size 64 --train 20000 --val 500 --test 500
    python benchmarks/clip_curve.py --epochs 8        # half an hour on two cores

The model is that of `diptych train clip-scenes` with OpenAI's text tower in the place of a BERT, which OpenCLIP can't
describe: what their vectors are is the text's end and the class token. Ours goes through the loop of `diptych train`.
Theirs is `open_clip.CLIP` with its `ClipLoss`, torch's fused AdamW, the same learning rates, weight decays, clipping of
gradients and autocast, as its trainer has them, and texts filled up to its context length. A picture's right text is
the one beside it on both sides (`objectives.positives=pair`). Seconds are of the step alone, its data at hand.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from pairs import Spread
from torch import Tensor

from diptych import config
from diptych.checkpoints import openclip
from diptych.data.pairs import PairBatch
from diptych.data.transforms import normalised
from diptych.errors import UserError
from diptych.models.clip import config_of
from diptych.settings import ClipSettings
from diptych.train import clip, loop, paired
from diptych.train.contrast import COLDEST
from diptych.train.moves import moves_of
from diptych.train.recalls import recalls
from diptych.train.schedule import groups, set_rate
from diptych.train.watch import Silent

AS_THEIRS = ("text_encoder.kind=clip", "model.image_pool=first", "model.text_pool=end", "objectives.positives=pair")
WAYS = {"val_image_to_text_r1": "picture → text", "val_text_to_image_r1": "text → picture"}
TOGETHER = 20  # steps, of which the mean loss is drawn
COLOURS = {"ours": "#0b6e99", "theirs": "#c4532b"}


class Theirs:
    """OpenCLIP's model and a step of its trainer."""

    def __init__(self, described: dict[str, Any], weights: dict[str, Tensor], settings: ClipSettings):
        self.table, self.settings = openclip.clip(described), settings.train
        self.model = open_clip.CLIP(**{name: it for name, it in described.items() if name != "custom_text"}).train()
        self.model.load_state_dict(self.table.save(weights)[0])
        self.loss, self.context = ClipLoss(), described["text_cfg"]["context_length"]
        self.optimizer = torch.optim.AdamW(
            groups(self.model, self.settings.weight_decay), lr=0.0, betas=self.settings.betas, fused=True
        )
        self.dtype = loop.precision(self.settings.precision, torch.device("cpu"))

    def step(self, batch: PairBatch, spec: Any, lr: float) -> float:
        ids = F.pad(batch.ids * batch.mask, (0, self.context - batch.ids.shape[1]))
        set_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        with loop.autocast(self.dtype, torch.device("cpu")):
            found = self.loss(*self.model(normalised(batch.pixels, spec), ids))
        found.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, -torch.tensor(COLDEST).log())
        return found.item()

    def weights(self) -> dict[str, Tensor]:
        return self.table.load(self.model.state_dict())[0]


@dataclass
class Told:
    """Of one side. losses: a step's; recalls: (step, figures) at each epoch; seconds: a step's."""

    losses: list[float] = field(default_factory=list)
    recalls: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def side_by_side(settings: ClipSettings, epochs: int) -> dict[str, Told]:
    """Trains both and tells of each."""
    watch, faults = Silent(Path(settings.out)), []
    made, held_out = clip.made(settings, watch, faults), paired.splits(settings)["val"]
    program, built = made.program.train(), made.words
    model, spec, words = program.model, program.model.image.spec, clip.in_use(settings, built)
    described = openclip.described(config_of(model))
    theirs = Theirs(described, model.state_dict(), settings)
    told = {"ours": Told(), "theirs": Told()}
    steps, every = epochs * made.batches.steps_per_epoch, made.batches.steps_per_epoch
    moves = moves_of(program, settings.train, loop.precision(settings.train.precision, torch.device("cpu")))
    last: list[PairBatch] = []

    def stream() -> Iterator[PairBatch]:
        for batch in made.batches.read(0, steps, 0):
            last[:] = [batch]
            yield batch

    def measured() -> dict[str, float]:
        program.eval()
        found = recalls(words, clip.gallery(settings, words, held_out))
        program.train()
        return found

    def after(step: loop.Step) -> None:
        told["ours"].losses.append(step.losses["loss"])
        told["ours"].seconds.append(step.seconds - step.waited)
        began = time.perf_counter()
        told["theirs"].losses.append(theirs.step(last[0], spec, step.lr))
        told["theirs"].seconds.append(time.perf_counter() - began)
        if (step.number + 1) % every:
            return
        told["ours"].recalls.append((step.number + 1, measured()))
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(theirs.weights())
        told["theirs"].recalls.append((step.number + 1, measured()))
        model.load_state_dict(kept)
        print(line(told, steps), flush=True)

    loop.run(program, moves, stream(), settings.train, steps, after=after)
    return told


def line(told: dict[str, Told], steps: int) -> str:
    """The last epoch's figures."""
    cells = [f"{told['ours'].recalls[-1][0]:5d}/{steps}"]
    for side in told.values():
        loss = sum(side.losses[-50:]) / len(side.losses[-50:])
        cells.append(f"{loss:6.3f} " + " ".join(f"{100 * side.recalls[-1][1][way]:5.1f}" for way in WAYS))
    ratios = [slow / fast for fast, slow in zip(told["ours"].seconds, told["theirs"].seconds, strict=True)]
    spread = Spread.of(ratios)
    return "   ".join([*cells, f"{spread.median:.2f} ({spread.lower:.2f}, {spread.upper:.2f})"])


def draw(told: dict[str, Told], batch: int, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, recall = figure.subplots(1, 2)
    for (name, side), style in zip(told.items(), ("-", "--"), strict=True):
        label = {"ours": "diptych", "theirs": f"open_clip_torch {open_clip.__version__}"}[name]
        parts = [side.losses[i : i + TOGETHER] for i in range(0, len(side.losses), TOGETHER)]
        seen = [TOGETHER * batch * (i + 0.5) / 1000 for i in range(len(parts))]
        losses.plot(seen, [sum(part) / len(part) for part in parts], style, color=COLOURS[name], label=label)
        for way, mark in zip(WAYS, ("o", "^"), strict=True):
            points = [(step * batch / 1000, 100 * found[way]) for step, found in side.recalls]
            recall.plot(
                *zip(*points, strict=True), style + mark, color=COLOURS[name], label=f"{label}, {WAYS[way]}", ms=4
            )
    losses.set(xlabel="thousand pairs seen", ylabel="loss of a batch", yscale="log")
    losses.yaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 4]))
    losses.yaxis.set_minor_locator(NullLocator())
    losses.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    recall.set(xlabel="thousand pairs seen", ylabel="recall@1 among the held-out pictures, %", ylim=(0, 100))
    for axes in (losses, recall):
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def arguments() -> argparse.Namespace:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--data", default="runs/clip-scenes-data")
    read.add_argument("--epochs", type=int, default=8)
    read.add_argument("--threads", type=int, default=2)
    read.add_argument("--out", type=Path, default=Path("runs/clip-curve.png"))
    read.add_argument("more", nargs="*", help="settings of the recipe clip-scenes, KEY=VALUE")
    return read.parse_intermixed_args()


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    try:
        settings = config.load("clip-scenes", [f"data.path={chosen.data}", *AS_THEIRS, *chosen.more])
        print(f"open_clip_torch {open_clip.__version__}, torch {torch.__version__}, {chosen.threads} threads")
        print(" " * 11 + "ours: loss, r@1 both ways   theirs                theirs ÷ ours, a step")
        told = side_by_side(settings, chosen.epochs)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    draw(told, settings.train.batch, chosen.out)
    chosen.out.with_suffix(".json").write_text(json.dumps({name: asdict(side) for name, side in told.items()}))
    apart = max(abs(a - b) / b for a, b in zip(told["ours"].losses[:20], told["theirs"].losses[:20], strict=True))
    print(f"losses of the first 20 steps: {apart:.1e} apart, relative; drawn: {chosen.out}, figures beside it")


if __name__ == "__main__":
    main()
