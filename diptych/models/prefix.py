"""Prefix tuning (Li & Liang 2021) and P-Tuning v2 (Liu et al. 2022): keys and values learned for every layer of a
model that is otherwise frozen, and seen by every token through its `Past`.

    model = prefixed(model, Prefix(model.text.stack, 16), trained=("classifier",))
    ...                                         # trained as any model
    save(model, "colours.safetensors", base="bert-base-uncased")
    model = load(fresh, "colours.safetensors")  # another day, on the same base

A prefix is no text: it is in nobody's count of tokens, and a text stands where it would stand without it. Where
positions are relative it lies right before position 0, so that its length and the text's together may not exceed the
model's positions.

B batch, P length of the prefix, T text tokens, L layers, H heads of a layer, d their width, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diptych.aside import aside
from diptych.core.dropout import Dropout
from diptych.core.fingerprint import fingerprint
from diptych.core.memory import Past
from diptych.core.stack import Stack
from diptych.core.surgery import freeze
from diptych.errors import UserError
from diptych.models.language import TextModel
from diptych.models.qformer import QFormer

KIND = "diptych prefix 1"  # what a file says that it is, and the version of its form


class Prefix(nn.Module):
    """P keys and values for each layer of a stack: a `Past` of any batch.

    tokens: P rows, which are the keys and values, Σ 2·H·d numbers a row; or of width D where an MLP makes those of
    them (`hidden` wide, with a tanh: Li & Liang's re-parametrisation, P-Tuning v2's `prefix_projection`), which is
    dropped when the prefix is saved.
    """

    def __init__(self, stack: Stack, length: int, hidden: int | None = None, dropout: float = 0.0):
        """hidden: width of the MLP, None for none. dropout: of keys and values, each row's alone. UserError for a
        length below 1."""
        super().__init__()
        if length < 1:
            raise UserError(f"a prefix of length {length}: it must be 1 or more")
        self.length = length
        self.heads, self.head_width = _shape(stack)
        inner, width = 2 * self.head_width * sum(self.heads), stack.config.width
        self.tokens = nn.Parameter(torch.randn(length, inner if hidden is None else width))
        self.mlp: nn.Module = nn.Identity()
        if hidden is not None:
            self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, inner))
        self.drop = Dropout(dropout)

    def table(self) -> Tensor:
        """(P, Σ 2·H·d): a row's keys and values, layer by layer, whoever made them."""
        return self.mlp(self.tokens)

    def forward(self, rows: int, dtype: torch.dtype | None = None) -> Past:
        """What `rows` texts go on from; of `dtype`, the prefix's own when None."""
        table = self.table()
        table = table.to(dtype or table.dtype)
        sizes = [2 * heads * self.head_width for heads in self.heads]
        kv: list[tuple[Tensor, Tensor] | None] = []
        for heads, part in zip(self.heads, table.split(sizes, 1), strict=True):
            pair = part.view(self.length, 2, 1, heads, self.head_width).permute(1, 2, 3, 0, 4)
            keys, values = self.drop(pair.expand(-1, rows, -1, -1, -1))
            kv.append((keys, values))
        mask = torch.ones((rows, self.length), dtype=torch.bool, device=table.device)
        return Past(kv, mask, torch.arange(-self.length, 0, device=table.device)[None], whole=True)

    @torch.no_grad()
    def start_from(self, past: Past) -> None:
        """Begins as the keys and values of P tokens that the model has read, which `past` holds for one row (Li & Liang
        2021, §7.4: real words are a better beginning than noise)."""
        pairs = [torch.stack(pair) for pair in past.kv if pair is not None]  # (2, 1, H, P, d) each
        table = torch.cat([pair[:, 0].permute(2, 0, 1, 3).flatten(1) for pair in pairs], 1)
        if table.shape != self.tokens.shape:  # another length, or an MLP makes them
            raise ValueError(f"keys and values {list(table.shape)} for a prefix that learns {list(self.tokens.shape)}")
        self.tokens.copy_(table)


