"""The main loop for Hopper: same numbers as the portable one, P V beside the softmax, and only where tuning chose it."""

import ast
import inspect
import re
import subprocess
from dataclasses import replace
from tempfile import NamedTemporaryFile
from types import SimpleNamespace

import pytest
import torch
from exact import assert_exact
from factories import nan_filled, qkv, scheme
from ptx import device
from ptx.block import Deadlock

import tokquant as tq
from tokquant.kernels import generate, hopper, launch, targets, tuned
from tokquant.kernels.plan import plan
from tokquant.kernels.products import takes_tokens_last
from tokquant.kernels.resources import _cuobjdump, machine_code, main_loops
from tokquant.kernels.wanted import Wanted
from tokquant.schemes import preset, preset_names

pytestmark = pytest.mark.skipif(not hopper.available(), reason="this Triton has no Gluon, or another")
PRESETS = ["int8", "int8-token", "int8-fast", "int8-fp8", "fp8", "fp8-rotated", "int-flash", "int8-fp16", "int-flash-half"]


def planned(s, head_dim=64, target="sm_90", **features):
    last = {"tokens_last": takes_tokens_last(s, torch.float16), "target": targets.get(target)}
    switches = {name: features.pop(name) for name in ("portable", "interpreted") if name in features}
    return plan(s, head_dim=head_dim, dtype=torch.float16, wanted=Wanted(**features), **last, **switches)


def loops(made):
    return [config for config in made.candidates if config.loop == "hopper"]


def quantized(name, n_q, n_k, d, batch=1):
    tensors = qkv(n_q, n_k, d, heads=2, kv_heads=1, batch=batch, dtype=torch.float16)
    return launch.packed(tq.quantize(*tensors, name, backend="reference"), preset(name))


def take(monkeypatch, place):
    """Let launches take a candidate of this loop, or the plan's own where `place` is None."""
    monkeypatch.setattr(tuned, "choose", lambda made, *_: (made.config if place is None else loops(made)[place], None))


# preset; queries, keys, head_dim, batch; causal; which candidate
CASES = {
    "tails at both ends": ("int8", (70, 300, 64, 1), False, 0),
    "a producer, causal": ("int8", (200, 200, 64, 1), True, 2),
    "a producer, more queries than keys, causal": ("int8-fast", (300, 90, 64, 1), True, 3),
    "a producer for one query and one key": ("int8-fp16", (1, 1, 64, 1), False, 2),
    "more queries than keys, causal": ("int8-fast", (150, 90, 64, 1), True, 0),
    "two sequences of one key": ("int8-fp8", (5, 1, 64, 2), False, 0),
    "causal with 128 channels": ("fp8", (140, 270, 128, 1), True, 0),
    "values of 16 bits, causal": ("int8-fp16", (130, 300, 64, 1), True, 0),
    "a scale of V for each token": ("int8-token", (70, 150, 64, 1), False, 0),
    "a scale of K for each key, a ring of three": ("int-flash", (70, 400, 64, 1), True, 1),
}  # fmt: skip
MORE = {
    "a ring of three, 128 channels": ("int8-fast", (64, 640, 128, 1), False, 1),
    "a producer, whole tiles alone": ("fp8", (128, 384, 64, 1), False, 3),
    "a producer, a scale of V for each token": ("int8-token", (70, 150, 64, 1), False, 2),
    "a producer, a scale of K for each key, 128 channels": ("int-flash-half", (100, 400, 128, 1), False, 2),
    "every scale of its own, 128 channels": ("int8", (130, 300, 128, 2), True, 3),
}  # fmt: skip
EVERY = [pytest.param(case, id=name) for name, case in CASES.items()]
EVERY += [pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in MORE.items()]


