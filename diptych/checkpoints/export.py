"""The two towers of a dual encoder as programs that run without diptych: ONNX files, or torch's exported programs.

B pictures or texts, T text tokens, E embedding.

    FOLDER/image.onnx, text.onnx    or image.pt2, text.pt2; of int8, image.int8.onnx and text.int8.onnx beside them
           export.json              how pictures are made ready, how long texts may be, scale and bias of the logits
           tokenizer.json           the tokenizer's, where one is given
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from diptych.aside import aside
from diptych.checkpoints import texts
from diptych.errors import UserError, nearest
from diptych.models.clip import DualEncoder, FilledTextTower, TextTower
from diptych.models.language import TextModel
from diptych.models.resnet import CELL, ModifiedResNet
from diptych.models.timm_tower import TimmTrunk
from diptych.models.vision import TimmEncoder, VisionTransformer
from diptych.text.tokenizer import Words

if TYPE_CHECKING:
    from torch.export import ExportedProgram

Format = Literal["onnx", "torch"]
Say = Callable[[str], None]
CARD = "export.json"
OPSET = 20  # the first that has GELU; onnxruntime reads it since 1.17
LEAST_OPSET, MOST_OPSET = 18, 25  # what torch writes (2.15), older ones not at all
LEAST = 2  # tokens of a text, and cells along a side of a picture: of 1, torch would make a constant
INLINE = 1 << 30  # bytes of weights up to which an ONNX file holds them itself; protobuf ends at 2 GiB
CLOSE = 1e-4  # how far from the model's an exported tower's answers may lie, of unit vectors


class Pictures(nn.Module):
    """uint8 (B, 3, height, width) → unit vectors (B, E): what normalises pixels is inside."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model, spec = model, model.image.spec
        self.register_buffer("mean", torch.tensor(spec.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(spec.std)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.embed_pictures((pixels.float() / 255 - self.mean) / self.std)


class Texts(nn.Module):
    """ids and mask, int64 (B, T), the mask 1 for real tokens and 0 for padding → unit vectors (B, E)."""

    def __init__(self, model: DualEncoder):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.embed_texts(ids, mask)


@dataclass
class Tower:
    """A tower as it was traced. examples: inputs it was traced with, and others that it must answer too. multiple: of
    which the sides of pictures are whole ones, None where they are as the spec's size says."""

    name: str
    module: nn.Module
    program: ExportedProgram
    examples: list[tuple[Tensor, ...]]
    multiple: int | None = None

    @property
    def inputs(self) -> list[str]:
        return ["pixels"] if self.name == "image" else ["ids", "mask"]


def export(
    model: DualEncoder,
    folder: str | Path,
    tokenizer: Words | None = None,
    to: Format = "onnx",
    opset: int = OPSET,
    int8: bool = False,
    longest: int | None = None,
    say: Say = print,
) -> Path:
    """Writes both towers to a new `folder` and tells what was found.

    A picture is uint8 (3, height, width), scaled and cut as export.json says; its values are normalised inside. Both
    towers give unit vectors in float32, for any number of rows. Sides may be any multiples of export.json's `multiple`,
    two at least; where a tower can't (most of timm's and Hugging Face's transformers), they are `size`. Texts have 2 to
    `longest` tokens, by default as many as the tower has positions.

    int8: writes towers beside them whose matrices have 8 bits (`evaluate.exported.int8_cost` tells what that costs).
    `UserError` for a folder that exists, an opset that can't be written, a model that can't be traced; nothing is
    then written.
    """
    folder = Path(folder)
    _check(folder, to, opset, int8)
    own = copy.deepcopy(model).cpu().float().eval()
    with _quiet(), torch.no_grad():
        towers = [image_tower(own, say), text_tower(own, longest or context_length(own.text))]
        with _written(folder) as new:
            new.mkdir()
            files = [_write(tower, new, to, opset, int8, say) for tower in towers]
            if tokenizer is not None:
                tokenizer.save(new)
            card = _card(own, towers, files, longest, tokenizer is not None)
            (new / CARD).write_text(json.dumps(card | {"format": to, "int8": int8}, indent=1), encoding="utf-8")
    return folder


def context_length(text: TextTower) -> int:
    """Tokens of the longest text that a tower reads."""
    if isinstance(text, FilledTextTower):
        return text.length
    if not isinstance(text.encoder, TextModel):
        raise UserError(f"{type(text.encoder).__name__} doesn't tell how many positions it has: say how long texts are")
    return texts.longest(text.encoder.config)


def image_tower(model: DualEncoder, say: Say) -> Tower:
    """Traced for any grid of cells, or else for pictures of its own size alone."""
    from torch.export import Dim

    module, size, cell = Pictures(model), model.image.spec.size, _cell(model.image.encoder)
    batch, other = Dim("batch"), _pixels(3, size, size)
    if cell is not None and size % cell == 0:
        rows, columns = Dim("rows", min=LEAST), Dim("columns", min=LEAST)
        free: dict[int, Any] = {0: batch, 2: cell * rows, 3: cell * columns}
        try:
            seen = _pixels(2, 3 * cell, 5 * cell)
            program = _traced(_with_plain_padding(module), seen, {"pixels": free}, "image")
            return Tower("image", module, program, [seen, _pixels(1, 4 * cell, 2 * cell), other], cell)
        except UserError as error:
            say(f"pictures must be {size} × {size}: the image tower can't be traced for any size ({_reason(error)})")
    program = _traced(module, other, {"pixels": {0: batch}}, "image")
    return Tower("image", module, program, [other, _pixels(1, size, size)])


def text_tower(model: DualEncoder, longest: int) -> Tower:
    """Traced for texts of 2 to `longest` tokens."""
    from torch.export import Dim

    if longest <= LEAST:
        raise UserError(f"longest: {longest} tokens; a text is its two ends and something between")
    tells = isinstance(model.text, FilledTextTower) or isinstance(model.text.encoder, TextModel)
    if tells and longest > context_length(model.text):
        raise UserError(f"longest: {longest} tokens, and the text tower knows {context_length(model.text)} positions")
    module, few = Texts(model), min(5, longest - 1)
    shared = {0: Dim("batch"), 1: Dim("tokens", min=LEAST, max=longest)}
    program = _traced(module, _ids(3, few), {"ids": shared, "mask": shared}, "text")
    return Tower("text", module, program, [_ids(3, few), _ids(1, longest), _ids(2, LEAST)])


def _cell(encoder: nn.Module) -> int | None:
    """Pixels along a side of one cell of an encoder's map; None where nobody knows."""
    if isinstance(encoder, VisionTransformer):
        return encoder.config.patch
    if isinstance(encoder, ModifiedResNet):
        return CELL
    if isinstance(encoder, TimmEncoder | TimmTrunk) and getattr(encoder.model, "feature_info", None):
        return encoder.model.feature_info[-1]["reduction"]
    return None


def _with_plain_padding(module: nn.Module) -> nn.Module:
    """TensorFlow's padding depends on how large a picture is, and does not where sides are multiples of all strides: in
    what is given back its convolutions are plain ones behind a border. (The general case did not end in 15 minutes.)
    """
    from timm.layers import Conv2dSame

    if not any(isinstance(part, Conv2dSame) for part in module.modules()):
        return module
    module = copy.deepcopy(module)
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, Conv2dSame):
                setattr(part, name, _bordered(child))
    return module


def _bordered(conv: nn.Conv2d) -> nn.Module:
    """A convolution behind a border of zeros, of which the larger half is at the right and at the bottom."""
    lacks = [max(d * (k - 1) + 1 - s, 0) for d, k, s in zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)]
    (top, bottom), (left, right) = ((lack // 2, lack - lack // 2) for lack in lacks)
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=conv.bias is not None)
    plain.kernel_size, plain.stride, plain.dilation = conv.kernel_size, conv.stride, conv.dilation
    plain.weight, plain.bias = conv.weight, conv.bias
    return nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), plain)


