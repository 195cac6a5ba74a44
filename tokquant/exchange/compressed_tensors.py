"""Schemes as compressed-tensors writes them into a model's config.json.

It has one QuantizationArgs for K and V, or for Q, K and V, and none for P. Of those, engines run 8-bit floats with static
scales per tensor or head (https://github.com/vllm-project/compressed-tensors, vLLM's `kv_cache_scheme`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokquant.errors import SchemeError, nearest, quote
from tokquant.schemes import QuantScheme, SchemeMap, read, resolve

STRATEGIES = {"head": "attn_head", "tensor": "tensor"}
"""compressed-tensors' names of granularities."""
ARGS = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic"),
    *("actorder", "scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)
WHY = {
    "int8": " (its int8 codes go down to -128, with scales of absmax / 127.5)",
    "dynamic": " (engines read scales of a checkpoint, not a rule for them)",
}


def to_compressed_tensors(
    scheme: QuantScheme | SchemeMap | str, targets: str | Sequence[str] = "re:.*self_attn$"
) -> dict[str, Any]:
    """The `quantization_config` of a config.json that describes what `scheme` does to the KV cache, or to Q, K and V.

    `targets` are the attention modules, by class or as `re:` and a pattern of their names; used only if Q is quantized.

    Raises SchemeError for every part of the scheme that cannot be expressed, with what could be; TypeError for other targets.
    """
    scheme = expressible(scheme)
    listed = [targets] if isinstance(targets, str) else targets
    if not isinstance(listed, Sequence) or not all(isinstance(each, str) for each in listed):
        raise TypeError(f"targets: {quote(targets)}; give a class, or re: and a pattern of names, or a list of those")
    args = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "strategy": STRATEGIES[scheme.k.granularity.kind],
        "dynamic": False,
    }
    group = {
        "targets": list(listed),
        "weights": None,
        "input_activations": args,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "ignore": [],
        "config_groups": {"attention": group} if scheme.q.scaled else {},
        "kv_cache_scheme": dict(args),
    }


def from_compressed_tensors(block: Mapping[str, Any]) -> QuantScheme:
    """The scheme of a `kv_cache_scheme`, of a `quantization_config` with one or with a config group of attention, or of a
    config.json with that. P, of which it says nothing, is fp16, and so is Q where it has no codes.

    Raises SchemeError, quoting what was written, for what is not 8-bit floats with static scales per tensor or head.
    """
    if not isinstance(block, Mapping):
        raise SchemeError(f"a kv_cache_scheme or quantization_config is a mapping, not {quote(block)}")
    if "quantization_config" in block:
        return from_compressed_tensors(block["quantization_config"])
    if not {"config_groups", "kv_cache_scheme", "quant_method"} & set(block):
        return fp8_scheme(_granularity(block, "kv_cache_scheme"))
    found = attention_blocks(block)
    if not found:
        raise SchemeError("quantization_config has no kv_cache_scheme, and no config group of attention")
    kinds = {place: _granularity(args, place) for place, args in found.items()}
    if len(set(kinds.values())) > 1:
        raise SchemeError(f"{' and '.join(kinds)} have scales of different granularity; a scheme is one for all layers")
    return fp8_scheme(next(iter(kinds.values())), q=any(place.startswith("config_groups") for place in kinds))


