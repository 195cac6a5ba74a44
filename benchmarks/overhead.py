"""The overhead of a call: microseconds on tensors so small that arithmetic takes no time, one thread, the minimum of many."""

import timeit

import torch

import tokquant as tq
from tokquant.inputs import check_tensors, features_of
from tokquant.operators import untraced

CALLS, REPEATS = 50, 300


def main() -> None:
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 2, 16, 32) for _ in range(3))
    codes = tq.quantize(q, k, v, "int8")
    compiled = torch.compile(lambda q: tq.attention(q, k, v, "int8"), backend="aot_eager", fullgraph=True)
    empty = torch.compile(lambda q: torch.neg(q), backend="aot_eager", fullgraph=True)
    nothing = lambda q, k, v, scheme: None  # noqa: E731
    seeming = untraced("nothing")(nothing)
    calls = {
        "tq.attention": lambda: tq.attention(q, k, v, "int8"),
        "  torch.ops.tokquant.attention": lambda: torch.ops.tokquant.attention.default(q, k, v, "int8"),
        "  in a graph of aot_eager": lambda: compiled(q),
        "a graph of aot_eager with torch.neg": lambda: empty(q),
        "tq.attention of codes": lambda: tq.attention(*codes, "int8"),
        "tq.quantize": lambda: tq.quantize(q, k, v, "int8"),
        "a function that does nothing": lambda: nothing(q, k, v, "int8"),
        "  with the look whether something traces": lambda: seeming(q, k, v, "int8"),
        "checks of tensors": lambda: check_tensors(q, k, v),
        "checks of features": lambda: features_of(q, k),
        "torch's scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
    }
    least = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for call in calls.values():
            call()
        for _ in range(REPEATS):  # interleaved, so that a slow phase of the machine affects all alike
            for name, call in calls.items():
                least[name] = min(least[name], *timeit.repeat(call, number=1, repeat=CALLS))
    for name, seconds in least.items():
        print(f"{name:<46} {1e6 * seconds:7.1f}")


if __name__ == "__main__":
    main()
