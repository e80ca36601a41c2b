"""A prefix beside `transformers`: the same keys and values handed to its models as a cache, positions told from the
text's own first token. Hidden states and the gradient of the prefix, at the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from diptych import checkpoints
from diptych.models.language import TextModel
from diptych.models.prefix import Prefix, prefixed
from tests.parity.test_peers import FORWARD, GRADIENTS, batch, distance, redraw, text_peers

LENGTH = 4
PEERS: dict[str, Any] = {
    name: peer
    for name, peer in text_peers().items()
    if name in {"gpt2", "gpt2, unscaled", "bert, decoder with cross-attention", "roberta, decoder with cross-attention"}
}


def handed_over(theirs: nn.Module, prefix: Prefix, ids: Tensor, mask: Tensor, first: int, pictures: Tensor | None):
    """Their states (B, T, D), from a cache that begins with the prefix."""
    past = prefix(len(ids), next(theirs.parameters()).dtype)
    cache = DynamicCache()
    for i, pair in enumerate(past.kv):
        cache.update(*pair, i)
    if pictures is not None:
        from transformers import EncoderDecoderCache

        cache = EncoderDecoderCache(cache, DynamicCache())
    seen = torch.cat([mask.new_ones((len(ids), LENGTH)), mask], 1)
    places = (mask.cumsum(1) * mask - 1 + first).clamp(min=0)
    extra = {} if pictures is None else {"encoder_hidden_states": pictures}
    out = theirs(
        input_ids=ids, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True, **extra
    )
    return out.last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PEERS)
def test_a_prefix_is_a_cache_that_they_are_handed(name, dtype, tmp_path):
    peer = PEERS[name]
    torch.manual_seed(0)
    theirs = peer.build().to(dtype).eval()
    redraw(theirs)
    theirs.save_pretrained(tmp_path)
    config = peer.config(theirs.config)
    ours = TextModel(config).to(dtype).eval()
    checkpoints.load(ours, tmp_path, peer.table(config))
    draw = torch.Generator().manual_seed(3)
    prefix = Prefix(ours.stack, LENGTH).to(dtype)
    with torch.no_grad():
        prefix.tokens.copy_(torch.randn(prefix.tokens.shape, generator=draw, dtype=torch.float64))
    ids, mask = batch()
    pictures = torch.randn((3, 5, 24), generator=draw, dtype=torch.float64).to(dtype) if peer.cross else None
    memory = None if pictures is None else ours.stack.project(pictures)
    plain = ours(ids, mask, memory)
    mine = prefixed(ours, prefix)(ids, mask, memory)
    wanted = handed_over(theirs, prefix, ids, mask, config.count_from or 0, pictures)
    real = mask.bool()
    assert distance(mine, wanted, real) < FORWARD[dtype]
    assert distance(plain, wanted, real) > 1e-2
    if dtype == torch.float64:
        gradients = [torch.autograd.grad(states[real].sin().sum(), prefix.tokens)[0] for states in (mine, wanted)]
        assert distance(*gradients) < GRADIENTS
