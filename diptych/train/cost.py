"""What a recipe will take before it is run: parameters, floating-point operations, memory.

b pictures of a small measured batch, B of the recipe's, T text tokens, N image tokens, D width.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diptych.config import Encoder, Settings
from diptych.core.surgery import is_frozen
from diptych.data.pairs import PairBatch
from diptych.data.records import Record
from diptych.models.vision import ImageTokens
from diptych.objectives import gather
from diptych.text.tokenizer import Tokenizer
from diptych.train.build import Built, build
from diptych.train.encoders import image_encoder
from diptych.train.loop import autocast, precision
from diptych.train.programs import Stage1, rows_of

MEASURED = 2  # pictures of the batch that is run; every part of a step but the similarities grows with rows alone
READ = 2000  # records whose captions are measured
OBJECTIVES = {"itc": "pictures, texts and ITC", "itm": "ITM", "lm": "LM"}
PARTS = {
    "image_encoder.": "image encoder",
    "model.qformer.stack.": "Q-Former: blocks",
    "model.qformer.": "Q-Former: embeddings",
    "model.": "heads and norms",
}


@dataclass(frozen=True)
class Count:
    """Parameters of a part: numbers trained and frozen."""

    trained: int
    frozen: int


@dataclass(frozen=True)
class Cost:
    """Of one training step at a batch of `batch` pictures with captions of `tokens` tokens.

    parameters: by part. image: FLOPs of one picture through the image encoder, backward too where it is trained; they
    fall in every step, or once a picture where features are kept (`is_kept`). flops: by objective, forward and
    backward, without the image encoder; and of what chunks (`train.accumulate`) encode again. memory: bytes by what
    they are for; `features` of all pictures is among them where data are known. A multiplication and an addition are
    two FLOPs; the optimizer's are not counted.
    """

    batch: int
    tokens: int
    image_tokens: tuple[int, int]
    is_kept: bool
    precision: str
    parameters: dict[str, Count]
    image: int
    flops: dict[str, int]
    memory: dict[str, int]

    @property
    def step(self) -> int:
        """FLOPs of a step."""
        return sum(self.flops.values()) + (0 if self.is_kept else self.image * self.batch)

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.memory.values())


def work(program: Stage1, batch: int, tokens: int, is_kept: bool) -> int:
    """FLOPs of a step of a program at hand, counted by steps of a few random pictures, in this process alone. tokens:
    of a caption; is_kept: whether features are. What blocks recompute for memory's sake counts where they do so
    already. Draws from torch's generator."""
    seen, image, _ = image_cost(program.image_encoder)
    with gather.alone():
        flops, _ = step_cost(program, seen, tokens, batch, torch.float32)
    return sum(flops.values()) + (0 if is_kept else image * batch)


def cost(settings: Settings, records: list[Record] | None = None, built: Built | None = None) -> Cost:
    """What a step of `settings` takes. records: of the training split, for captions' length and the features' size;
    without them captions are as long as they may be, and no vocabulary is trimmed. built: what the settings build, when
    that is there already."""
    if built is None:
        texts = [text for record in records or () for text in record.captions]
        built = build(settings, initialise=False, encoder=_weightless(settings.image_encoder), texts=texts)
    program, is_kept = built.program, settings.data.cache != "none"
    batch = settings.train.batch
    if records:
        rows = len(records) if settings.data.captions == "one" else sum(len(r.captions) for r in records)
        batch = min(batch, rows)
    tokens = caption_tokens(built.tokenizer, records, settings.data.max_tokens)
    seen, image, kept = image_cost(program.image_encoder)
    dtype = precision(settings.train.precision, torch.device("cpu"))
    flops, activations = step_cost(program, seen, tokens, batch, dtype)
    if not is_kept:
        activations += kept * batch
    chunks = min(settings.train.accumulate, batch)
    if chunks > 1:
        activations = round(activations * math.ceil(batch / chunks) / batch)
        flops["encoding again"] = encoding_flops(program, seen, tokens, batch, dtype)
        if not is_kept:
            image += image if is_frozen(program.image_encoder) else image // 3  # of a forward and a backward pass
    memory = state_memory(program) | {"activations": activations}
    if settings.data.cache == "memory" and records:
        memory["features"] = features_bytes(len(records) * settings.data.views, *seen)
    name = str(dtype).removeprefix("torch.")
    return Cost(batch, tokens, seen, is_kept, name, parameters(program), image, flops, memory)


def _weightless(chosen: Encoder) -> nn.Module:
    """The encoder on meta tensors where it may be large: it is counted, and computes nothing."""
    if chosen.name.startswith(("starter", "hf:")):
        return image_encoder(chosen)
    with torch.device("meta"):
        return image_encoder(chosen.model_copy(update={"weights": None}))


def parameters(program: nn.Module) -> dict[str, Count]:
    """Numbers trained and frozen, by part; tied ones counted once."""
    found = {part: [0, 0] for part in PARTS.values()}
    for name, parameter in program.named_parameters():
        part = next(part for prefix, part in PARTS.items() if name.startswith(prefix))
        found[part][not parameter.requires_grad] += parameter.numel()
    return {part: Count(*numbers) for part, numbers in found.items()}


def state_memory(program: nn.Module) -> dict[str, int]:
    """Bytes of weights (buffers too), of the gradients of what is trained, and of AdamW's two moments."""
    held = [*program.parameters(), *program.buffers()]
    trained = sum(p.numel() * p.element_size() for p in program.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in held)
    return {"weights": weights, "gradients": trained, "AdamW's moments": 2 * trained}


def features_bytes(pictures: int, tokens: int, width: int) -> int:
    """Bytes of the features that are kept of so many pictures, (n, N, D) bfloat16."""
    return pictures * tokens * width * 2


