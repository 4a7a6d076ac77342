// Small matrix products for operands that lie in the caches: C = A B or C += A B, float32.
//
// Matrices are plain rows with a stride. A tile of C stays in registers: A's elements are broadcast, B's are
// loaded as vectors. Choose strides of an odd number of cache lines (padded_stride): a power of two would put a
// tile's column of rows into few sets of the first-level cache.
//
// The tile's shape follows from the registers (of 16: 6 x 2 vectors of sums, 2 of B, 1 of A; of 32: 12 x 2). Every
// element of C is summed over k in order, whatever the tile: results do not depend on how rows are grouped.
#pragma once

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

// A row stride, in floats, for rows of `columns` padded to whole tiles: an odd number of 64-byte lines.
constexpr int64_t padded_stride(int64_t columns) {
    return (round_up(columns, TILE_COLUMNS > 16 ? TILE_COLUMNS : 16) / 16 | 1) * 16;
}

template <int ROWS>
BERT_FAST_INLINE void product_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                                   int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    vfloat sums[ROWS][2];
    for (int i = 0; i < ROWS; i++) {
        sums[i][0] = accumulate ? load(c + i * c_row) : broadcast(0.0f);
        sums[i][1] = accumulate ? load(c + i * c_row + LANES) : broadcast(0.0f);
    }
    for (int64_t k = 0; k < depth; k++) {
        const vfloat b0 = load(b + k * b_row), b1 = load(b + k * b_row + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const vfloat x = broadcast(a[i * a_row + k * a_column]);
            sums[i][0] += x * b0;
            sums[i][1] += x * b1;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        store(c + i * c_row, sums[i][0]);
        store(c + i * c_row + LANES, sums[i][1]);
    }
}

// The tiles of `rows` rows in one strip of TILE_COLUMNS columns; row tiles as equal as can be.
template <int ROWS>
inline void product_strip(int tiles, int64_t depth, const float* a, int64_t a_row, int64_t a_column, const float* b,
                          int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    for (int tile = 0; tile < tiles; tile++)
        product_tile<ROWS>(depth, a + tile * ROWS * a_row, a_row, a_column, b, b_row, c + tile * ROWS * c_row, c_row,
                           accumulate);
}

template <int ROWS>
inline void product_rows(int rows_each, int tiles, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                         const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    if (rows_each == ROWS)
        product_strip<ROWS>(tiles, depth, a, a_row, a_column, b, b_row, c, c_row, accumulate);
    else if constexpr (ROWS > 1)
        product_rows<ROWS - 1>(rows_each, tiles, depth, a, a_row, a_column, b, b_row, c, c_row, accumulate);
}

// C (rows, columns) = or += A (rows, depth) B (depth, columns). A's element (i, k) is a[i * a_row + k * a_column];
// B and C are padded to whole TILE_COLUMNS.
inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_column,
                    const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
    constexpr int64_t DEPTH = 256;  // TILE_COLUMNS x DEPTH of B stay in the first-level cache
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, each = tiles ? rows / tiles : 0;
    const int larger = static_cast<int>(rows - each * tiles), smaller = static_cast<int>(tiles) - larger;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = depth - k < DEPTH ? depth - k : DEPTH;
        for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
            const float* a_part = a + k * a_column;
            const float* b_part = b + k * b_row + column;
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
