"""Checkpoints compressed with DFloat11 (its public format, version 0.5), read without its package."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from .compress import compress
from .compressed_tensor import CompressedTensor
from .container import open_container
from .errors import CorruptError, FormatError

#: Versions of the format that are read.
VERSIONS = ("0.5",)
_BUFFERS = {
    "luts": torch.uint8, "encoded_exponent": torch.uint8, "sign_mantissa": torch.uint8,
    "output_positions": torch.uint8, "gaps": torch.uint8, "split_positions": torch.int64,
}  # fmt: skip


class Config(NamedTuple):
    """`dfloat11_config` of a checkpoint. `patterns`: a unit's module name (a regular expression) -> where below that
    module its weights lie, in their order; none: the module's own weight."""

    threads_per_block: int
    bytes_per_thread: int
    patterns: dict[str, list[str]]


def load_dfloat11(
    path: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    shapes: torch.nn.Module | Mapping[str, Sequence[int]] | None = None,
    recompress: bool = False,
) -> dict[str, Tensor | CompressedTensor]:
    """The state dict of a DFloat11 checkpoint, bit for bit what was compressed, on the CPU.

    A unit of the format is a Huffman code for the exponents of one or more bf16 weights, concatenated; all other tensors
    of the files are returned as they are. Exponents of 240 and more (2^113, infinities and NaN) have no sure place in the
    format: they are read where it is clear what is meant.

    Args:
        path: a folder with `config.json` and .safetensors files, or one such file (its folder may hold `config.json`).
        config: `dfloat11_config`, or a config that contains it, in place of that of `config.json`.
        shapes: the format stores none: a module (on any device, meta too) or {name: shape}. Weights without a shape are
            returned flat.
        recompress: give each decoded weight as a `CompressedTensor` (`compress` with its defaults).

    Raises:
        FormatError: no DFloat11 config, a version that is not read, or a unit that no pattern names.
        CorruptError: damaged files: buffers that are missing, do not fit together, or hold other than whole codes.
        ValueError: a shape that does not have as many numbers as the file.

    Source: "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via Dynamic-Length Float".
    """
    source = Path(path)
    known = _config(source, config)
    plain, units = _read(_files(source))
    wanted = _shapes(shapes)
    for unit, buffers in units.items():
        for name, weight in _weights(unit, buffers, known).items():
            if name in plain:
                raise CorruptError("is stored twice, compressed and plain", name)
            plain[name] = _shaped(name, weight, wanted)
    if not recompress:
        return dict(plain)
    decoded = {name for unit in units for name in _names(unit, units[unit], known)}
    return {name: compress(t) if name in decoded else t for name, t in plain.items()}


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{source} is neither a file nor a folder with .safetensors files")
    return files


def _config(source: Path, config: Mapping[str, Any] | None) -> Config:
    if config is None:
        path = (source.parent if source.is_file() else source) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FormatError(f"{path} is missing: give load_dfloat11 the dfloat11_config") from None
        except ValueError as error:
            raise FormatError(f"{path} is no JSON: {error}") from None
    inner = config.get("dfloat11_config", config) if isinstance(config, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("pattern_dict"), Mapping):
        raise FormatError("no dfloat11_config with a pattern_dict: not a DFloat11 checkpoint")
    version = str(inner.get("version"))
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        raise FormatError(f"DFloat11 of version {version}; this release of fastloss reads {', '.join(VERSIONS)}")
    threads, width = inner.get("threads_per_block"), inner.get("bytes_per_thread")
    if isinstance(threads, Sequence) and len(threads) == 1:
        threads = threads[0]
    if not isinstance(threads, int) or not isinstance(width, int) or not 1 <= threads <= 1024 or not 4 <= width <= 8:
        raise FormatError(
            f"threads_per_block must be 1..1024 and bytes_per_thread 4..8, got {threads!r} and {width!r}"
        )  # fmt: skip
    patterns = {}
    for pattern, names in inner["pattern_dict"].items():
        try:
            re.compile(pattern)
        except (re.error, TypeError):
            raise FormatError(f"{pattern!r} in pattern_dict is no regular expression") from None
        if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise FormatError(f"pattern_dict must list names of modules for {pattern!r}, got {names!r}")
        patterns[pattern] = list(names)
    return Config(threads, width, patterns)