@pytest.mark.compiled
@pytest.mark.parametrize("case", EVERY)
def test_numbers_are_those_of_the_portable_loop_to_the_bit(case, on_ptx, monkeypatch):
    name, shape, causal, place = case
    s, operands = preset(name), quantized(name, *shape)
    monkeypatch.setattr(launch.torch, "empty", nan_filled)
    found = []
    for chosen in (place, None):
        take(monkeypatch, chosen)
        found.append(tq.attention(*operands, s, causal=causal, return_lse=True, backend="triton"))
    for ours, portable in zip(*found, strict=True):
        assert torch.equal(ours, portable)
    assert_exact(*found[0], operands, s, causal=causal)
    ours, portable = on_ptx
    assert ours.src.fn.is_gluon() and not portable.src.fn.is_gluon()
    assert ours.unfenced == 0, "tensor cores see what was copied"


def run_again(monkeypatch, place, name, n_q, n_k):
    """The PTX of a launch, and what runs it with another text: how many unfenced products, and whether it gives the same."""
    take(monkeypatch, place)
    ran, own = [], device.launch
    monkeypatch.setattr(device, "launch", lambda *given: ran.append(given) or own(*given))
    out = tq.attention(*quantized(name, n_q, n_k, 64), name, backend="triton")
    expected = out.clone()
    [(compiled, grid, values)] = ran

    def again(ptx, order=()):
        out.fill_(torch.nan)
        changed = SimpleNamespace(asm={"ptx": ptx}, src=compiled.src, metadata=compiled.metadata)
        return own(changed, grid, values, order), torch.equal(out, expected)

    return compiled.asm["ptx"], again


@pytest.mark.compiled
def test_a_wait_or_a_fence_that_is_left_out_is_found(on_ptx, monkeypatch):
    ptx, again = run_again(monkeypatch, 0, "int8-fast", 64, 384)

    def without(instruction):
        changed, count = re.subn(rf"\n\s*{instruction}[^\n]*", "", ptx)
        assert count > 1
        return again(changed)

    waits = (r"cp\.async\.wait_group", r"wgmma\.wait_group\S*\s+1;", r"wgmma\.wait_group\S*\s+0;")
    assert [without(wait) for wait in waits] == [(0, False)] * 3
    for seen in (r"fence\.proxy\.async", r"bar\.sync"):
        unfenced, same = without(seen)
        assert unfenced > 0 and same


CONSUMER = r"mbarrier\.try_wait\S* complete, \[(%r\d+)\][^;]*;\s*@!complete bra\.uni waitLoop;(?=[^;]*fence\.proxy)"
PRODUCER = CONSUMER.replace("(?=", "(?!")
RELEASE = r"@%p\d+ mbarrier\.arrive\S* _, \[%r\d+\];"
ORDERS = [(0, 1, 2), (2, 0, 1), (1, 2, 0), (1, 0, 2)]
"""Of two consumers and a producer: who goes on where several could."""


def released_early(ptx):
    """Slots are free when they are full, before they are read."""
    parts = re.split(f"({RELEASE})", ptx)
    for place in range(1, len(parts), 2):
        *_, wait = re.finditer(CONSUMER, parts[place - 1])
        early = re.sub(r"\[%r\d+\]", f"[{wait[1]}+16]", parts[place])  # the barriers of two slots lie before
        parts[place - 1] = f"{parts[place - 1][: wait.end()]}\n{early}{parts[place - 1][wait.end() :]}"
        parts[place] = ""
    return "".join(parts)


