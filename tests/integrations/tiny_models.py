"""Random models of a few kilobytes, one for each thing that a model may ask of its attention."""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    # large enough for attention to be far from uniform
    initializer_range=0.15,
)


def _gpt_oss() -> transformers.PreTrainedModel:
    # every expert takes every token: a router's choice between two that are near is no matter of attention
    sizes = SIZES | {"initializer_range": 0.1}
    config = transformers.GptOssConfig(**sizes, head_dim=16, num_local_experts=2, num_experts_per_tok=2, sliding_window=8)
    model = transformers.GptOssForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def _gemma2() -> transformers.PreTrainedModel:
    config = transformers.Gemma2Config(
        **SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=9, attn_logit_softcapping=0.5
    )
    return transformers.Gemma2ForCausalLM(config)


DECODERS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama, grouped heads": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3, normed heads of their own size": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**SIZES, head_dim=32)
    ),
    "mistral, a window": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8)),
    "qwen2-moe, a window that only its mask tells": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **SIZES, num_experts=2, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
            use_sliding_window=True, sliding_window=8, max_window_layers=1,
        )
    ),
    "gemma2, softcap and a scale": _gemma2,
    "gpt-oss, sinks": _gpt_oss,
}  # fmt: skip


def decoder(name: str = "llama, grouped heads") -> transformers.PreTrainedModel:
    """A causal language model, always the same."""
    torch.manual_seed(1)
    return DECODERS[name]().eval()


def prompts(padding: str | None = None, batch: int = 2, tokens: int = 20) -> dict[str, Tensor]:
    """Token ids and their mask; of the first sequence 7 are padding, on the side that is named."""
    ids = torch.randint(3, 128, (batch, tokens), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[0, slice(7) if padding == "left" else slice(tokens - 7, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def eagerly(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model with transformers' own attention, written out."""
    model.set_attn_implementation("eager")
    return model


def cosine(out: Tensor, exact: Tensor) -> float:
    """The least cosine of any token's logits."""
    return torch.cosine_similarity(out.double(), exact.double(), dim=-1).min().item()
