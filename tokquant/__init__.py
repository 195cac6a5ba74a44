"""tokquant: token-level quantized attention. Declare a scheme, get its flash-attention kernel."""

from tokquant import bias
from tokquant.attention import attention, quantize
from tokquant.calibration.calibrator import Calibrator
from tokquant.calibration.scales import LayerScales, Scales
from tokquant.decode import decode
from tokquant.errors import CacheFileError, CacheFullError, ScalesError, SchemeError, UnsupportedError
from tokquant.evaluation.bound import Bound, error_bound
from tokquant.evaluation.compare import Comparison, compare
from tokquant.export import load_scales, save_scales
from tokquant.kernels.compile import Kernel, compile
from tokquant.kv_cache import KVCache
from tokquant.precisions import Precision, register
from tokquant.schemes import Granularity, QuantScheme, preset
from tokquant.tensor import QuantizedTensor
from tokquant.tune import tune
from tokquant.varlen import attention_varlen

__version__ = "0.1.0"

__all__ = [
    "Bound",
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
    "error_bound",
    "load_scales",
    "preset",
    "quantize",
    "register",
    "save_scales",
    "tune",
]
