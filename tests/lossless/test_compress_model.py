"""`compress_model` on a small decoder in the manner of LLaMA: bit for bit the dense model, for LoRA and torch.compile too."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fastloss.lossless import CompressedEmbedding, CompressedLinear, compress_model, decompress_model
from lossless_cases import bits

WIDTH, HEADS, VOCAB = 48, 4, 96


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


class Block(nn.Module):
    """Attention and a gated MLP, named as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(), RMSNorm()
        self.self_attn = nn.ModuleDict({f"{k}_proj": nn.Linear(WIDTH, WIDTH, bias=k == "q") for k in "qkvo"})
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(WIDTH, 2 * WIDTH, bias=False),
                "up_proj": nn.Linear(WIDTH, 2 * WIDTH, bias=False),
                "down_proj": nn.Linear(2 * WIDTH, WIDTH, bias=False),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.input_layernorm(x)
        q, k, v = (self.self_attn[f"{part}_proj"](h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in "qkv")
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.self_attn["o_proj"](mixed)
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


class Decoder(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = RMSNorm()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.tie_weights()

    def tie_weights(self) -> None:
        """As transformers does, also after a model was compressed."""
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class LoRA(nn.Module):
    """A low-rank update beside a frozen layer, made as peft makes it: from what the layer says of itself."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base_layer = base
        rows, columns = base.weight.shape
        assert (rows, columns) == (base.out_features, base.in_features)
        kind = {"dtype": base.weight.dtype, "device": base.weight.device}
        generator = torch.Generator().manual_seed(3)
        self.lora_A = nn.Parameter((torch.randn(rank, columns, generator=generator) / math.sqrt(columns)).to(**kind))
        self.lora_B = nn.Parameter((torch.randn(rows, rank, generator=generator) / 100).to(**kind))

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def decoder(dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Decoder:
    torch.manual_seed(0)
    return Decoder(tied).to(dtype)


def ids(seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(seed))


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def with_lora(model: Decoder) -> Decoder:
    for p in model.parameters():
        p.requires_grad_(False)
    for layer in model.layers:
        for name in ("q_proj", "v_proj"):
            layer.self_attn[name] = LoRA(layer.self_attn[name])
        layer.mlp["down_proj"] = LoRA(layer.mlp["down_proj"])
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_those_of_the_dense_model_bit_for_bit(dtype: torch.dtype) -> None:
    dense = decoder(dtype)
    model = copy.deepcopy(dense)
    report = compress_model(model, min_bytes=0)
    assert report.model is model and not report.skipped
    same(model(ids()), dense(ids()))
    for name, p in dense.named_parameters():
        if name.endswith("norm.weight"):
            same(model.get_parameter(name), p)
    shares = {x.name: x.after / x.before for x in report.layers if x.before}
    assert len(report.layers) == 16 and all(s < 1 for s in shares.values())
    assert report.before == sum(x.before for x in report.layers) and report.after < report.before
    assert f"16 layers: {report.before} -> {report.after} bytes" in str(report)


@pytest.mark.parametrize("codec", ["auto", "p7", "r8"])
def test_there_and_back(codec: str) -> None:
    dense = decoder()
    dense.layers[0].self_attn["q_proj"].weight.requires_grad_(False)
    model = compress_model(dense, codec=codec, tier="storage", min_bytes=0, inplace=False, exclude="layers.1.*").model
    assert model is not dense and isinstance(dense.lm_head, nn.Linear)
    assert isinstance(model.lm_head, CompressedLinear) and isinstance(model.embed_tokens, CompressedEmbedding)
    back = decompress_model(model, inplace=False)
    assert isinstance(model.lm_head, CompressedLinear)
    assert back.lm_head.weight is back.embed_tokens.weight and back.embed_tokens.padding_idx == 0
    assert back.state_dict().keys() == dense.state_dict().keys()
    for name, p in dense.named_parameters():
        same(back.get_parameter(name), p)
        assert back.get_parameter(name).requires_grad == p.requires_grad


def test_tied_weights_stay_tied() -> None:
    dense, model = decoder(), decoder()
    report = compress_model(model, min_bytes=0)
    sizes = {x.name: (x.before, x.after) for x in report.layers}
    assert sizes["lm_head"] == (0, 0) and sizes["embed_tokens"][0] == VOCAB * WIDTH * 2
    for made in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).to("cpu")):
        assert made.lm_head.blob.data_ptr() == made.embed_tokens.blob.data_ptr()
        same(made(ids()), dense(ids()))
    moved = copy.deepcopy(model).to("meta")
    assert moved.lm_head.blob is moved.embed_tokens.blob
    before = model.lm_head.blob.clone()
    model.tie_weights()
    assert model.lm_head.compressed is model.embed_tokens.compressed and torch.equal(model.lm_head.blob, before)
    other = compress_model(decoder(torch.bfloat16, tied=True), min_bytes=0).model
    for state in (model.state_dict(), dense.state_dict()):
        torch.manual_seed(7)
        nn.init.ones_(other.norm.weight)
        assert not any(other.load_state_dict(state))
        same(other(ids()), dense(ids()))
        assert other.lm_head.blob is other.embed_tokens.blob


def test_choice_of_layers() -> None:
    def left(**options: Any) -> set[str]:
        return set(compress_model(decoder(tied=False), **{"min_bytes": 0, **options}).skipped)

    everything = {x.name for x in compress_model(decoder(tied=False), min_bytes=0).layers}
    assert len(everything) == 16
    assert left(include="*.mlp.*") == {n for n in everything if ".mlp." not in n}
    assert left(exclude=["lm_head", "embed_*"]) == {"lm_head", "embed_tokens"}
    assert left(include="*_proj", exclude="*.mlp.*") == {n for n in everything if ".self_attn." not in n}
    assert left(include=lambda name, layer: isinstance(layer, nn.Embedding)) == everything - {"embed_tokens"}
    assert left(min_bytes=9000) == {n for n in everything if n.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))}
    tied = compress_model(decoder(), min_bytes=0, exclude="lm_head").skipped
    assert tied == {"lm_head": "it is excluded", "embed_tokens": "it is excluded"}


def test_layers_that_are_more_than_torchs_stay_with_a_reason() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Named(nn.Linear):
        """Linear's forward: nothing of its own."""

    shared = nn.Linear(64, 64)
    holder = nn.Module()
    holder.register_parameter("kernel", shared.weight)
    model = nn.ModuleDict({
        "own": Own(64, 64), "named": Named(64, 64), "hooked": nn.Linear(64, 64), "pruned": nn.Linear(64, 64),
        "parametrized": parametrizations.weight_norm(nn.Linear(64, 64)), "patched": nn.Linear(64, 64),
        "lazy": nn.LazyLinear(64), "renormed": nn.Embedding(64, 64, max_norm=1.0), "shared": shared, "holder": holder,
        "noise": nn.Linear(64, 64), "meta": nn.Linear(64, 64, device="meta"), "hooked weight": nn.Linear(64, 64),
    })  # fmt: skip
    model["hooked"].register_forward_hook(lambda *_: None)
    model["hooked weight"].weight.register_hook(lambda g: g)
    prune.l1_unstructured(model["pruned"], "weight", 0.5)
    model["patched"].forward = model["patched"].forward
    noise = torch.randint(0, 2**16, (64, 64), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    model["noise"].weight = nn.Parameter(noise, requires_grad=False)
    before = list(model.values())
    report = compress_model(model, min_bytes=0)
    assert [x.name for x in report.compressed] == ["named"]
    reasons = {
        "own": "forward of its own", "hooked": "hooks", "pruned": "made of other tensors", "parametrized": "parametrized",
        "patched": "forward of its own", "lazy": "hooks", "renormed": "max_norm", "shared": "holder.kernel",
        "noise": "not be smaller", "meta": "on meta", "hooked weight": "hooks",
    }  # fmt: skip
    assert set(report.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in report.skipped[name], (name, report.skipped[name])
    assert [a is b for a, b in zip(before, model.values(), strict=True)].count(False) == 1
    again = compress_model(model, min_bytes=0)
    assert not again.compressed and "named" not in again.skipped


def test_torchs_own_attention_works_on_compressed_projections() -> None:
    torch.manual_seed(0)
    dense = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True).eval()
    model = compress_model(dense, min_bytes=0, inplace=False).model
    x = torch.randn(2, 5, WIDTH)
    assert isinstance(model.self_attn.out_proj, CompressedLinear)
    with torch.no_grad():
        same(model(x), dense(x))
    same(model.train()(x).new_zeros(1), torch.zeros(1))
    assert not model.eval().linear1.training


def test_lora_step_has_the_gradients_of_the_dense_model_bit_for_bit() -> None:
    models = [with_lora(decoder()), with_lora(compress_model(decoder(), min_bytes=0).model)]
    target = ids(1)
    for _ in range(2):
        for model in models:
            logits = model(ids())
            F.cross_entropy(logits.flatten(0, 1).float(), target.flatten()).backward()
        dense, ours = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in models)
        assert dense.keys() == ours.keys() and len(ours) == 12
        for name, p in dense.items():
            assert p.grad is not None and ours[name].grad is not None and bool(p.grad.any())
            same(ours[name].grad, p.grad)
        for model in models:
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
            model.zero_grad()
    same(models[1](ids()), models[0](ids()))


def test_compiled_block_is_one_graph() -> None:
    dense = decoder(torch.float32).layers[0]
    block = compress_model(dense, min_bytes=0, inplace=False).model
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for length in (5, 9):
        x = torch.randn(2, length, WIDTH)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours, theirs = compiled(a), dense(b)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        (got,), (want,) = (torch.autograd.grad(y.sin().sum(), z) for y, z in ((ours, a), (theirs, b)))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_modes_layout_and_offload_reach_the_layers() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(64, 128), nn.Linear(128, 64), nn.Linear(64, 40)).bfloat16()

    dense = model()
    made = compress_model(model(), min_bytes=0, mode="fused", layout="tiles", offload=True).model
    index = torch.randint(64, (5,))
    assert [m.compressed.header.layout.name for m in made] == ["ROWS", "TILES", "ROWS"]
    assert made[1].mode == "fused" and all(m.compressed.offload for m in made)
    torch.testing.assert_close(made(index), dense(index), rtol=2e-2, atol=2e-3)
    made[1].mode = made[2].mode = "exact"
    same(made(index), dense(index))


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="got dict"):
        compress_model({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got dict"):
        decompress_model({})  # type: ignore[arg-type]
    for wrong, message in (
        ({"codec": "zip"}, "codec must be one of auto, raw, p7, r8, got 'zip'"),
        ({"tier": "cold"}, "tier must be one of fused, storage, got 'cold'"),
        ({"layout": "z"}, "layout must be one of rows, tiles, got 'z'"),
        ({"mode": "fast"}, "mode must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            compress_model(nn.Linear(2, 2), **wrong)
    with pytest.raises(ValueError, match="itself a Linear"):
        compress_model(nn.Linear(64, 64))
    assert isinstance(compress_model(nn.Linear(64, 64), min_bytes=0, inplace=False).model, CompressedLinear)
