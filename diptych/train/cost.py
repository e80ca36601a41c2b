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
from typing import Any

import torch
from torch import Tensor, nn

from diptych.core.stack import Stack
from diptych.core.surgery import is_frozen
from diptych.data.pairs import PairBatch
from diptych.data.records import Record
from diptych.models.vision import ImageTokens
from diptych.objectives import gather
from diptych.settings import Encoder, Stage1Settings, Train
from diptych.text.tokenizer import Words
from diptych.train import eightbit
from diptych.train.build import Built, build
from diptych.train.encoders import image_encoder
from diptych.train.flops import flop_counter
from diptych.train.live import Live, read_on
from diptych.train.loop import autocast, device, precision
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
    backward, without the image encoder; and of what chunks (`train.accumulate`) encode again. What blocks recompute
    (`train.checkpoint_last`) counts where it is recomputed. memory: bytes by what they are for; activations are all
    that a step makes and lets go, at their most, and `features` of all pictures is among them where data are known. A
    multiplication and an addition are two FLOPs; the optimizer's are not counted.
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
    seen, image = image_flops(program.image_encoder)
    with gather.alone():
        flops = step_flops(program, seen, tokens, batch)
    return sum(flops.values()) + (0 if is_kept else image * batch)


def cost(settings: Stage1Settings, built: Built, records: list[Record] | None = None) -> Cost:
    """What a step of `settings` takes. built: by `to_count`. records: of the training split, for captions' length and
    the features' size; without them captions are as long as they may be."""
    program, is_kept = built.program, settings.data.cache != "none"
    batch = settings.train.batch
    if records:
        batch = min(batch, len(records) if settings.data.captions == "one" else sum(len(r.captions) for r in records))
    tokens = caption_tokens(built.tokenizer, records, settings.data.max_tokens)
    seen, image = image_flops(program.image_encoder)
    dtype = precision(settings.train.precision, device())
    chunks = min(settings.train.accumulate, batch)
    rows = math.ceil(batch / chunks)
    with _recomputing(program.model.qformer.stack, settings.train.checkpoint_last):
        flops = step_flops(program, seen, tokens, batch)
        activations = step_memory(program, seen, tokens, rows, dtype, chunks > 1)
    if not is_kept:
        kept, most = image_memory(program.image_encoder, rows)
        activations = max(activations + kept, most)
    if chunks > 1:
        waiting = 4 * math.prod(seen) + (0 if is_kept else 3 * program.image_encoder.spec.size**2)
        activations += (batch - rows) * waiting
        flops["encoding again"] = encoding_flops(program, seen, tokens, batch)
        if not is_kept:
            image += image if is_frozen(program.image_encoder) else image // 3  # of a forward and a backward pass
    memory = state_memory(program, settings.train) | {"activations": activations}
    if settings.data.cache == "memory" and records:
        memory["features"] = features_bytes(len(records) * settings.data.views, *seen)
    name = str(dtype).removeprefix("torch.")
    return Cost(batch, tokens, seen, is_kept, name, parameters(program), image, flops, memory)


def to_count(settings: Stage1Settings, records: list[Record] | None = None) -> Built:
    """What the settings build, for counting alone. records: of the training split, where a vocabulary is trimmed."""
    texts = [text for record in records or () for text in record.captions]
    return build(settings, initialise=False, encoder=_weightless(settings.image_encoder), texts=texts)


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


@contextmanager
def _recomputing(stack: Stack, blocks: int) -> Iterator[None]:
    """Within, the last blocks recompute their inside in the backward pass."""
    before, stack.checkpoint_last = stack.checkpoint_last, blocks
    try:
        yield
    finally:
        stack.checkpoint_last = before


def state_memory(program: nn.Module, train: Train) -> dict[str, int]:
    """Bytes of weights (buffers too), of the gradients of what is trained, of AdamW's two moments, and of the moving
    average where there is one."""
    trained = trained_bytes(program)
    weights = sum(t.numel() * t.element_size() for t in held(program))
    moments = 2 * trained
    if train.optimizer == eightbit.NAME:
        moments = sum(eightbit.moments_bytes(p) for p in program.parameters() if p.requires_grad)
    average = {"moving average": trained} if train.ema > 0 else {}
    return {"weights": weights, "gradients": trained, "AdamW's moments": moments, **average}