def caption_tokens(tokenizer: Tokenizer, records: list[Record] | None, longest: int) -> int:
    """The mean length of the first captions, cut at `longest`, for nothing is computed for padding; without records,
    `longest`."""
    texts = [text for record in (records or [])[:READ] for text in record.captions]
    return round(statistics.mean(map(len, tokenizer.rows(texts, longest)))) if texts else longest


def image_cost(encoder: nn.Module | None) -> tuple[tuple[int, int], int, int]:
    """(N, D) of a picture's tokens, and of one picture the FLOPs and the bytes kept for the backward pass (both 0 for
    it where the encoder is frozen). Measured on meta tensors, which compute nothing."""
    if encoder is None:
        raise ValueError("a program without an image encoder has no picture to count")
    side, is_trained = encoder.spec.size, not is_frozen(encoder)
    with _meta(encoder), torch.set_grad_enabled(is_trained), FlopCounterMode(display=False) as counter:
        pixels = torch.empty((1, 3, side, side), device="meta")
        with Saved(encoder) as saved:
            tokens = encoder(pixels).tokens
        if is_trained:
            tokens.sum().backward()
            encoder.zero_grad(set_to_none=True)
    return (tokens.shape[1], tokens.shape[2]), counter.get_total_flops(), saved.bytes


@contextmanager
def _meta(module: nn.Module) -> Iterator[None]:
    """`module`'s weights as meta tensors within; afterwards they are what they were."""
    kept = [(m, name, t) for m in module.modules() for name, t in (*m._parameters.items(), *m._buffers.items())]
    stand_in: dict[int, Any] = {}
    for owner, name, tensor in kept:
        if tensor is None:
            continue
        place = owner._parameters if name in owner._parameters else owner._buffers
        if id(tensor) not in stand_in:
            bare = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            stand_in[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if is_parameter else bare
        place[name] = stand_in[id(tensor)]
    try:
        yield
    finally:
        for owner, name, tensor in kept:
            place = owner._parameters if name in owner._parameters else owner._buffers
            place[name] = tensor


class Saved:
    """Bytes of the tensors kept for a backward pass inside the block, a storage once, weights aside."""

    def __init__(self, module: nn.Module):
        held = [*module.parameters(), *module.buffers()]
        self.seen = {t.untyped_storage()._cdata for t in held}
        self.kept: list[Tensor] = []  # so that no storage is given away, and seen again as another
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.kept.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> Self:
        self.hooks.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.hooks.__exit__(*exc)


def step_cost(
    program: Stage1, seen: tuple[int, int], tokens: int, batch: int, dtype: torch.dtype
) -> tuple[dict[str, int], int]:
    """FLOPs by objective, and bytes of activations, of a step after the image encoder: measured at a few rows, forward
    and backward, and scaled to `batch`. The first objective's FLOPs include what all share: both encodings.
    """
    before, on = program.objectives, program.objectives
    named = [name for name in OBJECTIVES if getattr(on, name)]
    small = min(MEASURED, batch)
    rows = random_batch(program, seen, tokens, small).to(next(program.model.parameters()).device)
    share = {"itc": 1.0, "itm": on.matching_share, "lm": on.captioning_share}
    flops: dict[str, int] = {}
    bytes_kept, last = 0.0, (0, 0)
    was_training = program.training
    program.train()
    try:
        for count, name in enumerate(named):
            chosen = {other: float(other in named[: count + 1]) for other in OBJECTIVES}
            program.objectives = replace(on, **chosen, matching_share=1.0, captioning_share=1.0)
            measured = _measure(program, rows, dtype)
            factor = batch / small if not count else len(rows_of(share[name], 0, batch)) / small
            flops[OBJECTIVES[name]] = round((measured[0] - last[0]) * factor)
            bytes_kept += (measured[1] - last[1]) * factor
            last = measured
    finally:
        program.objectives = before
        program.zero_grad(set_to_none=True)
        program.train(was_training)
    flops[OBJECTIVES[named[0]]] += similarity_flops(program, batch) - round(
        similarity_flops(program, small) * batch / small
    )
    return flops, round(bytes_kept)


def encoding_flops(program: Stage1, seen: tuple[int, int], tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Of `Program.encode` after the image encoder, forward alone: measured at a few rows."""
    small = min(MEASURED, batch)
    rows = random_batch(program, seen, tokens, small)
    with FlopCounterMode(display=False) as counter, autocast(dtype, torch.device("cpu")):
        program.encode(rows)
    return round(counter.get_total_flops() * batch / small)


def similarity_flops(program: Stage1, batch: int) -> int:
    """Of every picture against every text both ways, forward and backward: the one part that grows as the batch²."""
    config = program.model.config
    return 2 * 3 * 2 * batch * batch * config.qformer.queries * config.embed


def _measure(program: Stage1, rows: PairBatch, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs and saved bytes of one step."""
    with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Saved(program) as saved, autocast(dtype, rows.ids.device):
            losses = program(rows)
        losses["loss"].backward()
    return counter.get_total_flops(), saved.bytes


def random_batch(program: Stage1, seen: tuple[int, int], tokens: int, rows: int, seed: int = 0) -> PairBatch:
    """`rows` pictures' tokens and captions, drawn at random; no two rows are the same picture."""
    draw = torch.Generator().manual_seed(seed)
    words = program.model.config.qformer.vocab
    ids = torch.randint(0, words, (rows, tokens), generator=draw)
    names = torch.arange(rows)
    pictures = ImageTokens(torch.randn((rows, *seen), generator=draw), (0, 0))
    return PairBatch(ids, torch.ones_like(ids), names, names, tokens=pictures.tokens)
