"""tokquant: token-level quantized attention. Declare a scheme, get its flash-attention kernel."""

from tokquant import bias, folding
from tokquant.attention import attention, quantize
from tokquant.calibration.calibrator import Calibrator
from tokquant.calibration.scales import LayerScales, Scales
from tokquant.calibration.watching import record
from tokquant.decode import decode
from tokquant.errors import CacheFileError, CacheFullError, ScalesError, SchemeError, UnsupportedError
from tokquant.evaluation.bound import Bound, error_bound
from tokquant.evaluation.compare import Comparison, compare
from tokquant.evaluation.search import search
from tokquant.exchange.checkpoint import import_checkpoint_scales
from tokquant.exchange.compressed_tensors import from_compressed_tensors, to_compressed_tensors
from tokquant.exchange.engines import export_checkpoint_scales
from tokquant.export import load_scales, save_scales
from tokquant.integrations.torch_sdpa import quantized_sdpa
from tokquant.kernels.compile import Kernel, compile
from tokquant.kv_cache import KVCache
from tokquant.precisions import Precision, register
from tokquant.schemes import Granularity, HeadSchemes, QuantScheme, SchemeMap, preset
from tokquant.sdpa import scaled_dot_product_attention
from tokquant.tensor import QuantizedHeads, QuantizedTensor
from tokquant.tune import tune, tune_decode
from tokquant.varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "Bound",
    "CacheFileError",
    "CacheFullError",
    "Calibrator",
    "Comparison",
    "Granularity",
    "HeadSchemes",
    "KVCache",
    "Kernel",
    "LayerScales",
    "Precision",
    "QuantScheme",
    "QuantizedHeads",
    "QuantizedTensor",
    "Scales",
    "ScalesError",
    "SchemeError",
    "SchemeMap",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "bias",
    "compare",
    "compile",
    "decode",
    "error_bound",
    "export_checkpoint_scales",
    "folding",
    "from_compressed_tensors",
    "import_checkpoint_scales",
    "load_scales",
    "preset",
    "quantize",
    "quantized_sdpa",
    "record",
    "register",
    "save_scales",
    "scaled_dot_product_attention",
    "search",
    "to_compressed_tensors",
    "tune",
    "tune_decode",
]