@pytest.mark.compiled
def test_a_producer_and_its_consumers_may_go_on_in_any_order_and_wait_for_one_another(on_ptx, monkeypatch):
    ptx, again = run_again(monkeypatch, 2, "int8-fp8", 128, 256)

    def found(changed, order):
        try:
            unfenced, same = again(changed, order)
        except Deadlock:
            return "deadlock"
        return "same" if same and not unfenced else "wrong"

    def without(pattern):
        changed, count = re.subn(pattern, "", ptx)
        assert count
        return changed

    assert [found(ptx, order) for order in ORDERS] == ["same"] * 4
    assert found(without(CONSUMER), ORDERS[1]) == "wrong"
    assert found(without(PRODUCER), ORDERS[1]) != "same"
    assert found(without(r"fence\.proxy\.async\S*;"), ORDERS[0]) == "wrong"
    assert found(without(r"bar\.sync\s+[02], 128;"), ORDERS[0]) == "wrong", "queries that other warps copied"
    assert found(without(RELEASE), ORDERS[0]) == "deadlock"
    # nobody is overtaken where the producer comes last
    assert [found(released_early(ptx), order) for order in (ORDERS[1], ORDERS[3])] == ["wrong", "same"]


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_a_slot_is_released_when_all_warps_have_read_it(name):
    """In what is compiled, as the machine has warps go together."""
    kernel = next(each for each in tq.compile(name, head_dim=64).candidates() if each.config.roles > 1)
    order = re.findall(r"wgmma\.wait_group\S*\s+0|bar\.sync\s+\d, 128|mbarrier\.arrive\.shared", kernel.asm["ptx"])
    places = [place for place, each in enumerate(order) if each.startswith("mbarrier")]
    assert len(places) == 4, "of two consumers, for whole tiles and for others"
    for place in places:
        assert order[place - 1].startswith("bar.sync")
        waited = max(before for before in range(place) if order[before].startswith("wgmma"))
        assert "mbarrier.arrive.shared" not in order[waited:place]


@pytest.mark.parametrize("name", preset_names())
def test_presets_with_scores_in_8_bits_have_such_candidates(name):
    made = planned(preset(name), right=True, lse=True)
    assert bool(loops(made)) is (name in PRESETS)
    assert made.config.loop == "portable" and len(loops(made)) in (0, 4)


NONE = {
    "a window": {"left": True, "right": True},
    "softcap": {"softcap": True},
    "a mask": {"mask": "boolean"},
    "a bias": {"bias": "alibi"},
    "sinks": {"sinks": True},
    "lengths of their own": {"varlen": True},
    "padded channels": {"head_dim": 80},
    "another GPU": {"target": "sm_89"},
    "Blackwell": {"target": "sm_100"},
    "the interpreter": {"interpreted": True},
    "rows at any byte": {"portable": True},
}


@pytest.mark.parametrize("features", NONE.values(), ids=NONE)
def test_what_the_loop_lacks_has_no_such_candidate(features):
    assert not loops(planned(preset("int8-fast"), **features)) and loops(planned(preset("int8-fast")))


OTHERS = {
    "scales of K in 16 bits": scheme("int8", "int8 scale=fp16", "int8 channel", "int8 row_block:128"),
    "queries decoded to 16 bits": scheme("int8 group:16", "int8", "int8 channel", "int8 row_block:128"),
    "values of 8 bits that meet P in 16": scheme("int8", "int8", "int8 channel", "fp16"),
    "values decoded to 16 bits": scheme("int8", "int8", "int8 group:16", "int8 row_block:128"),
    "zeros of V": scheme("int8", "int8", "int8 channel asymmetric", "int8 row_block:128"),
    "packed keys": scheme("int8", "int4", "int8 channel", "int8 row_block:128"),
    "a tile of 32": scheme("int8", "int8", "int8 channel", "int8 row_block:32"),
    "rounded sums of floats": scheme("int8", "int8", "fp8_e4m3 channel", "fp8_e4m3", normalizer="quantized"),
}


@pytest.mark.parametrize("s", OTHERS.values(), ids=OTHERS)
def test_what_tensor_cores_cannot_read_from_memory_has_no_such_candidate(s):
    assert not loops(planned(s))


def entry(made, config):
    key = tuned.Key(kernel=generate.name_of(made), device="H100", triton="3.6.0", batch_heads=2, n_q=64, n_k=256)
    return tuned.Entry(key=key, config=config, ms=1.0, default_ms=1.5)


def test_an_entry_that_names_the_loop_is_passed_over_where_there_is_none():
    made = planned(preset("int8-fast"))
    chosen = entry(made, loops(made)[1])
    tuned.record(chosen)
    assert tuned.nearest(made, chosen.key) == chosen
    without = planned(preset("int8-fast"), portable=True)
    assert generate.name_of(without) == chosen.key.kernel and tuned.nearest(without, chosen.key) is None


