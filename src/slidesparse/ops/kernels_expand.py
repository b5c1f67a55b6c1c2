"""Triton kernels that expand packed weights, to dense rows (restore) or to slid rows (slide), for patterns on 2:4 hardware.

Elements of 1 or 2 bytes (``SIZE``) move as integers. Restoring works by chunks of 8 output bytes: the keep-bits of a chunk's positions
select bytes from the 8 that follow in the row's stream of values, by two byte permutations. Sliding works by windows: each holds the
next two values, and where the dropped positions lie says in which lanes. A thread writes 16 bytes, two chunks, four windows or two
of 2-byte elements, each a tensor of its own: that way no value ever changes threads.
Rows are addressed in 64 bits, positions within a row in 32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _select_bytes(low, high, selector, INLINE: tl.constexpr):
    """Four bytes of ``high:low`` picked by the four lowest nibbles of the selector, each below 8; all uint32."""
    if INLINE:
        picked = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        # The interpreter has no inline assembly.
        stream = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
        picked = low ^ low
        for lane in tl.static_range(4):
            byte = (stream >> (((selector >> (4 * lane)) & 7) * 8).to(tl.uint64)) & 0xFF
            picked = picked | (byte.to(tl.uint32) << (8 * lane))
    return picked


@triton.jit
def _spread(bits, SIZE: tl.constexpr):
    """Keep-bits of a chunk, apart: one in each nibble (8 of them) or byte (4)."""
    if SIZE == 1:
        bits = (bits | (bits << 12)) & 0x000F000F
        bits = (bits | (bits << 6)) & 0x03030303
        return (bits | (bits << 3)) & 0x11111111
    return (bits * 0x00204081) & 0x01010101


@triton.jit
def _set_bits(spread, SIZE: tl.constexpr):
    return (spread * 0x11111111) >> 28 if SIZE == 1 else (spread * 0x01010101) >> 24


@triton.jit
def _deposit(low, high, spread, SIZE: tl.constexpr, FULL: tl.constexpr, INLINE: tl.constexpr):
    """Put the next values of the stream ``high:low`` where the chunk's keep-bits are, zeros elsewhere: int64."""
    # A chunk that drops anything leaves the last element of its 8 bytes free to be the zero. Products add up the bits below each
    # position, which is its rank.
    if SIZE == 1:
        short = high & 0x00FFFFFF
        full = spread == 0x11111111
        kept, rank, free = spread * 15, spread * 0x11111110, 0x77777777
    else:
        short = high & 0x0000FFFF
        full = spread == 0x01010101
        kept, rank, free = spread * 255, spread * 0x22222200 + 0x10101010, 0x76767676
    high = tl.where(full, high, short) if FULL else short
    selector = (rank & kept) | ((kept ^ 0xFFFFFFFF) & free)
    first = _select_bytes(low, high, selector, INLINE)
    second = _select_bytes(low, high, selector >> 16, INLINE)
    return (first.to(tl.uint64) | (second.to(tl.uint64) << 32)).to(tl.int64, bitcast=True)


@triton.jit
def _two_or_fewer(bits):
    """How many bits are set, if they are at most two."""
    return (bits != 0).to(tl.uint32) + ((bits & (bits - 1)) != 0).to(tl.uint32)


@triton.jit
def _byte(keep, index, inside):
    return tl.load(keep + index.to(tl.int32), mask=inside, other=0).to(tl.uint32)


