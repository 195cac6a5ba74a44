"""Compares two instruction sets of a CPU, and SDPA: median milliseconds of attention on codes, interleaved, one thread."""

import argparse
import os

import torch

import tokquant as tq
from tokquant.evaluation.costs import scales_for
from tokquant.kernels.cpu.build import CHOICE
from tokquant.timing import interleaved_medians

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs=2, default=["avx512_vnni", "avx512_bf16"])
    parser.add_argument("--schemes", nargs="+", default=["int8", "fp8"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--shape", nargs=5, type=int, default=[8, 8, 2048, 2048, 64], help="heads, those of K, queries, keys, head_dim"
    )
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--repeats", type=int, default=21)
    given = parser.parse_args()

    torch.set_num_threads(1)
    heads, kv_heads, n_q, n_k, d = given.shape
    sizes = (1, heads, n_q, d), (1, kv_heads, n_k, d), (1, kv_heads, n_k, d)
    operands = [torch.randn(size, dtype=DTYPES[given.dtype]) for size in sizes]
    calls = {f"SDPA in {name}": _sdpa(operands, dtype, given.causal) for name, dtype in DTYPES.items()}
    for name in given.schemes:
        codes = tq.quantize(*operands, name, scales=scales_for(tq.preset(name), *operands))
        calls |= {f"{name} with {each}": _with(each, codes, name, given.causal) for each in given.sets}
    with torch.no_grad():
        medians = interleaved_medians(list(calls.values()), given.repeats, torch.device("cpu"))
    for name, milliseconds in zip(calls, medians, strict=True):
        print(f"{name:<32} {milliseconds:8.2f}")


def _sdpa(operands, dtype, causal):
    q, k, v = (x.to(dtype) for x in operands)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _with(instructions, codes, name, causal):
    def call():
        os.environ[CHOICE] = instructions
        tq.attention(*codes, name, causal=causal)

    return call


if __name__ == "__main__":
    main()