def attention_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a quantization_config that are about attention: QuantizationArgs by their dotted path."""
    found = {}
    if config.get("kv_cache_scheme") is not None:
        found["kv_cache_scheme"] = config["kv_cache_scheme"]
    groups = config.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        # groups that quantize weights are of linear layers, even if the target is attention's
        if isinstance(group, Mapping) and group.get("weights") is None and group.get("input_activations") is not None:
            targets = str(group.get("targets")).lower()
            if "attn" in targets or "attention" in targets:
                found[f"config_groups.{name}.input_activations"] = group["input_activations"]
    return found


def fp8_scheme(granularity: str, q: bool = False) -> QuantScheme:
    """The scheme of fp8 attention scales as engines use them: e4m3 codes, `real = code * scale`, calibrated float32 scales."""
    static = {"precision": "fp8_e4m3", "granularity": granularity, "scale": "static"}
    plain = {"precision": "fp16"}
    operands: dict[str, Any] = {"q": static if q else plain, "k": static, "v": static, "p": plain}
    return QuantScheme(name=("qkv-fp8" if q else "kv-fp8") + ("-tensor" if granularity == "tensor" else ""), **operands)


def expressible(given: QuantScheme | SchemeMap | str) -> QuantScheme:
    """The scheme, if compressed-tensors can express it. Raises SchemeError, with a line for each part that it cannot."""
    found = read(given)
    if isinstance(found, SchemeMap) and found.only() is None:
        raise SchemeError(f"scheme: {found.name!r} is a map of layers, and a quantization_config has one scheme for them all")
    scheme = resolve(found)
    kind = scheme.k.granularity.kind
    beyond = differences(scheme, fp8_scheme(kind if kind in STRATEGIES else "head", q=scheme.q.scaled))
    if beyond:
        raise SchemeError([(place, _cannot(place, written, accepted)) for place, written, accepted in beyond])
    return scheme


def differences(scheme: QuantScheme, theirs: QuantScheme) -> list[tuple[str, str, str]]:
    """The parts in which `scheme` and `theirs` differ in effect, as (dotted path, value in `scheme`, value in `theirs`).

    Names, the 16-bit type of Q and P and the size of a page do not count.
    """
    # all fields are compared, so that a field that is added to schemes is not forgotten
    written, wanted = scheme.model_dump(mode="json", exclude={"name"}), theirs.model_dump(mode="json", exclude={"name"})
    if not scheme.q.scaled and not theirs.q.scaled:
        written["q"] = wanted["q"] | {"smooth": scheme.q.smooth}
    if scheme.p.format.largest is None:
        written["p"] = wanted["p"]
    if scheme.cache and not scheme.cache.sink and not scheme.cache.recent:
        written["cache"] = wanted["cache"]
    theirs_by_place = _by_place(wanted)
    return [
        (place, text, theirs_by_place[place]) for place, text in _by_place(written).items() if text != theirs_by_place[place]
    ]


def _by_place(dump: dict[str, Any]) -> dict[str, str]:
    """Every part of a scheme, as text, by its dotted path."""
    found = {}
    for name, part in dump.items():
        fields = {f"{name}.{field}": value for field, value in part.items()} if name in ("q", "k", "v") else {name: part}
        found.update({place: _text(value) for place, value in fields.items()})
    return found


def _text(value: object) -> str:
    """A value as a YAML scheme writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(part)}" for key, part in value.items()) + "}"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _cannot(place: str, written: str, accepted: str) -> str:
    if place.endswith(".granularity"):
        accepted = f"head or tensor, the same for all that has scales (here {accepted})"
    elif place == "p":
        accepted = "fp16, as what P is rounded to is each engine's own"
    return f"{written} cannot be expressed{WHY.get(written, '')}; use {accepted}"


def _granularity(args: object, place: str) -> str:
    """The granularity of QuantizationArgs. Raises SchemeError unless these are 8-bit floats with static scales."""
    if not isinstance(args, Mapping):
        raise SchemeError([(place, f"{quote(args)} is no mapping such as {{num_bits: 8, type: float, strategy: tensor}}")])
    found = []
    for key in args:
        if key not in ARGS:
            found.append((f"{place}.{str(key)[:40]}", f"unknown key; use {', '.join(ARGS)}{nearest(key, ARGS)}"))
    # missing keys have the defaults of QuantizationArgs
    kind, bits = _lower(args.get("type", "int")), args.get("num_bits", 8)
    if kind != "float":
        text = f"{quote(kind)} is not read: its scales are absmax * 2 / (2^bits - 1), for codes that ours lack; use float"
        found.append((f"{place}.type", text))
    if bits != 8:
        found.append((f"{place}.num_bits", f"{quote(bits)} is not read; use 8, which with type float is fp8_e4m3"))
    if args.get("symmetric", True) is not True:
        found.append((f"{place}.symmetric", f"{quote(args['symmetric'])} is not read, as floats have no zero point; use true"))
    if args.get("dynamic", False) is not False:
        found.append((f"{place}.dynamic", f"{quote(args['dynamic'])} is not read, as there are no scales in it; use false"))
    size = args.get("group_size")
    strategy = _lower(args.get("strategy")) or ("tensor" if size is None else "channel" if size == -1 else "group")
    kinds = {theirs: ours for ours, theirs in STRATEGIES.items()}
    if not isinstance(strategy, str) or strategy not in kinds:
        found.append(
            (f"{place}.strategy", f"{quote(strategy)} is not read; use {' or '.join(kinds)}{nearest(strategy, kinds)}")
        )
    if found:
        raise SchemeError(found)
    return kinds[strategy]


def _lower(value: object) -> Any:
    return value.lower() if isinstance(value, str) else value
