// Small matrix products for operands that lie in the caches: C = A B or C += A B, summed in float32.
//
// A and B consist of 32-bit units: float32, or pairs of bfloat16 that are neighbours along k (bfloat16_pairs.h), whose
// products a processor with the unit adds two at a time. Depths and strides count units; C is float32. So for pairs B
// has a row for every two k, and an odd k ends with a zero in A and B both.
//
// Matrices are plain rows with a stride. A tile of C stays in registers: A's units are broadcast, B's are
// loaded as vectors. Choose strides of an odd number of cache lines (padded_stride): a power of two would put a
// tile's column of rows into few sets of the first-level cache.
//
// The tile's shape follows from the registers (of 16: 6 x 2 vectors of sums, 2 of B, 1 of A; of 32: 12 x 2). Every
// element of C is summed over k in order, whatever the tile: results do not depend on how rows are grouped.
#pragma once

#include "bfloat16_pairs.h"
#include "vector.h"

namespace bert_fast {
namespace BERT_FAST_ISA {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;
#else
constexpr int TILE_ROWS = 6;
#endif
constexpr int TILE_COLUMNS = 2 * LANES;

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A row stride, in units or floats, for rows of `columns` padded to whole tiles: an odd number of 64-byte lines.
constexpr int64_t padded_stride(int64_t columns) {
    return (round_up(columns, TILE_COLUMNS > 16 ? TILE_COLUMNS : 16) / 16 | 1) * 16;
}

BERT_FAST_INLINE vfloat multiply_add(vfloat sum, vfloat a, vfloat b) { return sum + a * b; }

// depth is at least 1.
template <int ROWS, bool ACCUMULATE, typename Unit>
BERT_FAST_INLINE void product_tile(int64_t depth, const Unit* a, int64_t a_row, int64_t a_column, const Unit* b,
                                   int64_t b_row, float* c, int64_t c_row) {
    vfloat sums[ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = broadcast(0.0f);
    do {
        const auto b0 = load(b), b1 = load(b + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const auto x = broadcast(a[i * a_row]);
            sums[i][0] = multiply_add(sums[i][0], x, b0);
            sums[i][1] = multiply_add(sums[i][1], x, b1);
        }
        a += a_column;
        b += b_row;
    } while (--depth > 0);
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++) {
        float* to = c + i * c_row;
        store(to, ACCUMULATE ? load(to) + sums[i][0] : sums[i][0]);
        store(to + LANES, ACCUMULATE ? load(to + LANES) + sums[i][1] : sums[i][1]);
    }
}

// `tiles` tiles of ROWS rows, one below the other.
template <int ROWS, typename Unit>
inline void product_strip(int tiles, int64_t depth, const Unit* a, int64_t a_row, int64_t a_column, const Unit* b,
                          int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    for (int tile = 0; tile < tiles; tile++) {
        const Unit* a_tile = a + tile * ROWS * a_row;
        float* c_tile = c + tile * ROWS * c_row;
        if (accumulate)
            product_tile<ROWS, true>(depth, a_tile, a_row, a_column, b, b_row, c_tile, c_row);
        else
            product_tile<ROWS, false>(depth, a_tile, a_row, a_column, b, b_row, c_tile, c_row);
    }
}

template <int ROWS, typename Unit>
inline void product_rows(int rows_each, int tiles, int64_t depth, const Unit* a, int64_t a_row, int64_t a_column,
                         const Unit* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    if (rows_each == ROWS)
        product_strip<ROWS>(tiles, depth, a, a_row, a_column, b, b_row, c, c_row, accumulate);
    else if constexpr (ROWS > 1)
        product_rows<ROWS - 1>(rows_each, tiles, depth, a, a_row, a_column, b, b_row, c, c_row, accumulate);
}

// C (rows, columns) = or += A (rows, depth) B (depth, columns). A's unit (i, k) is a[i * a_row + k * a_column];
// B and C are padded to whole TILE_COLUMNS.
template <typename Unit>
inline void product(int64_t rows, int64_t columns, int64_t depth, const Unit* a, int64_t a_row, int64_t a_column,
                    const Unit* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    // In units: TILE_COLUMNS x DEPTH of B stay in the first-level cache, and sums stay short.
    constexpr int64_t DEPTH = 64;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, each = tiles ? rows / tiles : 0;
    const int larger = static_cast<int>(rows - each * tiles), smaller = static_cast<int>(tiles) - larger;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = depth - k < DEPTH ? depth - k : DEPTH;
        for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
            const Unit* a_part = a + k * a_column;
            const Unit* b_part = b + k * b_row + column;
            float* c_part = c + column;
            product_rows<TILE_ROWS>(static_cast<int>(each) + 1, larger, deep, a_part, a_row, a_column, b_part, b_row,
                                    c_part, c_row, accumulate || k > 0);
            product_rows<TILE_ROWS>(static_cast<int>(each), smaller, deep, a_part + larger * (each + 1) * a_row, a_row,
                                    a_column, b_part, b_row, c_part + larger * (each + 1) * c_row, c_row,
                                    accumulate || k > 0);
        }
    }
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
