"""Our one stack against living peers: tiny random models of `transformers` and `timm`, loaded through their key tables.

Each peer is written by its own `save_pretrained` and read back by `checkpoints.load`, with every parameter drawn anew
so that nothing hides behind zeros and ones. In float64 every hidden state agrees to 1e-9 and every gradient to 1e-8 of
the tensor's largest magnitude, in float32 hidden states to 1e-5; rows of padding are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych import checkpoints
from diptych.checkpoints import hf, hf_blip2
from diptych.checkpoints import timm as timm_tables
from diptych.core.memory import Past
from diptych.core.surgery import capture
from diptych.models.blip2 import Stage1Model
from diptych.models.language import TextConfig, TextModel
from diptych.models.vision import VisionTransformer

FORWARD = {torch.float64: 1e-9, torch.float32: 1e-5}
GRADIENTS = 1e-8
VOCAB, POSITIONS, PAD = 29, 24, 1
BERT_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": POSITIONS, "pad_token_id": PAD,
}  # fmt: skip
IMAGE_SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
SPECIAL = {"bos_token_id": 2, "eos_token_id": 3}


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Every parameter anew: scales about one, all else about zero, and large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            about = 1.0 if parameter.dim() == 1 and parameter.mean() > 0.5 else 0.0
            parameter.copy_(about + noise)


def distance(ours: Tensor, theirs: Tensor, rows: Tensor | None = None) -> float:
    """Largest difference, relative to the largest magnitude of theirs; `rows` picks what is compared."""
    if rows is not None:
        ours, theirs = ours[rows], theirs[rows]
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@dataclass
class TextPeer:
    """A peer with a text side.

    words: its module of word embeddings. arguments: what its forward is also given. context: width of what it looks
    at. masks_context: whether it heeds the mask over that, which gets lost on the way in `transformers`' BLIP (5.23).
    """

    build: Callable[[], nn.Module]
    config: Callable[[Any], TextConfig]
    table: Callable[[TextConfig], Any]
    words: str
    cross: bool = False
    causal: bool = False
    left_padding: bool = False
    arguments: dict[str, Any] | None = None
    context: int = 24
    masks_context: bool = True


def text_peers() -> dict[str, TextPeer]:
    import transformers as t
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    blip = partial(t.BlipTextConfig, **BERT_SIZES, sep_token_id=3, encoder_hidden_size=20, label_smoothing=0.0)
    words = "embeddings.word_embeddings"
    decoder = {"is_decoder": True, "add_cross_attention": True}
    gpt = partial(t.GPT2Config, vocab_size=VOCAB, n_positions=POSITIONS, n_embd=24, n_layer=3, n_head=3, **SPECIAL)
    clip = partial(t.CLIPTextConfig, **{**BERT_SIZES, "eos_token_id": 3, "bos_token_id": 2})
    no_pooler = {"add_pooling_layer": False}
    return {
        "bert": TextPeer(lambda: t.BertModel(t.BertConfig(**BERT_SIZES)), hf.bert_config, hf.bert, words),
        "bert, decoder with cross-attention": TextPeer(
            lambda: t.BertModel(t.BertConfig(**BERT_SIZES, **decoder), **no_pooler),
            hf.bert_config, hf.bert, words, cross=True, causal=True,
        ),
        "roberta": TextPeer(
            lambda: t.RobertaModel(t.RobertaConfig(**BERT_SIZES, type_vocab_size=1)),
            hf.roberta_config, hf.roberta, words,
        ),
        "roberta, decoder with cross-attention": TextPeer(
            lambda: t.RobertaModel(t.RobertaConfig(**BERT_SIZES, **decoder), **no_pooler),
            hf.roberta_config, hf.roberta, words, cross=True, causal=True,
        ),
        "gpt2": TextPeer(
            lambda: t.GPT2Model(gpt()), hf.gpt2_config, hf.gpt2, "wte", causal=True, left_padding=True
        ),
        "gpt2, unscaled": TextPeer(
            lambda: t.GPT2Model(gpt(scale_attn_weights=False, activation_function="relu", n_inner=40)),
            hf.gpt2_config, hf.gpt2, "wte", causal=True,
        ),
        "gpt2, scaled by depth, upcast": TextPeer(
            lambda: t.GPT2Model(
                gpt(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True, add_cross_attention=True)
            ),
            hf.gpt2_config, hf.gpt2, "wte", cross=True, causal=True, left_padding=True,
        ),
        "gpt2, cross-attention": TextPeer(
            lambda: t.GPT2Model(gpt(add_cross_attention=True)), hf.gpt2_config, hf.gpt2, "wte", cross=True, causal=True
        ),
        "clip text": TextPeer(
            lambda: t.CLIPTextModel(clip()), hf.clip_text_config, hf.clip_text, "embeddings.token_embedding",
            causal=True,
        ),
        "blip text, encoder": TextPeer(
            lambda: BlipTextModel(blip()), hf.blip_text_config, hf.blip_text, words, cross=True,
            arguments={"is_decoder": False}, context=20, masks_context=False,
        ),
        "blip text, decoder": TextPeer(
            lambda: BlipTextModel(blip()), hf.blip_text_config, hf.blip_text, words, cross=True, causal=True,
            arguments={"is_decoder": True}, context=20, masks_context=False,
        ),
    }  # fmt: skip


PEERS = text_peers()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Callable[[str], tuple[nn.Module, TextModel, list[str]]]:
    """Name → (theirs, ours, notes), ours filled from theirs' own file through the table, float64."""
    made: dict[str, tuple[nn.Module, TextModel, list[str]]] = {}

    def pair(name: str) -> tuple[nn.Module, TextModel, list[str]]:
        if name not in made:
            peer = PEERS[name]
            torch.manual_seed(0)
            theirs = peer.build().double().eval()
            redraw(theirs)
            folder = tmp_path_factory.mktemp("peer")
            theirs.save_pretrained(folder)
            config = peer.config(theirs.config)
            ours = TextModel(config).double().eval()
            made[name] = theirs, ours, checkpoints.load(ours, folder, peer.table(config))
        return made[name]

    return pair


