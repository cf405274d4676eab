"""Layers over compressed weights are read, copied, saved and loaded like torch's, and compute the same bits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastloss import registry
from fastloss.lossless import (
    CompressedEmbedding,
    CompressedLinear,
    CompressedTensor,
    FormatError,
    compress,
)
from fastloss.lossless.layers import CompressedWeight
from lossless_layers import COLUMNS, DTYPES, ROWS, matrix, pair, same


def test_layer_reads_like_a_linear() -> None:
    dense, layer = pair(torch.bfloat16)
    same(layer.weight, dense.weight.detach())
    assert not layer.weight.requires_grad and layer.weight.device == dense.weight.device
    assert (layer.in_features, layer.out_features) == (COLUMNS, ROWS)
    assert "in_features=128, out_features=48, bias=True, mode=exact" in repr(layer) and "P7 of torch.bfloat16" in repr(
        layer
    )
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict", "dense state_dict", "assign"])
def test_layer_is_copied_and_saved_like_any_module(how: str) -> None:
    dense, layer = pair()
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        torch.manual_seed(9)
        other = CompressedLinear.from_linear(nn.Linear(COLUMNS, ROWS))
        given = dense.state_dict() if how == "dense state_dict" else layer.state_dict()
        kept = dict(given)
        assert str(other.load_state_dict(given, assign=how == "assign")) == "<All keys matched successfully>"
        assert given.keys() == kept.keys()
    same(other.weight, dense.weight.detach())
    x = torch.randn(2, COLUMNS)
    same(other(x), dense(x))
    if how not in ("assign",):
        assert other.blob.data_ptr() != layer.blob.data_ptr()


def test_loading_refuses_what_does_not_fit_and_keeps_what_it_had() -> None:
    dense, layer = pair()
    before = layer.blob.clone()
    damaged = layer.state_dict()
    damaged["compressed.blob"] = before.clone()
    damaged["compressed.blob"][300] ^= 1
    other_dtype = {**layer.state_dict(), "compressed.blob": compress(dense.weight.detach().half()).blob}
    narrow = CompressedLinear.from_linear(nn.Linear(64, ROWS)).state_dict()
    for state, message in (
        (damaged, "checksum"),
        (other_dtype, "assign=True"),
        (narrow, "holds shape"),
        ({**layer.state_dict(), "compressed.blob": torch.zeros(5, dtype=torch.uint8)}, "no room for a header"),
        ({"weight": torch.zeros(3, 4), "bias": dense.bias.detach()}, "size mismatch for weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state)
        assert torch.equal(layer.blob, before)
    same(layer.weight, dense.weight.detach())
    layer.load_state_dict(other_dtype, assign=True)
    assert layer.weight.dtype == torch.float16
    assert layer.load_state_dict({}, strict=False).missing_keys == ["bias", "compressed.blob"]


def test_assigning_a_weight_compresses_it() -> None:
    _, layer = pair()
    new = matrix(seed=5)
    layer.weight = new
    same(layer.weight, new)
    with pytest.raises(ValueError, match=r"shape \[48, 128\], got \[2, 3\]"):
        layer.weight = torch.zeros(2, 3)


def test_offloaded_blob_stays_where_it_is() -> None:
    dense, layer = pair(offload=True)
    x = torch.randn(3, COLUMNS)
    same(layer(x), dense(x))
    moved = layer.to("meta")
    assert moved.blob.device.type == "cpu" and moved.bias is not None and moved.bias.device.type == "meta"
    assert "offloaded" in repr(moved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_equals_the_dense_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Embedding(300, 40, padding_idx=0, dtype=dtype)
    layer = CompressedEmbedding.from_embedding(dense)
    for index in (
        torch.randint(300, (2, 5)),
        torch.tensor(7),
        torch.randint(300, (3,), dtype=torch.int32),
        torch.empty(0, 2).long(),
    ):
        same(layer(index), dense(index).detach())
    assert layer.padding_idx == 0 and "300, 40, padding_idx=0" in repr(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 4):
        index = torch.randint(300, (n, 3))
        same(compiled(index), dense(index).detach())
    with pytest.raises(IndexError, match="out of bounds"):
        layer(torch.tensor([300]))


def test_embedding_decodes_touched_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CompressedEmbedding.from_embedding(nn.Embedding(300, 40))

    def no(*_: Any) -> Tensor:
        raise RuntimeError("the whole table was decoded")

    for table in registry._kernels["lossless_decode"]:
        monkeypatch.setitem(registry._kernels["lossless_decode"], table, registry.Kernel(no, lambda *_: None))
    if (
        registry.choose("lossless_rows", layer.blob, layer.compressed.plan, torch.tensor([1]), torch.float32)
        != "reference"
    ):
        layer(torch.tensor([1, 2]))
    known = layer.compressed_weight
    assert (known.shape, known.dtype, known.device) == ((300, 40), torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="whole table"):
        layer.weight  # noqa: B018


def test_embedding_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"max_norm=1\.0"):
        CompressedEmbedding.from_embedding(nn.Embedding(10, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="layout='rows'"):
        CompressedEmbedding(compress(matrix(torch.bfloat16, 64), "p7", layout="tiles"))
    with pytest.raises(ValueError, match="padding_idx must be within 48 rows, got 48"):
        CompressedEmbedding(compress(matrix()), padding_idx=48)
    with pytest.raises(TypeError, match="got Linear"):
        CompressedEmbedding.from_embedding(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Embedding"):
        CompressedLinear.from_linear(nn.Embedding(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got Tensor"):
        CompressedLinear(torch.zeros(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bias must be \[48\], got \[3\]"):
        CompressedLinear(compress(matrix()), torch.zeros(3))
    with pytest.raises(ValueError, match="a layer's weight is a matrix"):
        CompressedWeight(compress(torch.randn(5)))
    with pytest.raises(FormatError):
        CompressedTensor(torch.zeros(500, dtype=torch.uint8))