@triton.jit
def _start(keep, pair, own, inside, KEPT: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HISTORY: tl.constexpr):
    """Index in the row of the first value at or after a pair of chunks; ``own`` is the first keep byte of the pair."""
    positions: tl.constexpr = 16 // SIZE
    if positions % GROUP == 0:
        start = pair * (positions // GROUP * KEPT)
    else:
        position = pair * positions
        group = position // GROUP
        reach = position - group * GROUP
        window = own << (8 * HISTORY)
        for back in tl.static_range(HISTORY):
            byte = _byte(keep, position // 8 - (back + 1), inside & (position // 8 > back))
            window = window | (byte << (8 * (HISTORY - 1 - back)))
        below = (window >> (8 * HISTORY - reach)) | (0xFFFFFFFF << reach)
        start = group * KEPT + reach - _two_or_fewer(below ^ 0xFFFFFFFF)
    return start


@triton.jit
def _word(values, index, last, inside):
    return tl.load(values + index.to(tl.int32), mask=inside & (index <= last), other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _funnel(low, high, shift):
    """The lower word of ``high:low`` shifted right by 0 to 32 bits."""
    return ((low.to(tl.uint64) | (high.to(tl.uint64) << 32)) >> shift.to(tl.uint64)).to(tl.uint32)


@triton.jit
def _sixteen_bytes(values, first, last, inside, WORDS: tl.constexpr, ALIGNED: tl.constexpr):
    """The 16 bytes from byte ``first`` of a row on, of which ``WORDS`` aligned words hold what is needed; ``values`` points to the row's
    first word, ``last`` is its last."""
    index = first >> 2
    a = _word(values, index, last, inside)
    zero = a ^ a
    b = _word(values, index + 1, last, inside) if WORDS > 1 else zero
    c = _word(values, index + 2, last, inside) if WORDS > 2 else zero
    d = _word(values, index + 3, last, inside) if WORDS > 3 else zero
    if not ALIGNED:
        e = _word(values, index + 4, last, inside) if WORDS > 4 else zero
        shift = (first & 3) * 8
        a, b, c, d = _funnel(a, b, shift), _funnel(b, c, shift), _funnel(c, d, shift), _funnel(d, e, shift)
    return a, b, c, d


@triton.jit
def _second_stream(a, b, c, d, taken, LOOSE: tl.constexpr):
    """What follows in 16 bytes after the first ``taken``: 4 to 8 of them, or, if ``LOOSE``, 0 to 8."""
    shift = taken * 8 - 32
    if LOOSE:
        few = taken < 4
        b, c, d = tl.where(few, a, b), tl.where(few, b, c), tl.where(few, c, d)
        shift = tl.where(few, taken * 8, shift)
    return _funnel(b, c, shift), _funnel(c, d, shift)


@triton.jit
def _place(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each thread's row (int64) and its place among the threads of that row; blocks of rows take two axes of the grid, which are short.

    One axis for all threads: on two, Triton may lay warps across the rows, and loads fall apart.
    """
    thread = tl.arange(0, ROWS * BLOCK)
    block = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    return block.to(tl.int64) * ROWS + thread // BLOCK, thread % BLOCK


@triton.jit
def _pair_of_chunks(
    values, keep, pair, last, into, rows_in, chunks,
    KEPT: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HISTORY: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr,
    INLINE: tl.constexpr,
):  # fmt: skip
    """Chunks 2·pair and 2·pair + 1 of the rows, int64 each."""
    positions: tl.constexpr = 8 // SIZE
    inside, both = rows_in & (2 * pair < chunks), rows_in & (2 * pair + 1 < chunks)
    if SIZE == 1:
        own = _byte(keep, 2 * pair, inside)
        second = _spread(_byte(keep, 2 * pair + 1, both), SIZE)
    else:
        own = _byte(keep, pair, inside)
        second = _spread(own >> 4, SIZE)
    first = _spread(own if SIZE == 1 else own & 15, SIZE)
    start = _start(keep, pair, own, inside, KEPT, GROUP, SIZE, HISTORY)
    a, b, c, d = _sixteen_bytes(values, start * SIZE + into, last, inside, WORDS, ALIGNED)
    full: tl.constexpr = positions % GROUP != 0
    one = _deposit(a, b, first, SIZE, full, INLINE)
    count = _set_bits(first, SIZE) if full else tl.full(first.shape, positions // GROUP * KEPT, tl.uint32)
    low, high = _second_stream(a, b, c, d, count * SIZE, SIZE == 2 and GROUP % 4 != 0)
    return one, _deposit(low, high, second, SIZE, full, INLINE)


@triton.jit
def restore_kernel(
    values, keep, dense, n, k, values_stride, keep_stride,
    KEPT: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HISTORY: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNKED: tl.constexpr, STEP: tl.constexpr, INLINE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """values (bytes, rows of ``values_stride``), keep (bytes, rows of ``keep_stride``) → dense ``[n, k]``.

    ``dense`` is int64, one chunk each, with k in chunks, if ``CHUNKED``; else integers of the elements' size, with k in elements. k comes
    divided by ``STEP``: multiplied by it here, the compiler sees how far rows are aligned.
    """
    k = k * STEP
    positions: tl.constexpr = 8 // SIZE
    rows, place = _place(ROWS, BLOCK)
    rows_in = rows < n
    chunks = k if CHUNKED else (k + (positions - 1)) // positions
    # Words are aligned, rows of values need not be.
    origin = rows * values_stride
    into = (origin & 3).to(tl.uint32)
    last = (into + (values_stride - 1).to(tl.uint32)) >> 2
    values = values.to(tl.pointer_type(tl.int32), bitcast=True) + (origin >> 2)
    keep = keep + rows * keep_stride
    out = (dense + rows * k)[:, None]
    # All loads stand before the first store, or they would have to wait for it.
    results = ()
    for step in tl.static_range(UNROLL):
        pair = ((tl.program_id(0) * UNROLL + step) * BLOCK + place).to(tl.uint32)
        one, two = _pair_of_chunks(
            values, keep, pair, last, into, rows_in, chunks, KEPT, GROUP, SIZE, HISTORY, WORDS, ALIGNED, INLINE
        )  # fmt: skip
        results = results + (tl.join(one, two),)  # noqa: RUF005
    for step in tl.static_range(UNROLL):
        pair = (tl.program_id(0) * UNROLL + step) * BLOCK + place
        chunk = (pair * 2)[:, None] + tl.arange(0, 2)[None, :]
        if CHUNKED:
            tl.store(out + chunk, results[step], mask=rows_in[:, None] & (chunk < chunks))
        else:
            for lane in tl.static_range(positions):
                column = chunk * positions + lane
                element = (results[step] >> (8 * SIZE * lane)).to(dense.dtype.element_ty)
                tl.store(out + column, element, mask=rows_in[:, None] & (column < k))


@triton.jit
def _lifts(keep, group, inside, GROUP: tl.constexpr, BYTES: tl.constexpr):
    """Which values of a group stand higher than their number: bit j of the first says that a dropped position lies below value j, bit j
    of the second that both do."""
    position = group * GROUP
    bits = _byte(keep, position // 8, inside)
    for more in tl.static_range(1, BYTES):
        # A group's bits can end before the bytes that the worst group takes do.
        needed = inside & (position % 8 + GROUP > 8 * more)
        bits = bits | (_byte(keep, position // 8 + more, needed) << (8 * more))
    if GROUP % 8 != 0:
        bits = bits >> (position & 7)
    # With z1 < z2 dropped, value j stands z1 <= j and z2 - 1 <= j positions above j. Minus a power of two sets all bits from its on.
    dropped = (bits & ((1 << GROUP) - 1)) ^ ((1 << GROUP) - 1)
    first = dropped & ((dropped ^ 0xFFFFFFFF) + 1)
    second = (dropped ^ first) >> 1
    values: tl.constexpr = (1 << (GROUP - 2)) - 1
    return ((first ^ 0xFFFFFFFF) + 1) & values, ((second ^ 0xFFFFFFFF) + 1) & values


@triton.jit
def _lanes(
    keep, window, rows_in, windows, COUNT: tl.constexpr, GROUP: tl.constexpr, WINDOWS: tl.constexpr, GROUPS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """How many lanes above its first the values of ``COUNT`` windows stand, 2 bits each, from ``window`` on."""
    group = window // WINDOWS
    within = window - group * WINDOWS
    one, both = _lifts(keep, group, rows_in & (window < windows), GROUP, BYTES)
    one, both = one >> (2 * within), both >> (2 * within)
    for more in tl.static_range(1, GROUPS):
        there = rows_in & ((group + more) * WINDOWS < windows)
        next_one, next_both = _lifts(keep, group + more, there, GROUP, BYTES)
        one, both = one | (next_one << (2 * (more * WINDOWS - within))), both | (next_both << (2 * (more * WINDOWS - within)))
    # The low and the high bit of every number, apart by 16 bits until both are spread.
    wanted: tl.constexpr = (1 << (2 * COUNT)) - 1
    bits = ((one ^ both) & wanted) | ((both & wanted) << 16)
    if COUNT > 2:
        bits = (bits | (bits << 4)) & 0x0F0F0F0F
    bits = (bits | (bits << 2)) & 0x33333333
    bits = (bits | (bits << 1)) & 0x55555555
    return bits | (bits >> 15)


@triton.jit
def _window(value, lanes, INDEX: tl.constexpr, SIZE: tl.constexpr):
    """The window of two values, as the signed integer that it is stored as."""
    wide = tl.uint32 if SIZE == 1 else tl.uint64
    narrow = tl.int32 if SIZE == 1 else tl.int64
    up0 = ((lanes >> (4 * INDEX)) & 3) * (8 * SIZE)
    up1 = ((lanes >> (4 * INDEX + 2)) & 3) * (8 * SIZE)
    low = (value & (0xFF if SIZE == 1 else 0xFFFF)).to(wide) << up0.to(wide)
    high = (value & (0xFF00 if SIZE == 1 else 0xFFFF0000)).to(wide) << up1.to(wide)
    return (low | high).to(narrow, bitcast=True)


@triton.jit
def _values_of_windows(pairs, index, rows_in, windows, COUNT: tl.constexpr):
    """The values of ``COUNT`` windows a thread, each window's in a uint32 tensor of its own."""
    column = (index * COUNT)[:, None] + tl.arange(0, COUNT)[None, :]
    value = tl.load(pairs[:, None] + column, mask=rows_in[:, None] & (column < windows), other=0)
    if COUNT == 2:
        first, second = tl.split(value)
        values = (first.to(tl.uint32, bitcast=True), second.to(tl.uint32, bitcast=True))
    else:
        even, odd = tl.split(value.to(tl.uint16, bitcast=True).to(tl.uint32).reshape(value.shape[0], 2, 2))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        values = (first, second, third, fourth)
    return values


@triton.jit
def slide_kernel(
    values, keep, slid, n, n_out, windows, width, keep_stride,
    GROUP: tl.constexpr, WINDOWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BYTES: tl.constexpr,
    WINDOWS_STEP: tl.constexpr, WIDTH_STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """values ``[n, windows]``, the two of each window as one integer, keep (bytes) → slid ``[n_out, width]``, a window each.

    slid is int32 (elements of 1 byte) or int64 (of 2); rows from n and windows from ``windows`` on are 0. Both counts
    come divided by their steps, as in `restore_kernel`.
    """
    windows = windows * WINDOWS_STEP
    width = width * WIDTH_STEP
    count: tl.constexpr = 4 // SIZE
    rows, place = _place(ROWS, BLOCK)
    rows_in = rows < n
    pairs = values + rows * windows
    keep = keep + rows * keep_stride
    out = (slid + rows * width)[:, None]
    results = ()
    for step in tl.static_range(UNROLL):
        index = (tl.program_id(0) * UNROLL + step) * BLOCK + place
        value = _values_of_windows(pairs, index, rows_in, windows, count)
        lanes = _lanes(keep, index.to(tl.uint32) * count, rows_in, windows, count, GROUP, WINDOWS, GROUPS, BYTES)
        made = ()
        for i in tl.static_range(count):
            made = made + (_window(value[i], lanes, i, SIZE),)  # noqa: RUF005
        if count == 2:
            joined = tl.join(made[0], made[1])
        else:
            joined = tl.join(tl.join(made[0], made[2]), tl.join(made[1], made[3])).reshape(ROWS * BLOCK, 4)
        results = results + (joined,)  # noqa: RUF005
    for step in tl.static_range(UNROLL):
        index = ((tl.program_id(0) * UNROLL + step) * BLOCK + place) * count
        column = index[:, None] + tl.arange(0, count)[None, :]
        tl.store(out + column, results[step], mask=(rows < n_out)[:, None] & (column < width))
