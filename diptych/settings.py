"""What a run can be told, as typed settings: sections, and a kind of settings for each program."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a file, a folder, or a name of another kind

Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Data(Section):
    """Pictures and their captions.

    path: a file or folder (COCO captions, Karpathy's JSON, JSONL, CSV, pictures with .txt, tar shards, parquet files, a
    saved Hugging Face dataset), or hf:OWNER/NAME of the hub; images: where its pictures lie, when not beside it.
    train, val, test: names of splits, where it has any; hold_out: without a val split, this many training pictures (at
    most a tenth) are kept for validation. also: other data sets to train on, path → weight, where `path` has weight 1:
    {coco.json: 3} draws three rows in four from that. captions: "one" a picture an epoch, or "all". max_tokens: of a
    caption.
    cache: "memory" encodes every picture once at the start (frozen encoder, no augmentation); "disk" keeps that for
    other runs too, in cache_folder, and maps it into memory; "none" encodes at every step.
    views: of each training picture, one of which is drawn each time: 1 the picture, 2 its mirror image too (not where
    captions say left and right), up to 6 parts of it as well. They cost as many encodings, and last longer.
    on_bad: "stop" at the first row or picture that can't be used, or "skip" it, which skipped.jsonl then lists.
    """

    path: Place | None = None
    images: Place | None = None
    train: str | None = "train"
    val: str | None = "val"
    test: str | None = "test"
    hold_out: int = Field(0, ge=0)
    also: dict[Place, Annotated[float, Field(gt=0)]] = {}
    limit: int | None = Field(None, gt=0)
    captions: Literal["one", "all"] = "one"
    max_tokens: int = Field(32, gt=2)
    cache: Literal["memory", "disk", "none"] = "memory"
    cache_folder: Place = "runs/features"
    views: int = Field(1, ge=1, le=6)
    on_bad: Literal["stop", "skip"] = "stop"
    workers: int = Field(0, ge=0)


class TowerShape(Section):
    """Of an "eva", "clip" or "vit" tower. patch: the side of one in pixels; mlp: width inside a feed-forward."""

    width: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    patch: int = Field(gt=0)
    mlp: int = Field(gt=0)


class Encoder(Section):
    """name: "starter" (EfficientNet-Lite0 with ImageNet weights, from the package registry), "timm:NAME",
    "hf:FOLDER", "eva" or "clip" (LAVIS's towers), "vit" (CLIP's, random, of `shape`). weights: a file; size: side in
    pixels, when not the model's own. shape: of an "eva" or "clip" tower, when not the published one. stage: of the
    starter or a timm convolution tower, the map to take instead of the last, counted from 0 (the starter's 3: finer,
    and better at colours and shapes). freeze_bn: of an encoder that is trained, batch norms keep the statistics that
    they came with; None: where it comes with weights, by model.start too, which a batch's own would upset."""

    name: str = "starter"
    weights: Place | None = None
    size: int | None = Field(None, gt=0)
    stage: int | None = Field(None, ge=0)
    frozen: bool = True
    freeze_bn: bool | None = None
    shape: TowerShape | None = None


