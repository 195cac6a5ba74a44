"""Attention on a CPU beside torch's: `python benchmarks/attention.py [SCHEME ...] [--tokens N] [--head-dim D ...]`.

All providers run in turn in one process, so that whatever slows the machine slows all of them; medians, and ratios to the
faster of torch's scaled_dot_product_attention in float32 and bfloat16.
"""

import argparse
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

import tokquant as tq
from tokquant.timing import interleaved_medians


def providers(schemes, heads, tokens, head_dim, causal):
    """Name -> call. Schemes come twice: on codes (kernel only), and from tensors (with quantization)."""
    q, k, v = (torch.randn(1, heads, tokens, head_dim) for _ in range(3))
    half = [x.bfloat16() for x in (q, k, v)]
    found = {
        "SDPA fp32": partial(scaled_dot_product_attention, q, k, v, is_causal=causal),
        "SDPA bf16": partial(scaled_dot_product_attention, *half, is_causal=causal),
    }
    for scheme in schemes:
        codes = tq.quantize(q, k, v, scheme, backend="cpu")
        found[scheme] = partial(tq.attention, *codes, scheme, causal=causal, backend="cpu")
        found[f"{scheme}, quantized"] = partial(tq.attention, q, k, v, scheme, causal=causal, backend="cpu")
    return found


def main():
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="*", default=["int8", "int8-fast"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.manual_seed(0)
    for head_dim in given.head_dim:
        for causal in (False, True):
            calls = providers(given.schemes, given.heads, given.tokens, head_dim, causal)
            times = dict(zip(calls, interleaved_medians(list(calls.values()), given.repeats, torch.device("cpu")), strict=True))
            peer = min(times["SDPA fp32"], times["SDPA bf16"])
            # the last half of the products is not computed where causal
            operations = 4 * given.heads * given.tokens**2 * head_dim / (2 if causal else 1)
            print(f"\n{given.heads} heads, {given.tokens} tokens, head_dim {head_dim}{', causal' if causal else ''}")
            for name, ms in times.items():
                print(f"  {name:24} {ms:8.2f} ms  {operations / ms / 1e6:7.0f} GOPS  {peer / ms:5.2f} x")


if __name__ == "__main__":
    main()