class PrefixedText(TextModel):
    """A text model, on the very modules of `text`, whose every text stands behind a prefix.

    A past that is handed in empty is filled with the prefix first; any other began with it.
    """

    def __init__(self, text: TextModel, prefix: Prefix):
        nn.Module.__init__(self)  # TextModel's would build another
        self.config, self.causal, self.count_from = text.config, text.causal, text.count_from
        self.embeddings, self.stack, self.prefix = text.embeddings, text.stack, prefix

    def positions(self, mask: Tensor, past: Past | None) -> Tensor:
        places = super().positions(mask, past)
        if self.count_from is None or past is None or not past.length:
            return places
        return places - self.prefix.length * mask.long()  # real keys, but no tokens

    def begun(self, past: Past | None, rows: int) -> Past:
        past = Past([]) if past is None else past
        if not past.length:
            found = _begin(self.prefix, self.stack, rows)
            past.kv, past.mask, past.positions, past.whole = found.kv, found.mask, found.positions, found.whole
        return past

    def _looks(self, ids: Tensor, mask: Tensor | None, past: Past | None) -> tuple[Tensor | None, Tensor | None]:
        """A mask (B, T, n + T) may leave the prefix out, which every token then sees."""
        before = self.prefix.length
        if mask is not None and past is not None and mask.dim() == 3:
            mask = F.pad(mask, (before, 0), value=1) if mask.shape[2] == past.length - before + ids.shape[1] else mask
        return super()._looks(ids, mask, past)


class PrefixedQFormer(QFormer):
    """A Q-Former, on the very modules of `qformer`, whose queries and texts stand behind a prefix in each of its ways;
    captions see it through the past of their queries."""

    def __init__(self, qformer: QFormer, prefix: Prefix):
        nn.Module.__init__(self)
        self.config, self.query_tokens, self.embeddings = qformer.config, qformer.query_tokens, qformer.embeddings
        self.norm, self.drop, self.stack, self.prefix = qformer.norm, qformer.drop, qformer.stack, prefix

    def before(self, rows: int) -> Past:
        return _begin(self.prefix, self.stack, rows)


PREFIXED: dict[type, type] = {TextModel: PrefixedText, QFormer: PrefixedQFormer}


def prefixed(model: nn.Module, prefix: Prefix, trained: Iterable[str] = ()) -> nn.Module:
    """`model` with a prefix before its text model or Q-Former, wherever in it that is, in place of one that it may
    have. Nothing is trained but the prefix and the modules named in `trained` (a new classifier).

    What is answered is the model itself, changed and in eval mode (`train()` switches on the frozen part's dropout too,
    as is usual); or a new one, where it is itself a text model or a Q-Former. Raises ValueError for a model with none
    or several of them and where what is named is tied to it, UserError for a prefix of another shape.
    """
    name, part = _part(model)
    _check_shape(part.stack, prefix.heads, prefix.head_width, "the prefix")
    also = {module: model.get_submodule(module) for module in trained}
    base = {id(parameter) for parameter in part.parameters()}
    for module, named in also.items():
        if any(id(parameter) in base for parameter in named.parameters()):
            raise ValueError(f"'{module}' shares weights with what the prefix stands before, which stays as it is")
    freeze(model)
    changed = PREFIXED.get(type(part), type(part))(part, prefix.requires_grad_(True)).train(part.training)
    if name:
        model.set_submodule(name, changed)
    else:
        model = changed
    for named in also.values():
        named.requires_grad_(True)
    return model


def _part(model: nn.Module) -> tuple[str, TextModel | QFormer]:
    """The one part that takes a prefix, and its name; "" for the model itself."""
    kinds = (*PREFIXED, *PREFIXED.values())  # a subclass would lose what it overrides
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, TextModel | QFormer) and type(module) in kinds
    ]
    if len(found) != 1:
        names = ", ".join(name or "itself" for name, _ in found) or "none"
        raise ValueError(f"a prefix stands before one text model or Q-Former; this model has: {names}")
    return found[0]


def _shape(stack: Stack) -> tuple[tuple[int, ...], int]:
    """Heads of each layer, which pruning may have made differ, and the width of one."""
    attentions = [block.attn for block in stack.blocks]
    return tuple(attention.heads for attention in attentions), attentions[0].head_width