def batch(left: bool = False) -> tuple[Tensor, Tensor]:
    """(3, 9) ids without the pad id, where none is meant, and their mask: rows of 9, 6 and 2 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCAB, (3, 9), generator=generator)
    places = torch.arange(9)[None]
    lengths = torch.tensor([9, 6, 2])[:, None]
    mask = (places >= 9 - lengths if left else places < lengths).long()
    return torch.where(mask.bool(), ids, PAD), mask


def context_of(peer: TextPeer, dtype: torch.dtype) -> dict[str, Tensor]:
    """(3, 5, context width) to look at, with padding; what `transformers` calls it."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn((3, 5, peer.context), generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask if peer.masks_context else torch.ones_like(mask),
    }


def peer_positions(mask: Tensor) -> dict[str, Tensor]:
    """GPT-2 is told where its tokens stand, as its own `generate` does."""
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def run_theirs(model: nn.Module, peer: TextPeer, ids: Tensor, mask: Tensor, left: bool, more: dict) -> tuple:
    """Hidden states, input and every layer's, and the output; and the word embeddings looked up, for their gradient."""
    looked_up: list[Tensor] = []

    def keep(module, inputs, output):
        output.retain_grad()
        looked_up.append(output)

    hook = model.get_submodule(peer.words).register_forward_hook(keep)
    more = {**more, **(peer_positions(mask) if left else {}), **(peer.arguments or {})}
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **more)
    hook.remove()
    return out, looked_up[0]


def run_ours(model: TextModel, peer: TextPeer, ids: Tensor, mask: Tensor, more: dict) -> tuple:
    looked_up: list[Tensor] = []

    def keep(module, inputs, output):
        output.retain_grad()
        looked_up.append(output)

    hook = model.embeddings.word.register_forward_hook(keep)
    memory = None
    if more:
        memory = model.stack.project(more["encoder_hidden_states"], more["encoder_attention_mask"])
    with capture(model.stack) as states:
        out = model(ids, mask, memory, is_causal=peer.causal)
    hook.remove()
    return out, states, looked_up[0]


CASES = [
    pytest.param(name, left, cross, id=f"{name}, {'left' if left else 'right'} padding{', looking' if cross else ''}")
    for name, peer in PEERS.items()
    for left in ((False, True) if peer.left_padding else (False,))
    for cross in ((False, True) if peer.cross else (False,))
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "left", "cross"), CASES)
def test_text_peer(pairs, name, left, cross, dtype):
    (theirs, ours, _), peer = pairs(name), PEERS[name]
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    ids, mask = batch(left)
    more = context_of(peer, dtype) if cross else {}
    inputs = [{**more}, {**more}]
    if cross:
        for side in inputs:
            side["encoder_hidden_states"] = more["encoder_hidden_states"].clone().requires_grad_()
    try:
        out, words = run_theirs(theirs, peer, ids, mask, left, inputs[0])
        mine, states, my_words = run_ours(ours, peer, ids, mask, inputs[1])
        real, within = mask.bool(), FORWARD[dtype]
        assert distance(mine, out.last_hidden_state, real) < within
        hidden = out.hidden_states
        assert len(states) == len(hidden) == ours.config.stack.layers + 1
        # GPT-2 records the last norm's output in place of the last block's
        last = ours.stack.norm(states[-1]) if name.startswith("gpt2") else states[-1]
        for i, state in enumerate([*states[:-1], last]):
            assert distance(state, hidden[i], real) < within, f"hidden state {i}"
        if dtype == torch.float64:
            weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3), dtype=dtype) * mask[..., None]
            (out.last_hidden_state * weights).sum().backward()
            (mine * weights).sum().backward()
            assert distance(my_words.grad, words.grad, real) < GRADIENTS
            if cross:
                assert distance(*(side["encoder_hidden_states"].grad for side in reversed(inputs))) < GRADIENTS
    finally:
        theirs.double(), ours.double()


