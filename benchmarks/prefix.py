"""A small classification task learned by all weights, by LoRA (`peft`), by a prefix and by a new head alone, in turns.

    python benchmarks/prefix.py --threads 1 --seeds 3   # minutes a seed; needs diptych[starter], and peft for its row

The task: of a scene's caption such as "two small red stars to the right of a blue circle", the colour of what lies
further left or higher (blue). Words alone leave two colours to choose from: the relation must be understood. All sides
begin at the same MiniLM-L6 and the same new head, and take every batch one after another, each first in its turn.
A seed decides the new head, the prefix, dropout and which captions are learned; those held out are always the same.
Learning rates were chosen on the "val" split (`--split val`); what is printed is of "test".
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from pairs import Spread
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych.checkpoints import hf, io, starter
from diptych.core.surgery import freeze
from diptych.data.scenes.grammar import captions
from diptych.data.scenes.oracle import attributes
from diptych.data.scenes.words import COLOURS
from diptych.data.scenes.world import sample, stream
from diptych.errors import UserError
from diptych.models.heads import SequenceClassifier
from diptych.models.prefix import Prefix, prefixed, save
from diptych.text.tokenizer import Tokenizer

HEAD = ("pooler", "classifier")
HEAD_LR = 3e-3  # at most: a prefix wants more than the head can bear
WARMUP = 3
Rows = tuple[list[str], Tensor]  # captions, and the number of each one's colour


def colour(caption: str) -> str | None:
    """What lies further left or higher; None where the caption doesn't say, or both are of one colour."""
    claim = attributes(caption)
    if not claim.relations:
        return None
    one, way, other = claim.relations[0]
    first, second = claim.phrases[one].colour, claim.phrases[other].colour
    return None if first == second else first if way in ("left", "above") else second


def rows(split: str, count: int, seed: int = 0) -> Rows:
    """One caption a scene, as many as are wanted."""
    texts: list[str] = []
    index = 0
    while len(texts) < count:
        scene = sample("hard", seed, split, index)
        texts += [said for said in captions(scene, "en", stream(scene.key, 2), 1) if colour(said)]
        index += 1
    return texts, torch.tensor([COLOURS.index(str(colour(said))) for said in texts])


def base(seed: int = 0) -> SequenceClassifier:
    """MiniLM-L6 and a new head, the same one for a seed."""
    folder = starter.text_folder()
    config = hf.bert_config(hf.config_of(folder))
    torch.manual_seed(seed)
    model = SequenceClassifier(config, len(COLOURS))
    io.load(model.text, folder, hf.bert(config))
    return model


def with_head(model: nn.Module) -> nn.Module:
    """Trains the head beside what is trained already."""
    for name in HEAD:
        model.get_submodule(name).requires_grad_(True)
    return model


def with_lora(rank: int, seed: int) -> nn.Module:
    """Query and value projections with LoRA (Hu et al. 2022), as `peft` has it, and the head."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("LoRA needs peft, which is not installed: pip install peft, or leave `lora` out") from None
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r".*\.attn\.[qv]")
    return with_head(inject_adapter_in_model(config, base(seed)))


def with_prefix(length: int, hidden: int | None, seed: int) -> nn.Module:
    model = base(seed)
    return prefixed(model, Prefix(model.text.stack, length, hidden), HEAD)


SIDES: dict[str, tuple[str, float, Callable[[int], nn.Module]]] = {
    "full": ("all weights", 2e-4, base),
    "lora": ("LoRA (`peft`), rank 8 on q and v", 3e-3, lambda seed: with_lora(8, seed)),
    "prefix": ("prefix of 16", 1e-1, lambda seed: with_prefix(16, None, seed)),
    "mlp": ("prefix of 16 through an MLP of 384", 1e-3, lambda seed: with_prefix(16, 384, seed)),
    "head": ("head alone", 3e-3, lambda seed: with_head(freeze(base(seed)))),
}


@dataclass
class Side:
    """One way to learn the task."""

    model: nn.Module
    lr: float
    steps: int
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)  # accuracies, half-way and at the end

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        head = [p for name in HEAD for p in self.model.get_submodule(name).parameters()]
        other = [p for p in self.trained if not any(p is one for one in head)]
        groups = [{"params": head, "lr": min(self.lr, HEAD_LR)}, {"params": other, "lr": self.lr}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        warm = max(1, self.steps // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm, (self.steps - step) / (self.steps - warm))
        )
        self.model.train()

    def step(self, ids: Tensor, mask: Tensor, labels: Tensor) -> None:
        began = time.perf_counter()
        loss = F.cross_entropy(self.model(ids, mask), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(loss.item())

    @torch.no_grad()
    def judge(self, tokenizer: Tokenizer, held_out: Rows) -> None:
        self.model.eval()
        texts, labels = held_out
        right = 0
        for start in range(0, len(texts), 64):
            ids, mask = tokenizer.encode(texts[start : start + 64])
            right += int((self.model(ids, mask).argmax(1) == labels[start : start + 64]).sum())
        self.right.append(right / len(texts))
        self.model.train()

    def saved(self, name: str) -> int:
        """Bytes of the file that holds what was learned."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "learned.safetensors"
            if name in ("prefix", "mlp"):
                save(self.model, file)
            else:
                save_file({n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}, file)
            return file.stat().st_size


