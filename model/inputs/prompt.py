"""A job's prompt as token ids, with a place for the image. Knows no tokenizer and no pixels."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PromptTemplate:
    """The same prompt for every image: the ids before the image, and those after it."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    image_token_id: int

    def fill(self, image_tokens: int) -> np.ndarray:
        """int32 [T]: the prompt of an image with `image_tokens` features (`Layout.tokens`)."""
        image_ids = (self.image_token_id,) * image_tokens
        return np.array(self.prefix_ids + image_ids + self.suffix_ids, np.int32)
