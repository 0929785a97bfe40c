"""Text <-> token ids by the checkpoint's own tokenizer and chat template. Knows no torch.

Never runs a checkpoint's code; transformers renders the template in a
sandbox.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from model.config import (
    TOKENIZER_FILES,
    check_tokenizer_files,
    load_config,
    no_chat_template,
)
from model.files import Checkpoint, Folder
from model.inputs.prompt import PromptTemplate
from schemas.errors import CheckpointError, ConfigError, VL01Error


class Tokenizer:
    """The tokenizer of one checkpoint; `image_token_id` stands where the image goes."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, image_token_id: int, path: Folder
    ) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._path = path
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._reserved_ids = special | {image_token_id}

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and the chat template beside them.

        Raises CheckpointError when one is missing or damaged.
        """
        path = Folder.at(checkpoint)
        image_token_id = load_config(path).image_token_id
        check_tokenizer_files(path)
        try:
            with path.local_copy(TOKENIZER_FILES) as local:
                tokenizer = PreTrainedTokenizerFast.from_pretrained(local, local_files_only=True)
        except VL01Error:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path}: its tokenizer does not load: {error}") from error
        if not isinstance(tokenizer.chat_template, str):
            raise no_chat_template(path)
        return cls(tokenizer, image_token_id, path)

    def prompt_template(self, text: str, system: str | None = None) -> PromptTemplate:
        """The prompt that asks `text` of one image, rendered by the checkpoint's chat template.

        Raises ConfigError when `text` or `system` holds a special token, which would change what
        the model takes for the image or for the end of a turn; CheckpointError when the template
        cannot be rendered or does not place exactly one image.
        """
        for given in filter(None, (text, system)):
            self._refuse_special_tokens(given)
        ids = self._render(text, system)
        images = ids.count(self._image_token_id)
        if images != 1:
            raise CheckpointError(
                f"{self._path}: the chat template renders {images} image tokens "
                f"(id {self._image_token_id}) for a message with one image; expected 1."
            )
        at = ids.index(self._image_token_id)
        return PromptTemplate(tuple(ids[:at]), tuple(ids[at + 1 :]), self._image_token_id)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens; a character cut short shows as U+FFFD."""
        return self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def serialize(self) -> str:
        """The tokenizer as the text of a tokenizer.json, with what its other files add."""
        return self._tokenizer.backend_tokenizer.to_str()

    def _render(self, text: str, system: str | None) -> list[int]:
        content = [{"type": "image", "image": "placeholder"}, {"type": "text", "text": text}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        try:
            prompt = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program; it may raise anything
            raise CheckpointError(f"{self._path}: its chat template fails: {error}") from error
        return self._encode(str(prompt))

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _refuse_special_tokens(self, text: str) -> None:
        for token_id in self._encode(text):
            if token_id in self._reserved_ids:
                token = self._tokenizer.convert_ids_to_tokens(token_id)
                raise ConfigError(
                    f"The prompt contains {token!r}, a special token of this checkpoint; "
                    "write it in another way (the image is placed by itself)."
                )
