"""The program that trains two towers into one space: CLIP, SigLIP, any image encoder with any text encoder.

b rows of this process, B rows of all, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.core.stack import Stack
from diptych.core.surgery import freeze, is_frozen
from diptych.data.pairs import PairBatch
from diptych.data.transforms import normalised
from diptych.errors import UserError
from diptych.models.clip import DualEncoder
from diptych.models.language import TextModel
from diptych.models.resnet import ModifiedResNet
from diptych.models.vision import ImageTokens, VisionTransformer
from diptych.objectives import chunked, contrastive, gather, sigmoid
from diptych.objectives.targets import Ids, Smoothed, Teacher
from diptych.train.parallel import whole
from diptych.train.program import Program, Rest, graph_of, run_frozen

COLDEST = 0.01  # where a softmax is learned: cosines are never multiplied by more than 100 (Radford et al. 2021, §2.5)
OURS = (VisionTransformer, ModifiedResNet, TextModel)  # each weight of these is looked at in every pass


@dataclass(frozen=True)
class ContrastObjectives:
    """loss: CLIP's softmax over all of a batch, or SigLIP's sigmoid of each pair. smoothing: of a softmax's labels.
    positives: which texts are a picture's own: that of its "pair" alone, as the references have it, all of the same
    "picture", or those of the same words too ("caption"). mean: over the "global" batch, or over each "rank" and then
    over ranks.

    distillation: weight of the cross entropy with a teacher's softmax (OpenCLIP's `DistillClipLoss`), where there is
    one; temperature: of that softmax, the teacher's own by default. exchange: how a sigmoid's texts come to other
    processes, see `sigmoid.pairwise`. block: rows of logits held at a time, by default as `chunked` has it.
    temperatures: bounds of the learned one; without them a softmax's is not below `COLDEST`. scale_lr, bias_lr: times
    the learning rate, at which temperature and bias are learned. threshold: a sigmoid's bias goes with its scale, see
    `Contrast.held`.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    smoothing: float = 0.0
    positives: Literal["pair", "picture", "caption"] = "caption"
    mean: Literal["global", "rank"] = "global"
    distillation: float = 1.0
    temperature: float | None = None
    exchange: sigmoid.Exchange = "gather"
    block: int | None = None
    temperatures: tuple[float, float] | None = None
    scale_lr: float = 1.0
    bias_lr: float = 1.0
    threshold: bool = True

    def __post_init__(self) -> None:
        if self.loss == "sigmoid" and self.smoothing:
            raise UserError(f"objectives.smoothing={self.smoothing} is of a softmax; set it to 0, or loss=softmax")
        if self.loss == "softmax" and self.exchange == "ring":
            raise UserError("objectives.exchange=ring is of loss=sigmoid: a softmax sums over all texts; give gather")


@dataclass
class Pairs:
    """Unit vectors (b, E)."""

    pictures: Tensor
    texts: Tensor


@dataclass
class Joint:
    """Of a step that is computed in chunks: its losses, and what they ask of all of this process's embeddings, (b, E),
    and of the model's scale and bias (GradCache: Gao et al. 2021)."""

    losses: dict[str, Tensor]
    pictures: Tensor
    texts: Tensor
    of_model: list[Tensor]


