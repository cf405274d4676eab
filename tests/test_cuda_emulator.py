"""The emulator under the CUDA kernels: what it must refuse, with a message that names the place, and what it must compute."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from cuda_host import build

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=f"CUDA on the host: {build.why_not()}")

# The body of a kernel of one block of 64 threads with 100 bytes of dynamic shared memory, and a part of the message.
REFUSED = {
    "plain": {
        "if (t < 40) __syncthreads();": "40 threads wait at __syncthreads (",
        "if (t < 32) __syncthreads();\n else __syncthreads();": "divergent __syncthreads",
        "if (t != 3) __syncwarp(); else __syncthreads();": "31 threads wait at __syncwarp",
        "if (t & 1) __shfl_sync(~0u, 1, 0); else __shfl_up_sync(~0u, 1, 1);": "lanes of one mask disagree",
        "if (t & 1) __ballot_sync(0x55555555u, 1);": "does not name the calling lane",
        "if (t > 60) return; __any_sync(~0u, 1);": "29 threads wait at __any_sync",
        "if (t == 0) cluster_wait();": "wait without arrive",
        "SHARED_ARRAY(int, a, [20]); __ldg((const int4 *)&a[1]);": "unaligned address",
        "SHARED_ARRAY(int, a, [20]); cp_async16(&a[1], out);": "misaligned cp.async",
        "SHARED_ARRAY(int, a, [20]); cluster_map(&a[0], 1);": "no block 1",
    },
    "asan": {
        "SHARED_ARRAY(int, a, [63]); int *p = a; p[t] = 1;": "AddressSanitizer: use-after-poison",
        "SHARED_DYNAMIC(int, a); if (t < 26) a[t] = 1;": "AddressSanitizer: use-after-poison",
        "out[t] = 1;": "AddressSanitizer: heap-buffer-overflow",
        "int a[4]; volatile int i = t; a[i % 5] = 1; out[0] = a[i % 4];": "out of bounds for type 'int",
    },
    "tsan": {
        "if (t / 32 == 0) out[0] = 1; if (t == 40) out[0] = 2;": "ThreadSanitizer: data race",
        # a shuffle orders no memory; __syncwarp would
        "SHARED_ARRAY(int, a, [64]); a[t] = 1; __shfl_sync(~0u, 1, 0); out[t / 32] = a[t ^ 1];": "ThreadSanitizer: data race",
    },
}
COMPUTED = {  # what out[t] must be: a C++ expression of the thread t
    "out[t] = __shfl_xor_sync(~0u, t * t, 9);": "(t ^ 9) * (t ^ 9)",
    "out[t] = __shfl_sync(~0u, t, 3, 8);": "t / 8 * 8 + 3",
    "out[t] = __shfl_up_sync(~0u, t, 3, 8);": "t % 8 < 3 ? t : t - 3",
    "out[t] = __shfl_down_sync(~0u, t, 2, 16);": "t % 16 >= 14 ? t : t + 2",
    "out[t] = __ballot_sync(~0u, t % 3 == 0) >> (t % 32) & 1;": "t % 3 == 0",
    "out[t] = __popc(__match_any_sync(~0u, t / 10));": "t < 30 ? 10 : t < 32 ? 2 : t < 40 ? 8 : t < 60 ? 10 : 4",
    "out[t] = __reduce_max_sync(~0u, t);": "t < 32 ? 31 : 63",
    "out[t] = __syncthreads_count(t % 4 == 0);": "16",
    "SHARED_ARRAY(int, a, [1]); if (!t) a[0] = 0; __syncthreads(); atomicAdd(a, t); __syncthreads(); out[t] = a[0];": "2016",
    "SHARED_DYNAMIC(int, a); if (t == 5) { cp_async16(a, in, 8); cp_async_commit(); cp_async_wait<0>(); } __syncthreads();"
    "out[t] = a[t % 4];": "t % 4 < 2 ? 100 + t % 4 : 0",
    "SHARED_ARRAY(int, a, [1]); if (!t) a[0] = 7 * blockIdx.x; cluster_sync(); int other = *cluster_map(a, 1 - cluster_rank());"
    "cluster_sync(); if (blockIdx.x) out[t] = other; __syncthreads(); if (blockIdx.x) out[t] += a[0];": "7",
    "out[t] = __byte_perm(0x33221100u, 0x77665544u, 0x7250u);": "0x77225500",
    "unsigned a[4] = {}, b[2] = {}; int c[4] = {}; a[0] = t % 32 == 4 ? 7 : 0; b[0] = ~0u;"
    "mma_m16n8k256_b1_and(c, a, b); out[t] = c[0];": "t % 32 / 4 == 1 ? 3 : 0",
    "unsigned a[4] = {}, b[2] = {}; float c[4] = {}; a[1] = t % 32 == 9 ? 0x3f804000u : 0; b[0] = 0x40403f80u;"
    "mma_m16n8k16_bf16(c, a, b); out[t] = int(c[3]);": "t % 32 / 4 == 2 ? 5 : 0",
}
PROGRAM = """#include "common.cuh"
using namespace fastloss;
%s
int main(int, char **argument) {
  int *out = new int[%d];
  alignas(16) static const int in[4] = {100, 101, 102, 103};
  void (*kernels[])(int *, const int *) = {%s};
  const int number = atoi(argument[1]);
  try {
    launch(Launch{dim3(%d), dim3(64), 100, %d}, kernels[number], out, in);
    puts("passed");
    %s
  } catch (const std::exception &e) { puts(e.what()); }
}"""


def program(bodies: list[str], words: int, blocks: int, after: str = "") -> str:
    """One program of all kernels; its argument says which one runs, as one cluster of blocks of 64 threads."""
    head = "int *out, const int *in) { const int t = threadIdx.x; (void)out; (void)in; (void)t;"
    kernels = "\n".join(f"__global__ void k{i}({head} {body} }}" for i, body in enumerate(bodies))
    return PROGRAM % (kernels, words, ", ".join(f"k{i}" for i in range(len(bodies))), blocks, blocks, after)


@cache
def built() -> dict[str, Path]:
    """The programs: one a variant, and that of COMPUTED."""
    texts = {v: program(list(cases), 40, 1) for v, cases in REFUSED.items()}
    check = 'if (number == {} && out[t] != ({})) printf("%d: %d\\n", t, out[t]);'
    checks = "\n".join(check.format(i, want) for i, want in enumerate(COMPUTED.values()))
    texts["computed"] = program(list(COMPUTED), 64, 2, f"for (int t = 0; t < 64; ++t) {{ {checks} }}")
    with ThreadPoolExecutor(2) as pool:
        paths = pool.map(lambda v: build.build("plain" if v == "computed" else v, program=texts[v]), texts)
        return dict(zip(texts, paths, strict=True))


def output(name: str, number: int) -> str:
    """What kernel `number` of a program prints."""
    done = subprocess.run([built()[name], str(number)], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("variant", "number"), [(v, i) for v, cases in REFUSED.items() for i in range(len(cases))])
def test_refused(variant: str, number: int) -> None:
    assert list(REFUSED[variant].values())[number] in output(variant, number)


@pytest.mark.parametrize("number", range(len(COMPUTED)))
@pytest.mark.parametrize("order", ["asc", "desc", "3"])
def test_computed(order: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMU_ORDER", order)
    assert output("computed", number) == "passed\n"