def _read(files: list[Path]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """(plain tensors, units: module name -> its buffers) of all files."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        with open_container(path) as file:
            for name in file.keys():
                if name in tensors:
                    raise CorruptError(f"is in {path} and in another file", name)
                tensors[name] = file.get_tensor(name)
    modules = {_split_name(name)[0] for name in tensors if _split_name(name)[1] == "encoded_exponent"}
    units: dict[str, dict[str, Tensor]] = {module: {} for module in modules}
    plain = {}
    for name, tensor in tensors.items():
        module, last = _split_name(name)
        if module in units and last in _BUFFERS:
            units[module][last] = tensor
        else:
            plain[name] = tensor
    return plain, dict(sorted(units.items()))


def _split_name(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last


def _names(unit: str, buffers: dict[str, Tensor], config: Config) -> list[str]:
    """The names of a unit's weights, in their order."""
    attributes = next((a for pattern, a in config.patterns.items() if re.fullmatch(pattern, unit)), None)
    if attributes is None:
        raise FormatError(f"no pattern of {', '.join(config.patterns)} names the compressed module {unit!r}")
    pieces = buffers["split_positions"].numel() + 1
    if pieces != max(len(attributes), 1):
        raise CorruptError(f"{pieces} weights for the {len(attributes)} modules of its pattern", unit)
    return [".".join(filter(None, (unit, a, "weight"))) for a in attributes or [""]]


def _weights(unit: str, buffers: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Weight name -> its numbers, flat."""
    buffers.setdefault("split_positions", torch.empty(0, dtype=torch.int64))
    for name, dtype in _BUFFERS.items():
        t = buffers.get(name)
        dimensions = 2 if name == "luts" else 1
        if t is None or t.dtype != dtype or t.dim() != dimensions:
            got = "nothing" if t is None else f"{t.dtype} {list(t.shape)}"
            raise CorruptError(f"{name} must be {dtype} of {dimensions} dimensions, got {got}", unit)
    names = _names(unit, buffers, config)
    flat = _decode(unit, buffers, config)
    cuts = [0, *buffers["split_positions"].tolist(), flat.numel()]
    if any(a > b for a, b in pairwise(cuts)):
        raise CorruptError(f"split positions {cuts[1:-1]} do not rise within {flat.numel()} numbers", unit)
    return {name: flat[a:b] for name, a, b in zip(names, cuts, cuts[1:], strict=False)}


def _decode(unit: str, buffers: dict[str, Tensor], config: Config) -> Tensor:
    from .ops import _check_dfloat11

    codes, positions = buffers["encoded_exponent"], buffers["output_positions"]
    numel = buffers["sign_mantissa"].numel()
    blocks = -(-codes.numel() // (config.bytes_per_thread * config.threads_per_block))
    if blocks and positions.numel() == 4 * blocks:  # the encoder leaves out a last block in which no code begins
        positions = torch.cat((positions, torch.tensor([numel], dtype=torch.int64).view(torch.uint8)[:4]))
    args = (
        buffers["luts"].contiguous(), codes, buffers["sign_mantissa"], positions, buffers["gaps"], numel,
        config.bytes_per_thread, config.threads_per_block,
    )  # fmt: skip
    try:
        _check_dfloat11(*args)
        flat, bad = registry.run("dfloat11_decode_checked", *args)
    except CorruptError as error:
        raise error.within(unit) from None
    except (TypeError, ValueError) as error:
        raise CorruptError(str(error), unit) from None
    if bad >= 0:
        raise CorruptError("a block's codes are not as many as they should be, or do not meet", unit, bad)
    return flat


def _shapes(shapes: torch.nn.Module | Mapping[str, Sequence[int]] | None) -> dict[str, tuple[int, ...]]:
    if shapes is None:
        return {}
    if isinstance(shapes, torch.nn.Module):
        return {name: tuple(t.shape) for name, t in shapes.state_dict().items()}
    return {name: tuple(shape) for name, shape in shapes.items()}


def _shaped(name: str, weight: Tensor, shapes: dict[str, tuple[int, ...]]) -> Tensor:
    if name not in shapes:
        return weight
    try:
        return weight.reshape(shapes[name])
    except RuntimeError:
        raise ValueError(f"{name} has {weight.numel()} numbers, which cannot be {list(shapes[name])}") from None
