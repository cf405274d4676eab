"""Whole models: which layers are replaced, by what, and what remains of the one that was given."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from fastloss.quant import surrogates
from fastloss.quant.layers import (
    BinaryConv2d,
    BinaryLinear,
    BitLinear,
    PackedBinaryConv2d,
    PackedBinaryLinear,
    PackedLinear,
    QuantLinear,
    binarize_model,
    convert,
    model_nbytes,
    pack_model,
    set_surrogate,
)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Sequential(nn.Linear(8 * 16, 64), nn.Tanh()),
        nn.Linear(64, 64), nn.Linear(64, 10),
    )  # fmt: skip


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, BinaryLinear, BinaryConv2d))]


def test_binarize_and_pack() -> None:
    model, x = network(), torch.randn(2, 3, 8, 8)
    before = model(x)
    binary = binarize_model(model, scale="learned")
    assert kinds(binary) == [nn.Conv2d, BinaryConv2d, BinaryLinear, BinaryLinear, nn.Linear]
    assert torch.equal(model(x), before) and kinds(model) == [nn.Conv2d, nn.Conv2d, nn.Linear, nn.Linear, nn.Linear]
    assert torch.equal(binary[2].weight, model[2].weight) and binary[5].scaling == "learned"
    binary.eval()
    packed = pack_model(binary)
    assert [type(packed[i]) for i in (2, 5)] == [PackedBinaryConv2d, PackedBinaryLinear]
    assert isinstance(packed[4][0], PackedBinaryLinear) and isinstance(binary[4][0], BinaryLinear)
    assert not packed.training and torch.equal(packed(x), binary(x))
    assert model_nbytes(packed) < model_nbytes(binary) / 3
    other = pack_model(binarize_model(network(), scale="learned"))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(x), packed(x))


def test_skip() -> None:
    everything = convert(network(), BinaryLinear, BinaryConv2d)
    assert kinds(everything) == [BinaryConv2d, BinaryConv2d, BinaryLinear, BinaryLinear, BinaryLinear]
    named = convert(network(), BinaryLinear, BinaryConv2d, skip=("2", "4.*"))
    assert kinds(named) == [BinaryConv2d, nn.Conv2d, nn.Linear, BinaryLinear, BinaryLinear]
    assert kinds(convert(network(), skip="6")) == [nn.Conv2d, nn.Conv2d, BinaryLinear, BinaryLinear, nn.Linear]
    small = convert(network(), skip=lambda name, module: getattr(module, "out_features", 0) < 20)
    assert kinds(small)[-1] is nn.Linear
    assert kinds(binarize_model(network(), keep_ends=False, skip="5"))[3] is nn.Linear


def test_other_layers() -> None:
    made = convert(network(), BitLinear, linear_options={"norm": True})
    assert isinstance(made[5], BitLinear) and made[5].norm is not None
    made = convert(network(), functools.partial(QuantLinear.from_float, weight_bits=2))
    assert isinstance(made[6], QuantLinear) and made[6].weight_bits == 2
    made(torch.randn(2, 3, 8, 8))
    assert isinstance(pack_model(made)[6], PackedLinear)
    made = convert(network(), None, BinaryConv2d, conv2d_options={"padding_mode": "ones"})
    assert isinstance(made[6], nn.Linear) and made[0].padding_mode == "ones"
    assert isinstance(convert(nn.Linear(3, 2)), BinaryLinear)


def test_shared_layers_stay_shared() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Sequential(layer)})
    made = convert(model)
    assert isinstance(made["a"], BinaryLinear) and made["a"] is made["b"] is made["c"][0]
    assert pack_model(made)["a"] is not made["a"]


def test_inplace_and_subclasses() -> None:
    model = network()
    assert convert(model, inplace=True) is model and isinstance(model[5], BinaryLinear)
    assert pack_model(model, inplace=True) is model and isinstance(model[5], PackedBinaryLinear)
    attention = nn.MultiheadAttention(8, 2)  # reads out_proj.weight itself
    assert type(convert(attention).out_proj) is type(attention.out_proj)


def test_set_surrogate() -> None:
    model = binarize_model(network())
    set_surrogate(model, inputs=surrogates.reste(2.0))
    assert model[2].input_surrogate == model[5].input_surrogate == surrogates.reste(2.0)
    assert model[5].weight_surrogate == surrogates.clip()
    set_surrogate(model, weights="identity")
    assert model[5].weight_surrogate == surrogates.identity() and model[5].input_surrogate == surrogates.reste(2.0)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="model must be"):
        convert(torch.randn(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be one of"):
        binarize_model(network(), scale="rows")
