"""tokquant: token-level quantized attention. Declare a scheme, get its flash-attention kernel."""

from tokquant import bias
from tokquant.attention import attention, quantize
from tokquant.calibration.calibrator import Calibrator
from tokquant.calibration.scales import LayerScales, Scales
from tokquant.decode import decode
from tokquant.errors import CacheFileError, CacheFullError, ScalesError, SchemeError, UnsupportedError
from tokquant.evaluation.compare import Comparison, compare
from tokquant.export import load_scales, save_scales
from tokquant.integrations.torch_sdpa import quantized_sdpa
from tokquant.kernels.compile import Kernel, compile
from tokquant.kv_cache import KVCache
from tokquant.precisions import Precision, register
from tokquant.schemes import Granularity, QuantScheme, preset
from tokquant.sdpa import scaled_dot_product_attention
from tokquant.tensor import QuantizedTensor
from tokquant.tune import tune
from tokquant.varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "CacheFileError",
    "CacheFullError",
    "Calibrator",
    "Comparison",
    "Granularity",
    "KVCache",
    "Kernel",
    "LayerScales",
    "Precision",
    "QuantScheme",
    "QuantizedTensor",
    "Scales",
    "ScalesError",
    "SchemeError",
    "UnsupportedError",
    "attention",
    "attention_varlen",
    "bias",
    "compare",
    "compile",
    "decode",
    "load_scales",
    "preset",
    "quantize",
    "quantized_sdpa",
    "register",
    "save_scales",
    "scaled_dot_product_attention",
    "tune",
]