def held(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def trained_bytes(module: nn.Module) -> int:
    """Of the weights that are trained, and so of their gradients."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)


def features_bytes(pictures: int, tokens: int, width: int) -> int:
    """Bytes of the features that are kept of so many pictures, (n, N, D) bfloat16."""
    return pictures * tokens * width * 2


def caption_tokens(tokenizer: Words, records: list[Record] | None, longest: int) -> int:
    """The mean length of the first captions, cut at `longest`, for nothing is computed for padding; without records,
    `longest`."""
    texts = [text for record in (records or [])[:READ] for text in record.captions]
    return round(statistics.mean(map(len, tokenizer.rows(texts, longest)))) if texts else longest


def image_flops(encoder: nn.Module | None) -> tuple[tuple[int, int], int]:
    """(N, D) of a picture's tokens, and the FLOPs of one picture, backward too where the encoder is trained."""
    if encoder is None:
        raise ValueError("a program without an image encoder has no picture to count")
    with _meta(encoder), torch.set_grad_enabled(not is_frozen(encoder)), flop_counter() as counter:
        tokens = encoder(_pixels(encoder, 1)).tokens
        if tokens.requires_grad:
            tokens.sum().backward()
    return (tokens.shape[1], tokens.shape[2]), counter.get_total_flops()


def image_memory(encoder: nn.Module, rows: int) -> tuple[int, int]:
    """Bytes that `rows` pictures, and what is kept of them for a backward pass, take while the rest of a step is
    computed, without the tokens that come out; and bytes that they take at most. Both beside weights and gradients."""
    with _meta(encoder), torch.set_grad_enabled(not is_frozen(encoder)), Live(held(encoder)) as live:
        pixels = _pixels(encoder, rows)
        tokens = encoder(pixels).tokens
        kept = live.bytes - tokens.untyped_storage().nbytes()
        if tokens.requires_grad:
            tokens.sum().backward()
    return kept, max(live.after) - trained_bytes(encoder)


def _pixels(encoder: nn.Module, rows: int) -> Tensor:
    """Pictures that are nothing but shapes."""
    side = encoder.spec.size
    return torch.empty((rows, 3, side, side), device="meta")


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


def step_flops(program: Stage1, seen: tuple[int, int], tokens: int, batch: int) -> dict[str, int]:
    """By objective, of a step after the image encoder: measured at a few rows, forward and backward, and scaled to
    `batch`. The first objective's include what all share: both encodings.
    """
    on = program.objectives
    named = [name for name in OBJECTIVES if getattr(on, name)]
    small = min(MEASURED, batch)
    rows = random_batch(program, seen, tokens, small)
    share = {"itc": 1.0, "itm": on.matching_share, "lm": on.captioning_share}
    flops: dict[str, int] = {}
    last = 0
    with _training(program):
        for count, name in enumerate(named):
            chosen = {other: float(other in named[: count + 1]) for other in OBJECTIVES}
            program.objectives = replace(on, **chosen, matching_share=1.0, captioning_share=1.0)
            with flop_counter() as counter:
                _backward(program, rows, torch.float32)
            factor = batch / small if not count else len(rows_of(share[name], 0, batch)) / small
            flops[OBJECTIVES[name]] = round((counter.get_total_flops() - last) * factor)
            last = counter.get_total_flops()
    flops[OBJECTIVES[named[0]]] += similarity_flops(program, batch) - round(
        similarity_flops(program, small) * batch / small
    )
    return flops


def step_memory(
    program: Stage1, seen: tuple[int, int], tokens: int, rows: int, dtype: torch.dtype, goes_on: bool
) -> int:
    """Bytes that a step after the image encoder takes at most, its pictures' tokens among them, beside the weights and
    their gradients. goes_on: whether gradients are there already, as of chunks before this one."""

    def alive(count: int) -> list[int]:
        gradients = []
        if goes_on:
            _backward(program, random_batch(program, seen, tokens, count), dtype)
            gradients = [p.grad for p in program.parameters() if p.grad is not None]
        else:
            program.zero_grad(set_to_none=True)
        with Live([*held(program), *gradients]) as live:
            _backward(program, random_batch(program, seen, tokens, count), dtype)
        return live.after

    on = program.objectives
    few = min(16, max(4, math.ceil(1 / min(on.matching_share, on.captioning_share))))
    with _training(program):
        most = read_on(alive, rows, few)
    return most if goes_on else max(most - trained_bytes(program.model), 0)


def _backward(program: Stage1, rows: PairBatch, dtype: torch.dtype) -> None:
    with warnings.catch_warnings(), autocast(dtype, rows.ids.device):
        warnings.simplefilter("ignore")
        loss = program(rows)["loss"]
    loss.backward()


@contextmanager
def _training(program: Stage1) -> Iterator[None]:
    """Within it is in training mode; afterwards as it was before, and without gradients."""
    was_training, objectives = program.training, program.objectives
    program.train()
    try:
        yield
    finally:
        program.objectives = objectives
        program.zero_grad(set_to_none=True)
        program.train(was_training)


def encoding_flops(program: Stage1, seen: tuple[int, int], tokens: int, batch: int) -> int:
    """Of `Program.encode` after the image encoder, forward alone: measured at a few rows."""
    small = min(MEASURED, batch)
    with flop_counter() as counter:
        program.encode(random_batch(program, seen, tokens, small))
    return round(counter.get_total_flops() * batch / small)


def similarity_flops(program: Stage1, batch: int) -> int:
    """Of every picture against every text both ways, forward and backward: the one part that grows as the batch²."""
    config = program.model.config
    return 2 * 3 * 2 * batch * batch * config.qformer.queries * config.embed


def random_batch(program: Stage1, seen: tuple[int, int], tokens: int, rows: int, seed: int = 0) -> PairBatch:
    """`rows` pictures' tokens and captions, drawn at random; no two rows are the same picture."""
    draw = torch.Generator().manual_seed(seed)
    words = program.model.config.qformer.vocab
    ids = torch.randint(0, words, (rows, tokens), generator=draw)
    names = torch.arange(rows)
    pictures = ImageTokens(torch.randn((rows, *seen), generator=draw), (0, 0))
    batch = PairBatch(ids, torch.ones_like(ids), names, names, tokens=pictures.tokens)
    return batch.to(next(program.model.parameters()).device)