class QFormer(Section):
    """start: "starter" (6-layer MiniLM, width 384), a BERT folder or hub id to initialise from, or "random" with
    `width`, `heads`, `mlp` (None: 4 × width) and `positions`. layers: None takes all of the start's. tokenizer: a
    folder or hub id; the start's own when None. vocabulary: "data" keeps the words of the training captions (and single
    letters for the rest), which is faster and can't go back to LAVIS; "all" keeps all. picture_eps: of the norm over
    image tokens.
    """

    start: Place = "starter"
    tokenizer: Place | None = None
    vocabulary: Literal["all", "data"] = "all"
    layers: int | None = Field(None, gt=0)
    width: int = Field(768, gt=0)
    heads: int = Field(12, gt=0)
    mlp: int | None = Field(None, gt=0)
    positions: int = Field(512, gt=0)
    queries: int = Field(32, gt=0)
    cross_every: int = Field(2, gt=0)
    embed: int = Field(256, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    temperature: float = Field(0.07, gt=0)
    picture_eps: float = Field(1e-5, gt=0)


class Objectives(Section):
    """Weights of contrast (ITC), matching (ITM) and language modelling (LM); 0 turns one off.

    matching_share, captioning_share: the share of a batch's rows that each takes on. hardness: of ITM's negatives, 1 =
    in proportion to exp(similarity / temperature), 0 = any alike.
    """

    itc: float = Field(1.0, ge=0)
    itm: float = Field(1.0, ge=0)
    lm: float = Field(1.0, ge=0)
    smoothing: float = Field(0.1, ge=0, lt=1)
    matching_share: float = Field(1.0, gt=0, le=1)
    captioning_share: float = Field(1.0, gt=0, le=1)
    hardness: float = Field(1.0, ge=0)


class Train(Section):
    """batch: pictures a step; accumulate: in how many chunks these are computed, one after another, for memory: the
    same losses and gradients, for the time of one more encoding. epochs, or steps when given. warmup: share of the
    steps; the rate then falls to `final_lr` times `lr`, as a cosine or along a line (`decay`). Weights that
    qformer.start gave learn at `start_lr` times that, and at `layer_decay` times that for each block above them.
    optimizer: "adamw8bit" keeps moments in 8 bits, for a quarter to a half of their memory (extra `torchao`; compiled,
    which takes a minute). clip: of the gradients' norm, 0 = none.
    precision: "auto" is bfloat16 where the machine computes it fast, else float32; "float16" scales its loss, for GPUs
    without bfloat16. ema: a moving average of the weights, which keeps this much of itself a step (0.999, say; 0 =
    none), and which the run is then used with. checkpoint_last: blocks whose inside is recomputed, for memory.
    compile: blocks, by torch's compiler, which takes minutes at the start.
    save_every: steps between checkpoints, 0 = at the end alone; keep: how many stay; keep_best: measure recall on the
    held-out pictures at each, let the best stay too, and use that. Under torchrun, parallel: "ddp" keeps all weights in
    each process, "fsdp" spreads them; timeout: seconds after which a process that is waited for is given up. trackers:
    "wandb", "trackio", which are told each step's figures too."""

    batch: int = Field(64, gt=1)
    accumulate: int = Field(1, gt=0)
    epochs: int = Field(10, gt=0)
    steps: int | None = Field(None, gt=0)
    lr: float = Field(1e-4, gt=0)
    final_lr: float = Field(0.01, ge=0, le=1)
    decay: Literal["cosine", "linear"] = "cosine"
    start_lr: float = Field(1.0, gt=0, le=1)
    layer_decay: float = Field(1.0, gt=0, le=1)
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.05, ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    clip: float = Field(1.0, ge=0)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    ema: float = Field(0.0, ge=0, lt=1)
    checkpoint_last: int = Field(0, ge=0)
    compile: bool = False
    seed: int = Field(0, ge=0)
    log_every: int = Field(10, gt=0)
    save_every: int = Field(500, ge=0)
    keep: int = Field(2, gt=0)
    keep_best: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    timeout: int = Field(600, gt=0)
    trackers: list[Literal["wandb", "trackio"]] = Field(default_factory=list)


class Evaluation(Section):
    """What `diptych eval` measures on held-out pictures.

    views: of each picture, as data.views has them, whose scores are averaged; captions are of the picture itself.
    rerank: how many candidates ITM re-ranks (0 = none); combine: rank them by ITM's log odds and ITC over its
    temperature, by ITM alone, or by ITM + ITC as LAVIS does; itm_weight: of ITM in such a sum, less than 1 where it was
    learned from few pictures. captions: how many pictures are captioned; beams: 1 = greedy. java_metrics: "meteor",
    "spice", of captions, by Java. limit: pictures evaluated, None = all.
    """

    limit: int | None = Field(None, gt=0)
    views: int = Field(1, ge=1, le=6)
    rerank: int = Field(16, ge=0)
    combine: Literal["itm+itc/t", "itm", "itm+itc"] = "itm+itc/t"
    itm_weight: float = Field(1.0, gt=0)
    captions: int = Field(100, ge=0)
    beams: int = Field(3, gt=0)
    max_length: int = Field(30, gt=1)
    min_length: int = Field(4, gt=0)
    java_metrics: list[Literal["meteor", "spice"]] = Field(default_factory=list)


class Settings(Section):
    """One run, whole, of any program. out: its folder."""

    program: Any
    about: str = ""
    out: Place
    train: Train = Field(default_factory=Train)


class PairSettings(Settings):
    """Any program that learns from pictures and captions."""

    data: Data = Field(default_factory=Data)
    image_encoder: Encoder = Field(default_factory=Encoder)

    @model_validator(mode="after")
    def _can_keep(self) -> PairSettings:
        if self.data.cache != "none" and not self.image_encoder.frozen:
            wanted = f"data.cache={self.data.cache} needs image_encoder.frozen=true"
            raise ValueError(f"{wanted}; set data.cache=none to train it")
        return self


class Stage1Settings(PairSettings):
    """BLIP-2's first stage."""

    program: Literal["stage1"] = "stage1"
    out: Place = "runs/stage1"
    qformer: QFormer = Field(default_factory=QFormer)
    objectives: Objectives = Field(default_factory=Objectives)
    evaluation: Evaluation = Field(default_factory=Evaluation)

    @model_validator(mode="after")
    def _possible(self) -> Stage1Settings:
        if not (self.objectives.itc or self.objectives.itm or self.objectives.lm):
            raise ValueError("objectives: itc, itm and lm are all 0, so nothing would be learned")
        if self.train.keep_best and not self.objectives.itc:
            raise ValueError("train.keep_best=true measures recall by ITC, and objectives.itc is 0: give it a weight")
        return self


class Texts(Section):
    """Documents of text.

    path: a .txt file or a folder of them, where a document is a line, a paragraph or a file (`unit`); a .jsonl file,
    parquet files, a saved Hugging Face dataset or hf:OWNER/NAME of the hub, where it is what `column` holds (of
    `split`, where there are several). val, test: the like, to choose by and to report; hold_out: without val, this many
    documents (at most a tenth) are kept for it. limit: documents read. max_tokens: of a row. pack: rows are filled with
    one document after another, which don't see each other; otherwise a document is a row, or several.
    """

    path: Place | None = None
    val: Place | None = None
    test: Place | None = None
    hold_out: int = Field(1000, ge=0)
    unit: Literal["line", "paragraph", "file"] = "line"
    column: str = "text"
    split: str | None = None
    limit: int | None = Field(None, gt=0)
    max_tokens: int = Field(128, gt=2)
    pack: bool = False
    workers: int = Field(0, ge=0)


class TextModelChoice(Section):
    """start: "starter" (6-layer MiniLM, a BERT), a BERT, RoBERTa or GPT-2 folder or hub id, or "random" with what
    follows. tokenizer: a folder or hub id; the start's own when None, the starter's of "random". vocabulary: "data"
    keeps the words of the documents alone, of a model that begins at random. kind: of blocks and head; "clip" is of an
    encoder alone (causal, norms first). mlp: None = 4 × width.
    """

    start: Place = "starter"
    tokenizer: Place | None = None
    vocabulary: Literal["all", "data"] = "all"
    kind: Literal["bert", "gpt2", "clip"] = "bert"
    width: int = Field(256, gt=0)
    layers: int = Field(4, gt=0)
    heads: int = Field(4, gt=0)
    mlp: int | None = Field(None, gt=0)
    positions: int = Field(512, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _possible(self) -> TextModelChoice:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} of a text model is no multiple of its heads={self.heads}")
        if self.vocabulary == "data" and self.start != "random":
            raise ValueError("vocabulary=data is for a text model that begins at random: give start=random")
        return self


class TextObjective(Section):
    """smoothing: of labels. share: of words that are hidden (masked_lm); whole_words: with all their pieces, else each
    piece by itself; words: what parts them, "spaces" (and every Chinese letter is one), or "jieba" for Chinese (extra
    `chinese`)."""

    smoothing: float = Field(0.0, ge=0, lt=1)
    share: float = Field(0.15, gt=0, lt=1)
    whole_words: bool = False
    words: Literal["spaces", "jieba"] = "spaces"


class TextEvaluation(Section):
    """batch: rows at a time, of which no figure depends. one_word: of a masked_lm, hide each word of a document once,
    and nothing else, rather than `share` of all words. limit: documents evaluated, None = all."""

    batch: int = Field(64, gt=0)
    one_word: bool = False
    limit: int | None = Field(None, gt=0)


class TextSettings(Settings):
    """A language learned from text: words that are hidden, the next word, or the next after a prefix that sees itself
    whole."""

    program: Literal["masked_lm", "causal_lm", "prefix_lm"]
    out: Place = "runs/text"
    data: Texts = Field(default_factory=Texts)
    model: TextModelChoice = Field(default_factory=TextModelChoice)
    objectives: TextObjective = Field(default_factory=TextObjective)
    evaluation: TextEvaluation = Field(default_factory=TextEvaluation)

    @model_validator(mode="after")
    def _possible(self) -> TextSettings:
        if self.model.kind == "clip":
            raise ValueError("model.kind=clip is an encoder of the program clip and has no head: give bert or gpt2")
        if self.program == "prefix_lm" and self.data.pack:
            raise ValueError("data.pack=true fills a row with several documents, and prefix_lm wants one a row")
        return self


class TextEncoder(TextModelChoice):
    """frozen: it is not trained."""

    frozen: bool = False


class Towers(Section):
    """start: a whole model to go on from, of which both encoders come: another run, OpenAI's file, a folder of Hugging
    Face's (CLIPModel, SiglipModel, VisionTextDualEncoderModel), of OpenCLIP's, or a hub id; image_encoder and
    text_encoder then only say what is frozen, and image_encoder.size another side of pictures (and which image encoder,
    where a run has one of others'). embed: width of the space. image_pool, text_pool: what makes one vector of an
    encoder's states; "auto": the mean of a picture's, and of a text its end, or of one that is read both ways the mean;
    "pooler": the first one's through a layer and tanh, which is the checkpoint's (BERT's, ViT's) where it has one.
    temperature: at the start; bias: of a sigmoid's logits, at the start, also where it goes on from a softmax's model.
    """

    start: Place | None = None
    embed: int = Field(256, gt=0)
    image_pool: Literal["auto", "first", "mean", "attention", "pooler"] = "auto"
    text_pool: Literal["auto", "end", "first", "last", "mean", "pooler"] = "auto"
    temperature: float = Field(0.07, gt=0)
    bias: float = -10.0


class ClipObjectives(Section):
    """loss: "softmax" (CLIP's) or "sigmoid" (SigLIP's, with a learned bias). smoothing: of a softmax's labels.
    positives: which texts are a picture's own: that of its "pair" alone, as OpenAI and OpenCLIP have it, all of the
    same "picture", or those of the same words too ("caption").

    teacher: a run, or a checkpoint as model.start takes it, to learn from besides; distillation: weight of that;
    temperature: of the teacher's softmax, its own when None. exchange: of a sigmoid's texts over processes; "ring"
    holds those of two at a time. block: rows of logits held at a time, None: by memory. temperatures: the lowest and
    the highest that the learned one may come to, or None: not below 0.01 for a softmax (OpenAI's bound), any for a
    sigmoid. Two equal ones hold it still. scale_lr, bias_lr: times train.lr, at which the temperature and a sigmoid's
    bias are learned. threshold: of a sigmoid; the bias goes with the scale, so that the cosine at which a pair is as
    likely right as wrong stays while the temperature changes; false: each by itself, as in SigLIP.
    """

    loss: Literal["softmax", "sigmoid"] = "softmax"
    smoothing: float = Field(0.0, ge=0, lt=1)
    positives: Literal["pair", "picture", "caption"] = "caption"
    teacher: Place | None = None
    distillation: float = Field(1.0, gt=0)
    temperature: float | None = Field(None, gt=0)
    exchange: Literal["gather", "ring"] = "gather"
    block: int | None = Field(None, gt=0)
    temperatures: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] | None = None
    scale_lr: float = Field(1.0, gt=0)
    bias_lr: float = Field(1.0, gt=0)
    threshold: bool = True

    @model_validator(mode="after")
    def _in_order(self) -> ClipObjectives:
        if self.temperatures and self.temperatures[0] > self.temperatures[1]:
            low, high = self.temperatures
            raise ValueError(
                f"temperatures: the lowest, {low:g}, is above the highest, {high:g}: give [{high:g}, {low:g}]"
            )
        return self


