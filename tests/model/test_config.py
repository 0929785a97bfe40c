"""What a checkpoint says about itself: both spellings read, everything unknown refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.config import Residual, load_config
from schemas.errors import CheckpointError


@pytest.fixture
def edit(checkpoint, tmp_path):
    """A copy of the checkpoint's JSON files, and a way to change one of them."""
    for file in checkpoint.glob("*.json"):
        shutil.copy(file, tmp_path)

    def change(file: str, section: str | None = None, **values) -> Path:
        content = json.loads((tmp_path / file).read_text())
        target = content[section] if section else content
        for name, value in values.items():
            target[name] = value
            if value is ...:
                del target[name]
        (tmp_path / file).write_text(json.dumps(content))
        return tmp_path

    return change


def test_transformers_names_mean_the_same_as_the_released_ones(checkpoint, edit):
    released = load_config(checkpoint)
    parts = {"linear_attention": "linear_attn", "full_attention": "full_attn", "mlp": "mlp"}
    renamed: dict[str, Any] = {"attn_type_list": ..., "rotary_dim": ..., "rope_theta": ...}
    for theirs, ours in parts.items():
        for weight, value in (("alpha", 3.5565588200778455), ("beta", 1.0)):
            renamed[f"layernorm_{theirs}_{weight}"] = ...
            renamed[f"{ours}_{weight}_factor"] = value
    renamed["layer_types"] = ["linear_attention"] * 7 + ["full_attention"]
    renamed["rope_parameters"] = {"rope_theta": 1e7, "partial_rotary_factor": 0.5}
    folder = edit("config.json", "text_config", **renamed)
    assert load_config(folder) == released
    assert released.text.layer_types == ("lightning",) * 7 + ("softmax",)
    assert released.text.moe_residual == Residual(3.5565588200778455, 1.0)


@pytest.mark.parametrize(
    ("file", "section", "values", "message"),
    [
        ("config.json", None, {"model_type": "llava_next"}, "expected 'minimax_vl_01'"),
        ("config.json", None, {"model_type": ...}, "expected 'minimax_vl_01'"),
        ("config.json", None, {"vision_feature_layer": -2}, "vision_feature_layer"),
        ("config.json", None, {"image_token_index": ...}, "lacks image_token_index"),
        ("config.json", None, {"image_token_index": 640}, "image token 640 .* vocabulary of 640"),
        ("config.json", None, {"text_config": "x"}, "expected an object"),
        ("config.json", "text_config", {"hidden_size": ...}, "text_config lacks hidden_size"),
        ("config.json", "text_config", {"postnorm": False}, "postnorm = False"),
        ("config.json", "text_config", {"shared_intermediate_size": [512]}, "shared experts"),
        ("config.json", "text_config", {"attn_type_list": [0] * 7}, "7 attention types for 8"),
        ("config.json", "text_config", {"attn_type_list": [0] * 7 + [2]}, "among them 2"),
        ("config.json", "text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type"),
        ("config.json", "text_config", {"layernorm_mlp_alpha": ...}, "layernorm_mlp_alpha"),
        ("config.json", "text_config", {"num_key_value_heads": 3}, "4 heads over 3"),
        ("config.json", "vision_config", {"hidden_act": "quick_gelu"}, "'quick_gelu'"),
        ("config.json", "vision_config", {"hidden_act": ...}, "lacks hidden_act"),
        ("config.json", "vision_config", {"image_size": 57}, "no multiple"),
        ("preprocessor_config.json", None, {"image_mean": ...}, "lacks image_mean"),
        ("preprocessor_config.json", None, {"image_grid_pinpoints": [[56, 56]]}, "disagree"),
        ("generation_config.json", None, {"eos_token_id": ...}, "lacks eos_token_id"),
    ],
)
def test_what_is_not_vl01_is_refused_by_name(edit, file, section, values, message):
    with pytest.raises(CheckpointError, match=message):
        load_config(edit(file, section, **values))


def test_pinpoints_that_are_no_tiles_are_refused(edit):
    edit("config.json", image_grid_pinpoints=...)
    with pytest.raises(CheckpointError, match="no grid of 56 px tiles"):
        load_config(edit("preprocessor_config.json", image_grid_pinpoints=[[56, 100]]))


@pytest.mark.parametrize("in_config", [..., None, []])
def test_a_checkpoint_without_a_single_pinpoint_is_refused(edit, in_config):
    edit("config.json", image_grid_pinpoints=in_config)
    with pytest.raises(CheckpointError, match="lacks image_grid_pinpoints"):
        load_config(edit("preprocessor_config.json", image_grid_pinpoints=[]))


def test_the_pinpoints_of_the_preprocessor_count(edit):
    edit("config.json", image_grid_pinpoints=...)
    folder = edit("preprocessor_config.json", image_grid_pinpoints=[[112, 56], [56, 56]])
    assert load_config(folder).pinpoints == ((112, 56), (56, 56))


def test_text_may_end_with_more_than_one_token(edit):
    assert load_config(edit("generation_config.json", eos_token_id=[7, 9])).eos_token_ids == (7, 9)


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_file_is_named(edit, content):
    folder = edit("config.json")
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(folder)


def test_a_folder_that_is_no_checkpoint_says_what_was_expected(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="Expected the folder of a MiniMax-VL-01"):
            load_config(path)
