"""Triton has wheels for Linux alone: elsewhere everything but its kernels works."""

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # as if it were not there
import torch
import tokquant as tq

q, k, v = (torch.randn(1, 2, 40, 32) for _ in range(3))
exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
for backend in ("reference", "auto"):
    assert (tq.attention(q, k, v, "int8", backend=backend) - exact).abs().max() < 0.1
cache = tq.KVCache("kv-int8", batch=1, kv_heads=2, head_dim=32, dtype=torch.float32, backend="reference")
cache.append(k, v)
assert (tq.decode(q[:, :, -1:], cache) - exact[:, :, -1:]).abs().max() < 0.1
assert "def attention_int8" in tq.compile("int8", head_dim=32).source
try:
    tq.attention(q, k, v, "int8", backend="triton")
except tq.UnsupportedError as error:
    assert "use backend='reference'" in str(error)
else:
    raise AssertionError("there is no Triton")
"""


def test_where_there_is_no_triton_all_else_works():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
