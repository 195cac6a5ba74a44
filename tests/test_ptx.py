"""The machine that runs PTX where there is no GPU computes what torch does, and forgives nothing that a GPU would not."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx import device, text
from ptx.arithmetic import function
from ptx.block import Block, Deadlock
from ptx.memory import Memory, OutOfBounds
from triton.runtime.errors import OutOfResources

pytestmark = pytest.mark.compiled

LEAST = {torch.int8: 0, torch.float8_e4m3fn: 2.0**-9}  # shares of what is added that sums may be off by
UNITS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma"}


@triton.jit
def product(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACROSS: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    at = k[:, None] * N + n if ACROSS else n * K + k[:, None]
    found = tl.dot(tl.load(a + m * K + k[None, :]), tl.load(b + at))
    tl.store(c + m * N + n, found)


@pytest.mark.parametrize("across", [False, True], ids=["columns", "rows"])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("on_ptx", UNITS, indirect=True)
def test_products_are_those_of_torch(on_ptx, kind, across, request):
    capability = request.node.callspec.params["on_ptx"]
    if kind == torch.float8_e4m3fn and capability == 80:
        pytest.skip("sm_80 has no 8-bit floats")
    for m, n, k, warps in ((64, 32, 32, 4), (128, 64, 128, 8), (16, 128, 64, 2)):
        a, b = ((40 * torch.randn(shape)).to(kind) for shape in ((m, k), (k, n)))
        c = torch.full((m, n), -1, dtype=torch.int32 if kind == torch.int8 else torch.float32)
        product[(1,)](a, b if across else b.T.contiguous(), c, m, n, k, across, num_warps=warps)
        expected, most = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        assert ((c - expected).abs() <= LEAST.get(kind, 1e-6) * most).all()
        assert m < 64 or UNITS[capability] in on_ptx[-1].asm["ptx"]


def test_a_product_is_there_when_it_is_waited_for_and_of_what_a_fence_has_shown(on_ptx):
    a, b = ((40 * torch.randn(64, 64)).to(torch.int8) for _ in range(2))
    c = torch.zeros(64, 64, dtype=torch.int32)
    given = (a, b.T.contiguous(), c, 64, 64, 64, True)
    product[(1,)](*given, num_warps=4)
    [compiled], expected = on_ptx, a.int() @ b.T.int()
    assert torch.equal(c, expected) and compiled.unfenced == 0

    def without(instruction):
        lines = compiled.asm["ptx"].splitlines()
        left = [line for line in lines if not line.strip().startswith(instruction)]
        assert len(left) < len(lines)
        changed = SimpleNamespace(asm={"ptx": "\n".join(left)}, src=compiled.src, metadata=compiled.metadata)
        return device.launch(changed, (1,), given), torch.equal(c, expected)

    assert without("wgmma.wait_group") == (0, False)
    unfenced, same = without("fence.proxy.async")
    assert unfenced > 0 and same


@pytest.mark.parametrize("on_ptx", [89, 90], indirect=True)
def test_sums_of_8_bit_floats_lose_what_is_13_bits_below_the_largest(on_ptx):
    a, b = torch.zeros(64, 32), torch.ones(32, 32).to(torch.float8_e4m3fn)
    a[:, 0], a[:, 1] = 256.0, 2.0**-5  # of 2^8, bits down to 2^-5 are kept
    a[1, 1], a[2, 1:5] = 2.0**-6, 2.0**-6
    c = torch.zeros(64, 32)
    product[(1,)](a.to(torch.float8_e4m3fn), b, c, 64, 32, 32, False, num_warps=4)
    assert c[0, 0] == 256 + 2.0**-5 and c[1, 0] == 256 and c[2, 0] == 256


@triton.jit
def convert(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize(("opcode", "found"), [("shf.l.wrap.b32", 0x2345678A), ("shf.r.wrap.b32", 0x8ABCDEF0)])
def test_a_funnel_shifts_two_registers_as_one(opcode, found):
    shift, *_ = function(opcode)
    low, high, by = (np.array([x], np.uint32) for x in (0xABCDEF01, 0x12345678, 36))
    assert shift(low, high, by)[0] == found


def test_a_fused_multiply_add_rounds_once():
    """Of float32, where the float64 between is halfway to the next one."""
    multiply_add, *_ = function("fma.rn.f32")
    a, b = (np.full(4, x, np.float32) for x in (1 + 2.0**-12, 1 + 2.0**-12))
    c = np.array([2.0**-30, -(2.0**-30), 2.0**-60, -(2.0**-60)], np.float32)  # a b is halfway: 1 + 2^-11 + 2^-24
    assert multiply_add(a, b, c).tolist() == [1 + 2.0**-11 + 2.0**-23, 1 + 2.0**-11] * 2


def test_floats_are_cut_toward_zero():
    convert, *_ = function("cvt.rz.f16.f32")
    given = np.array([1 + 2.0**-10 + 2.0**-11, -1 - 2.0**-11, 2.0**-25, 1e9, -math.inf, math.nan], np.float32)
    with np.errstate(over="ignore"):
        found = convert(given).tolist()
    assert str(found) == str([1 + 2.0**-10, -1.0, 0.0, 65504.0, -math.inf, math.nan])


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_conversions_are_those_of_torch_for_every_number_and_tie(narrow, on_ptx):
    bits = torch.arange(2 ** (8 * narrow.itemsize)).to(torch.uint8 if narrow.itemsize == 1 else torch.uint16).view(narrow)
    numbers = bits[bits.float().isfinite()]
    wide = torch.full((len(bits),), float("nan"))
    convert[(1,)](bits, wide, len(bits))
    assert torch.equal(wide[: len(bits)].nan_to_num(7), bits.float().nan_to_num(7))
    ordered = numbers.float().sort().values
    x = torch.cat([ordered, (ordered[1:] + ordered[:-1]) / 2])
    x = torch.nn.functional.pad(x, (0, triton.next_power_of_2(len(x)) - len(x)))
    out = torch.zeros(len(x), dtype=narrow)
    convert[(1,)](x, out, len(x))
    assert torch.equal(out.float(), x.to(narrow).float())


@triton.jit
def copy(x, out, start, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + start + i))


def test_a_read_beyond_a_tensor_is_found(on_ptx):
    x = torch.arange(300)[:256]
    out = torch.zeros(128, dtype=x.dtype)
    copy[(1,)](x, out, 128, 128)
    assert torch.equal(out, x[128:])
    with pytest.raises(OutOfBounds, match="of which 8 lie beyond 2048"):
        copy[(1,)](x, out, 129, 128)
    with pytest.raises(OutOfBounds):
        copy[(1,)](x, out[:127], 0, 128)


@pytest.mark.parametrize("on_ptx", [89], indirect=True)
def test_a_block_with_more_shared_memory_than_there_is_is_not_launched(on_ptx):
    a, b, c = torch.zeros(128, 512, dtype=torch.int8), torch.zeros(128, 512, dtype=torch.int8), torch.zeros(128, 128).int()
    with pytest.raises(OutOfResources, match="Required: 131072, Hardware limit: 101376"):
        product[(1,)](a, b, c, 128, 128, 512, False)


def test_a_wide_load_that_is_not_aligned_is_found(on_ptx):
    x, out = torch.zeros(2049, dtype=torch.int8), torch.zeros(2048, dtype=torch.int8)
    copy[(1,)](x[:2048], out, 0, 2048)  # compiled for what begins at a multiple of 16
    with pytest.raises(OutOfBounds, match=r"16 bytes at .* not aligned"):
        device.launch(on_ptx[-1], (1,), [x[1:], out, 0, 2048])


COPY = """
.visible .entry copied(.param .u64 a_param_0,
.param .u64 a_param_1
) .reqntid 32
{
.reg .b32 %r<4>; .reg .b64 %rd<3>;
ld.param.b64 %rd1, [a_param_0];
ld.param.b64 %rd2, [a_param_1];
cp.async.ca.shared.global [ global_smem + 0 ], [ %rd1 + 0 ], 0x4;
cp.async.commit_group;
WAIT
ld.shared.b32 %r1, [global_smem];
st.global.b32 [ %rd2 + 0 ], { %r1 };
ret;
}"""


@pytest.mark.parametrize(("wait", "found"), [("cp.async.wait_group 0;", 7), ("cp.async.wait_group 1;", -1), ("", -1)])
def test_a_copy_arrives_when_it_is_waited_for(wait, found):
    x, out = np.full(4, 7, np.uint8), np.zeros(4, np.uint8)
    x[1:] = 0
    given = {"a_param_0": (256).to_bytes(8, "little"), "a_param_1": (512).to_bytes(8, "little")}
    Block(text.read(COPY.replace("WAIT", wait)), given, Memory([(256, x), (512, out)]), 16, {}).run()
    assert out.view(np.int32)[0] == found


WARPGROUPS = """
.visible .entry copied_by_others(.param .u64 a_param_0,
.param .u64 a_param_1
) .reqntid 256
.maxnreg 64
{
.reg .pred %p<3>; .reg .b32 %r<4>; .reg .b64 %rd<3>;
ld.param.b64 %rd1, [a_param_0];
ld.param.b64 %rd2, [a_param_1];
mov.u32 %r1, %tid.x;
setp.eq.u32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [global_smem+8], 128;
barrier.sync 1;
setp.lt.u32 %p2, %r1, 128;
@%p2 bra READ;
setmaxnreg.dec.sync.aligned.u32 24;
cp.async.ca.shared.global [ global_smem + 0 ], [ %rd1 + 0 ], 0x4;
cp.async.mbarrier.arrive.noinc.shared.b64 [global_smem+8];
ret;
READ:
setmaxnreg.inc.sync.aligned.u32 104;
{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared.b64 complete, [global_smem+8], 0;
@!complete bra.uni waitLoop;
}
ld.shared.b32 %r2, [global_smem];
st.global.b32 [ %rd2 + 0 ], { %r2 };
ret;
}"""

WAIT = "mbarrier.try_wait.parity.shared.b64 complete, [global_smem+8], 0;\n@!complete bra.uni waitLoop;"


def run_warpgroups(of, to, order):
    x, out = np.array([7, 0, 0, 0], np.uint8), np.zeros(4, np.uint8)
    given = {"a_param_0": (256).to_bytes(8, "little"), "a_param_1": (512).to_bytes(8, "little")}
    assert of in WARPGROUPS
    Block(text.read(WARPGROUPS.replace(of, to)), given, Memory([(256, x), (512, out)]), 16, {}).run(order)
    return out.view(np.int32)[0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_warpgroups_part_and_a_copy_of_one_is_there_when_the_other_has_waited(order):
    assert run_warpgroups("ret", "ret", order) == 7
    assert run_warpgroups(WAIT, "", order) == -1


@pytest.mark.parametrize(
    ("of", "to"),
    [
        ("[global_smem+8], 128", "[global_smem+8], 129"),
        (".noinc", ""),
        ("inc.sync.aligned.u32 104", "inc.sync.aligned.u32 112"),
        ("@%p2 bra READ;\nsetmaxnreg", "@%p2 bra READ;\nbarrier.sync 1;\nsetmaxnreg"),
    ],
    ids=["arrivals", "arrivals taken back", "registers", "threads"],
)
def test_what_nobody_can_wait_for_to_its_end_is_an_error(of, to):
    with pytest.raises(Deadlock, match="warpgroup 0 waits at"):
        run_warpgroups(of, to, (0, 1))


def test_a_thread_arrives_as_often_as_it_says():
    arrive = "cp.async.mbarrier.arrive.noinc.shared.b64 [global_smem+8]"
    with pytest.raises(AssertionError, match="256 arrivals"):
        run_warpgroups(arrive, "mbarrier.arrive.shared.b64 _, [global_smem+8], 2", ())


def test_a_barrier_that_is_written_over_is_found():
    with pytest.raises(OutOfBounds, match="a barrier is written over"):
        run_warpgroups("[ global_smem + 0 ], [ %rd1", "[ global_smem + 12 ], [ %rd1", ())


@pytest.mark.parametrize(
    "opcode",
    [
        "add.sat.f32", "fma.rn.relu.f16", "mul.rz.f32", "cvt.rz.bf16.f32", "cvt.rn.relu.f16.f32", "cvt.sat.f32.f32",
        "setp.lt.ftz.f32", "cvt.rn.satfinite.f16.f32", "prmt.b32.f4e",
    ],
)  # fmt: skip
def test_a_modifier_that_is_not_heeded_is_an_error(opcode):
    with pytest.raises(KeyError):
        function(opcode)


@pytest.mark.parametrize(("mode", "expected"), [("rni", [-2.0, 0.0, 2.0]), ("rzi", [-1.0, 0.0, 2.0])])
def test_floats_are_rounded_to_whole_ones(mode, expected):
    convert, *_ = function(f"cvt.{mode}.f32.f32")
    assert convert(np.array([-1.75, 0.5, 2.25], np.float32)).tolist() == expected


LEFT_OUT = """
.visible .entry left(.param .u64 a_param_0
) .reqntid 32
{
.reg .pred %p<2>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
ld.param.b64 %rd1, [a_param_0];
mov.u32 %r1, %tid.x;
setp.lt.u32 %p1, %r1, 8;
mul.wide.u32 %rd2, %r1, 4;
add.s64 %rd3, %rd1, %rd2;
@%p1 ld.global.b32 %r2, [ %rd3 + 0 ];
st.global.b32 [ %rd3 + 0 ], { %r2 };
ret;
}"""


def test_threads_that_load_nothing_have_what_is_no_number():
    x = np.zeros(128, np.uint8)
    Block(text.read(LEFT_OUT), {"a_param_0": (256).to_bytes(8, "little")}, Memory([(256, x)]), 16, {}).run()
    assert x.view(np.int32).tolist() == [0] * 8 + [-1] * 24


OF_ITS_OWN = """
.visible .entry kept(.param .u64 a_param_0
) .reqntid 32
{
.local .align 2 .b8 __local_depot0[4];
.reg .b64 %SP; .reg .b64 %SPL; .reg .b16 %rs<3>; .reg .b32 %r<4>; .reg .b64 %rd<4>;
mov.b64 %SPL, __local_depot0;
cvta.local.u64 %SP, %SPL;
ld.param.b64 %rd1, [a_param_0];
mov.u32 %r1, %tid.x;
cvt.u16.u32 %rs1, %r1;
st.b8 [%SP+3], %rs1;
st.local.b8 [%SPL+2], 1;
ld.b16 %rs2, [%SP+2];
mul.wide.u32 %rd2, %r1, 2;
add.s64 %rd3, %rd1, %rd2;
st.global.b16 [ %rd3 + 0 ], { %rs2 };
ret;
}"""


def test_a_thread_keeps_bytes_for_itself():
    x = np.zeros(64, np.uint8)
    Block(text.read(OF_ITS_OWN), {"a_param_0": (256).to_bytes(8, "little")}, Memory([(256, x)]), 16, {}).run()
    assert x.view(np.uint16).tolist() == [256 * thread + 1 for thread in range(32)]