PAST_CASES = [pytest.param(name, id=name) for name, peer in PEERS.items() if peer.causal]


@pytest.mark.parametrize("cuts", [(4,), (3, 8)], ids=["two pieces", "three pieces"])
@pytest.mark.parametrize("name", PAST_CASES)
def test_text_in_pieces_is_the_whole(pairs, name, cuts):
    """With `past`, padded on the left where the peer can be: hidden states, and gradients that flow through it."""
    (theirs, ours, _), peer = pairs(name), PEERS[name]
    ids, mask = batch(peer.left_padding)
    more = context_of(peer, torch.float64) if peer.cross else {}
    memory = ours.stack.project(*more.values()) if more else None
    out, words = run_theirs(theirs, peer, ids, mask, peer.left_padding, more)
    looked_up: list[Tensor] = []
    hook = ours.embeddings.word.register_forward_hook(lambda m, i, o: (o.retain_grad(), looked_up.append(o))[0])
    past, pieces = Past.empty(ours.config.stack.layers), []
    for start, stop in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        pieces.append(ours(ids[:, start:stop], mask[:, start:stop], memory, past, is_causal=True))
    hook.remove()
    mine, real = torch.cat(pieces, 1), mask.bool()
    assert past.length == ids.shape[1]
    assert distance(mine, out.last_hidden_state, real) < 1e-9
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3), dtype=mine.dtype) * mask[..., None]
    (out.last_hidden_state * weights).sum().backward()
    (mine * weights).sum().backward()
    assert distance(torch.cat([o.grad for o in looked_up], 1), words.grad, real) < GRADIENTS


CACHED = [pytest.param(n, id=n) for n, p in PEERS.items() if p.causal and n != "clip text"]


@pytest.mark.parametrize("name", CACHED)
def test_past_against_the_peers_own_cache(pairs, name):
    """Rows without padding: what BERT's and RoBERTa's caches make of a padded past is theirs alone."""
    (theirs, ours, _), peer = pairs(name), PEERS[name]
    ids, _ = batch()
    ids = torch.where(ids == PAD, 7, ids)
    more = context_of(peer, torch.float64) if peer.cross else {}
    memory = ours.stack.project(*more.values()) if more else None
    past, cache = Past.empty(ours.config.stack.layers), None
    with torch.no_grad():
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            out = theirs(
                input_ids=ids[:, start:stop], attention_mask=torch.ones(3, stop), past_key_values=cache, use_cache=True,
                **more, **(peer.arguments or {}),
            )  # fmt: skip
            cache = out.past_key_values
            mine = ours(ids[:, start:stop], None, memory, past, is_causal=True)
            assert distance(mine, out.last_hidden_state) < 1e-9


def image_peers() -> dict[str, tuple]:
    import timm
    import transformers as t

    tiny = {"img_size": 12, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    make = partial(timm.create_model, "vit_tiny_patch16_224", pretrained=False, **tiny)
    vit = partial(t.ViTConfig, **IMAGE_SIZES)
    return {
        "clip vision": (
            lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE_SIZES)), hf.clip_vision_config, hf.clip_vision
        ),
        "vit": (lambda: t.ViTModel(vit()), hf.vit_config, hf.vit),
        "vit without biases": (lambda: t.ViTModel(vit(qkv_bias=False)), hf.vit_config, hf.vit),
        "timm vit": (make, timm_tables.vit_config, timm_tables.vit),
        "timm vit, layer scale and patch norm": (
            partial(make, init_values=0.1, pre_norm=True), timm_tables.vit_config, timm_tables.vit
        ),
    }  # fmt: skip


IMAGE_PEERS = image_peers()


def stored(theirs: nn.Module, folder) -> Any:
    """The peer's own file."""
    if hasattr(theirs, "save_pretrained"):
        theirs.save_pretrained(folder)
        return folder
    torch.save(theirs.state_dict(), folder / "model.pth")
    return folder / "model.pth"


