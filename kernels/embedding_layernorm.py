"""embedding_layernorm: out = dropout(LayerNorm(word[id] + segment[s] + position[p])), one pass.

With M the dropout factor of an element (0 or 1 / keep, from kernels/philox.py, never stored):

    forward   z = word[id] + segment[s] + position[p];  xhat = (z - mean) * rstd;  out = M * (weight * xhat + bias)
    backward  d y = M * d out;  g = weight * d y;  d z = rstd * (g - mean(g) - xhat * mean(g * xhat))
              d weight = sum d y * xhat;  d bias = sum d y;  a table row's gradient = sum of d z of its tokens

Saved: mean and rstd in fp32; z is gathered again, and in the backward d z is never stored: every token is visited
twice, once in the order of words and once in that of positions, and d z is made anew where it is summed. Bytes for T
tokens, e-byte tables, o-byte output: forward T H (e + o), the position and segment rows from cache. Backward T H o,
each word row that occurs, a write of each table's gradient, and 8 H for each position of each group, where a sum waits
for another kernel. (d z in fp32, written once and read for three tables, was T H (e + o + 16).) A visit is about 30
instructions an element, a quarter of them dropout's: together as long as the memory takes.

    lists     The tokens sorted (stable) by group and word, and by group, position and segment, in one sort of 2 T
              keys. A token with an index out of range is at the end of both, where nothing reads.
    groups    Words are dealt out to groups, so many that d out and word rows of a group's tokens are 16 MiB. Programs
              of either list are resident side by side and walk through it group by group, so what one has read from
              memory is in the L2 cache for the other. A position of a group is a place, and has a sum of its own.
    runs      A list is cut into runs of a fixed length; programs take them in turn. Where the key changes, the sum so
              far is written: a word's to the gradient, a place's to a buffer. A key that ends inside the next run is
              followed there, and left out by that run.
    pieces    A key that fills a run is hot ([MASK], [SEP], "the"; a place of many short sequences). What each run has
              of it, with the rest before or behind, is a piece: a row of a buffer, one for each run.
    programs  A program sums d bias over all of its entries of the first list, d weight over those of the second. Where
              the segment changes, the sum since the last change is also added to that segment's row of the program's
              own. So any number of segments is right, and two are cheap.

    kernels   keys of every token; the sort; where each run starts and ends; the sums; and what completes them: pieces
              to rows of words and places, places to positions, programs to d weight, d bias and segments, zeros to
              word rows that no token has. Every row of every gradient is written once.

A tied word table has a gradient from its other use, the MLM projection, too. Given that, the sums are added to it in
place: rows that no token has are then neither read nor written, and no gradient of the size of the table is made.

The order of every sum follows from the keys alone, so equal inputs give equal bits. Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl

from bert_fast import choice
from bert_fast.dropout_mask import dropout_scale, dropout_threshold
from bert_fast.kernels import rows
from bert_fast.kernels.rows import drop, normalize, normalize_bwd

Tensor = torch.Tensor

# d out and word rows of a group's tokens. What is in flight of three groups is then less than the L2 cache of an H100
# (50 MB). Reasoned; no GPU has measured it yet.
_GROUP_BYTES = 1 << 24
_KEY_CONFIG = {"BLOCK": 1024, "num_warps": 4, "num_stages": 1}
_RUN_CONFIG = {"BLOCK": 32, "num_warps": 4, "num_stages": 1}

_LARGEST = tl.constexpr(2**31 - 1)  # past every key
# What is known of a word's or a place's sum, where it is not the number of its first piece.
_NO_TOKEN = tl.constexpr(-1)
_WRITTEN = tl.constexpr(-2)


def _launch_config(columns: int, direction: str) -> dict:
    """Forward as in residual_layernorm: 1024 elements. Backward a warp has a row of up to 1024, 32 elements a thread.

    So sums over a row need no barrier, what a row costs besides (ids, keys, addresses) is shared by many elements, and
    eight programs fit in a multiprocessor's registers. Of shorter rows a warp has up to eight at a time. A run of 16
    entries is longer than most keys, and four runs of either list are there for each program at 32768 tokens.
    Reasoned; no GPU has measured it yet.
    """
    if direction == "fwd":
        return {**rows.row_tile(columns, 1024), "num_stages": 1}
    block_n = max(8, rows.next_power_of_2(columns))
    block_m, warps = min(8, max(1, 1024 // block_n)), max(1, block_n // 1024)
    return {"RUN": 16, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": 1}


def _completion_config(columns: int) -> dict:
    """Tiles of 32 rows by up to 128 columns, 32 elements a thread. Reasoned; no GPU has measured it yet."""
    block_n = min(128, max(16, rows.next_power_of_2(columns)))
    return {"BLOCK_R": 32, "BLOCK_N": block_n, "num_warps": max(1, block_n // 32), "num_stages": 1}


def _group_count(tokens: int, columns: int, positions: int, element_bytes: int) -> int:
    """How many groups make ``_GROUP_BYTES`` each; fewer where a place had less than four tokens on average, as its sum
    would cost what the cache saves."""
    wanted = rows.cdiv(tokens * columns * element_bytes, _GROUP_BYTES)
    return max(1, min(wanted, tokens // (4 * max(1, positions))))


@triton.jit
def _indices(id_ptr, position_id_ptr, segment_id_ptr, token, inside, words, positions, segments):
    """Of tokens: word, position and segment, and whether all three are in range."""
    word_id = tl.load(id_ptr + token, mask=inside, other=0)
    position_id = tl.load(position_id_ptr + token, mask=inside, other=0)
    segment_id = tl.load(segment_id_ptr + token, mask=inside, other=0)
    valid = (word_id >= 0) & (word_id < words)
    valid &= (position_id >= 0) & (position_id < positions)
    valid &= (segment_id >= 0) & (segment_id < segments)
    return word_id, position_id, segment_id, valid


@triton.jit(do_not_specialize=["tokens", "words", "positions", "segments", "threshold", "site"])
def _embedding_layernorm_fwd_kernel(
    id_ptr,
    position_id_ptr,
    segment_id_ptr,
    word_ptr,
    position_ptr,
    segment_ptr,
    weight_ptr,
    bias_ptr,
    row_key_ptr,
    rng_key_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    words,
    positions,
    segments,
    eps,
    threshold,
    scale,
    site,
    COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    row_mask, column_mask = row < tokens, column[None, :] < COLUMNS
    word_id, position_id, segment_id, valid = _indices(
        id_ptr, position_id_ptr, segment_id_ptr, row, row_mask, words, positions, segments
    )
    mask = (row_mask & valid)[:, None] & column_mask
    z = tl.load(word_ptr + word_id[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(segment_ptr + segment_id[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
    z += tl.load(position_ptr + position_id[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
    normalized, mean, rstd = normalize(z, column_mask, eps, COLUMNS)
    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)
    weight = tl.load(weight_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column[None, :], mask=column_mask, other=0.0).to(tl.float32)
    y = normalized * weight + bias
    if HAS_DROPOUT:
        row_key = tl.load(row_key_ptr + row, mask=row_mask, other=0)
        y = drop(y, row_key, rng_key_ptr, threshold, scale, site, BLOCK_M, BLOCK_N)
    y = tl.where(valid[:, None], y, float("nan"))  # after dropout, so that no element of such a row looks right
    offset = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    tl.store(out_ptr + offset, y, mask=row_mask[:, None] & column_mask)


@triton.jit
def _word_of_key(key, groups, group_words):
    """The word with a key: words are dealt out to the groups in turn, and numbered through group after group."""
    return key % group_words * groups + key // group_words


# Specialised to ``tokens``, as the next one: a multiple of 16 makes accesses of 16 bytes possible.
@triton.jit(do_not_specialize=["words", "positions", "segments", "groups", "group_words", "segment_bits"])
def _key_kernel(
    id_ptr,
    position_id_ptr,
    segment_id_ptr,
    key_ptr,  # (2, tokens) int32
    first_ptr,  # (sums, rounded up to BLOCK) int32: _NO_TOKEN, _WRITTEN or the first piece of a word's or place's sum
    tokens,
    words,
    positions,
    segments,
    groups,
    group_words,
    segment_bits,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(first_ptr + token, tl.full((BLOCK,), _NO_TOKEN, tl.int32))
    inside = token < tokens
    word_id, position_id, segment_id, valid = _indices(
        id_ptr, position_id_ptr, segment_id_ptr, token, inside, words, positions, segments
    )
    word_id, position_id, segment_id = word_id.to(tl.int32), position_id.to(tl.int32), segment_id.to(tl.int32)
    group, no_word, no_place = word_id % groups, groups * group_words, groups * positions
    word_key = tl.where(valid, group * group_words + word_id // groups, no_word)
    place = tl.where(valid, group * positions + position_id, no_place)
    place_key = no_word + 1 + (place << segment_bits) + tl.where(valid, segment_id, 0)
    tl.store(key_ptr + token, word_key, mask=inside)
    tl.store(key_ptr + tokens + token, place_key, mask=inside)


@triton.jit(do_not_specialize=["positions", "groups", "group_words", "segment_bits", "padding_idx"])
def _run_kernel(
    key_ptr,  # (2, tokens) int32, sorted
    run_ptr,  # (3, 2, runs) int32: the first entry, the one after the last, the sum that has a piece here or -1
    first_ptr,
    last_ptr,  # (sums,) int32: the piece after a sum's last one
    tokens,
    positions,
    groups,
    group_words,
    segment_bits,
    padding_idx,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    of_places, no_word, runs = tl.program_id(1), groups * group_words, tl.cdiv(tokens, RUN)
    # A key less ``offset``, without its last ``bits``, is the number of the sum that its token goes to.
    offset, bits = of_places * (no_word + 1), of_places * segment_bits
    sums = tl.where(of_places == 1, groups * positions, no_word)
    list_end = (1 + of_places) * tokens
    run = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = run < runs
    begin = of_places * tokens + run * RUN
    ahead = tl.arange(0, 2 * RUN)[None, :]
    own, at = ahead < RUN, begin[:, None] + ahead  # of a run and the next one
    numbers = (tl.load(key_ptr + at, mask=at < list_end, other=_LARGEST) - offset) >> bits
    before = (tl.load(key_ptr + begin - 1, mask=inside & (begin > 0), other=-1) - offset) >> bits
    first = tl.min(numbers, axis=1)
    last = tl.max(tl.where(own, numbers, -1), axis=1)
    starts = (first != before) | (first != last)  # the last sum starts in this run
    goes_on = (last == tl.max(numbers, axis=1)) & (last < sums)  # ... and takes the whole of the next one
    left_out = own & (numbers == first[:, None]) & ((first == before) & (first != last))[:, None]
    followed = (numbers == last[:, None]) & (goes_on == 0)[:, None]
    summed = (own | followed) & (numbers < sums)
    run_ptr += of_places * runs + run
    tl.store(run_ptr, begin + tl.sum(left_out.to(tl.int32), axis=1), mask=inside)
    tl.store(run_ptr + 2 * runs, begin + tl.sum(summed.to(tl.int32), axis=1), mask=inside)
    tl.store(run_ptr + 4 * runs, tl.where(goes_on | (starts == 0), last, -1), mask=inside)
    unknown = tl.where(of_places == 1, -1, padding_idx)
    known = inside & (last < sums) & (_word_of_key(last, groups, group_words) != unknown)
    piece, number = of_places * runs + run, of_places * no_word + last
    tl.store(first_ptr + number, piece, mask=known & starts & goes_on)
    tl.store(last_ptr + number, piece + 1, mask=known & (starts == 0) & (goes_on == 0))


@triton.jit
def _entries(
    place,
    end,
    order_ptr,
    id_ptr,
    position_id_ptr,
    segment_id_ptr,
    mean_ptr,
    rstd_ptr,
    row_key_ptr,
    tokens,
    HAS_DROPOUT: tl.constexpr,
):
    """Of the entries at ``place`` (BLOCK_M,): token, word, position, segment, mean, rstd, key of the dropout's row."""
    token = tl.load(order_ptr + tl.minimum(place, end - 1)).to(tl.int32)
    token = tl.where(token < tokens, token, token - tokens)
    word_id = tl.load(id_ptr + token).to(tl.int32)
    position_id = tl.load(position_id_ptr + token).to(tl.int32)
    segment_id = tl.load(segment_id_ptr + token).to(tl.int32)
    mean, rstd = tl.load(mean_ptr + token), tl.load(rstd_ptr + token)
    row_key = tl.load(row_key_ptr + token) if HAS_DROPOUT else token
    return token, word_id, position_id, segment_id, mean, rstd, row_key


