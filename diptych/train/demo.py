"""The main job on an embedded default: scenes are drawn, a Q-Former learns stage 1, a report shows how well."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from diptych import config
from diptych.data import scenes
from diptych.evaluate.scenes import OBJECT
from diptych.train.evaluation import evaluate
from diptych.train.run import train

PICTURES = {"train": 3000, "val": 300, "test": 300, "unseen": 100}


def main() -> Path:
    """Runs the demo in `runs/` of this folder and gives the report's path. A demo from before is replaced."""
    began = time.perf_counter()
    settings = config.load("demo")
    made = scenes.write(str(settings.data.path), "simple", **PICTURES, size=160, languages=("en",))
    print(f"scenes: {made['pictures']} pictures in {made['out']}{' (from before)' if made['kept'] else ''}", flush=True)
    out = Path(settings.out)
    if out.exists():
        print(f"{out}: the demo from before is replaced", flush=True)
        shutil.rmtree(out)
    train(settings)
    result = evaluate(out)
    _tell(out, result, time.perf_counter() - began)
    return out / "report.html"


def _tell(out: Path, result: dict, seconds: float) -> None:
    """Where it is, how good against chance and ceiling, and what to type next."""
    itc = result["retrieval"][0]
    ways = {"image_to_text": "a caption for a picture", "text_to_image": "a picture for a caption"}
    print(f"\nThe demo took {seconds / 60:.0f} minutes. Among {itc['counts']['pictures']} held-out pictures:")
    for way, what in ways.items():
        found, chance, best = (part[way]["r@1"] for part in (itc, itc["chance"], itc["ceiling"]))
        print(f"  {what}: right at first in {found:.0%} (chance {chance:.1%}, ceiling {best:.0%})")
    for rows in result["tables"].values():
        for row in rows:
            if row.get("claim") == OBJECT and row["right"] is not None:
                print(f"  captions that name an object's colour and shape rightly: {row['right']:.0%}")
    print(f"\nSee {out}/report.html in a browser. Then, with photographs of your own:")
    print("  diptych data check captions.json")
    print("  diptych train photos data.path=captions.json out=runs/mine")
    print("where captions.json is COCO's or Karpathy's, or a .csv with the columns image,caption,")
    print("or a folder with a .txt beside each picture.")


if __name__ == "__main__":
    main()
