"""Language models beside the truth: trained from nothing on scenes' captions, whose exact probabilities are known.

python benchmarks/entropy.py [FOLDER]

A caption is drawn from one of SCENES scenes, each as likely as any other, so that its probability is the mean of the
grammar's over them, exactly. A causal model's nats a caption are set beside the truth's on the same held-out captions;
a masked model's share of words that it tells, one word hidden, beside that of the best guess there is.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from diptych.data.scenes.grammar import Captions, captions
from diptych.data.scenes.world import sample

SCENES, TRAIN, TEST = 300, 60_000, 1000
STEPS = {"causal_lm": 2500, "masked_lm": 5000}
SMALL = ["model.start=random", "model.vocabulary=data", "model.width=128", "model.layers=3", "model.dropout=0"]


def drawn(count: int, seed: int, scenes: list) -> list[str]:
    draw = np.random.default_rng(seed)
    return [captions(scenes[i], "en", draw, 1)[0] for i in draw.integers(len(scenes), size=count)]


def log_probs(texts: list[str], scenes: list) -> np.ndarray:
    """ln p of each text, over all scenes."""
    asked, total = Captions(texts), np.zeros(len(texts))
    for scene in scenes:
        for index, found in asked.log_probs(scene).items():
            total[index] += math.exp(found)
    with np.errstate(divide="ignore"):
        return np.log(total / len(scenes))


def best_guesses(texts: list[str], scenes: list) -> float:
    """The share of words that the likeliest word in their place is, of all that the captions have."""
    words = sorted({word for text in texts for word in text.split()})
    other, asked = defaultdict(list), {}
    for text in dict.fromkeys(texts):
        split = text.split()
        for place in range(len(split)):
            for word in words:
                changed = " ".join([*split[:place], word, *split[place + 1 :]])
                other[text, place].append(asked.setdefault(changed, len(asked)))
    chances = log_probs([*asked], scenes)
    right = total = 0
    for text in texts:
        for place, word in enumerate(text.split()):
            right += words[int(np.argmax(chances[other[text, place]]))] == word
            total += 1
    return right / total


def learned(program: str, folder: Path, evaluation: list[str]) -> dict:
    out = folder / program
    recipe = "causal" if program == "causal_lm" else "masked"
    settings = [
        f"data.path={folder / 'train.txt'}", f"data.test={folder / 'test.txt'}", "data.hold_out=0", f"out={out}",
        f"train.steps={STEPS[program]}", "train.lr=1e-3", "train.batch=64", "train.save_every=0", *SMALL,
        "data.max_tokens=64", "data.pack=true", *evaluation,
    ]  # fmt: skip
    if not (out / "results.json").exists():
        subprocess.run([sys.executable, "-m", "diptych", "train", recipe, *settings], check=True)
        subprocess.run([sys.executable, "-m", "diptych", "eval", str(out)], check=True)
    return json.loads((out / "results.json").read_text())["language"]


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("folder", type=Path, nargs="?", default=Path("runs/entropy"))
    folder = given.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [sample("simple", 0, "train", i) for i in range(SCENES)]
    train, test = drawn(TRAIN, 1, scenes), drawn(TEST, 2, scenes)
    for name, texts in (("train", train), ("test", test)):
        (folder / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    truth = -log_probs(test, scenes).mean()
    ceiling = best_guesses(test, scenes)
    causal = learned("causal_lm", folder, [])["nats_a_document"]
    masked = learned("masked_lm", folder, ["evaluation.one_word=true"])["accuracy"]
    print(f"causal: {causal:.4f} nats a caption, the truth {truth:.4f}: {causal / truth - 1:+.2%}")
    print(f"masked: {masked:.2%} of words told, the best guess {ceiling:.2%}: {100 * (masked - ceiling):+.2f} points")


if __name__ == "__main__":
    main()
