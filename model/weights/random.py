"""Fills a Decoder with random weights on its device, for measuring: nothing is read."""

import math
import zlib

import torch
from torch import Tensor

from model.config import VL01Config
from model.decoder import Decoder
from model.layers.linear import Quantization

_INT8_DEVIATION = 127 / math.sqrt(3)  # of whole numbers from -127 to 127, all as likely


def random_decoder(
    config: VL01Config,
    span: range,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: Quantization = "int8",
    seed: int = 0,
) -> Decoder:
    """The layers in `span`: uniform int8 data, normal values for the rest.

    Every product is scaled by 1 / sqrt(inputs), so that activations stay near 1. The values of a
    parameter depend on its name and the seed alone, so that ranks hold what one rank would.
    """
    decoder = Decoder(config, span, dtype=dtype, device=device, quantization=quantization)
    generator = torch.Generator(device)
    parameters = dict(decoder.named_parameters())
    for name, parameter in parameters.items():
        generator.manual_seed(seed + zlib.crc32(name.encode()))
        if name.endswith("_scale"):
            inputs = parameters[name.removesuffix("_scale")].shape[-1]
            parameter.fill_(1 / (_INT8_DEVIATION * math.sqrt(inputs)))
        else:
            _fill(name, parameter, generator)
    return decoder


def _fill(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    if parameter.dtype == torch.int8:
        parameter.random_(-127, 128, generator=generator)
    elif "norm" in name and name.endswith("weight"):
        parameter.fill_(1)
    elif name.endswith("bias"):
        parameter.zero_()
    elif parameter.ndim == 1 or "embed" in name:
        parameter.normal_(generator=generator)
    else:
        parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
