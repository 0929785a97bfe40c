"""The vision tower against transformers' CLIP, with the weights under their released names."""

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from model.config import load_config
from model.vision.tower import VisionTower
from model.weights.names import checkpoint_tensors


def clip_and_tower(checkpoint) -> tuple[CLIPVisionModel, VisionTower]:
    config = load_config(checkpoint)
    vision = config.vision
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act="gelu",
        )
    ).eval()
    state = {name: torch.randn_like(value) * 0.2 for name, value in clip.state_dict().items()}
    clip.load_state_dict(state)
    tower = VisionTower(vision, dtype=torch.float32, device="cpu")
    parameters = dict(tower.named_parameters())
    for entry in checkpoint_tensors(config, range(1)):
        if not entry.name.startswith("vision_tower."):
            continue
        rows = slice(entry.first_row, entry.first_row + entry.shape[0])
        theirs = state[entry.name.removeprefix("vision_tower.vision_model.")]
        parameters[entry.target.removeprefix("vision_tower.")].data[rows] = theirs
    return clip, tower


@torch.inference_mode()
def test_features_are_those_of_clips_last_encoder_layer(checkpoint):
    clip, tower = clip_and_tower(checkpoint)
    side = load_config(checkpoint).vision.image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = clip(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    features = tower(pixels.permute(0, 2, 3, 1))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_tile_does_not_see_the_other_tiles(checkpoint):
    _, tower = clip_and_tower(checkpoint)
    side = 56
    pixels = torch.randn(3, side, side, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(tower(pixels)[1:2], tower(pixels[1:2]))
