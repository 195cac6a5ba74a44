"""Small launches of every kind under NVIDIA's compute-sanitizer: reads and writes beside what was allocated, and races."""

import shutil
import subprocess
import sys

import pytest

LAUNCHES = """
import torch
import tokquant as tq

for name in ("int8", "int8-fp8", "int4", "kv-int4-kivi"):
    q, k, v = (torch.randn(1, h, n, 64, device="cuda", dtype=torch.float16) for h, n in ((4, 70), (2, 200), (2, 200)))
    tq.attention(q, k, v, name, causal=True, return_lse=True)
cache = tq.KVCache("kv-int4", batch=2, kv_heads=2, head_dim=64, device="cuda")
for n in (200, 1):
    cache.append(*(torch.randn(2, 2, n, 64, device="cuda", dtype=torch.float16) for _ in range(2)))
tq.decode(torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.float16), cache)
torch.cuda.synchronize()
print("launched")
"""


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool, monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor is an allocation of its own
    # an error that the driver returns is none of a kernel's: so torch and Triton find out what there is
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command = ["compute-sanitizer", *options, sys.executable, "-c", LAUNCHES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("the sanitizer does not run on this machine")
    assert done.returncode == 0 and "launched" in done.stdout, (done.stdout + done.stderr)[-2000:]
