"""A GRPO step over a vocabulary of 131072: its extra memory is counted, its gradients are the materialised ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys, torch, fastloss
from fastloss import losses
limit = int(sys.argv[1])
torch.set_num_threads(1)
b, t, d, v = 4, 128, 64, 131072
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
x = torch.randn(b, t, d, requires_grad=True)
w = (torch.randn(v, d) * d**-.5).requires_grad_()
target = torch.randint(0, v, (b, t))
target[1, 100:] = -100
mask = target != -100
advantage = losses.group_relative(torch.tensor([1.0, 0.0, 0.3, 0.0]), b)
old, reference = -13 + 0.3 * torch.randn(2, b, t)

def step(x, w, target, mask, old, reference, advantage):
    logp = fastloss.token_logp(x, w, target, temperature=0.9, max_extra_bytes=limit or None)
    loss = losses.grpo(logp, old, advantage, mask=mask, reference_logp=reference, kl_weight=0.1)
    loss.backward()
    return loss.detach()

few = slice(0, 1)  # what libraries allocate once is no memory of the step
small = w.detach()[:1024].clone().requires_grad_()
step(x[few], small, target[few] % 1024, mask[few], old[few], reference[few], advantage[few])
x.grad = None
gradients = x.nbytes + w.nbytes
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
loss = step(x, w, target, mask, old, reference, advantage)
extra = status("VmHWM") - before - gradients

xs, ws = (p.detach().clone().requires_grad_() for p in (x, w))
logp = torch.log_softmax(xs @ ws.T / 0.9, -1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
rho = torch.exp(logp - old)
a = advantage[:, None]
clipped = -torch.minimum(a * rho, a * rho.clamp(0.8, 1.2))
clipped = torch.where(a < 0, torch.minimum(clipped, -3 * a), clipped)
kl = torch.exp(reference - logp) - (reference - logp) - 1
want = ((clipped + 0.1 * kl) * mask).sum() / mask.sum()
want.backward()
errors = [float((p.grad - q.grad).norm() / q.grad.norm()) for p, q in ((x, xs), (w, ws))]
print(json.dumps({"extra": extra, "logits": b * t * v * 4, "errors": errors, "loss": float(loss), "want": float(want)}))
"""


def measure(limit: int) -> dict:
    done = subprocess.run([sys.executable, "-c", PROBE, str(limit)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_grpo_step_takes_a_twentieth_of_the_logits() -> None:
    found = measure(limit=8 * 2**20)
    mib = found["extra"] / 2**20
    assert found["extra"] <= found["logits"] / 20, f"{mib:.1f} MiB extra, logits {found['logits'] / 2**20:.0f} MiB"
    assert max(found["errors"]) < 1e-5, found["errors"]
    assert found["loss"] == pytest.approx(found["want"], rel=1e-5)
