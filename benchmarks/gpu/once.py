"""Runs one call of attention or decoding for Nsight Compute, from the arguments: a scheme, then the fields of a Shape."""

import sys
import time
from pathlib import Path

import torch
from profiles import call_of
from running import Setting

from tokquant.evaluation.bench import Shape

if __name__ == "__main__":
    scheme, *numbers, causal = sys.argv[1:]
    setting = Setting(torch.device("cuda", 0), False, Path(), {}, time.time())
    call = call_of(setting, scheme, Shape(*map(int, numbers), causal == "True"))
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