@triton.jit
def _load_rows(ptr, row, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, PAIRED: tl.constexpr):
    """Rows as they are stored; of bfloat16 two elements as 32 bits, so that each is one instruction from float32."""
    if PAIRED and ptr.dtype.element_ty == tl.bfloat16:
        column = tl.arange(0, BLOCK_N // 2)[None, :]
        pair_ptr = ptr.to(tl.pointer_type(tl.int32)) + row[:, None].to(tl.int64) * (COLUMNS // 2)
        return tl.load(pair_ptr + column, mask=column < COLUMNS // 2, other=0)
    else:
        column = tl.arange(0, BLOCK_N)[None, :]
        return tl.load(ptr + row[:, None].to(tl.int64) * COLUMNS + column, mask=column < COLUMNS, other=0.0)


@triton.jit
def _as_float32(loaded, BLOCK_N: tl.constexpr):
    if loaded.dtype == tl.int32:
        first, second = loaded << 16, loaded & -65536
        pairs = tl.join(first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True))
        return tl.reshape(pairs, (loaded.shape[0], BLOCK_N))
    else:
        return loaded.to(tl.float32)


@triton.jit
def _write_word(grad_word_ptr, word, total, column, inside, COLUMNS: tl.constexpr, ADD: tl.constexpr):
    """Write a row of the word table's gradient, or add to it: rounded before, as a gradient of its own would be."""
    grad_word_ptr += word.to(tl.int64) * COLUMNS + column
    total = total.to(grad_word_ptr.dtype.element_ty)
    if ADD:
        total = tl.load(grad_word_ptr, mask=inside, other=0.0).to(tl.float32) + total.to(tl.float32)
    tl.store(grad_word_ptr, total, mask=inside)


@triton.jit(
    do_not_specialize=[
        "tokens", "segments", "groups", "group_words", "segment_bits", "padding_idx", "threshold", "site"
    ]
)  # fmt: skip
def _embedding_layernorm_bwd_kernel(
    grad_out_ptr,
    id_ptr,
    position_id_ptr,
    segment_id_ptr,
    word_ptr,
    position_ptr,
    segment_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    row_key_ptr,
    rng_key_ptr,
    key_ptr,  # (2, tokens) int32, sorted
    order_ptr,  # (2, tokens) int64: where in the unsorted keys
    grad_word_ptr,
    place_sum_ptr,  # (groups, positions, COLUMNS) fp32
    piece_ptr,  # (2, runs, COLUMNS) fp32
    run_ptr,
    first_ptr,  # (words' and places' sums,) int32: _NO_TOKEN, _WRITTEN or the first piece
    partial_ptr,  # (programs, 2 + segments, COLUMNS) fp32: sums of d bias, d weight, of each segment's d z
    tokens,
    segments,
    groups,
    group_words,
    segment_bits,
    padding_idx,
    threshold,
    scale,
    site,
    COLUMNS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ADD_TO_WORD: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = tl.arange(0, BLOCK_N)[None, :]
    inside = column < COLUMNS
    index = tl.arange(0, BLOCK_M)
    # Beside rows of float32, pairs would be other threads' than those are, and be exchanged between them.
    PAIRED: tl.constexpr = COLUMNS % 2 == 0 and word_ptr.dtype.element_ty == tl.bfloat16
    no_word, runs = groups * group_words, tl.cdiv(tokens, RUN)
    program, of_places = tl.program_id(0) // 2, tl.program_id(0) % 2
    zeros = tl.zeros((1, BLOCK_N), tl.float32)
    parameter_sum = zeros
    for OF_PLACES in tl.static_range(2):
        if of_places == OF_PLACES:
            # As in the kernel above: the number of the sum that an entry goes to, and for places the segment behind it.
            offset, bits = (no_word + 1, segment_bits) if OF_PLACES else (0, 0)
            if OF_PLACES:
                for segment in range(segments):
                    row = program * (2 + segments) + 2 + segment
                    tl.store(partial_ptr + row.to(tl.int64) * COLUMNS + column, zeros, mask=inside)
                tl.debug_barrier()  # another thread than the one that wrote may add
            for run in range(program, runs, tl.num_programs(0) // 2):
                piece = OF_PLACES * runs + run
                start, end = tl.load(run_ptr + piece), tl.load(run_ptr + 2 * runs + piece)
                in_pieces = tl.load(run_ptr + 4 * runs + piece)
                if start < end:
                    token, word_id, position_id, segment_id, mean, rstd, row_key = _entries(
                        start + index, end, order_ptr, id_ptr, position_id_ptr, segment_id_ptr, mean_ptr, rstd_ptr,
                        row_key_ptr, tokens, HAS_DROPOUT,
                    )  # fmt: skip
                    next_grad = _load_rows(grad_out_ptr, token, COLUMNS, BLOCK_N, PAIRED)
                    key = tl.load(key_ptr + start)
                    total = zeros
                    begun = 0  # whether the sum's row has what an earlier segment's tokens have
                    for place in range(start, end, BLOCK_M):
                        grad_y = _as_float32(next_grad, BLOCK_N)
                        if BLOCK_M > 1:  # rows past the end are the last one again: 0 makes their d z 0
                            grad_y = tl.where((place + index < end)[:, None], grad_y, 0.0)
                        z = _as_float32(_load_rows(word_ptr, word_id, COLUMNS, BLOCK_N, PAIRED), BLOCK_N)
                        z += _as_float32(_load_rows(segment_ptr, segment_id, COLUMNS, BLOCK_N, PAIRED), BLOCK_N)
                        z += _as_float32(_load_rows(position_ptr, position_id, COLUMNS, BLOCK_N, PAIRED), BLOCK_N)
                        normalized = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
                        if HAS_DROPOUT:  # the factor of kept elements comes in with rstd, and with the program's sum
                            grad_y = drop(grad_y, row_key, rng_key_ptr, threshold, 1.0, site, BLOCK_M, BLOCK_N)
                        scaled_rstd = rstd * scale
                        token, word_id, position_id, segment_id, mean, rstd, row_key = _entries(
                            place + BLOCK_M + index, end, order_ptr, id_ptr, position_id_ptr, segment_id_ptr, mean_ptr,
                            rstd_ptr, row_key_ptr, tokens, HAS_DROPOUT,
                        )  # fmt: skip
                        next_grad = _load_rows(grad_out_ptr, token, COLUMNS, BLOCK_N, PAIRED)
                        weight = _as_float32(_load_rows(weight_ptr, tl.arange(0, 1), COLUMNS, BLOCK_N, PAIRED), BLOCK_N)
                        grad_z = normalize_bwd(grad_y * weight, normalized, scaled_rstd, COLUMNS)
                        parameter_sum += tl.sum(grad_y * normalized if OF_PLACES else grad_y, axis=0)[None, :]
                        for i in tl.static_range(BLOCK_M):
                            at = place + i
                            total += tl.sum(tl.where((index == i)[:, None], grad_z, 0.0), axis=0)[None, :]
                            following = tl.load(key_ptr + at + 1, mask=at + 1 < end, other=-1)
                            if (key != following) & (at < end):
                                number = (key - offset) >> bits
                                in_piece = number == in_pieces
                                piece_row = piece_ptr + piece.to(tl.int64) * COLUMNS + column
                                if OF_PLACES:
                                    segment = key - offset - (number << bits)
                                    row = program * (2 + segments) + 2 + segment
                                    sum_row = partial_ptr + row.to(tl.int64) * COLUMNS + column
                                    tl.store(sum_row, tl.load(sum_row, mask=inside, other=0.0) + total, mask=inside)
                                    sum_row = place_sum_ptr + number.to(tl.int64) * COLUMNS + column
                                    if in_piece:
                                        sum_row = piece_row
                                    if begun != 0:
                                        total += tl.load(sum_row, mask=inside, other=0.0)
                                    tl.store(sum_row, total, mask=inside)
                                    tl.debug_barrier()
                                    begun = (number == (following - offset) >> bits).to(tl.int32)
                                    known, number = True, no_word + number
                                else:
                                    word = _word_of_key(key, groups, group_words)
                                    known = word != padding_idx
                                    if in_piece:
                                        tl.store(piece_row, total, mask=inside)
                                    elif known:
                                        _write_word(grad_word_ptr, word, total, column, inside, COLUMNS, ADD_TO_WORD)
                                tl.store(first_ptr + number, _WRITTEN, mask=known & (in_piece == 0))
                                total = zeros
                            key = following
    row = program * (2 + segments) + of_places
    tl.store(partial_ptr + row.to(tl.int64) * COLUMNS + column, parameter_sum * scale, mask=inside)


@triton.jit
def _add_rows(total, ptr, first, last, stride, column, inside, BLOCK_R: tl.constexpr):
    """``total`` (BLOCK_R, BLOCK_N) plus the rows first .. last-1 of those that are ``stride`` elements apart."""
    for start in range(first, last, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        offset = row[:, None].to(tl.int64) * stride + column
        total += tl.load(ptr + offset, mask=(row < last)[:, None] & inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["programs", "words", "positions", "segments", "groups", "group_words"])
def _completion_kernel(
    partial_ptr,
    place_sum_ptr,
    piece_ptr,
    first_ptr,
    last_ptr,
    grad_word_ptr,
    grad_position_ptr,
    grad_segment_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    programs,
    words,
    positions,
    segments,
    groups,
    group_words,
    COLUMNS: tl.constexpr,
    ADD_TO_WORD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(0)  # d bias; d weight; a segment; a position; BLOCK_R words
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = column < COLUMNS
    no_word, block = groups * group_words, tl.arange(0, BLOCK_R)
    zeros = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if part < 2 + segments:
        stride = (2 + segments) * COLUMNS
        total = _add_rows(zeros, partial_ptr + part * COLUMNS, 0, programs, stride, column, inside, BLOCK_R)
        row = tl.sum(total, axis=0)[None, :]
        if part == 0:
            tl.store(grad_bias_ptr + column, row, mask=inside)
        elif part == 1:
            tl.store(grad_weight_ptr + column, row, mask=inside)
        else:
            tl.store(grad_segment_ptr + (part - 2).to(tl.int64) * COLUMNS + column, row, mask=inside)
    elif part < 2 + segments + positions:
        position = part - 2 - segments
        total = zeros
        for start in range(0, groups, BLOCK_R):
            place = (start + block) * positions + position
            first = tl.load(first_ptr + no_word + place, mask=start + block < groups, other=_NO_TOKEN)
            offset = place[:, None].to(tl.int64) * COLUMNS + column
            total += tl.load(place_sum_ptr + offset, mask=(first == _WRITTEN)[:, None] & inside, other=0.0)
            if tl.max(first, axis=0) >= 0:
                for group in range(start, tl.minimum(start + BLOCK_R, groups)):
                    number = no_word + group * positions + position
                    first_piece = tl.load(first_ptr + number)
                    if first_piece >= 0:
                        last_piece = tl.load(last_ptr + number)
                        total = _add_rows(total, piece_ptr, first_piece, last_piece, COLUMNS, column, inside, BLOCK_R)
        row = tl.sum(total, axis=0)[None, :]
        tl.store(grad_position_ptr + position.to(tl.int64) * COLUMNS + column, row, mask=inside)
    else:
        start = (part - 2 - segments - positions) * BLOCK_R
        key = start + block
        first = tl.load(first_ptr + key, mask=key < no_word, other=_WRITTEN)
        if not ADD_TO_WORD:
            word = _word_of_key(key, groups, group_words)  # may be past the last: groups are of one size
            offset = word[:, None].to(tl.int64) * COLUMNS + column
            tl.store(grad_word_ptr + offset, zeros, mask=((first == _NO_TOKEN) & (word < words))[:, None] & inside)
        if tl.max(first, axis=0) >= 0:
            for number in range(start, tl.minimum(start + BLOCK_R, no_word)):
                first_piece = tl.load(first_ptr + number)
                if first_piece >= 0:
                    last_piece = tl.load(last_ptr + number)
                    total = _add_rows(zeros, piece_ptr, first_piece, last_piece, COLUMNS, column, inside, BLOCK_R)
                    row = tl.sum(total, axis=0)[None, :]
                    word_of_number = _word_of_key(number, groups, group_words)
                    _write_word(grad_word_ptr, word_of_number, row, column, inside, COLUMNS, ADD_TO_WORD)


def embedding_layernorm_fwd(
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    bias: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    eps: float,
    p: float,
    site: int,
    padding_idx: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py. The row of an index out of range is NaN. TypeError for float64."""
    tokens, columns = ids.shape[0], word.shape[1]
    out = torch.empty((tokens, columns), dtype=out_dtype, device=word.device)
    rows.check_tensors(
        "embedding_layernorm", columns, word=word, position=position, segment=segment, weight=weight, bias=bias, out=out
    )
    mean = torch.empty(tokens, dtype=torch.float32, device=word.device)
    rstd = torch.empty_like(mean)
    if tokens:
        config = choice.of("embedding_layernorm.fwd", _launch_config(columns, "fwd"))
        _embedding_layernorm_fwd_kernel[(rows.cdiv(tokens, config["BLOCK_M"]),)](
            id_ptr=ids,
            position_id_ptr=positions,
            segment_id_ptr=segments,
            word_ptr=word,
            position_ptr=position,
            segment_ptr=segment,
            weight_ptr=weight,
            bias_ptr=bias,
            row_key_ptr=row_key,
            rng_key_ptr=rng_key,
            out_ptr=out,
            mean_ptr=mean,
            rstd_ptr=rstd,
            tokens=tokens,
            words=word.shape[0],
            positions=position.shape[0],
            segments=segment.shape[0],
            eps=eps,
            threshold=dropout_threshold(p),
            scale=dropout_scale(p),
            site=site,
            COLUMNS=columns,
            HAS_DROPOUT=p > 0.0,
            **config,
        )
    return out, mean, rstd


def embedding_layernorm_bwd(
    grad_out: Tensor,
    ids: Tensor,
    positions: Tensor,
    segments: Tensor,
    word: Tensor,
    position: Tensor,
    segment: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    row_key: Tensor,
    rng_key: Tensor,
    p: float,
    site: int,
    padding_idx: int,
    grad_word: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py. A token with an index out of range adds to no gradient. TypeError for float64."""
    tokens, columns = grad_out.shape
    rows.check_tensors(
        "embedding_layernorm", columns, grad_out=grad_out, word=word, position=position, segment=segment, weight=weight,
        grad_word=grad_word,
    )  # fmt: skip
    device, words = word.device, word.shape[0]
    sizes = {"positions": position.shape[0], "segments": segment.shape[0]}
    groups = _group_count(tokens, columns, sizes["positions"], grad_out.element_size() + word.element_size())
    dealt = {"groups": groups, "group_words": rows.cdiv(words, groups)}
    places = groups * sizes["positions"]
    sums = groups * dealt["group_words"] + places
    segment_bits = (sizes["segments"] - 1).bit_length()
    if sums - places + 1 + ((places + 1) << segment_bits) > 2**31:
        raise ValueError(
            f"bert_fast.embedding_layernorm: tables of {words}, {sizes['positions']} and {sizes['segments']} rows need "
            "keys of more than 32 bits, which the triton backend does not have. Use the reference: "
            'bert_fast.set_backend(embedding_layernorm="reference")'
        )
    key_programs = rows.cdiv(max(tokens, sums), _KEY_CONFIG["BLOCK"])
    key = torch.empty((2, tokens), dtype=torch.int32, device=device)
    first = torch.empty(key_programs * _KEY_CONFIG["BLOCK"], dtype=torch.int32, device=device)
    last = torch.empty(sums, dtype=torch.int32, device=device)
    if key_programs:
        _key_kernel[(key_programs,)](
            id_ptr=ids,
            position_id_ptr=positions,
            segment_id_ptr=segments,
            key_ptr=key,
            first_ptr=first,
            tokens=tokens,
            words=words,
            segment_bits=segment_bits,
            **sizes,
            **dealt,
            **_KEY_CONFIG,
        )
    key, order = torch.sort(key.view(-1), stable=True)
    config = choice.of("embedding_layernorm.bwd", _launch_config(columns, "bwd"))
    runs = rows.cdiv(tokens, config["RUN"])
    run = torch.empty((3, 2, runs), dtype=torch.int32, device=device)
    if tokens:
        _run_kernel[(rows.cdiv(runs, _RUN_CONFIG["BLOCK"]), 2)](
            key_ptr=key,
            run_ptr=run,
            first_ptr=first,
            last_ptr=last,
            tokens=tokens,
            positions=sizes["positions"],
            segment_bits=segment_bits,
            padding_idx=padding_idx,
            RUN=config["RUN"],
            **dealt,
            **_RUN_CONFIG,
        )

    add_to_word = grad_word is not None
    if not add_to_word:
        grad_word = torch.empty_like(word)
    programs = rows.row_programs(device, runs)
    place_sum = torch.empty((places, columns), dtype=torch.float32, device=device)
    piece = torch.empty((2 * runs, columns), dtype=torch.float32, device=device)
    partial = torch.empty((programs, 2 + sizes["segments"], columns), dtype=torch.float32, device=device)
    if tokens:
        _embedding_layernorm_bwd_kernel[(2 * programs,)](
            grad_out_ptr=grad_out,
            id_ptr=ids,
            position_id_ptr=positions,
            segment_id_ptr=segments,
            word_ptr=word,
            position_ptr=position,
            segment_ptr=segment,
            weight_ptr=weight,
            mean_ptr=mean,
            rstd_ptr=rstd,
            row_key_ptr=row_key,
            rng_key_ptr=rng_key,
            key_ptr=key,
            order_ptr=order,
            grad_word_ptr=grad_word,
            place_sum_ptr=place_sum,
            piece_ptr=piece,
            run_ptr=run,
            first_ptr=first,
            partial_ptr=partial,
            tokens=tokens,
            segments=sizes["segments"],
            segment_bits=segment_bits,
            padding_idx=padding_idx,
            threshold=dropout_threshold(p),
            scale=dropout_scale(p),
            site=site,
            COLUMNS=columns,
            HAS_DROPOUT=p > 0.0,
            ADD_TO_WORD=add_to_word,
            **dealt,
            **config,
        )

    grad_position, grad_segment = torch.empty_like(position), torch.empty_like(segment)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(weight)
    config = _completion_config(columns)
    parts = 2 + sum(sizes.values()) + rows.cdiv(sums - places, config["BLOCK_R"])
    _completion_kernel[(parts, rows.cdiv(columns, config["BLOCK_N"]))](
        partial_ptr=partial,
        place_sum_ptr=place_sum,
        piece_ptr=piece,
        first_ptr=first,
        last_ptr=last,
        grad_word_ptr=grad_word,
        grad_position_ptr=grad_position,
        grad_segment_ptr=grad_segment,
        grad_weight_ptr=grad_weight,
        grad_bias_ptr=grad_bias,
        programs=programs,
        words=words,
        COLUMNS=columns,
        ADD_TO_WORD=add_to_word,
        **sizes,
        **dealt,
        **config,
    )
    return grad_word, grad_position, grad_segment, grad_weight, grad_bias


def embedding_layernorm_bwd_add(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See bert_fast/reference.py."""
    return embedding_layernorm_bwd(*arguments)[1:]


def aot_cases(capability: int) -> list[dict]:
    """The kernels' default configurations at BERT-base and -large, for ahead-of-time compilation.

    Output and its gradient are bf16, tables and parameters fp32 (autocast) or, backward, bf16 too. ``capability`` is
    80, 90 or 100: one configuration serves all.
    """
    tables = ("word_ptr", "position_ptr", "segment_ptr", "weight_ptr", "bias_ptr")
    tables += tuple(f"grad_{name}" for name in tables)
    pointers = dict.fromkeys(("out_ptr", "grad_out_ptr"), "*bf16") | dict.fromkeys(tables, "*fp32")
    for names, kind in (
        (("id_ptr", "position_id_ptr", "segment_id_ptr", "row_key_ptr", "rng_key_ptr", "order_ptr"), "*i64"),
        (("key_ptr", "run_ptr", "first_ptr", "last_ptr"), "*i32"),
        (("mean_ptr", "rstd_ptr", "place_sum_ptr", "piece_ptr", "partial_ptr"), "*fp32"),
    ):
        pointers |= dict.fromkeys(names, kind)
    scalars = ("tokens", "words", "positions", "segments", "groups", "group_words", "segment_bits", "padding_idx",
               "programs", "threshold", "site")  # fmt: skip
    scalars = dict.fromkeys(scalars, "i32") | {"scale": "fp32", "eps": "fp32"}

    def case(kernel, name: str, constants: dict, config: dict, kind: str = "fp32") -> dict:
        types = pointers | dict.fromkeys(tables, f"*{kind}")
        own = {name: types[name] for name in kernel.arg_names if name in types}
        return rows.aot_case(kernel, f"embedding_layernorm {name}", own, scalars, constants, config)

    run = {"RUN": _launch_config(1024, "bwd")["RUN"]}
    cases = [case(_key_kernel, "keys", {}, _KEY_CONFIG), case(_run_kernel, "runs", run, _RUN_CONFIG)]
    for found in cases:
        found["divisible_by_16"].append("tokens")
    sorts = (("fp32", True), ("bf16", False))  # a step of pretrain; the operator alone, as benchmarks time it
    for columns in (768, 1024):
        for p in (0.0, 0.1):
            name, constants = f"H={columns} p={p}", {"COLUMNS": columns, "HAS_DROPOUT": p > 0.0}
            config = _launch_config(columns, "fwd")
            cases.append(case(_embedding_layernorm_fwd_kernel, f"fwd {name}", constants, config))
            for kind, add in sorts:
                constants, config = constants | {"ADD_TO_WORD": add}, _launch_config(columns, "bwd")
                added = f"bwd {name} {kind}{' added' if add else ''}"
                cases.append(case(_embedding_layernorm_bwd_kernel, added, constants, config, kind))
        for kind, add in sorts:
            name, constants = f"{kind}{' added' if add else ''} H={columns}", {"COLUMNS": columns, "ADD_TO_WORD": add}
            cases.append(case(_completion_kernel, f"completion {name}", constants, _completion_config(columns), kind))
    return cases