def test_an_entry_that_names_a_launch_which_is_no_candidate_is_read_and_passed_over():
    made = planned(preset("int8-fast"))
    other = entry(made, replace(loops(made)[2], num_warps=8))
    tuned.record(other)
    assert tuned.known(other.key.kernel) == (other,) and tuned.nearest(made, other.key) is None


def test_an_entry_of_before_there_were_loops_names_the_portable_one():
    made = planned(preset("int8-fast"))
    text = entry(made, made.config).model_dump_json().replace(',"loop":"portable"', "")
    assert "loop" not in text and tuned.Entry.model_validate_json(text).config == made.config


@pytest.mark.compiled
def test_attention_takes_the_loop_where_tuning_chose_it_and_rows_begin_at_whole_16_bytes(on_ptx, monkeypatch):
    def choose(made, *_):
        # as on a GPU
        chosen = entry(made, loops(planned(s, lse=True))[0])
        return (chosen if chosen.chooses_for(made) else SimpleNamespace(config=made.config)).config, None

    s = preset("int8-fast")
    monkeypatch.setattr(tuned, "choose", choose)
    q, k, v = quantized(s.name, 64, 128, 64)
    first = tq.attention(q, k, v, s, return_lse=True, backend="triton")
    apart = torch.zeros(*k.codes.shape[:3], 72, dtype=torch.int8)[..., :64]
    k = replace(k, codes=apart.copy_(k.codes))
    second = tq.attention(q, k, v, s, return_lse=True, backend="triton")
    assert [each.src.fn.is_gluon() for each in on_ptx] == [True, False]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.compiled
def test_sequences_of_their_own_lengths_pass_over_an_entry_of_their_batch_that_names_the_loop(on_ptx, monkeypatch):
    s = preset("int8-fast")
    tensors = [x[0].transpose(0, 1) for x in qkv(100, d=64, dtype=torch.float16)]
    starts = torch.tensor([0, 30, 100], dtype=torch.int32)
    given = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "backend": "triton"}
    expected = tq.attention_varlen(*tensors, s, **given)
    # as on a GPU
    monkeypatch.setattr(tuned, "_of_call", lambda made, *_: tuned.nearest(made, entry(made, made.config).key))
    made = planned(s)
    tuned.record(entry(made, loops(made)[0]))
    assert tuned.choose(made, torch.device("cuda"), 2, 64, 256) == (loops(made)[0], None)
    assert torch.equal(tq.attention_varlen(*tensors, s, **given), expected)
    assert not any(each.src.fn.is_gluon() for each in on_ptx)


@pytest.mark.parametrize("name", PRESETS)
def test_the_text_stands_alone_and_has_the_fragments_of_the_portable_loop(name):
    made = planned(preset(name), right=True, lse=True)
    text = generate.render(made, "hopper")
    tree = ast.parse(text)
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert all(module == "typing" or module.startswith("triton.experimental") for module in imports)
    branches = set(re.findall(r"if ([A-Z]\w+):", text))
    assert branches == {"COPIES"}, "which a block of one warpgroup does; branches on constants are resolved"
    holes = made.holes
    for hole in ("encode_p", "order_p", "count", "row_reference"):
        source = inspect.getsource(getattr(holes[hole], "fn", holes[hole]))
        assert source[source.index("(") :].rstrip() in text
    assert ("k_scales.index" in text) is made.constants["K_PER_KEY"]


# instructions a score in the loop over whole tiles, of 64 queries and of 128 with a producer; head_dim 128
BUDGETS = {"fp8": (8.6, 8.2), "int8-fp8": (9.1, 8.8), "int8-fast": (11.6, 11.0), "int8": (15.2, 14.3)}


