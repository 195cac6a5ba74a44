"""Which layers of a language model bear few bits: each quantized alone by a scheme map, and the logits beside exact ones.

The model is random, and small enough to be made in a second; replace it and its tokens by your own.
"""

import torch
import transformers

import tokquant as tq
from tokquant.integrations.transformers import use

SCHEMES = ("int8", "int4")


def model() -> transformers.PreTrainedModel:
    """A Llama of four layers with heads of 64 channels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.06,
    )
    return transformers.LlamaForCausalLM(config).eval()


def kl(logits: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence from the exact distribution, in nats a token."""
    log_q, log_p = (x.double().log_softmax(-1).flatten(0, -2) for x in (logits, exact))
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item()


@torch.no_grad()
def main() -> None:
    llama, ids = model(), torch.randint(256, (1, 256), generator=torch.Generator().manual_seed(1))
    exact = use(llama, "none")(ids).logits
    layers = [name for name, module in llama.named_modules() if name.endswith("self_attn")]
    print(f"{'scheme':8}{'layer':28}{'KL':>10}{'least cosine':>16}")
    for scheme in SCHEMES:
        for name in (*layers, "*"):
            use(llama, tq.SchemeMap.from_data({"layers": {name: scheme} | ({} if name == "*" else {"*": "none"})}))
            logits = llama(ids).logits
            cosine = torch.cosine_similarity(logits, exact, dim=-1).min().item()
            print(f"{scheme:8}{'all layers' if name == '*' else name:28}{kl(logits, exact):10.2e}{cosine:16.6f}")


if __name__ == "__main__":
    main()