class GuardSet(Section):
    """What fine-tuning may not cost, as early stopping on a guard: pictures in a folder a class (FOLDER/CLASS/*.jpg),
    told by their classes' names before the first step and at each checkpoint (train.save_every).

    names, prompts: files, as `diptych zeroshot` takes them. A run that has lost more than `allowed_loss` (0.02: two
    pictures in a hundred), at `patience` checkpoints in a row, ends there, and is used with its last checkpoint that
    had not, or the best of those where train.keep_best tells it.
    """

    path: Place | None = None
    names: Place | None = None
    prompts: Place | None = None
    allowed_loss: float = Field(0.02, ge=0, le=1)
    patience: int = Field(1, gt=0)


class ClipEvaluation(Section):
    """limit: pictures evaluated, None = all. views: of each picture, whose scores are averaged."""

    limit: int | None = Field(None, gt=0)
    views: int = Field(1, ge=1, le=6)


class ClipData(Data):
    """As stage 1's, but pictures are read at each step."""

    cache: Literal["memory", "disk", "none"] = "none"


class ClipEncoder(Encoder):
    """As stage 1's, but trained."""

    frozen: bool = False


class ClipSettings(PairSettings):
    """Two encoders and one space: CLIP, SigLIP, or any image encoder with any text encoder."""

    program: Literal["clip"]
    out: Place = "runs/clip"
    data: ClipData = Field(default_factory=ClipData)  # ty: ignore[incompatible-mutable-override]
    model: Towers = Field(default_factory=Towers)
    image_encoder: ClipEncoder = Field(default_factory=ClipEncoder)  # ty: ignore[incompatible-mutable-override]
    text_encoder: TextEncoder = Field(default_factory=TextEncoder)
    objectives: ClipObjectives = Field(default_factory=ClipObjectives)
    guard: GuardSet = Field(default_factory=GuardSet)
    evaluation: ClipEvaluation = Field(default_factory=ClipEvaluation)

    @model_validator(mode="after")
    def _possible(self) -> ClipSettings:
        if self.image_encoder.frozen and self.text_encoder.frozen and self.model.start:
            raise ValueError("image_encoder.frozen and text_encoder.frozen are both true: nothing would be learned")
        return self
