"""Whether a request fits the model and itself; what else it needs, memory, is the scheduler's."""

from model.config import VL01Config
from model.inputs.tiling import choose_layout
from schemas.requests import Request


def check_request(request: Request, model: VL01Config) -> None:
    """Raises ValueError: no tokens, an id that no token has, or an image with another number of
    image tokens or tiles than its size asks for."""
    vocab_size = model.text.vocab_size
    if not len(request.token_ids):
        raise ValueError(f"request {request.id} has no tokens; expected at least one")
    # ON_DEVICE is one of them: it would stand for a token of another request.
    unknown = request.token_ids[(request.token_ids < 0) | (request.token_ids >= vocab_size)]
    if len(unknown):
        raise ValueError(
            f"request {request.id} has the token id {unknown[0]}; expected 0 to {vocab_size - 1}"
        )
    tokens = int((request.token_ids == model.image_token_id).sum())
    tiles = 0 if request.tiles is None else len(request.tiles)
    expected_tokens = expected_tiles = 0
    if request.tiles is not None or request.image_size is not None:
        if request.image_size is None or request.tiles is None:
            raise ValueError(f"request {request.id} has tiles or an image size; expected both")
        vision = model.vision
        layout = choose_layout(
            *request.image_size, model.pinpoints, vision.image_size, vision.patch_size
        )
        expected_tokens, expected_tiles = layout.tokens, layout.tiles
    if (tokens, tiles) != (expected_tokens, expected_tiles):
        raise ValueError(
            f"request {request.id} has {tokens} image tokens and {tiles} tiles; an image of size "
            f"{request.image_size} has {expected_tokens} and {expected_tiles}"
        )
