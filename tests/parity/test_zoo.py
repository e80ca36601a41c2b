"""Published dual encoders' figures against open_clip's and transformers' own configs, and counts of parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diptych.checkpoints import hf_clip, openclip
from diptych.errors import UserError
from diptych.models import zoo
from diptych.models.clip import ClipConfig, dual_encoder
from diptych.models.specs import spec_of_open_clip

THEIRS = {  # open_clip's model, and one of its sets of weights
    "clip-rn50": ("RN50-quickgelu", "openai"),
    "clip-rn101": ("RN101-quickgelu", "openai"),
    "clip-rn50x4": ("RN50x4-quickgelu", "openai"),
    "clip-rn50x16": ("RN50x16-quickgelu", "openai"),
    "clip-rn50x64": ("RN50x64-quickgelu", "openai"),
    "clip-vit-b-32": ("ViT-B-32-quickgelu", "openai"),
    "clip-vit-b-16": ("ViT-B-16-quickgelu", "openai"),
    "clip-vit-l-14": ("ViT-L-14-quickgelu", "openai"),
    "clip-vit-l-14-336": ("ViT-L-14-336-quickgelu", "openai"),
    "openclip-vit-b-32": ("ViT-B-32", "laion2b_s34b_b79k"),
    "openclip-vit-b-16": ("ViT-B-16", "laion2b_s34b_b88k"),
    "openclip-vit-h-14": ("ViT-H-14", "laion2b_s32b_b79k"),
    "openclip-vit-g-14": ("ViT-g-14", "laion2b_s34b_b88k"),
    "siglip-b-16": ("ViT-B-16-SigLIP", "webli"),
    "siglip-b-16-256": ("ViT-B-16-SigLIP-256", "webli"),
    "siglip-b-16-384": ("ViT-B-16-SigLIP-384", "webli"),
    "siglip-b-16-512": ("ViT-B-16-SigLIP-512", "webli"),
    "siglip-l-16-256": ("ViT-L-16-SigLIP-256", "webli"),
    "siglip-l-16-384": ("ViT-L-16-SigLIP-384", "webli"),
    "siglip-so400m-14": ("ViT-SO400M-14-SigLIP", "webli"),
    "siglip-so400m-14-384": ("ViT-SO400M-14-SigLIP-384", "webli"),
}


def test_every_name_is_compared():
    assert sorted(THEIRS) == sorted(zoo.names())


def with_tanh(config: ClipConfig) -> ClipConfig:
    """OpenCLIP's SigLIP has the exact GELU and CLIP's first scale, where its authors' and transformers' has the tanh's
    and 10."""
    image, text = (
        replace(tower, stack=replace(tower.stack, activation="gelu_tanh")) for tower in (config.image, config.text)
    )
    return replace(config, image=image, text=text, scale=10.0)


@pytest.mark.parametrize("name", THEIRS)
def test_configs_and_specs(name):
    import open_clip

    model, weights = THEIRS[name]
    theirs = openclip.config(open_clip.get_model_config(model))
    theirs = with_tanh(theirs) if name.startswith("siglip") else theirs
    assert replace(zoo.config(name), scale=1.0) == replace(theirs, scale=1.0)
    assert zoo.config(name).scale == pytest.approx(theirs.scale)
    published = open_clip.get_pretrained_cfg(model, weights)
    spec = spec_of_open_clip({"model_cfg": open_clip.get_model_config(model), "preprocess_cfg": published})
    assert zoo.spec(name) == spec


def test_siglip_is_as_transformers_has_it():
    from transformers import SiglipConfig

    assert zoo.config("siglip-b-16") == hf_clip.config(SiglipConfig())


@pytest.mark.parametrize("name", ["clip-rn50x4", "clip-vit-b-32", "openclip-vit-g-14", "siglip-so400m-14"])
def test_as_many_parameters_as_theirs(name):
    import open_clip

    with torch.device("meta"):
        ours, theirs = dual_encoder(zoo.config(name)), open_clip.create_model(THEIRS[name][0], device="meta")
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1] > 1e8


def test_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'clip-vit-b-32'"):
        zoo.config("ViT-B-32")
