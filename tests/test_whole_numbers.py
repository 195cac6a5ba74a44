"""Whole numbers are taken of any type that is one, and of none that is not, wherever a call or a scheme takes one."""

import numpy as np
import pytest
import torch

import tokquant as tq
from tokquant.calibration.observers import Percentile
from tokquant.io_model import Workload, algorithms
from tokquant.schemes import Granularity

INT8 = {"precision": "int8"}
TOKENS = torch.tensor([0, 16], dtype=torch.int32)


def scheme(**changed):
    return tq.QuantScheme(
        **{"q": INT8, "k": INT8, "v": INT8, "p": INT8 | {"granularity": {"row_block": 64}}} | changed
    ).to_yaml()


def varlen(longest):
    q, k, v = (torch.randn(16, 1, 16) for _ in range(3))
    return tq.attention_varlen(
        q, k, v, "none", cu_seqlens_q=TOKENS, cu_seqlens_k=TOKENS, max_seqlen_k=longest, backend="reference"
    ).shape


def search(rows):
    x = torch.ones(1, 1, 64, 32)
    return str(tq.search({"layer": (x, x, x)}, ["int8", "none"], budget="bits=9", rows=rows).map)


CALLS = {
    "a granularity's size": lambda n: scheme(k=INT8 | {"granularity": {"block": n}}),
    "a Granularity's size": lambda n: scheme(k=INT8 | {"granularity": Granularity("block", n)}),
    "a block of P's rows": lambda n: scheme(p=INT8 | {"granularity": {"row_block": n}}),
    "tokens in 16 bits": lambda n: scheme(cache={"sink": n, "page": n}),
    "balanced channels": lambda n: scheme(balance={"rope_pairs": {"top_k": n}}),
    "heads of a scheme": lambda n: tq.SchemeMap((("*", tq.HeadSchemes(((n, tq.preset("int8")),))),)).to_yaml(),
    "heads of a bias": lambda n: tq.bias.alibi_slopes(n).tolist(),
    "the rank of a bias": lambda n: tq.bias.svd(torch.ones(1, 64, 64), largest_rank=n).tensors()[0].shape,
    "the longest sequence": varlen,
    "rows of a search": search,
    "sizes of a workload": lambda n: repr(Workload(heads=n, n_q=n, n_k=n, window=(n, 0))),
    "words of a memory": algorithms.side,
    "a compiled kernel's head_dim": lambda n: tq.compile("int8-fast", head_dim=n, target="sm_90").source,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_one_of_numpy_does_what_one_of_python_does(call):
    assert call(np.int64(64)) == call(64)
    for wrong in (True, np.True_, 64.0, "64"):
        with pytest.raises(ValueError, match=r"True|64\.0|'64'"):
            call(wrong)


def test_a_calibration_by_a_number_of_numpy_goes_on(tmp_path):
    calibrator = tq.Calibrator("kv-fp8", Percentile(np.float64(99)))
    calibrator.observe("layer", *(torch.randn(1, 1, 16, 16) for _ in range(3)))
    calibrator.save(tmp_path / "state")
    both = [
        each.scales(margin=margin) for each, margin in ((calibrator, np.int64(2)), (tq.Calibrator.load(tmp_path / "state"), 2))
    ]
    assert torch.equal(*(scales["layer"].tensors["k_scale"] for scales in both))
