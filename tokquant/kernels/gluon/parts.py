"""Functions that the template calls whatever fills its holes."""

from tokquant.kernels.gluon.language import async_load, tl, triton


@triton.jit
def places(base, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # pointers to a tile, 16 bytes of a row to a thread, and the row and the column of each. Rows that a thread takes further
    # down have a dimension of their own and are added last: what it keeps is one offset, and the rest is one for all
    EACH: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    ACROSS: tl.constexpr = COLUMNS // EACH
    AT_ONCE: tl.constexpr = tl.num_warps() * 32 // ACROSS
    TAKEN: tl.constexpr = tl.BlockedLayout([1, 1, EACH], [1, 32 // ACROSS, ACROSS], [1, tl.num_warps(), 1], [2, 1, 0])
    further = tl.arange(0, ROWS // AT_ONCE, layout=tl.SliceLayout(1, tl.SliceLayout(2, TAKEN)))[:, None, None] * AT_ONCE
    row = tl.arange(0, AT_ONCE, layout=tl.SliceLayout(0, tl.SliceLayout(2, TAKEN)))[None, :, None]
    column = tl.arange(0, COLUMNS, layout=tl.SliceLayout(0, tl.SliceLayout(1, TAKEN)))[None, None, :]
    at = base + (row * stride + column) + further.to(tl.int64) * stride
    rows = (further + row + column * 0).reshape(ROWS, COLUMNS)
    columns = (further * 0 + row * 0 + column).reshape(ROWS, COLUMNS)
    # launches see to it that rows begin at multiples of 16 bytes
    return tl.max_contiguous(tl.multiple_of(at.reshape(ROWS, COLUMNS), [16, 16]), [1, EACH]), rows, columns


@triton.jit
def fetch_rows(tile, base, stride, count):
    # begins to copy; rows from `count` on come as zeros, and none is read
    at, row, _ = places(base, stride, tile.shape[0], tile.shape[1])
    async_load(tile, at, mask=tl.max_constancy(row < count, [1, 16]))


@triton.jit
def fetch_columns(tile, base, stride, count):
    # the same of columns, by whole 16
    at, _, column = places(base, stride, tile.shape[0], tile.shape[1])
    async_load(tile, at, mask=tl.max_constancy(column < count, [1, 16]))


@triton.jit
def fetch_floats(floats, base, stride, GROUP: tl.constexpr, start, count):
    # one for each key or channel, of which each GROUP have one together
    n = tl.arange(0, floats.shape[0], layout=tl.BlockedLayout([1], [32], [tl.num_warps()], [0]))
    async_load(floats, base + ((start + n) // GROUP) * stride, mask=n < count)


@triton.jit
def in_words(codes, M: tl.constexpr, N: tl.constexpr):
    # [M, N] codes of 8 or 16 bits -> [M, N / 4] or [M, N / 2] words of those that a thread has side by side anyway: no
    # instruction. Parts of words would go through a loop one by one
    if codes.dtype.primitive_bitwidth == 8:
        words = tl.inline_asm_elementwise("mov.b32 $0, $4;", "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
        found, _ = tl.split(tl.split(words.reshape(M, N // 4, 2, 2))[0])
    else:
        words = tl.inline_asm_elementwise("mov.b32 $0, $2;", "=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=2)
        found, _ = tl.split(words.reshape(M, N // 2, 2))
    return found


@triton.jit
def of_words(words, TYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    # the reverse
    two = tl.join(words, tl.zeros_like(words))
    if words.shape[1] * 4 == N:
        four = tl.join(two, tl.zeros_like(two)).reshape(M, N)
        codes = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [four], dtype=tl.int8, is_pure=True, pack=4)
    else:
        codes = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r", [two.reshape(M, N)], dtype=tl.int16, is_pure=True, pack=2
        )
    return codes.to(TYPE, bitcast=True)


@triton.jit
def stay_behind(x):
    # the compiler moves a wait for products up to the last access to memory before it: here is one that needs `x`, of a byte
    # that nobody wants, among the kernel's own: the first of shared memory belong to the system
    tl.inline_asm_elementwise(
        "{ .reg .b32 own, at; mov.b32 own, global_smem; shr.u32 at, $1, 31; add.u32 at, at, own; "
        "ld.volatile.shared.u8 $0, [at]; }",
        "=r,r",
        [x],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
