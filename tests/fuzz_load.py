"""Coverage-guided fuzzing of everything that reads compressed bytes. Not part of the test run:

    pip install atheris
    mkdir -p /tmp/corpus && PYTHONPATH=tests python tests/fuzz_load.py --seed /tmp/corpus     # whole files to begin with
    PYTHONPATH=tests python tests/fuzz_load.py /tmp/corpus -max_total_time=600 -rss_limit_mb=4096 -timeout=10

The first byte of an input chooses how it is read: as a file; as a file whose checksums of header and blobs are made right
first; as a blob, its checksums made right. Any error but CorruptError and FormatError, any crash or hang is a finding.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fastloss.lossless"]):
    import torch

    from fastloss.lossless import (
        CompressedTensor,
        CorruptError,
        FormatError,
        load_file,
        safe_open,
        save_file,
        verify_file,
    )
    from fastloss.lossless.container import canonical_checksum
    from fastloss.lossless.crc32c_table import of_bytes

from lossless_files import MIN_BYTES, USER, tensors

_FOLDER = tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
_PATH = Path(_FOLDER) / "x.safetensors"
_COUNTS = {"runs": 0, "opened": 0, "decoded": 0}


def mended_blob(blob: bytearray) -> bytearray:
    """The blob with the checksums that its header and sections ought to have."""
    if len(blob) < 32:
        return blob
    dimensions, count = blob[9], struct.unpack_from("<H", blob, 10)[0]
    size = 28 + 8 * dimensions + 24 * count
    if count > 23 or size + 4 > len(blob):
        return blob
    for at in range(28 + 8 * dimensions, size, 24):
        offset, length = struct.unpack_from("<QQ", blob, at + 8)
        if offset + length <= len(blob):
            struct.pack_into("<I", blob, at + 4, of_bytes(bytes(blob[offset : offset + length])))
    struct.pack_into("<I", blob, size, of_bytes(bytes(blob[:size])))
    return blob


def mended_file(data: bytearray) -> bytes:
    """The file with right checksums in its blobs and its header, as far as there is sense in them."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        for name, entry in header.items():
            if name != "__metadata__":
                low, high = (start + int(offset) for offset in entry["data_offsets"])
                if data[low : low + 4] == b"FLZ1":
                    data[low:high] = mended_blob(data[low:high])
        metadata = header["__metadata__"]
        stored = [(k, v["dtype"], v["shape"]) for k, v in header.items() if k != "__metadata__"]
        others = {k: v for k, v in metadata.items() if k != "fastloss.crc32c"}
        metadata["fastloss.crc32c"] = str(canonical_checksum(stored, others))
        head = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return bytes(data)
    return len(head).to_bytes(8, "little") + head + bytes(data[start:])


def read_file() -> None:
    """Everything that can be asked of a file."""
    for verify in ("off", "full"):
        with contextlib.suppress(CorruptError, FormatError), safe_open(_PATH, verify=verify) as file:
            _COUNTS["opened"] += 1
            file.metadata()
            for name in file.keys():
                with contextlib.suppress(CorruptError, FormatError):
                    file.get_tensor(name)
                    _COUNTS["decoded"] += 1
                with contextlib.suppress(CorruptError, FormatError):
                    part = file.get_slice(name)
                    if part.get_shape():
                        part[1:3]
    with contextlib.suppress(CorruptError, FormatError):
        load_file(_PATH, verify="header")
    with contextlib.suppress(CorruptError, FormatError):
        verify_file(_PATH)


def read_blob(data: bytearray) -> None:
    """Everything that can be asked of a blob."""
    with contextlib.suppress(CorruptError, FormatError):
        compressed = CompressedTensor(torch.frombuffer(data, dtype=torch.uint8))
        _COUNTS["opened"] += 1
        compressed.decompress(verify="off")
        _COUNTS["decoded"] += 1
        compressed.verify()


def test_one_input(data: bytes) -> None:
    """One input of the fuzzer."""
    _COUNTS["runs"] += 1
    if _COUNTS["runs"] % 1000 == 0:
        print(_COUNTS, file=sys.stderr, flush=True)
    if len(data) < 2:
        return
    kind, rest = data[0] % 3, bytearray(data[1:])
    if kind == 2:
        read_blob(mended_blob(rest))
        return
    _PATH.write_bytes(rest if kind == 0 else mended_file(rest))
    read_file()


def write_seeds(folder: Path) -> None:
    """Whole files and blobs, for each way of reading them."""
    for tier in ("storage", "fused"):
        save_file(tensors(), _PATH, USER, tier, min_bytes=MIN_BYTES)
        with safe_open(_PATH) as file:
            for name in file.keys():
                entry = file.entry(name)
                if entry is not None and entry.codec != "plain" and entry.same_as is None:
                    blob = file.get_compressed(name).blob.numpy().tobytes()
                    (folder / f"blob-{tier}-{name.replace(' ', '-')}").write_bytes(b"\2" + blob)
        small = {k: v for k, v in tensors().items() if k in ("w.bf16", "escapes", "ids", "tied")}
        save_file(small, _PATH, USER, tier, min_bytes=MIN_BYTES)
        for kind in (b"\0", b"\1"):
            (folder / f"file-{tier}-{kind[0]}").write_bytes(kind + _PATH.read_bytes())


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--seed"]:
        write_seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, test_one_input)
        atheris.Fuzz()
