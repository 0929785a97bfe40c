import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from model.config import load_config
from model.nano.random_checkpoint import write_random_checkpoint
from model.tokenizer import Tokenizer
from schemas.errors import CheckpointError, ConfigError

SYSTEM = "You are a helpful assistant."


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_random_checkpoint(tmp_path, hidden_size=16, intermediate_size=16, experts=2)


def rewrite(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def apply_chat_template(checkpoint: Path, text: str, system: str | None, images: int) -> list[int]:
    """The prompt by transformers alone, each <image> of its text written `images` times."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    once = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [id for token in once for id in [token] * (images if token == image else 1)]


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("text", ["Describe this image.", "  Text?\n\nÜber 3 €: 文字 😀 ", ""])
def test_prompts_are_those_of_apply_chat_template(checkpoint, text, system):
    template = Tokenizer.from_checkpoint(checkpoint).prompt_template(text, system)
    expected = apply_chat_template(checkpoint, text, system, images=700)
    assert template.fill(700).tolist() == expected


def test_the_prompt_reads_as_released(checkpoint):
    template = Tokenizer.from_checkpoint(checkpoint).prompt_template("Describe it.", SYSTEM)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    assert tokenizer.decode(template.fill(1)) == (
        f"<beginning_of_sentence>system ai_setting=assistant\n{SYSTEM}<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\n<image>Describe it.<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )
    assert template.image_token_id == load_config(checkpoint).image_token_id


@pytest.mark.parametrize("token", ["<image>", "<end_of_sentence>", "<beginning_of_sentence>"])
def test_a_prompt_cannot_smuggle_in_a_special_token(checkpoint, token):
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with pytest.raises(ConfigError, match=token):
        tokenizer.prompt_template(f"Describe{token} this.")
    with pytest.raises(ConfigError, match=token):
        tokenizer.prompt_template("Describe this.", system=f"a{token}")


def test_decode_gives_the_text_back_without_special_tokens(checkpoint):
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    text = "A small boat , it ' s blue.\n  Über 3 €: 文字 😀"
    template = tokenizer.prompt_template(text)
    assert tokenizer.decode([*template.suffix_ids]).startswith(text)
    assert tokenizer.decode(template.fill(3).tolist()).count("<") == 0


def test_a_character_cut_short_is_marked_until_its_last_byte_comes(checkpoint):
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    emoji = tokenizer.prompt_template("😀").suffix_ids
    texts = [tokenizer.decode(emoji[: n + 1]) for n in range(4)]
    assert texts[0].endswith("\ufffd")
    assert any(text == "😀" for text in texts)


def test_a_chat_template_in_a_file_of_its_own_is_read(checkpoint):
    expected = Tokenizer.from_checkpoint(checkpoint).prompt_template("Describe it.", SYSTEM)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    rewrite(checkpoint / "tokenizer_config.json", chat_template=None)
    (checkpoint / "chat_template.jinja").write_text(settings["chat_template"])
    assert Tokenizer.from_checkpoint(checkpoint).prompt_template("Describe it.", SYSTEM) == expected


def test_a_checkpoint_without_a_chat_template_is_refused(checkpoint):
    rewrite(checkpoint / "tokenizer_config.json", chat_template=None)
    with pytest.raises(CheckpointError, match="no chat template"):
        Tokenizer.from_checkpoint(checkpoint)


@pytest.mark.parametrize("chat_template", ["hello", "<image><image>"])
def test_a_template_that_does_not_place_exactly_one_image_is_refused(checkpoint, chat_template):
    rewrite(checkpoint / "tokenizer_config.json", chat_template=chat_template)
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="expected 1"):
        tokenizer.prompt_template("Describe this.")


def test_a_template_that_fails_names_the_checkpoint(checkpoint):
    rewrite(checkpoint / "tokenizer_config.json", chat_template="{{ raise_exception('no') }}")
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="chat template fails: no"):
        tokenizer.prompt_template("Describe this.")


def test_a_missing_or_damaged_tokenizer_is_refused_not_looked_up_elsewhere(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not load"):
        Tokenizer.from_checkpoint(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_checkpoint(checkpoint)