def _pixels(rows: int, height: int, width: int) -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(height)
    return (torch.randint(256, (rows, 3, height, width), dtype=torch.uint8, generator=draws),)


def _ids(rows: int, length: int) -> tuple[Tensor, ...]:
    """The last row is padded, where there is room."""
    ids, mask = torch.arange(rows * length).view(rows, length) % 7 + 1, torch.ones(rows, length, dtype=torch.long)
    mask[-1, LEAST:] = 0
    return ids, mask


def _traced(module: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, dict[int, Any]], name: str):
    from torch.export import export as trace

    try:
        return trace(module, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch raises a score of kinds, of its own and of whatever the model does
        raise UserError(f"the {name} tower can't be traced: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of what torch says that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if len(line) > 10), type(error).__name__)


def _check(folder: Path, to: str, opset: int, int8: bool) -> None:
    if to not in get_args(Format):
        raise UserError(f"'{to}' is no format to export to{nearest(to, get_args(Format))}; there are onnx and torch")
    if folder.exists():
        raise UserError(f"{folder} is there already: give another name, or remove it")
    if to == "torch":
        if int8:
            raise UserError("int8 is of ONNX files alone: give format onnx, or leave it out")
        return
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'diptych[onnx]'") from None
    if not LEAST_OPSET <= opset <= MOST_OPSET:
        much = "low" if opset < LEAST_OPSET else "high"
        raise UserError(f"opset {opset}: too {much}; give one of {LEAST_OPSET} to {MOST_OPSET}")


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    try:
        with aside(folder) as new:
            yield new
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """torch and onnxruntime talk of their inside, which nobody can mend."""
    names = ("torch.onnx", "torch.export", "torch.__trace", "onnxscript", "onnx_ir", "root")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write(tower: Tower, folder: Path, to: Format, opset: int, int8: bool, say: Say) -> dict[str, Any]:
    """The tower's files, each compared with the model; what the card tells of them."""
    if to == "torch":
        file = folder / f"{tower.name}.pt2"
        torch.export.save(tower.program, file)
        loaded = torch.export.load(file).module()
        say(f"{file.name}: {_apart(tower, loaded):.0e} from the model at most")
        return {"file": file.name}
    file = folder / f"{tower.name}.onnx"
    _write_onnx(tower, file, opset)
    say(f"{file.name}: {_apart(tower, _opened(tower, file, opset)):.0e} from the model at most, opset {opset}")
    if not int8:
        return {"file": file.name, "opset": opset}
    small = folder / f"{tower.name}.int8.onnx"
    quantize(file, small)
    say(f"{small.name}: {size(small) / size(file):.0%} of {file.name}'s bytes")
    return {"file": file.name, "opset": opset, "int8": small.name}


def _write_onnx(tower: Tower, file: Path, opset: int) -> None:
    try:
        found = torch.onnx.export(
            tower.program, dynamo=True, opset_version=opset, input_names=tower.inputs, output_names=["vectors"],
            verbose=False,
        )  # fmt: skip
        bytes_ = sum(t.numel() * t.element_size() for t in tower.module.state_dict().values())
        assert found is not None  # with dynamo
        found.save(file, external_data=bytes_ > INLINE)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"the {tower.name} tower can't be written as ONNX: {_reason(error)}") from error
    written = next(one.version for one in found.model_proto.opset_import if not one.domain)
    if written != opset:
        raise UserError(f"opset {opset}: the {tower.name} tower could only be written in {written}; give that one")


def _opened(tower: Tower, file: Path, opset: int) -> Callable[..., Tensor]:
    try:
        return session(file)
    except Exception as error:  # onnxruntime raises kinds of its own
        why = f"onnxruntime can't open the {tower.name} tower: {_reason(error)}"
        raise UserError(f"opset {opset}: {why}; give {OPSET}" if opset > OPSET else why) from error


def _apart(tower: Tower, run: Callable[..., Tensor]) -> float:
    """The largest difference from the model's answers to the tower's examples."""
    most = 0.0
    for inputs in tower.examples:
        try:
            given = run(*inputs)
        except Exception as error:
            shape = tuple(inputs[0].shape)
            raise UserError(f"the exported {tower.name} tower fails on {shape}: {_reason(error)}") from error
        most = max(most, float((given - tower.module(*inputs)).abs().max()))
    if not most < CLOSE:
        raise UserError(f"the exported {tower.name} tower is {most:.1e} from the model, where {CLOSE:.0e} is allowed")
    return most


def session(file: Path, threads: int | None = None) -> Callable[..., Tensor]:
    """An ONNX file as a function of tensors, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    held = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in held.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(held.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})[0])

    return run


def size(file: Path) -> int:
    """Bytes of an ONNX file, and of the weights that lie beside it where they are too many for it."""
    return sum(part.stat().st_size for part in (file, data_of(file)) if part.is_file())


def data_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.data")


def quantize(file: Path, out: Path) -> None:
    """The same tower with its matrices in 8 bits, a scale a column, and tables of words, one scale each; what matrices
    are multiplied with has 8 bits too, by the range that each call finds (onnxruntime's dynamic quantization).
    Convolutions stay: so made, those of EfficientNet-Lite0 took 9 times as long, and cosines with what they should give
    fell to 0.75."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(file)
    del model.graph.value_info[:]  # of the graph before it was made smaller: onnx would find them wrong
    quantize_dynamic(
        model, out, op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True, weight_type=QuantType.QInt8,
        use_external_data_format=data_of(file).is_file(),
    )  # fmt: skip


def _card(
    model: DualEncoder, towers: Sequence[Tower], files: Sequence[dict[str, Any]], longest: int | None, words: bool
) -> dict[str, Any]:
    image, text = files
    bias = model.logit_bias
    return {
        "image": image | asdict(model.image.spec) | {"multiple": towers[0].multiple},
        "text": text | {"longest": longest or context_length(model.text), "tokenizer": words},
        "embedding": towers[1].module(*_ids(1, 3)).shape[1],
        "scale": float(model.logit_scale.exp()),
        "bias": None if bias is None else float(bias),
    }
