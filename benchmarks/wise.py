"""What fine-tuning costs, and what weight averaging gives back (WiSE-FT), on drawn scenes.

    diptych data scenes runs/hard --preset hard --size 64 --train 20000 --val 500 --test 500
    python benchmarks/wise.py runs/clip-scenes runs/hard       # a run of `diptych train clip-scenes`; minutes

The run goes on with other scenes: textured grounds, more objects, of several sizes, and counted. The guard is
zero-shot classification, by colour and shape, of pictures of one object each, of the kind that the run was trained on
and of another draw. Each share of the way from the run to the tuned one is measured: recall on the new data's val
split, by which the share is chosen, and the guard, which may lose no more than --allowed-loss. What was chosen is then
measured by what nothing was chosen by: the test split, and a second guard.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from diptych import config, load
from diptych.data.scenes.draw import draw
from diptych.data.scenes.world import sample, unseen_pairs
from diptych.errors import UserError
from diptych.evaluate import zeroshot
from diptych.settings import GuardSet
from diptych.train import between, evaluation, run
from diptych.train.watch import Watch

DIRECTIONS = ("image_to_text", "text_to_image")


def classes(folder: Path, seed: int, count: int, size: int) -> Path:
    """`count` pictures of one object, in a folder for each colour and shape that scenes are trained on."""
    if folder.exists():
        return folder
    for index in range(count):
        scene = sample("simple", seed, "test", index)
        thing = next(thing for thing in scene.objects if thing.pair not in unseen_pairs())
        kind = folder / f"{thing.colour}_{thing.shape}"
        kind.mkdir(parents=True, exist_ok=True)
        draw(replace(scene, objects=(thing,)), size).save(kind / f"{index:05d}.png")
    return folder


def figures(folder: Path, guard: Path) -> list[float]:
    """Recall@1 both ways on the test split, and the guard's accuracy."""
    found = evaluation.evaluate(folder, "test", report=False, say=lambda line: None)["retrieval"][0]
    told = zeroshot.in_folder(load(folder).model, guard)
    return [*(found[way]["r@1"] for way in DIRECTIONS), told["top1"]]


def arguments() -> argparse.Namespace:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("run", type=Path)
    read.add_argument("data", help="to go on with")
    read.add_argument("--out", type=Path, default=Path("runs/wise"), help="a folder")
    read.add_argument("--pictures", type=int, default=1000, help="of each guard")
    read.add_argument("--allowed-loss", type=float, default=0.01)
    read.add_argument("--threads", type=int, default=2)
    read.add_argument("more", nargs="*", help="settings of the fine-tuning, KEY=VALUE")
    return read.parse_intermixed_args()


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    try:
        size = load(chosen.run).model.model.image.spec.size
        guard, other = (
            classes(chosen.out / name, seed, chosen.pictures, size) for name, seed in (("guard", 1), ("other", 2))
        )
        tuned, mixed = chosen.out / "tuned", chosen.out / "mixed"
        own = [f"data.path={chosen.data}", f"model.start={chosen.run}", f"out={tuned}", "train.lr=3e-4"]
        settings = config.load("clip-scenes", [*own, "train.epochs=3", *chosen.more])
        run.train(settings, Watch(tuned, 50))
        asked = GuardSet(path=str(guard), allowed_loss=chosen.allowed_loss)
        between.average_within(chosen.run, tuned, mixed, asked)
        start = chosen.out / "start"
        between.average(chosen.run, tuned, start, 0.0)  # the run itself, with the new data's splits
        print(f"\n{'':8}test: r@1 both ways   guard, of another draw")
        for folder in (start, mixed, tuned):
            there, back, told = (100 * figure for figure in figures(folder, other))
            print(f"{folder.name:8}{there:9.1f} {back:9.1f} {told:14.1f}")
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