@pytest.mark.compiled
@pytest.mark.parametrize("roles", [1, 3])
@pytest.mark.parametrize(
    "name", ["fp8", "int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8-fp8", "int8-fast"))]
)
def test_a_softmax_runs_between_the_waits_for_its_scores_and_for_the_tile_before(name, roles):
    made = tq.compile(name, head_dim=128).candidates()
    kernel = next(each for each in made if each.config.loop == "hopper" and each.config.roles == roles)
    computing = main_loops(machine_code(kernel.compiled)[2], roles)[:2]
    for loop in computing:
        names = [instruction for _, instruction, _ in loop]
        products = [place for place, each in enumerate(names) if "GMMA" in each]
        waits = [place for place, each in enumerate(names) if each.startswith("WARPGROUP.DEPBAR")]
        assert products and max(products) < min(waits), "both products are begun before either is waited for"
        between = names[min(waits) : max(waits)]
        assert sum(each == "MUFU.EX2" for each in between) >= 64, "a thread's exponentials of the tile"
        assert names.count("PRMT") <= 48, "P goes from product to product in registers"
    found = kernel.resources
    assert found.instructions_per_score <= BUDGETS[name][roles > 1]
    assert found.blocks_per_multiprocessor == (2 if roles == 1 else 1) and found.spills_in_loop <= 16 * len(computing)
    assert found.loop["LDGSTS"] in (16, 19), "the copies of a tile are counted once"


def overwritten(kernel, wait="WARPGROUP.DEPBAR.LE gsb0, 0x0"):
    """Instructions that write a register of P while a product may still read it, in the order of the machine code."""
    with NamedTemporaryFile() as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([_cuobjdump(), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found, read = [], set()
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([^;]+?) *;", text):
        name, _, operands = instruction.partition(" ")
        if product := re.match(r"R\d+, R(\d+), gdesc", operands) if "GMMA" in name else None:
            read |= set(range(int(product[1]), int(product[1]) + 4))
        elif instruction == wait:
            read.clear()
        elif (target := re.match(r"R(\d+)\b", operands)) and "GMMA" not in name:
            several = 4 if ".128" in name else 2 if re.search(r"\.64|WIDE", name) else 1
            found += [instruction] * (not read.isdisjoint(range(int(target[1]), int(target[1]) + several)))
    return found


@pytest.mark.compiled
@pytest.mark.parametrize("roles", [1, 3])
@pytest.mark.parametrize(
    "name", ["int8", "int8-fp16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp8", "int8-fast", "int8-token"))]
)
def test_no_register_of_p_is_written_before_its_product_has_ended(name, roles):
    # ptxas before 13.3 may reuse registers that an asynchronous product still reads (triton-lang/triton#11781)
    made = tq.compile(name, head_dim=128).candidates()
    kernel = next(each for each in made if each.config.loop == "hopper" and each.config.roles == roles)
    assert overwritten(kernel) == []
    assert overwritten(kernel, wait="none"), "without the waits there are such instructions"


@pytest.mark.gpu
@pytest.mark.compiled
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("name", PRESETS)
def test_a_gpu_finds_the_numbers_of_the_portable_loop_in_every_launch(name, d, monkeypatch):
    if targets.of(torch.device("cuda")).name != "sm_90":
        pytest.skip("needs an H100 or H200")
    tensors = [x.cuda() for x in qkv(700, 2100, d, heads=8, kv_heads=2, batch=4, dtype=torch.float16)]
    operands = tq.quantize(*tensors, name)
    for causal in (False, True):
        take(monkeypatch, None)
        expected = tq.attention(*operands, name, causal=causal, return_lse=True)
        for place in range(4):
            take(monkeypatch, place)
            for _ in range(20):  # a race would not show in each
                for ours, portable in zip(tq.attention(*operands, name, causal=causal, return_lse=True), expected, strict=True):
                    if name == "int8-token":
                        # the sum of a row of P is one of products, which compilers fuse with additions in pairs of their choice
                        rtol = {torch.float16: 2**-10, torch.float32: 0.0}[ours.dtype]
                        torch.testing.assert_close(ours, portable, rtol=rtol, atol=4e-6)
                    else:
                        assert torch.equal(ours, portable), f"candidate {place}"