def image_states(theirs: nn.Module, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
    """The stack's input and every block's output, and what comes after the last norm, for the class token."""
    if hasattr(theirs, "config"):
        out = theirs(pixel_values=pixels, output_hidden_states=True)
        if type(theirs).__name__ == "CLIPVisionModel":
            return list(out.hidden_states), out.pooler_output
        return list(out.hidden_states), out.last_hidden_state[:, 0]
    states: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda m, i, o: states.append(o)) for b in theirs.blocks]
    hooks.append(theirs.blocks[0].register_forward_pre_hook(lambda m, i: states.append(i[0])))
    out = theirs.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    return states, out[:, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", IMAGE_PEERS)
def test_image_peer(name, dtype, tmp_path):
    build, configure, table = IMAGE_PEERS[name]
    theirs = build().double().eval()
    redraw(theirs)
    config = configure(theirs.config if hasattr(theirs, "config") else theirs)
    ours = VisionTransformer(config).double().eval()
    checkpoints.load(ours, stored(theirs, tmp_path), table(config))
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn((2, 3, 12, 12), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    states, first = image_states(theirs, inputs[0])
    with capture(ours.stack) as mine:
        tokens = ours(inputs[1])
    within = FORWARD[dtype]
    assert tokens.grid == (3, 3) and tokens.prefix == 1
    assert distance(tokens.tokens[:, 0], first) < within
    assert len(mine) == len(states) == 4
    for i, (ours_here, theirs_here) in enumerate(zip(mine, states, strict=True)):
        assert distance(ours_here, theirs_here) < within, f"hidden state {i}"
    if dtype == torch.float64:
        weights = torch.randn(first.shape, generator=generator, dtype=dtype)
        (first * weights).sum().backward()
        (tokens.tokens[:, 0] * weights).sum().backward()
        assert distance(inputs[1].grad, inputs[0].grad) < GRADIENTS


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    """(theirs, ours) of `Blip2ForImageTextRetrieval`, loaded from its own folder, float64."""
    import transformers as t

    config = t.Blip2Config(
        vision_config={**IMAGE_SIZES, "hidden_size": 20, "num_attention_heads": 2},
        qformer_config={**BERT_SIZES, "use_qformer_text_input": True},
        num_query_tokens=4,
        image_text_hidden_size=10,
    )
    theirs = t.Blip2ForImageTextRetrieval(config).double().eval()
    redraw(theirs)
    folder = tmp_path_factory.mktemp("blip2")
    theirs.save_pretrained(folder)
    vision, stage1 = hf_blip2.config(theirs.config)
    ours = nn.ModuleDict({"image_encoder": VisionTransformer(vision), "model": Stage1Model(stage1)}).double().eval()
    notes = checkpoints.load(ours, folder, hf_blip2.retrieval(vision, stage1))
    return theirs, ours, notes


def their_layers(theirs: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """A list that fills with the Q-Former's embeddings and layers' outputs as it runs, and the hooks to take off."""
    states: list[Tensor] = []
    layers = theirs.qformer.encoder.layer
    hooks = [layers[0].register_forward_pre_hook(lambda m, i: states.append(i[0]))]
    hooks += [layer.register_forward_hook(lambda m, i, o: states.append(o)) for layer in layers]
    return states, hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("way", ["queries and text apart", "queries and text together"])
def test_qformer(blip2, way, dtype):
    """The Q-Former's three ways through, with the tower before it and the heads behind."""
    theirs, ours, notes = blip2
    assert any("temperature" in note for note in notes) and any("LM head" in note for note in notes)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    ids, mask = batch()
    generator = torch.Generator().manual_seed(1)
    pixels = [torch.randn((3, 3, 12, 12), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()]
    pixels.append(pixels[0].detach().clone().requires_grad_())
    together, model = way.endswith("together"), ours["model"]
    try:
        states, hooks = their_layers(theirs)
        out = theirs(pixel_values=pixels[0], input_ids=ids, attention_mask=mask, use_image_text_matching_head=together)
        for hook in hooks:
            hook.remove()
        memory = model.project(ours["image_encoder"](pixels[1]).tokens)
        with capture(model.qformer.stack) as mine:
            if together:
                scores = model.match(memory, ids, mask)
            else:
                pictures = model.embed_pictures(model.qformer.queries(memory)[0])
                scores = (pictures @ model.embed_texts(ids, mask).T).amax(1)
        within = FORWARD[dtype]
        assert distance(scores, out.logits_per_image) < within
        seen = torch.cat([mask.new_ones(3, 4), mask], 1).bool()
        assert len(mine) == len(states) == (4 if together else 8)
        for i, (ours_here, theirs_here) in enumerate(zip(mine, states, strict=True)):
            rows = seen if together else mask.bool() if i >= 4 else None
            assert distance(ours_here, theirs_here, rows) < within, f"hidden state {i}"
        if dtype == torch.float64:
            weights = torch.randn(scores.shape, generator=generator, dtype=dtype)
            (out.logits_per_image * weights).sum().backward()
            (scores * weights).sum().backward()
            assert distance(pixels[1].grad, pixels[0].grad) < GRADIENTS
    finally:
        theirs.double(), ours.double()
