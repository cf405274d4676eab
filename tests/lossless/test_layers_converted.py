"""Compressed layers under what users do to layers: conversions of dtype, assigned weights, attributes of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastloss.lossless import CompressedLinear, compress_model, decompress_model

WIDTH, WORDS = 64, 96


class Model(nn.Module):
    """A head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.norm = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, index: Tensor) -> Tensor:
        hidden: Tensor = self.head(self.norm(self.inner(self.words(index))))
        return hidden


def pair(offload: bool = False) -> tuple[Model, Model]:
    torch.manual_seed(0)
    dense = Model()
    return dense, compress_model(dense, min_bytes=0, inplace=False, offload=offload).model  # type: ignore[return-value]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16), lambda m: m.half().float(),
        lambda m: m.double().bfloat16(), lambda m: m.type(torch.float16), nn.Module.share_memory, nn.Module.float,
    ],
)  # fmt: skip
def test_conversions_of_dtype_are_those_of_the_dense_model(
    convert: Callable[[nn.Module], nn.Module], offload: bool
) -> None:
    dense, model = pair(offload)
    index = torch.arange(WORDS)
    convert(dense)
    convert(model)
    assert torch.equal(model(index), dense(index))
    assert model.head.compressed is model.words.compressed
    held = model.inner.compressed
    assert held.blob.dtype == torch.uint8 and held.dtype == dense.inner.weight.dtype
    assert held.header.codec.name == ("RAW" if held.dtype == torch.float64 else "P7")
    held.tensor.verify()


def test_another_device_is_no_conversion() -> None:
    _, model = pair()
    before = model.inner.blob
    assert model.to("cpu").inner.blob is before
    assert copy.deepcopy(model).to("meta").half().inner.blob.dtype == torch.uint8


def test_a_parameter_is_assigned_like_a_tensor() -> None:
    _, model = pair()
    new = nn.Parameter(torch.randn(WIDTH, WIDTH))
    model.inner.weight = new
    assert torch.equal(model.inner.weight, new) and [n for n, _ in model.inner.named_parameters()] == ["bias"]
    for wrong in (None, 3.0, [1.0]):
        with pytest.raises(TypeError, match="weight must be a tensor, got"):
            model.inner.weight = wrong


def test_an_assigned_weight_loses_no_bit() -> None:
    _, model = pair()
    model.bfloat16()
    new = torch.randn(WIDTH, WIDTH)
    model.inner.weight = new
    assert model.inner.weight.dtype == torch.float32 and torch.equal(model.inner.weight, new)


def test_loading_with_assign_loses_no_bit() -> None:
    dense, model = pair()
    model.bfloat16()
    index = torch.arange(WORDS)
    model.load_state_dict(dense.state_dict(), assign=True)
    assert torch.equal(model(index), dense(index))
    model.bfloat16().load_state_dict(dense.state_dict())
    assert torch.equal(model(index), dense.bfloat16()(index))


def test_assigning_unties_and_the_same_bits_do_not() -> None:
    dense, model = pair()
    model.head.weight = model.words.weight  # what tie_weights() of a transformers model does
    assert model.head.compressed is model.words.compressed
    new = torch.randn(WORDS, WIDTH)
    model.head.weight = new
    assert torch.equal(model.head.weight, new) and torch.equal(model.words.weight, dense.words.weight)


def test_attributes_of_a_layer_are_taken_over_and_given_back() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Embedding(WORDS, WIDTH, sparse=True, scale_grad_by_freq=True))
    model[0].init_scale, model[0].mode = 7, "a user's"  # type: ignore[assignment]
    model[0].requires_grad_(False).eval()
    compress_model(model, min_bytes=0)
    assert isinstance(model[0], CompressedLinear)
    assert model[0].init_scale == 7 and model[0].mode == "exact" and not model[0].training
    decompress_model(model)
    assert model[0].init_scale == 7 and not model[0].training
    assert model[1].sparse and model[1].scale_grad_by_freq and model[1].training


def test_layers_with_more_than_a_weight_stay() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, WIDTH)
            self.register_buffer("scale", torch.ones(1))

    model = nn.ModuleDict({"scaled": Scaled(), "parted": nn.Linear(WIDTH, WIDTH), "lora": nn.Linear(WIDTH, WIDTH)})
    model["parted"].register_parameter("gain", nn.Parameter(torch.ones(1)))
    model["lora"].add_module("adapter", nn.Linear(WIDTH, WIDTH))
    report = compress_model(model, min_bytes=0)
    for name in model:
        assert "more than a weight and a bias" in report.skipped[name]
    assert [layer.name for layer in report.compressed] == ["lora.adapter"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_dtype_that_p7_does_not_take_is_a_reason_not_an_error_half_way(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(dtype), requires_grad=False)
    report = compress_model(model, codec="p7", min_bytes=0)
    assert [layer.name for layer in report.compressed] == ["0"]
    assert report.skipped["1"] == f"codec p7 takes bf16, fp16 and fp32, not {dtype}"


@pytest.mark.parametrize("names", [5, [1], ["a", None]])
def test_names_are_strings(names: object) -> None:
    with pytest.raises(TypeError, match="names, or a function of name and module, got"):
        compress_model(Model(), include=names)  # type: ignore[arg-type]