def _check_shape(stack: Stack, heads: tuple[int, ...], head_width: int, source: str) -> None:
    own = _shape(stack)
    if own != (heads, head_width):
        theirs, ours = _said(heads, head_width), _said(*own)
        raise UserError(f"{source}: keys and values for {theirs}, and the model has {ours}")


def _said(heads: tuple[int, ...], head_width: int) -> str:
    number = str(heads[0]) if len(set(heads)) == 1 else "/".join(map(str, heads))
    return f"{len(heads)} layers of {number} heads of width {head_width}"


def _begin(prefix: Prefix, stack: Stack, rows: int) -> Past:
    """The prefix as this stack's own keys and values would be: in autocast's precision where it is on, in its weights'
    otherwise. UserError where the stack has lost layers or heads since."""
    _check_shape(stack, prefix.heads, prefix.head_width, "the prefix")
    weight = stack.blocks[0].attn_residual.norm.weight  # a projection's may be quantised
    kind = weight.device.type
    return prefix(rows, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)


def save(model: nn.Module, path: str | Path, base: str = "") -> None:
    """Writes what is trained of a prefixed model as one .safetensors file: the prefix, as keys and values, and the
    weights named in `trained`, under their own names. `base`, what the rest is called, and a fingerprint of its weights
    stand in the file's metadata. Raises UserError where it can't be written."""
    name, part = _part(model)
    prefix: Prefix | None = getattr(part, "prefix", None)
    if prefix is None:
        raise ValueError("there is no prefix to save: see `prefixed`")
    inside = f"{name}.prefix.".removeprefix(".")
    tensors = {"prefix": prefix.table()}
    tensors |= {n: p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)}
    heads = ",".join(map(str, prefix.heads))
    shape = {"length": str(prefix.length), "heads": heads, "head_width": str(prefix.head_width)}
    metadata = {"format": "pt", "kind": KIND, **shape, "base": base, "fingerprint": _base(part)}
    try:
        with aside(Path(path)) as file:
            save_file({n: tensor.detach().clone().contiguous() for n, tensor in tensors.items()}, file, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be written ({error})") from error


def load(model: nn.Module, path: str | Path, any_base: bool = False) -> nn.Module:
    """`model` with the prefix of a file before it, and the other weights that were trained with it; as `prefixed`.

    any_base: takes a prefix that was learned before other weights. Raises UserError for a file of another kind or
    shape and for one of another base; the model is then as it was.
    """
    tensors, said = _read(Path(path))
    _, part = _part(model)
    heads = tuple(int(number) for number in said["heads"].split(","))
    _check_shape(part.stack, heads, int(said["head_width"]), str(path))
    others = {name: tensor for name, tensor in tensors.items() if name != "prefix"}
    _check_others(model, others, str(path))
    own = _base(part)
    if own != said["fingerprint"] and not any_base:
        before = f"other weights ({said['base'] or 'unnamed'}, {said['fingerprint']})"
        raise UserError(f"{path}: learned before {before}, and the model's are {own}; any_base=True takes it anyway")
    prefix = Prefix(part.stack, int(said["length"])).to(part.stack.blocks[0].attn.o.weight.device)
    prefix.tokens.data = tensors["prefix"].to(prefix.tokens.device)
    model = prefixed(model, prefix)
    for name, tensor in others.items():
        parameter = model.get_parameter(name).requires_grad_(True)
        parameter.data.copy_(tensor)
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a prefix, or a damaged one ({type(error).__name__})") from error
    if said.get("kind") != KIND:
        raise UserError(f"{path}: not a prefix: its kind is '{said.get('kind', 'unsaid')}' and not '{KIND}'")
    return tensors, said


def _check_others(model: nn.Module, others: Mapping[str, Tensor], source: str) -> None:
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name, tensor in sorted(others.items()):
        if name not in shapes:
            raise UserError(f"{source}: '{name}' was trained with the prefix, and the model has none")
        if shapes[name] != list(tensor.shape):
            raise UserError(f"{source}: '{name}' is {list(tensor.shape)} in the file and {shapes[name]} in the model")


def _base(part: nn.Module) -> str:
    """The fingerprint of what a prefix stands before, without its own weights."""
    return fingerprint(part, ("prefix.",))
