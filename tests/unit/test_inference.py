"""A model in use gives the same whatever the batch: embeddings, matching, captions, retrieval."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diptych.core.config import StackConfig
from diptych.data.records import Record
from diptych.errors import UserError
from diptych.evaluate import gallery as galleries
from diptych.evaluate.gallery import Gallery
from diptych.evaluate.inference import PictureText
from diptych.generate import Search
from diptych.models.blip2 import Stage1Config, Stage1Model
from diptych.models.qformer import QFormerConfig
from diptych.models.vision import VisionConfig, VisionTransformer
from diptych.text.tokenizer import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(
    "a", "red", "blue", "green", "dog", "cat", "bird", "runs", "sits", "on", "the", "grass"
)]  # fmt: skip
TEXTS = ["a red dog", "the blue cat sits on the grass", "a bird", "the green bird runs", "red", "a cat on the dog"]


@pytest.fixture(scope="module")
def model() -> PictureText:
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_words(WORDS)
    tower = VisionTransformer(VisionConfig(StackConfig(16, 1, 2, 32), image_size=16, patch=4))
    stack = StackConfig(
        24, 2, 3, 48, norm="post", eps=1e-12, final_norm=False, cross_every=2, context_width=16, dropout=0.1
    )
    stage1 = Stage1Model(Stage1Config(QFormerConfig(stack, 4, tokenizer.size, 40), embed=8))
    with torch.no_grad():
        for parameter in stage1.parameters():  # far enough from zero for captions and scores to differ
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return PictureText(tower, stage1, tokenizer, max_tokens=16)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture(scope="module")
def gallery(model, pictures) -> Gallery:
    tokens = torch.cat([seen.tokens for seen in model.image_tokens(pictures)])
    records = [Record(f"/{i}.png", (TEXTS[i], TEXTS[-1 - i]), i, "") for i in range(len(pictures))]
    return Gallery.of(records, tokens)


def test_embeddings_do_not_depend_on_the_batch(model, pictures):
    whole = model.embed_images(pictures), model.embed_texts(TEXTS)
    torch.testing.assert_close(model.embed_images(pictures, batch=2), whole[0], rtol=0, atol=1e-6)
    for batch in (1, 4):
        torch.testing.assert_close(model.embed_texts(TEXTS, batch=batch), whole[1], rtol=0, atol=1e-6)
    one_by_one = torch.cat([model.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(one_by_one, whole[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(whole[0].norm(dim=-1), torch.ones(5, 4))


def test_matching_a_picture_agrees_with_matching_pairs(model, pictures, gallery):
    rows = torch.arange(5).repeat_interleave(len(TEXTS))
    pairs = model.match_rows(model.project(gallery.tokens), rows, TEXTS * 5).sigmoid().view(5, -1)
    for i, picture in enumerate(pictures):
        alone = model.match(picture, TEXTS)
        torch.testing.assert_close(torch.tensor([a["itm"] for a in alone]), pairs[i], rtol=0, atol=1e-5)
        cosines = model.similarity([picture], TEXTS)[0]
        torch.testing.assert_close(torch.tensor([a["itc"] for a in alone]), cosines, rtol=0, atol=1e-6)
    assert pairs.std() > 1e-3  # or anything would agree


def test_scores_of_a_picture_in_several_views_are_their_means(model, gallery):
    other = gallery.tokens.roll(1, 0)
    both = Gallery.of(gallery.records, torch.stack([gallery.tokens, other], 1).flatten(0, 1), views=2)
    apart = [gallery, Gallery.of(gallery.records, other)]
    scores = galleries.similarities(model, both)
    torch.testing.assert_close(scores, sum(galleries.similarities(model, one) for one in apart) / 2)
    rows = torch.tensor([4, 0, 2]), torch.tensor([1, 7, 3])
    wanted = sum(galleries.pair_scorer(model, one)(*rows) for one in apart) / 2
    torch.testing.assert_close(galleries.pair_scorer(model, both)(*rows), wanted, rtol=0, atol=1e-5)
    short = Search(max_length=6)
    assert galleries.captions(model, both, 3, short) == galleries.captions(model, gallery, 3, short)
    assert "5 pictures in 2 views each, ranked by ITC" in galleries.by_itc(scores, both, 0)["protocol"]


def test_the_likelihood_of_a_caption_is_that_of_its_words_one_by_one(model, gallery):
    rows = torch.arange(5).repeat_interleave(len(TEXTS))
    memory = model.project(gallery.tokens)
    together = model.likelihood_rows(memory, rows, TEXTS * 5)
    for row, text in zip(rows.tolist(), TEXTS * 5, strict=True):
        _, past = model.model.qformer.queries(model.project(gallery.tokens[row : row + 1]))
        ids, wanted = [model.tokenizer.start, *model.tokenizer.rows([text], 16)[0][1:]], 0.0
        for now, then in pairwise(ids):
            with torch.no_grad():
                wanted += float(model.model.step(past, torch.tensor([[now]])).log_softmax(-1)[0, then])
        assert together[0] == pytest.approx(wanted, abs=1e-4)
        together = together[1:]


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_do_not_depend_on_the_batch(model, pictures, beams):
    search = Search(beams=beams, max_length=10, min_length=3)
    together = model.caption(pictures, search=search)
    assert together == [said for picture in pictures for said in model.caption([picture], search=search)]
    assert together == model.caption(pictures, search=search, batch=2)
    assert len(set(together)) > 1


def test_re_ranking_every_pair_ranks_by_matching(model, gallery):
    scores = galleries.similarities(model, gallery)
    assert scores.shape == (5, 10)
    result, found = galleries.reranked(model, gallery, scores, 10, "itm")
    every = galleries.pair_scorer(model, gallery)(
        torch.arange(5).repeat_interleave(10), torch.arange(10).repeat(5)
    ).view(5, 10)
    torch.testing.assert_close(found.image_to_text, every, rtol=0, atol=1e-5)
    assert "re-ranked by ITM" in result["protocol"] and "ITC" in galleries.by_itc(scores, gallery)["protocol"]


def test_re_ranking_with_itc_over_its_temperature(model, gallery):
    """ITM's log odds correct the odds of ITC; an ITM that can tell nothing leaves ITC's order as it was."""
    scores = galleries.similarities(model, gallery)
    itm = galleries.reranked(model, gallery, scores, 10, "itm")[1].image_to_text
    result, found = galleries.reranked(model, gallery, scores, 10, "itm+itc/t")
    wanted = itm + scores / model.model.temperature.item()
    torch.testing.assert_close(found.image_to_text, wanted, rtol=0, atol=1e-4)
    assert "re-ranked by ITM+ITC/T" in result["protocol"]
    result, found = galleries.reranked(model, gallery, scores, 10, "itm+itc/t", itm_weight=0.4)
    torch.testing.assert_close(found.image_to_text, wanted - 0.6 * itm, rtol=0, atol=1e-4)
    assert "re-ranked by 0.4·ITM+ITC/T" in result["protocol"]
    head = model.model.matching_head
    with patch.object(head, "weight", nn.Parameter(torch.zeros_like(head.weight))):
        blind = galleries.reranked(model, gallery, scores, 3, "itm+itc/t")[1]
    assert torch.equal(blind.image_to_text.argsort(1, descending=True), scores.argsort(1, descending=True))


def test_a_caption_longer_than_the_model_knows_is_said(model, pictures):
    with pytest.raises(UserError, match="positions"):
        model.caption(pictures[:1], search=Search(max_length=100, min_length=90))
