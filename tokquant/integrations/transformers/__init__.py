"""tokquant as the attention of transformers models: schemes, quantized KV caches, and checkpoints that include a scheme.

Importing this imports transformers; importing tokquant does not.
"""

from tokquant.integrations.transformers.cache import TokquantCache
from tokquant.integrations.transformers.evaluation import evaluate
from tokquant.integrations.transformers.quantizer import TokquantConfig
from tokquant.integrations.transformers.recording import observing, record, run_observed
from tokquant.integrations.transformers.registration import register, use

__all__ = ["TokquantCache", "TokquantConfig", "evaluate", "observing", "record", "register", "run_observed", "use"]