class Contrast(Program):
    """Pictures and texts that belong together, told from all others of the batch."""

    batches = PairBatch

    def __init__(
        self,
        model: DualEncoder,
        objectives: ContrastObjectives,
        teacher: DualEncoder | None = None,
    ):
        """teacher: a trained model to learn from, with the same tokenizer
        and pictures of the same size; frozen."""
        super().__init__()
        self.model, self.objectives = model, objectives
        self.teacher = None if teacher is None else freeze(teacher)
        if teacher is not None and teacher.image.spec.size != model.image.spec.size:
            sizes = f"{teacher.image.spec.size} pixels, and the model's of {model.image.spec.size}"
            raise UserError(f"the teacher's pictures are of {sizes}; give image_encoder.size={teacher.image.spec.size}")
        encoders = (model.image.encoder, model.text.encoder)
        has_idle_bias = objectives.loss == "softmax" and model.logit_bias is not None
        self.trains_all = not has_idle_bias and all(is_frozen(e) or isinstance(e, OURS) for e in encoders)
        self.rates = {"model.logit_scale": objectives.scale_lr, "model.logit_bias": objectives.bias_lr}
        self.scale_before: Tensor | None = None
        self.likeness: dict[str, Tensor] = {}

    @property
    def stacks(self) -> list[Stack]:
        return [module for module in self.model.modules() if isinstance(module, Stack)]

    def train(self, mode: bool = True) -> Contrast:
        """As torch's, except that what is frozen stays in eval mode, in a tower too."""
        super().train(mode)
        for module in self.model.modules():
            if any(True for _ in module.parameters()) and is_frozen(module):
                module.eval()
        return self

    @property
    def has_threshold(self) -> bool:
        return self.objectives.threshold and self.objectives.loss == "sigmoid" and self.model.logit_bias is not None

    def before_step(self) -> None:
        self.scale_before = self.model.logit_scale.detach().clone()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keeps the temperature, exp(−logit_scale), within its bounds, and lets the bias follow, see `held`."""
        if self.objectives.temperatures is not None:
            coldest, warmest = self.objectives.temperatures
            self.model.logit_scale.clamp_(-math.log(warmest), -math.log(coldest))
        elif self.objectives.loss == "softmax":
            self.model.logit_scale.clamp_(max=-math.log(COLDEST))
        if self.has_threshold and self.scale_before is not None:
            self.model.logit_bias.mul_((self.model.logit_scale - self.scale_before).exp())

    def held(self, scale: Tensor, bias: Tensor) -> Tensor:
        """The bias, whose gradient goes to the scale (a logarithm) too, as if it were −threshold · exp(scale).

        A pair is as likely right as wrong where its cosine is −bias / exp(scale). With a bias of its own that threshold
        sinks as the temperature does, so that neither can move without the other, and a short run's temperature stays
        where it began. What is learned with the threshold held is a sharper or duller line at the same place; after a
        step the bias is put where the threshold then asks it to be.
        """
        return bias + bias.detach() * (scale - scale.detach()) if self.has_threshold else bias

    def vitals(self) -> dict[str, float]:
        """temperature; bias, where there is one; picture_likeness, text_likeness: the mean cosine between embeddings of
        the last batch."""
        told = {"temperature": whole(self.model.logit_scale).neg().exp().item()}
        if self.model.logit_bias is not None:
            told["bias"] = whole(self.model.logit_bias).item()
        return told | {name: value.item() for name, value in self.likeness.items()}

    def look(self, batch: PairBatch) -> ImageTokens:
        encoder = self.model.image.encoder
        if batch.tokens is not None:
            prefix = getattr(encoder, "prefix", 0)
            side = math.isqrt(batch.tokens.shape[1] - prefix)
            return ImageTokens(batch.tokens, (side, side), prefix)
        if batch.pixels is None:
            raise ValueError("a batch brings image tokens, or pixels")
        with graph_of(encoder):
            return self.model.image.see(normalised(batch.pixels, self.model.image.spec))

    def encode(self, batch: PairBatch) -> Pairs:
        pictures = self.model.embed_tokens(self.look(batch))
        return Pairs(pictures, F.normalize(run_frozen(self.model.text, batch.ids, batch.mask), dim=-1))

    def keep(self, embeddings: Pairs) -> Pairs:
        return embeddings

    def joint(self, batch: PairBatch, kept: list[Pairs]) -> Joint:
        found = [chunked.wide(torch.cat(x)) for x in ([k.pictures for k in kept], [k.texts for k in kept])]
        leaves = [x.detach().requires_grad_() for x in (*found, *self.of_model())]
        with torch.enable_grad():
            losses = self.losses(*leaves, batch=batch, chunks=len(kept))
        pictures, texts, *of_model = torch.autograd.grad(losses["loss"], leaves, materialize_grads=True)
        return Joint({name: value.detach() for name, value in losses.items()}, pictures, texts, of_model)

    def loss(self, embeddings: Pairs, batch: PairBatch, rest: Rest | None = None) -> dict[str, Tensor]:
        if rest is None:
            return self.losses(embeddings.pictures, embeddings.texts, *self.of_model(), batch=batch)
        joint, chunks = rest.joint, len(rest.kept)
        start = sum(len(k.texts) for k in rest.kept[: rest.number])
        part = slice(start, start + len(embeddings.texts))
        asked = (joint.pictures[part], joint.texts[part], *(gradient / chunks for gradient in joint.of_model))
        given = (embeddings.pictures, embeddings.texts, *self.of_model())
        # a number whose gradient is the loss's
        stand_in = torch.stack([(x * gradient).sum() for x, gradient in zip(given, asked, strict=True)]).sum()
        losses = {name: value / chunks for name, value in joint.losses.items()}
        return losses | {"loss": losses["loss"] + (stand_in - stand_in.detach())}

    def of_model(self) -> list[Tensor]:
        """The logarithm of what cosines are multiplied by, and what is added to them, where there is such."""
        return [x for x in (self.model.logit_scale, self.model.logit_bias) if x is not None]

    def losses(
        self, pictures: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None = None, *, batch: PairBatch,
        chunks: int = 1,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Of all this process's rows. chunks: in how many the teacher looks at them."""
        on, ids = self.objectives, self.ids(batch)
        self.likeness = {
            "picture_likeness": contrastive.likeness(pictures),
            "text_likeness": contrastive.likeness(texts),
        }
        if on.loss == "sigmoid":
            bias = None if bias is None else self.held(scale, bias)
            rows = sigmoid.pairwise(pictures, texts, scale.exp(), bias, ids, on.exchange, on.block)
        else:
            targets = Ids(ids, gather.gather(ids))
            shares = Smoothed(targets, on.smoothing) if on.smoothing else targets
            rows = chunked.itc(pictures, texts, scale.exp(), shares, on.block)
        losses = {"itc": gather.mean(rows.sum(), rows.numel(), on.mean)}
        losses["loss"] = losses["itc"]
        if self.teacher is not None:
            rows = chunked.itc(pictures, texts, scale.exp(), self.taught(self.teacher, batch, chunks), on.block)
            losses["distillation"] = gather.mean(rows.sum(), rows.numel(), on.mean)
            losses["loss"] = losses["itc"] + on.distillation * losses["distillation"]
        return losses

    def ids(self, batch: PairBatch) -> Tensor:
        """(b,) or (b, K): rows belong together that have one in common."""
        if self.objectives.positives == "pair":
            rank, _ = gather.world()
            first = sum(gather.counts(len(batch), batch.ids.device)[:rank])
            return first + torch.arange(len(batch), device=batch.ids.device)
        is_caption = self.objectives.positives == "caption"
        return torch.stack([batch.image_id, batch.caption_id], 1) if is_caption else batch.image_id

    @torch.no_grad()
    def taught(self, teacher: DualEncoder, batch: PairBatch, chunks: int) -> Teacher:
        """What a teacher says of all pairs."""
        pictures, texts = [], []
        for part in batch.split(chunks):
            if part.pixels is None:
                raise UserError("a teacher looks at the pictures themselves, not at kept features: set data.cache=none")
            pictures.append(teacher.embed_pictures(normalised(part.pixels, teacher.image.spec)))
            texts.append(teacher.embed_texts(part.ids, part.mask))
        temperature = self.objectives.temperature
        scale = teacher.logit_scale.exp() if temperature is None else 1 / temperature
        return Teacher.of(torch.cat(pictures), torch.cat(texts), scale, self.objectives.block)
