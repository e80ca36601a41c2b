"""Draws docs/picture.png, the README's: held-out scenes, what a trained demo finds for them and says of them.

✓ marks what is true of the scene, whoever said it.

    .venv/bin/python docs/picture.py runs/demo docs/picture.png
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import diptych
from diptych.data import readers, scenes
from diptych.generate import Search

SHOWN, ASKED = 3, 100
INK, PALE, RIGHT = "#1f2933", "#8a94a0", "#1d6fb8"


def main(folder: str, out: str) -> None:
    run = diptych.load(folder)
    records = readers.read(run.settings.data.path, split="test")[:ASKED]
    texts = list(dict.fromkeys(text for record in records for text in record.captions))
    shown, truth = records[:SHOWN], scenes.load_truth(run.settings.data.path)
    scores = run.model.similarity([record.image for record in shown], texts)
    said = run.caption([record.image for record in shown], search=Search(beams=3))
    figure, axes = plt.subplots(SHOWN, 2, figsize=(9, 1.9 * SHOWN), width_ratios=(1, 4.2), dpi=110)
    for (left, right), record, row, caption in zip(axes, shown, scores, said, strict=True):
        left.imshow(Image.open(record.image))
        left.axis("off")
        right.axis("off")
        right.set(xlim=(0, 1), ylim=(0, 1))
        right.text(0, 0.94, f"the best of {len(texts)} captions", color=PALE, fontsize=9, va="top")
        for place, index in enumerate(row.argsort(descending=True)[:3].tolist()):
            good = scenes.holds(texts[index], truth[record.image_id])
            height = 0.70 - 0.19 * place
            mark = "✓" if good else "✗"
            right.text(0, height, mark, color=RIGHT if good else PALE, fontsize=12, va="center")
            right.text(0.035, height, texts[index], color=INK, fontsize=11, va="center")
            right.text(0.98, height, f"{row[index]:.2f}", color=PALE, fontsize=9, va="center", ha="right")
        right.text(0, 0.06, "says: ", color=PALE, fontsize=9, va="center")
        right.text(0.06, 0.06, f"“{caption}”", color=INK, fontsize=11, va="center", style="italic")
    figure.tight_layout(h_pad=0.6)
    figure.savefig(out, facecolor="white")


if __name__ == "__main__":
    main(*sys.argv[1:])
