"""`load_file`: all tensors of a `.safetensors` file, compressed or not."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .safe_open import safe_open


def load_file(
    filename: str | os.PathLike[str], device: str | int | torch.device = "cpu", verify: str = "full"
) -> dict[str, Tensor]:
    """name -> tensor, bit for bit as they were saved; mirrors `safetensors.torch.load_file` and reads ordinary files too.

    Tensors that are stored once are separate copies here, as from an ordinary file.

    Args:
        filename: the file.
        device: where the tensors are to be; blobs are decoded there.
        verify: "full" checks every number that is loaded against its checksum, "header" only headers and index, "off" nothing
            but sizes and offsets.

    Raises:
        CorruptError: damage, with the tensor and the block; nothing is returned then.
        FormatError, ValueError, OSError, ImportError: as `safe_open`.
    """
    tensors: dict[str, Tensor] = {}
    with safe_open(filename, device=device, verify=verify) as file:
        for name in file.keys():
            entry = file.entry(name)
            twin = None if entry is None else entry.same_as
            tensors[name] = tensors[twin].clone() if twin in tensors else file.get_tensor(name)
    return tensors
