"""Functions that the template calls in every kernel."""

from tokquant.kernels.gluon.language import async_load, tl, triton


@triton.jit
def places(base, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # pointers to a tile, and the row and column of each; a thread loads 16 bytes of a row. The further rows of a thread are a
    # dimension of their own, added last: a thread then keeps one offset, and the other terms are the same for all threads
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
    # launches check that rows begin at multiples of 16 bytes
    return tl.max_contiguous(tl.multiple_of(at.reshape(ROWS, COLUMNS), [16, 16]), [1, EACH]), rows, columns


@triton.jit
def fetch_rows(tile, base, stride, count):
    # begin an asynchronous copy of a tile; rows from `count` on are not read, and arrive as zeros
    at, row, _ = places(base, stride, tile.shape[0], tile.shape[1])
    async_load(tile, at, mask=tl.max_constancy(row < count, [1, 16]))


@triton.jit
def fetch_columns(tile, base, stride, count):
    # the same, but bounded by columns, in whole groups of 16
    at, _, column = places(base, stride, tile.shape[0], tile.shape[1])
    async_load(tile, at, mask=tl.max_constancy(column < count, [1, 16]))


@triton.jit
def fetch_floats(floats, base, stride, GROUP: tl.constexpr, start, count):
    # one float per key or channel of the tile; each GROUP of these share one
    n = tl.arange(0, floats.shape[0], layout=tl.BlockedLayout([1], [32], [tl.num_warps()], [0]))
    async_load(floats, base + ((start + n) // GROUP) * stride, mask=n < count)


@triton.jit
def in_words(codes, M: tl.constexpr, N: tl.constexpr):
    # [M, N] codes of 8 or 16 bits -> [M, N / 4] or [M, N / 2] words of codes that are adjacent in a thread's registers anyway,
    # so it costs no instruction. Codes carried through a loop would take a register each
    if codes.dtype.primitive_bitwidth == 8:
        words = tl.inline_asm_elementwise("mov.b32 $0, $4;", "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4)
        found, _ = tl.split(tl.split(words.reshape(M, N // 4, 2, 2))[0])
    else:
        words = tl.inline_asm_elementwise("mov.b32 $0, $2;", "=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=2)
        found, _ = tl.split(words.reshape(M, N // 2, 2))
    return found


@triton.jit
def of_words(words, TYPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    # the reverse of in_words
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
    # the compiler moves a wait for products up to the last memory access before it. So here is such an access that depends on
    # `x`: a load of an unused byte of the kernel's own shared memory, whose first bytes belong to the system
    tl.inline_asm_elementwise(
        "{ .reg .b32 own, at; mov.b32 own, global_smem; shr.u32 at, $1, 31; add.u32 at, at, own; "
        "ld.volatile.shared.u8 $0, [at]; }",
        "=r,r",
        [x],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
