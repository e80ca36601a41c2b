"""diptych's `Stage1` as a worker of `benchmarks/pairs.py`: one stage-1 training step at a time.

Takes the same commands as LAVIS's worker: its weights come in through diptych's own key table, its negatives through
`Stage1.draw`. Everything else (optimizer, padding to the longest caption) is as diptych trains in
float32.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from pairs import peak_kib, serve
from safetensors.torch import load_file
from torch import Tensor

from diptych.checkpoints import lavis, load
from diptych.data.pairs import PairBatch
from diptych.models.blip2 import Stage1Model
from diptych.text.tokenizer import Tokenizer
from diptych.train.programs import Stage1, Stage1Objectives
from diptych.train.schedule import optimizer

IMAGE_WIDTH, QUERIES = 1408, 32


class GivenNegatives(Stage1):
    """Stage 1 with the hard negatives of a step handed in: a picture for each text, then a text for each picture."""

    given: tuple[Tensor, ...] = ()

    def draw(self, weights: Tensor, batch: PairBatch, stream: str) -> Tensor:
        return self.given[("negative picture", "negative text").index(stream)]


class Bench:
    """The commands, and what they keep between them."""

    def load(
        self,
        weights: str,
        inputs: str,
        texts: list[str],
        threads: int,
        vocab: str,
        max_txt_len: int = 32,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> dict[str, Any]:
        """Builds the model, fills it from LAVIS's `weights`, and keeps the features and the captions."""
        torch.set_num_threads(threads)
        imported = peak_kib()
        self.tokenizer, self.texts, self.longest = Tokenizer.load(vocab), texts, max_txt_len
        config = lavis.stage1_config(768, 12, 12, 3072, QUERIES, self.tokenizer.size, 512, IMAGE_WIDTH)
        self.program = GivenNegatives(None, Stage1Model(config), Stage1Objectives(), self.tokenizer.start).train()
        load(self.program, weights, lavis.stage1(None, config))
        self.features = load_file(inputs)["features"]
        self.optimizer = optimizer(self.program, 0.0, tuple(betas), weight_decay)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        parameters = sum(p.numel() for p in self.program.parameters())
        return {"parameters": parameters, "imported_kib": imported, "versions": versions}

    def batch(self, number: int) -> PairBatch:
        """Captions `number` × B … of those that were loaded; every pair is its own picture."""
        size = self.features.shape[0]
        texts = self.texts[number * size : (number + 1) * size]
        ids, mask = self.tokenizer.encode(texts, self.longest)
        rows = torch.arange(size)
        return PairBatch(ids, mask, rows, rows, tokens=self.features, step=number)

    def step(self, draws: list[int], lr: float, batch: int = 0) -> dict[str, Any]:
        """One training step on the captions of `batch`; `draws` are B negative pictures, then B negative captions."""
        self.program.given = torch.tensor(draws).chunk(2)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        start = time.perf_counter()
        losses = self.program(self.batch(batch))
        forward = time.perf_counter()
        losses["loss"].backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = time.perf_counter()
        named = {f"loss_{name}": losses[name].item() for name in ("itc", "itm", "lm")}
        phases = {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward}
        return {**named, "seconds": end - start, "phases": phases, "peak_kib": peak_kib()}


if __name__ == "__main__":
    bench = Bench()
    serve({name: getattr(bench, name) for name in ("load", "step")})
