"""generate() from a cache of codes: how many bytes it takes, and how near its logits are to 16-bit ones.

The model is random, and small enough to be made in a second; replace it by one of your own.
"""

import torch
import transformers

from tokquant.integrations.transformers import TokquantCache, use

SCHEMES = ("kv-int8", "kv-int4")
PROMPT, NEW = 500, 12


def model() -> transformers.PreTrainedModel:
    """A Llama of two layers with heads of 64 channels."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.06,
        pad_token_id=0,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


def generate(llama: transformers.PreTrainedModel, cache: transformers.Cache) -> torch.Tensor:
    """The logits of each new token, `[sequences, NEW, vocabulary]`."""
    ids = torch.randint(3, 256, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :100] = 0  # a shorter prompt, padded on the left
    found = llama.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(found.logits, dim=1)


def main() -> None:
    llama = model()
    plain = transformers.DynamicCache(config=llama.config)
    exact = generate(llama, plain)
    sixteen = sum(x.numel() * 2 for layer in plain.layers for x in (layer.keys, layer.values))
    print(f"{'cache':16}{'bytes':>10}{'of 16 bits':>12}{'cosine of the first logits':>28}")
    print(f"{'16 bits':16}{sixteen:10}{1:12.2f}{1:28.5f}")
    for scheme in SCHEMES:
        use(llama, scheme)
        cache = TokquantCache(llama, scheme)
        near = generate(llama, cache)
        cosine = torch.cosine_similarity(near[:, 0], exact[:, 0], dim=-1).min().item()
        # what is packed and in windows; slack is room for what comes
        stored = cache.memory.packed + cache.memory.windows
        print(f"{scheme:16}{stored:10}{stored / sixteen:12.2f}{cosine:28.5f}")


if __name__ == "__main__":
    main()
