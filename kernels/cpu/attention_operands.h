// What attention multiplies: how rows of q, k, v and d out, and of the softmax and its gradient, become operands of
// matmul.h. Two policies with the same members, and one algorithm on top (attention.cpp):
//
// FloatOperands: float32, whatever the dtype in memory. The scale of q and dropout's 1 / keep are multiplied in when
//   rows are copied; the softmax works in place, and one matrix of d scores serves as rows and as columns.
// PairOperands (bfloat16 where the processor multiplies it): pairs along k, copied unchanged, so that q, k, v and
//   d out lose nothing; the factors reach the float32 scores and results instead. Softmax and d scores are rounded
//   once, to bfloat16, as operands. A product over queries or keys takes its rows two at a time ("groups").
#pragma once

#include "matmul.h"

namespace bert_fast {
namespace BERT_FAST_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A head's rows lie 3 A D elements apart, each in a page of its own: no hardware prefetcher follows them.
template <typename T>
BERT_FAST_INLINE void prefetch_row(const T* row, int64_t size) {
    for (int64_t d = 0; d < size; d += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(row + d);
}
constexpr int64_t AHEAD = 16;  // rows

// to (size, count padded to whole tiles) = from (count, size) transposed; the padding is zero.
template <typename Unit>
void transpose(Unit* to, int64_t to_row, const Unit* from, int64_t from_row, int64_t count, int64_t size) {
    constexpr int64_t STEP = 16;
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP)
        for (int64_t d = 0; d < size; d++)
            for (int64_t j = 0; j < STEP; j++) to[d * to_row + i + j] = from[(i + j) * from_row + d];
    for (; i < round_up(count, TILE_COLUMNS); i++)
        for (int64_t d = 0; d < size; d++) to[d * to_row + i] = i < count ? from[i * from_row + d] : Unit{};
}

// The lanes of `x` at columns `column ..` of a row with `count` columns; lanes past the row's end are `other`.
BERT_FAST_INLINE vfloat within(vfloat x, int64_t column, int64_t count, float other) {
    if (column + LANES <= count) return x;
    const vint inside = lane_numbers() < broadcast(static_cast<uint32_t>(count - column));
    return inside ? x : broadcast(other);
}

BERT_FAST_INLINE uint32_t keep_bits(const uint64_t* words, int64_t column) {
    return static_cast<uint32_t>(words[column / 64] >> (column % 64));
}

// Factors of q and of d out (of v's products): where they are multiplied in.
struct Factors {
    float q, grad_out;
};

struct RowSum {
    float sum, max;
};
// In place: scores -> exp(factor * score - max), dropped where the mask says so, as an operand's row; returns the
// undropped sum, of what is not yet rounded, and the max.
template <typename Operands, bool DROP>
RowSum softmax_row(float* scores, int64_t keys, float factor, const uint64_t* words) {
    const int64_t padded = round_up(keys, LANES);
    const float none = -__builtin_inff();
    vfloat most = broadcast(none), sum = broadcast(0.0f);
    for (int64_t c = 0; c < padded; c += LANES)
        most = max(most, within(Operands::scaled(load(scores + c), factor), c, keys, none));
    const float largest = max_lanes(most);
    for (int64_t c = 0; c < padded; c += LANES) {
        vfloat e = exp(within(Operands::scaled(load(scores + c), factor), c, keys, none) - largest);
        sum += e;
        if (DROP) e = keep_lanes(e, keep_bits(words, c));
        Operands::store_row(scores, c, e);
    }
    return {sum_lanes(sum), largest};
}

// P = exp(score - lse) and dS = P (keep * dP - delta); then P dropped. The factor 1 / keep is in dP already.
struct SoftmaxGradient {
    vfloat p, grad_s;
};
template <bool DROP>
BERT_FAST_INLINE SoftmaxGradient softmax_gradient(vfloat score, vfloat grad_p, const uint64_t* words, int64_t column,
                                                  float lse, float delta) {
    const vfloat p = exp(score - lse);
    const uint32_t kept = DROP ? keep_bits(words, column) : 0;
    return {DROP ? keep_lanes(p, kept) : p, p * ((DROP ? keep_lanes(grad_p, kept) : grad_p) - delta)};
}

struct FloatOperands {
    typedef float Unit;
    static constexpr int64_t DEPTH = 1;  // elements along k in a unit

    static Factors in_operands(Factors all) { return all; }
    static Factors in_results(Factors) { return {1.0f, 1.0f}; }
    static BERT_FAST_INLINE vfloat scaled(vfloat x, float) { return x; }
    static BERT_FAST_INLINE void store_row(float* row, int64_t column, vfloat x) { store(row + column, x); }

    // to (count, size padded to whole tiles) = factor * from (count, size); the padding is zero.
    template <typename T>
    static void rows(float* to, int64_t to_row, const T* from, int64_t from_row, int64_t count, int64_t size,
                     float factor) {
        const int64_t padded = round_up(size, TILE_COLUMNS);
        for (int64_t i = 0; i < count; i++) {
            if (i + AHEAD < count) prefetch_row(from + (i + AHEAD) * from_row, size);
            for (int64_t d = 0; d < padded; d += LANES)
                store(to + i * to_row + d, d < size ? load_first(from + i * from_row + d, size - d) * factor
                                                    : broadcast(0.0f));
        }
    }
    template <typename T>
    static void groups(float* to, int64_t to_row, const T* from, int64_t from_row, int64_t count, int64_t size) {
        rows(to, to_row, from, from_row, count, size, 1.0f);
    }

