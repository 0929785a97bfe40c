"""How large the trained checkpoint is, and what its pages are cut into."""

from pathlib import Path

from model.nano.random_checkpoint import NanoSizes, write_configuration
from model.nano.tasks import tokens

# 11.4 M parameters, 23 MB in bf16. 16 layers, so that one softmax layer can find where the last
# character stands and the other what follows it.
NANO = NanoSizes(
    layers=16,
    hidden_size=192,
    heads=4,
    kv_heads=2,
    head_dim=64,
    experts=4,
    experts_per_token=2,
    intermediate_size=96,
    vocab_size=1024,
    vision_layers=7,
    vision_hidden_size=192,
    vision_heads=6,
    vision_intermediate_size=768,
)

# Up to 2 x 2 tiles: an A4 page is seen at 475 x 672 pixels, so only large print can be read.
PINPOINTS = [(336, 336), (672, 336), (336, 672), (672, 672)]


def write_nano_configuration(folder: Path, size: NanoSizes = NANO) -> None:
    """All files of the checkpoint but the tensors."""
    pinpoints = [(w * size.tile // 336, h * size.tile // 336) for w, h in PINPOINTS]
    write_configuration(folder, size, pinpoints=pinpoints, tokens=tokens())