def settings() -> argparse.Namespace:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("sides", nargs="*", help=f"of {', '.join(SIDES)}; all of them when none is named")
    read.add_argument("--steps", type=int, default=150)
    read.add_argument("--batch", type=int, default=16)
    read.add_argument("--held-out", type=int, default=1000)
    read.add_argument("--seeds", type=int, default=1, help="how many: 0, 1, …")
    read.add_argument("--split", choices=("val", "test"), default="test")
    read.add_argument("--lr", type=float, action="append", help="in place of a side's own, in their order")
    read.add_argument("--threads", type=int, default=2)
    chosen = read.parse_args()
    chosen.sides = chosen.sides or list(SIDES)
    if unknown := set(chosen.sides) - set(SIDES):
        read.error(f"{min(unknown)} is none of {', '.join(SIDES)}")
    return chosen


def measure(chosen: argparse.Namespace, seed: int) -> dict[str, Side]:
    """Every side after the same batches, taken in turns."""
    tokenizer = Tokenizer.load(starter.text_folder())
    sides: dict[str, Side] = {}
    for place, name in enumerate(chosen.sides):
        lr = chosen.lr[place] if chosen.lr else SIDES[name][1]
        sides[name] = Side(SIDES[name][2](seed), lr, chosen.steps)
    (texts, labels), held_out = rows("train", chosen.steps * chosen.batch, seed), rows(chosen.split, chosen.held_out)
    names = list(sides)
    for number in range(chosen.steps):
        here = slice(number * chosen.batch, (number + 1) * chosen.batch)
        ids, mask = tokenizer.encode(texts[here])
        first = number % len(names)
        for name in names[first:] + names[:first]:
            torch.manual_seed(seed * chosen.steps + number)
            sides[name].step(ids, mask, labels[here])
        if number + 1 in (chosen.steps // 2, chosen.steps):
            for side in sides.values():
                side.judge(tokenizer, held_out)
        if (number + 1) % 50 == 0:
            said = ", ".join(f"{name} {sum(side.losses[-50:]) / 50:.3f}" for name, side in sides.items())
            print(f"seed {seed}, step {number + 1}: {said}", flush=True)
    return sides


def table(found: list[dict[str, Side]], chosen: argparse.Namespace) -> str:
    """Markdown: one row a side; times as shares of the first one's, inside each turn."""
    half = chosen.steps // 2
    lines = [
        f"| trained | weights | file | accuracy after {half} steps | after {chosen.steps} | time of a step |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, side in found[0].items():
        turns = [
            ours / theirs
            for sides in found
            for ours, theirs in zip(sides[name].seconds[WARMUP:], sides[chosen.sides[0]].seconds[WARMUP:], strict=True)
        ]
        count, size = sum(p.numel() for p in side.trained), side.saved(name)
        file = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
        halfway, end = (shown([sides[name].right[place] for sides in found]) for place in (0, 1))
        lines.append(f"| {SIDES[name][0]} | {count:,} | {file} | {halfway} | {end} | {Spread.of(turns).median:.2f} |")
    return "\n".join(lines)


def shown(accuracies: list[float]) -> str:
    """Their mean, and the lowest and highest where there are several."""
    mean = f"{100 * fmean(accuracies):.1f} %"
    if len(accuracies) == 1:
        return mean
    return f"{mean} ({100 * min(accuracies):.1f}–{100 * max(accuracies):.1f})"


def main() -> None:
    chosen = settings()
    torch.set_num_threads(chosen.threads)
    try:
        found = [measure(chosen, seed) for seed in range(chosen.seeds)]
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    print(table(found, chosen))
    name = chosen.sides[0]
    rate = f"{1000 * median(second for sides in found for second in sides[name].seconds[WARMUP:]):.0f} ms a step"
    held_out = f"{chosen.held_out} held out ({chosen.split})"
    seeds = f"{chosen.seeds} seeds: mean, lowest and highest; " if chosen.seeds > 1 else ""
    print(f"\n{seeds}{chosen.steps} steps of {chosen.batch} captions, {held_out}; {SIDES[name][0]}: {rate}")


if __name__ == "__main__":
    main()
