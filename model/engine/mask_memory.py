"""Where masks wait on the host for their way to a device. Knows not what they allow.

C masks of W words of 32 bits.
"""

import numpy as np
import torch

from model.engine.sampling import Masks, MasksOnDevice
from model.layers.ragged import aligned


class MaskMemory:
    """Two buffers in turn: masks are written to one while those before may still be copied.

    For CUDA they are pinned, so that the host waits for no copy, and kept: to pin memory takes
    longer than to copy it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer, self._other = _Buffer(device), _Buffer(device)
        self._taken: np.ndarray | None = None

    def take(self, masks: int, words: int) -> np.ndarray:
        """int32 [C, W], to be filled and then handed to `upload` before others are taken."""
        self._buffer, self._other = self._other, self._buffer
        self._taken = self._buffer.room(masks, words)
        return self._taken

    def upload(self, masks: Masks) -> MasksOnDevice:
        """Without waiting. Masks that were not written to what was taken are copied there first."""
        if masks.bits_CW is not self._taken:
            self.take(*masks.bits_CW.shape)[...] = masks.bits_CW
        self._taken = None
        return self._buffer.upload(masks.rows, masks.bits_CW.shape)


class _Buffer:
    """The masks, then their rows, so that all go in one copy."""

    def __init__(self, device: torch.device) -> None:
        self._device, on_cuda = device, device.type == "cuda"
        self._copied = torch.cuda.Event() if on_cuda else None
        self._flat = torch.empty(0, dtype=torch.int32)

    def room(self, masks: int, words: int) -> np.ndarray:
        if self._copied:
            self._copied.synchronize()  # long since, as a rule
        size = aligned(masks * words) + masks
        if len(self._flat) < size:
            self._flat = torch.empty(size, dtype=torch.int32, pin_memory=self._copied is not None)
        return self._flat.numpy()[: masks * words].reshape(masks, words)

    def upload(self, rows: tuple[int, ...], shape: tuple[int, ...]) -> MasksOnDevice:
        masks, words = shape
        start = aligned(masks * words)
        self._flat.numpy()[start : start + masks] = rows
        packed = self._flat[: start + masks].to(self._device, non_blocking=True)
        if self._copied:
            self._copied.record()
        return MasksOnDevice(packed[start:], packed[: masks * words].view(masks, words))