    // One row, in place: scores -> P, grad_p -> dS.
    template <bool DROP>
    static void softmax_bwd(float* scores, float* grad_p, int64_t, float*, int64_t, int64_t keys, Factors,
                            const uint64_t* words, int64_t, const float* lse, const float* delta) {
        for (int64_t c = 0; c < keys; c += LANES) {
            const vfloat score = within(load(scores + c), c, keys, -__builtin_inff());
            const SoftmaxGradient g = softmax_gradient<DROP>(score, load(grad_p + c), words, c, *lse, *delta);
            store(grad_p + c, g.grad_s);
            store(scores + c, g.p);
        }
    }
};

template <typename T>
struct OperandsOf {
    typedef FloatOperands type;
};

#if defined(__AVX512BF16__)
struct PairOperands {
    typedef bfloat16_pair Unit;
    static constexpr int64_t DEPTH = 2;

    static Factors in_operands(Factors) { return {1.0f, 1.0f}; }
    static Factors in_results(Factors all) { return all; }
    static BERT_FAST_INLINE vfloat scaled(vfloat x, float factor) { return x * factor; }
    // Over the row's own first half, which has been read by then.
    static BERT_FAST_INLINE void store_row(float* row, int64_t column, vfloat x) {
        bert_fast::BERT_FAST_ISA::store_row(reinterpret_cast<bfloat16_pair*>(row) + column / 2, x);
    }

    // to (count, size / 2 pairs along size) = from (count, size); an odd size ends with a zero.
    static void rows(bfloat16_pair* to, int64_t to_row, const bfloat16* from, int64_t from_row, int64_t count,
                     int64_t size, float) {
        for (int64_t i = 0; i < count; i++) {
            if (i + AHEAD < count) prefetch_row(from + (i + AHEAD) * from_row, size);
            bfloat16_pair* row = to + i * to_row;
            const bfloat16* in = from + i * from_row;
            int64_t d = 0;
            for (; d + 2 * LANES <= size; d += 2 * LANES) store(row + d / 2, load_bits<vuint>(in + d));
            for (; d + 2 <= size; d += 2) memcpy(row + d / 2, in + d, sizeof(*row));
            if (d < size) row[d / 2] = {in[d].bits};
        }
    }

    // to (count / 2, size padded to whole tiles), pairs along count: rows two by two. An odd count ends with zeros.
    static void groups(bfloat16_pair* to, int64_t to_row, const bfloat16* from, int64_t from_row, int64_t count,
                       int64_t size) {
        const int64_t padded = round_up(size, TILE_COLUMNS);
        for (int64_t i = 0; i < count; i += 2) {
            for (int64_t r = i + AHEAD; r < smaller(count, i + AHEAD + 2); r++) prefetch_row(from + r * from_row, size);
            for (int64_t d = 0; d < padded; d += LANES) {
                vuint low = {}, high = {};
                if (d < size) low = as_uint(load_first(from + i * from_row + d, size - d));
                if (d < size && i + 1 < count) high = as_uint(load_first(from + (i + 1) * from_row + d, size - d));
                store(to + i / 2 * to_row + d, (low >> 16) | high);
            }
        }
    }

    // Two rows (`count` is 1 at an odd end, the other then zero), s_row floats apart: P and dS as pairs of the two,
    // over the first of the rows of scores and of grad_p; dS also as rows of pairs along the keys.
    template <bool DROP>
    static void softmax_bwd(float* scores, float* grad_p, int64_t s_row, bfloat16_pair* grad_s_rows, int64_t count,
                            int64_t keys, Factors factors, const uint64_t* words, int64_t words_row, const float* lse,
                            const float* delta) {
        const auto run = count == 2 ? softmax_bwd_rows<DROP, 2> : softmax_bwd_rows<DROP, 1>;
        run(scores, grad_p, s_row, grad_s_rows, keys, factors, words, words_row, lse, delta);
    }

  private:
    template <bool DROP, int ROWS>
    static void softmax_bwd_rows(float* scores, float* grad_p, int64_t s_row, bfloat16_pair* grad_s_rows, int64_t keys,
                                 Factors factors, const uint64_t* words, int64_t words_row, const float* lse,
                                 const float* delta) {
        for (int64_t c = 0; c < keys; c += LANES) {
            SoftmaxGradient row[2] = {};
#pragma GCC unroll 2
            for (int i = 0; i < ROWS; i++) {
                const vfloat score = scaled(load(scores + i * s_row + c), factors.q);
                row[i] = softmax_gradient<DROP>(within(score, c, keys, -__builtin_inff()),
                                                scaled(load(grad_p + i * s_row + c), factors.grad_out),
                                                words + i * words_row, c, lse[i], delta[i]);
            }
            const vtworows grad_s = narrow(row[0].grad_s, row[1].grad_s);
            memcpy(grad_s_rows + c / 2, &grad_s, sizeof(grad_s) / 2);
            memcpy(grad_s_rows + s_row + c / 2, reinterpret_cast<const char*>(&grad_s) + sizeof(grad_s) / 2,
                   sizeof(grad_s) / 2);
            store(reinterpret_cast<bfloat16_pair*>(grad_p) + c, pair_rows(grad_s));
            store(reinterpret_cast<bfloat16_pair*>(scores) + c, pair_rows(narrow(row[0].p, row[1].p)));
        }
    }
};

template <>
struct OperandsOf<bfloat16> {
    typedef PairOperands type;
};
#endif

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
