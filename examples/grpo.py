"""Reinforcement learning of a tiny language model with GRPO, the logits of the training step never stored.

    python examples/grpo.py            # some ten seconds on a CPU
    python examples/grpo.py --help

The task has a reward that can be checked: after three digits and "=", write the same digits and stop. The model starts
at random. Each step samples a group of completions of every prompt, rewards them, takes advantages relative to the
group, and makes a few updates on them. `fastloss.token_logp` reads the head in chunks: with a vocabulary of 128,000,
too, the step would hold a small part of the logits at a time.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import Tensor, nn

import fastloss

DIGITS, EQUALS, END, VOCAB = 10, 10, 11, 12
PROMPT, COMPLETION = 4, 5  # tokens: three digits and "=", at most one token more than needed


class LanguageModel(nn.Module):
    """One transformer layer; `features` [B, T, width] are what the head turns into logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.positions = nn.Parameter(0.5 * torch.randn(PROMPT + COMPLETION, width))
        self.body = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def features(self, ids: Tensor) -> Tensor:
        """Features at each position of ids [B, T], which see the positions before."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=x.device, dtype=x.dtype)
        return self.norm(self.body(x, src_mask=mask, is_causal=True))


@torch.no_grad()
def sample(model: LanguageModel, prompts: Tensor, temperature: float) -> Tensor:
    """[B, PROMPT + COMPLETION]: prompts and what the model goes on with; END fills up what follows the first END."""
    ids = prompts
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(COMPLETION):
        logits = model.head(model.features(ids)[:, -1]) / temperature
        drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
        drawn = torch.where(ended, END, drawn)
        ended |= drawn == END
        ids = torch.cat((ids, drawn[:, None]), 1)
    return ids


def reward_of(ids: Tensor) -> Tensor:
    """Share of the four tokens wanted (the digits and the end) that stand in their place, [B]."""
    wanted = torch.cat((ids[:, : PROMPT - 1], torch.full_like(ids[:, :1], END)), 1)
    return (ids[:, PROMPT : PROMPT + 4] == wanted).float().mean(-1)


def targets_of(ids: Tensor) -> Tensor:
    """Tokens that the policy chose: the completion up to its first END; -100 elsewhere."""
    ended = (ids == END).cumsum(1) > (ids == END)
    prompt = torch.arange(ids.shape[1], device=ids.device) < PROMPT
    return torch.where(prompt | ended, -100, ids)


def train(o: argparse.Namespace) -> list[float]:
    """Mean reward of the samples of every step."""
    torch.manual_seed(o.seed)
    model = LanguageModel(o.width).to(o.device)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters(), lr=o.rate)

    def logp_of(policy: LanguageModel, ids: Tensor, target: Tensor) -> Tensor:
        return fastloss.token_logp(
            policy.features(ids), policy.head.weight, target, temperature=o.temperature, shift=True
        )

    rewards: list[float] = []
    for step in range(o.steps):
        digits = torch.randint(DIGITS, (o.prompts, PROMPT - 1), device=o.device)
        prompts = torch.cat((digits, torch.full_like(digits[:, :1], EQUALS)), 1)
        ids = sample(model, prompts.repeat_interleave(o.group, 0), o.temperature)
        reward = reward_of(ids)
        advantage = fastloss.losses.group_relative(reward, o.group)

        target = targets_of(ids)
        mask = fastloss.token_mask(target, shift=True)
        with torch.no_grad():  # constants of this batch, computed once
            old, ref = logp_of(model, ids, target), logp_of(reference, ids, target)
        for _ in range(o.updates):
            loss = fastloss.losses.grpo(
                logp_of(model, ids, target), old, advantage, mask=mask, reference_logp=ref, kl="k3", kl_weight=o.kl
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        rewards.append(reward.mean().item())
        if step % max(1, o.steps // 10) == 0 or step == o.steps - 1:
            print(f"step {step:4d}   mean reward {rewards[-1]:.3f}", flush=True)
    return rewards


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help=f"default here: {device}")
    parser.add_argument("--steps", type=int, default=60, help="batches that are sampled (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=2, help="updates on each batch (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a batch (default: %(default)s)")
    parser.add_argument("--group", type=int, default=16, help="completions of each prompt (default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="features (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of Adam (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--kl", type=float, default=0.001, help="weight of the KL penalty (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    for name in ("steps", "updates", "prompts", "group", "width"):
        if getattr(o, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(o, name)}")
    if o.width % 4:
        parser.error(f"--width must be a multiple of 4, the number of heads, got {o.width}")
    return o


def main() -> None:
    o = arguments()
    start = time.perf_counter()
    rewards = train(o)
    last = rewards[-max(1, o.steps // 10) :]
    print(f"mean reward {rewards[0]:.3f} -> {sum(last) / len(last):.3f} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
