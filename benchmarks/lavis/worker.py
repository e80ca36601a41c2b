"""LAVIS's own `Blip2Qformer` as a worker of `benchmarks/pairs.py`: one stage-1 training step at a time.

Runs in the environment that `setup.sh` makes. Nothing is downloaded: the tokenizer comes from a vocabulary file, the
Q-Former from LAVIS's classes at base size, and the image encoder hands back the picture features it is given, so that
neither side pays for one. All else (losses, masks, padding to `max_txt_len`, AdamW) is as LAVIS trains.

Shapes: B batch, N image tokens, D_v their width.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parent.parent))  # appended: this folder's name is also LAVIS's

import torch
import transformers
from lavis.models.blip2_models import blip2_qformer
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from pairs import peak_kib, serve
from safetensors.torch import load_file, save_file

IMAGE_WIDTH, QUERIES = 1408, 32


class GivenFeatures(torch.nn.Module):
    """An image encoder that has already run: features (B, N, D_v) in, the same out."""

    num_features = IMAGE_WIDTH

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def bert_tokenizer(vocab: str) -> transformers.BertTokenizer:
    """bert-base-uncased's slow tokenizer with [DEC] added, as LAVIS makes it."""
    tokenizer = transformers.BertTokenizer(vocab_file=vocab, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def base_qformer(queries: int, image_width: int, cross_attention_freq: int) -> tuple[BertLMHeadModel, torch.Tensor]:
    """The Q-Former at bert-base size, randomly initialised, without dropout; and its query tokens (1, Q, D)."""
    config = BertConfig(
        vocab_size=30522, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, is_decoder=False
    )  # the remaining defaults are bert-base-uncased's: 768 wide, 12 layers, 12 heads, 3072 in the feed-forward
    config.encoder_width = image_width
    config.add_cross_attention = True
    config.cross_attention_freq = cross_attention_freq
    config.query_length = queries
    tokens = torch.empty(1, queries, config.hidden_size).normal_(std=config.initializer_range)
    return BertLMHeadModel(config), torch.nn.Parameter(tokens)


def build(vocab: str, max_txt_len: int) -> torch.nn.Module:
    """`Blip2Qformer` with its three downloading constructors replaced by local ones."""

    class Offline(blip2_qformer.Blip2Qformer):
        init_tokenizer = classmethod(lambda cls: bert_tokenizer(vocab))
        init_Qformer = classmethod(lambda cls, *sizes: base_qformer(*sizes))
        init_vision_encoder = classmethod(lambda cls, *_: (GivenFeatures(), LayerNorm(IMAGE_WIDTH)))

    model = Offline(num_query_token=QUERIES, cross_attention_freq=2, max_txt_len=max_txt_len)
    return model.train()


class Draws:
    """Stands in for `torch.multinomial` and hands out the given rows one after another."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = list(rows)

    def __call__(self, weights: torch.Tensor, count: int) -> torch.Tensor:
        if weights.dim() != 1 or count != 1:
            raise RuntimeError(f"LAVIS drew {count} from {tuple(weights.shape)}; one from a row was expected")
        if not self.rows:
            raise RuntimeError("LAVIS drew more negatives than there are draws; 2 a caption are needed")
        return torch.tensor([self.rows.pop(0)])


class Bench:
    """The commands, and what they keep between them."""

    def init(self, seed: int, vocab: str, weights: str, max_txt_len: int = 32) -> dict[str, Any]:
        """Writes random weights under LAVIS's names: its own initialisation, then every 1-D tensor moved off 0 or 1
        by a normal draw of deviation 0.02, so that no bias or scale hides a difference."""
        torch.manual_seed(seed)
        model = build(vocab, max_txt_len)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        # Tied tensors are written once per name, as LAVIS's own checkpoints have them.
        state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, weights)
        return {"tensors": len(state), "parameters": sum(p.numel() for p in model.parameters())}

    def features(self, seed: int, batch: int, tokens: int, out: str) -> dict[str, Any]:
        """Writes normal picture features (B, N, D_v) as `features`."""
        drawn = torch.randn(batch, tokens, IMAGE_WIDTH, generator=torch.Generator().manual_seed(seed))
        save_file({"features": drawn}, out)
        return {"shape": list(drawn.shape)}

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
        """Builds the model, loads `weights` strictly, and keeps the features and the captions: one batch or more."""
        torch.set_num_threads(threads)
        imported = peak_kib()
        self.model = build(vocab, max_txt_len)
        self.model.load_state_dict(load_file(weights), strict=True)
        self.image = load_file(inputs)["features"]
        self.texts = texts
        # LAVIS's runner: no decay for vectors, scalars, biases and norms; all of these have fewer than 2 dimensions.
        trained = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=tuple(betas))
        gc.collect()
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"parameters": sum(p.numel() for p in trained), "imported_kib": imported, "versions": versions}

    def step(self, draws: list[int], lr: float, batch: int = 0) -> dict[str, Any]:
        """One training step on the captions of `batch`; `draws` are B negative pictures, then B negative captions."""
        size = self.image.shape[0]
        texts = self.texts[batch * size : (batch + 1) * size]
        if len(draws) != 2 * size or len(texts) != size:
            raise ValueError(f"{len(draws)} draws and {len(texts)} captions for a batch of {size}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        replaced = Draws(draws)
        with mock.patch.object(torch, "multinomial", replaced):
            start = time.perf_counter()
            losses = self.model({"image": self.image, "text_input": texts})
            forward = time.perf_counter()
            losses.loss.backward()
            backward = time.perf_counter()
            self.optimizer.step()
            self.optimizer.zero_grad()
            end = time.perf_counter()
        if replaced.rows:
            raise RuntimeError(f"{len(replaced.rows)} draws were left over")
        phases = {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward}
        named = {name: losses[name].item() for name in ("loss_itc", "loss_itm", "loss_lm")}
        return {**named, "seconds": end - start, "phases": phases, "peak_kib": peak_kib()}


def main() -> None:
    # Blip2Qformer asks for its rank even when it trains alone.
    torch.distributed.get_rank = lambda group=None: 0
    torch.distributed.get_world_size = lambda group=None: 1
    bench = Bench()
    serve({name: getattr(bench, name) for name in ("init", "features", "load", "step")})


if __name__ == "__main__":
    main()
