"""Calibrate a model's attention by hooks, keep the scales, load them elsewhere.

Run: python examples/calibrate_export_load.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import tokquant as tq

torch.manual_seed(0)
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 2, enable_nested_tensor=False).eval()

# any module that calls torch's attention can be watched; layers are named as the model names them
calibrator = tq.Calibrator("kv-fp8", "mse")
with torch.no_grad(), calibrator.watch(model):
    for _ in range(4):
        model(torch.randn(2, 100, 64))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "scales.safetensors"
    tq.save_scales(path, calibrator.scales(margin=1.1))
    scales = tq.load_scales(path)  # the scheme is in the file
    for layer, own in scales.items():
        print(layer, {name: [round(x, 4) for x in value.flatten().tolist()] for name, value in own.tensors.items()})

    layer = next(iter(scales))
    q, k, v = (torch.randn(1, 2, 50, 32) for _ in range(3))
    out = tq.attention(q, k, v, scales.scheme, scales=scales[layer])
    print(f"attention by {scales.scheme.name} with the scales of {layer}: {list(out.shape)}")

    tq.export_checkpoint_scales(Path(folder) / "kv_scales.safetensors", scales)  # as vLLM reads them
    print("config.json for it:", tq.to_compressed_tensors(scales.scheme)["kv_cache_scheme"])
