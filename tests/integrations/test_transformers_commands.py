"""Local models on the command line: calibrated, recorded, evaluated."""

import json
import math
from contextlib import nullcontext

import pytest
import tokenizers
import torch
import transformers
from tiny_models import SIZES, decoder, eagerly

import tokquant as tq
from tokquant.activations import Activations
from tokquant.evaluation.logits import Agreement
from tokquant.integrations.transformers import evaluate, record, texts, use

LAYERS = [f"model.layers.{i}.self_attn" for i in range(SIZES["num_hidden_layers"])]
LINES = ["the quick brown fox", "jumps over", "", "the lazy dog " * 12]


@pytest.fixture
def folder(tmp_path):
    """A model and a tokenizer of one token a byte."""
    decoder().save_pretrained(tmp_path / "model")
    vocabulary = {chr(i): i for i in range(3, 127)} | {"\n": 127}
    base = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="\x03"))
    base.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=base).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(LINES))
    return path


def windows(folder, lines, tokens=32):
    model, tokenizer = texts.load(folder, device=torch.device("cpu"))
    return model, texts.windows(tokenizer, texts.read(lines), tokens)


def test_texts_are_cut_into_windows_in_their_order(folder, lines, tmp_path):
    _, found = windows(folder, lines)
    written = "".join(f"{line}\n" for line in LINES if line)
    assert (
        "".join(chr(i) if i != 127 else "\n" for window in found for i in window[0].tolist())
        == written[: len(written) // 32 * 32]
    )
    wrapped = tmp_path / "texts.jsonl"
    wrapped.write_text("\n".join([json.dumps({"text": LINES[0]}), json.dumps(LINES[1])]))
    assert texts.read(wrapped) == LINES[:2]
    wrapped.write_text('{"text": "a"}\n{"txt": "b"}')
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 2: .* has no text"):
        texts.read(wrapped)


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x0bb"], ids=["U+2028", "U+0085", "a vertical tab"])
def test_only_newlines_end_a_text(text, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(f"{json.dumps({'text': text}, ensure_ascii=False)}\r\n{json.dumps('c')}\n".encode())
    assert texts.read(path) == [text, "c"]
    path = tmp_path / "texts.txt"
    path.write_bytes(f"{text}\r\nc".encode())
    assert texts.read(path) == [text, "c"]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a\n", encoding="utf-8-sig")
    assert texts.read(path) == ["a"]


def test_a_line_that_is_nested_too_deeply_is_named(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('"a"\n' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"texts\.jsonl, line 2: is no JSON: maximum recursion depth"):
        texts.read(path)


def test_calibrate_sees_each_layer_under_its_own_name(tokquant, folder, lines, tmp_path):
    path = tmp_path / "scales.safetensors"
    words = ["calibrate", "--scheme", "kv-fp8", "--model", folder, "--texts", lines, "--tokens", 32, "-o", path]
    code, out, err = tokquant(*words, "--json")
    assert code == 0, err
    assert list(json.loads(out)["layers"]) == LAYERS
    model, found = windows(folder, lines)
    seen = {name: [] for name in LAYERS}
    keys = [layer.self_attn.k_proj for layer in eagerly(model).model.layers]
    assert all(key.out_features == 32 for key in keys)
    cache = transformers.DynamicCache()
    model(found[0], past_key_values=cache)
    for window in found:
        cache = transformers.DynamicCache()
        with torch.no_grad():
            model(window, past_key_values=cache)
        for name, layer in zip(LAYERS, cache.layers, strict=True):
            seen[name].append((layer.keys.abs().amax((0, 2, 3)), layer.values.abs().amax((0, 2, 3))))
    scales = tq.load_scales(path)
    for name in LAYERS:
        for place, role in enumerate("kv"):
            largest = torch.stack([each[place] for each in seen[name]]).amax(dim=0)
            assert scales[name].tensors[f"{role}_scale"].flatten() == pytest.approx(largest / 448, rel=1e-4)


def test_recorded_activations_are_those_of_the_model(tokquant, folder, lines, tmp_path):
    path = tmp_path / "activations.safetensors"
    words = ["record", "--model", folder, "--texts", lines, "--tokens", 32, "--windows", 2, "-o", path]
    code, out, err = tokquant(*words)
    assert code == 0 and "2 layers, q [2, 4, 32, 16], k and v [2, 2, 32, 16]" in out, err
    model, found = windows(folder, lines)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        eagerly(model)(torch.cat(found[:2]), past_key_values=cache)
    file = Activations(path)
    assert list(file) == LAYERS
    for name, layer in zip(LAYERS, cache.layers, strict=True):
        _, k, v = file[name]
        assert (k - layer.keys).abs().max() < 1e-5 and (v - layer.values).abs().max() < 1e-5
    code, out, _ = tokquant("compare", "int8", "--input", path, "--causal", "--repeats", 1, "--json")
    assert code == 0 and json.loads(out)["schemes"][0]["rel_l1"] < 0.03


def test_windows_that_make_no_activations_are_named(folder, lines):
    model, found = windows(folder, lines)
    with pytest.raises(ValueError, match="windows: there are none"):
        record(model, [])
    with pytest.raises(ValueError, match="windows: of 8 and 32 tokens; give windows of one length"):
        record(model, [found[0], found[0][:, :8]])
    for wrong, message in (
        (found[0].tolist(), "windows: one is a list; give tensors of token ids"),
        ({"input_ids": found[0]}, "windows: one is a dict; give tensors of token ids"),
        (found[0][0], r"windows: one of shape \[32\] and torch.int64; give token ids \[B, N\]"),
        (found[0].float(), r"windows: one of shape \[1, 32\] and torch.float32"),
    ):
        for call in (lambda w: record(model, [w]), lambda w: evaluate(model, [w], ["none"], decoded=0)):
            with pytest.raises((TypeError, ValueError), match=message):
                call(wrong)


def test_eval_measures_schemes_for_prompts_and_step_by_step(tokquant, folder, lines):
    words = [
        "eval",
        "--model",
        folder,
        "--texts",
        lines,
        "--tokens",
        32,
        "--windows",
        2,
        "--decode",
        5,
        "--backend",
        "reference",
    ]
    code, out, err = tokquant(*words, "-s", "none", "-s", "int8", "-s", "kv-int4", "--json")
    assert code == 0, err
    report = json.loads(out)
    model, found = windows(folder, lines)
    with torch.no_grad():
        logits = torch.cat([eagerly(model)(window).logits[0, :-1] for window in found[:2]])
        loss = torch.nn.functional.cross_entropy(logits, torch.cat([window[0, 1:] for window in found[:2]]))
    assert report["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    none, int8, four = report["schemes"]
    assert none["prefill"]["perplexity"] == pytest.approx(report["perplexity"], rel=1e-5)
    assert none["prefill"]["kl"] < 1e-7 and none["decode"]["kl"] < 1e-7 and none["decode"]["top1"] == 1
    assert none["prefill"]["tokens"] == 62 and none["decode"]["tokens"] == 10
    assert 1e-7 < int8["prefill"]["kl"] < 0.01 < four["prefill"]["kl"] < 0.5 and int8["decode"] is None
    # on the same codes as in a prompt
    assert 0.001 < four["decode"]["kl"] < 0.5
    with torch.no_grad():
        last = [torch.nn.functional.cross_entropy(eagerly(model)(w).logits[0, -6:-1], w[0, -5:]) for w in found[:2]]
    exact = pytest.approx(torch.stack(last).mean().exp().item(), rel=1e-5)
    assert none["decode"]["perplexity"] == exact and four["decode"]["exact_perplexity"] == exact
    code, out, _ = tokquant(*words, "-s", "int8")
    assert code == 0 and "int8 is not decoded: " in out and "same top-1" in out
    code, out, _ = tokquant(*words, "-s", "kv-int4")
    assert code == 0 and f"without tokquant {four['decode']['exact_perplexity']:.4f}" in " ".join(out.split())


def test_what_cannot_be_evaluated_is_named(folder, lines):
    model, found = windows(folder, lines)
    for given, message in [
        (dict(schemes="int8"), "schemes: 'int8' alone; give a list"),
        (dict(schemes=["int8"], scales=[None, None]), "scales: 2 for 1 schemes"),
        (dict(schemes=["int8"], windows=[]), "windows: there are none"),
        (dict(schemes=["int8"], decoded=-1), "decoded: -1 is not a whole number from 0"),
        (
            dict(schemes=["int8"], windows=[found[0][:, :1]]),
            r"windows: one of shape \[1, 1\]; give \[1, N\] of two tokens or more",
        ),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            evaluate(model, **dict(windows=found[:1], backend="reference", decoded=0) | given)
    masked = transformers.BertConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ValueError, match="model: BertForMaskedLM predicts no next token"):
        evaluate(transformers.BertForMaskedLM(masked).eval(), found[:1], ["int8"])
    with pytest.raises(TypeError, match=r"model: a str; give a transformers\.PreTrainedModel"):
        evaluate("llama", found[:1], ["int8"])


def test_layers_that_no_cache_keeps_are_judged_by_prompts(folder, lines):
    _, found = windows(folder, lines)
    config = transformers.Llama4TextConfig(
        **SIZES, num_local_experts=1, intermediate_size_mlp=96, head_dim=16, attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    _, [none] = evaluate(model, found[:1], ["none"], backend="reference", decoded=4)
    assert none.prefill.kl < 1e-6 and none.decode is None and "layer 0 is of type 'chunked_attention'" in none.refusal
    _, [int8] = evaluate(model, found[:1], ["int8"], backend="reference", decoded=0)
    assert int8.decode is None and not int8.refusal, "nothing was to be decoded"


@pytest.mark.parametrize("last", [slice(None), slice(1)], ids=["of windows that fit", "after an error"])
def test_a_model_attends_after_an_evaluation_as_before(folder, lines, last):
    model, found = windows(folder, lines)
    use(model, "int4", backend="reference")
    with torch.no_grad():
        before = model(found[0]).logits
    with nullcontext() if last == slice(None) else pytest.raises(ValueError, match="windows: one of shape"):
        evaluate(model, [found[0], found[0][:, last]], ["none"], backend="reference", decoded=0)
    with torch.no_grad():
        assert torch.equal(model(found[0]).logits, before)


def test_agreement_is_what_its_definition_says():
    p, q = (torch.randn(300, 7).double() for _ in range(2))
    targets = torch.randint(7, (300,))
    found = Agreement()
    for rows in (slice(0, 150), slice(150, 300)):
        found.add(q[rows], p[rows], targets[rows])
    kl = torch.nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(torch.nn.functional.cross_entropy(q, targets)), rel=1e-4)
    assert found.exact_perplexity == pytest.approx(math.exp(torch.nn.functional.cross_entropy(p, targets)), rel=1e-4)
    assert found.top1 == (p.argmax(1) == q.argmax(1)).double().mean()
    found.add(torch.tensor([[0.0, -torch.inf]]).expand(1, 2), torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))
    assert math.isfinite(found.kl)
    with pytest.raises(ValueError, match=r"shapes \[300, 7\], \[300, 7\], \[2\] do not fit"):
        found.add(p, q, targets[:2])


def test_a_folder_without_a_tokenizer_is_named(tokquant, folder, lines):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    code, _, err = tokquant("eval", "--model", folder, "--texts", lines)
    assert code == 2 and "its tokenizer cannot be read" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "{lines}", "--texts", "{lines}"], "is no folder of a model"),
        (["eval", "--model", "{folder}", "--texts", "{lines}", "--tokens", "4096"], "make no window of 4096"),
        (["eval", "--model", "{folder}", "--texts", "missing.txt"], "missing.txt"),
        (["eval", "--model", "{folder}", "--texts", "{lines}", "--tokens", "32", "-s", "kv-fp8"], "is static; calibrate it"),
        (["calibrate", "-s", "kv-fp8", "-o", "x", "--model", "{folder}"], "give --model and --texts together"),
        (["record", "--model", "{folder}", "--texts", "{lines}", "-o", "nowhere/x"], "there is no folder nowhere"),
        (["record", "--model", "missing", "--texts", "{lines}", "-o", "{folder}"], "is a folder; name a file in it"),
    ],
)
def test_what_cannot_be_is_one_message(tokquant, folder, lines, words, message):
    code, _, err = tokquant(*(word.format(folder=folder, lines=lines) for word in words))
    assert code == 2 and err.startswith("error: ") and message in err
