// residual_layernorm: out = LayerNorm(dropout(x + bias) + residual). See bert_fast/reference.py.
//
// A row is read once, forward and backward: it stays in a buffer of float32 (3 KiB for BERT-base) between the
// passes over it, mean, then the mean of (z - mean)^2, then the result. The statistics are those of z as stored.
// Gradients of parameters: every BLOCK_ROWS rows give a partial sum, whatever the number of threads, and the
// partial sums are added in their order, so the bits do not depend on the threads.

#include "parallel.h"
#include "philox.h"
#include "vector.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 32;

// body(c, count, k) for the vectors of a row, c its first column and count the columns left, LANES or more but for the
// last. Four at a time: k is 0 .. 3, so that sums kept in four vectors do not wait for each other's additions.
template <typename Body>
BERT_FAST_INLINE void for_vectors(int64_t columns, const Body& body) {
    int64_t c = 0;
    for (; c + 4 * LANES <= columns; c += 4 * LANES) {
        body(c, LANES, 0);
        body(c + LANES, LANES, 1);
        body(c + 2 * LANES, LANES, 2);
        body(c + 3 * LANES, LANES, 3);
    }
    for (; c < columns; c += LANES) body(c, columns - c, 0);
}

// Asks for the cache line of p[c] where vector k of for_vectors begins one. The passes over a row that is in the cache
// ask for the next row's lines: the processor's own prefetching falls behind streams that pause.
template <typename T>
BERT_FAST_INLINE void prefetch(const T* p, int64_t c, int k) {
    constexpr int VECTORS_IN_LINE = LANES * sizeof(T) < 64 ? 64 / (LANES * sizeof(T)) : 1;
    if (k % VECTORS_IN_LINE == 0) __builtin_prefetch(p + c);
}

BERT_FAST_INLINE float sum_four(const vfloat* sums) { return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])); }

// The dropout of one forward pass at one site; nothing is dropped where row_key is null.
struct Dropout {
    const int64_t* row_key;
    uint64_t key;
    uint32_t site, threshold;
    float scale;

    BERT_FAST_INLINE void draw(uint64_t* words, int64_t row, int64_t columns) const {
        if (row_key != nullptr) hidden_keep_words(words, (columns + 63) / 64, key, row_key[row], site, 0, threshold);
    }
    BERT_FAST_INLINE vfloat apply(vfloat x, const uint64_t* words, int64_t c) const {
        if (row_key == nullptr) return x;
        return keep_lanes(x * scale, static_cast<uint32_t>(words[c / 64] >> (c % 64)));
    }
};

BERT_FAST_INLINE int64_t padded(int64_t columns) { return (columns + LANES - 1) / LANES * LANES; }

// Working memory of a worker: a row of float32 and the keep words of a row.
BERT_FAST_INLINE size_t row_bytes(int64_t columns) { return sizeof(float) * padded(columns) + (columns + 63) / 64 * 8; }

BERT_FAST_INLINE int64_t blocks_of(int64_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

template <typename X, typename Z>
int forward(const X* x, const float* bias, const Z* residual, const float* weight, const float* ln_bias, Z* out, Z* z,
            float* means, float* rstds, int64_t rows, int64_t columns, float eps, Dropout dropout, int threads) {
    const Scratch scratch(threads, row_bytes(columns));
    if (!scratch.ok()) return NO_MEMORY;
    parallel(threads, blocks_of(rows), [&](int64_t block, int worker) {
        float* kept_row = scratch.of<float>(worker);
        uint64_t* words = reinterpret_cast<uint64_t*>(kept_row + padded(columns));
        const int64_t last = (block + 1) * BLOCK_ROWS < rows ? (block + 1) * BLOCK_ROWS : rows;
        for (int64_t row = block * BLOCK_ROWS; row < last; row++) {
            const int64_t start = row * columns, next = row + 1 < last ? start + columns : start;
            dropout.draw(words, row, columns);
            vfloat sums[4] = {};
            for_vectors(columns, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
                vfloat value = load_first(x + start + c, count);
                if (bias != nullptr) value += load_first(bias + c, count);
                value = dropout.apply(value, words, c);
                if (residual != nullptr) value += load_first(residual + start + c, count);
                store_first(z + start + c, value, count);
                if (sizeof(Z) < sizeof(float) || count < LANES)
                    value = load_first(z + start + c, count);  // as rounded by the store, and 0 past the row
                store(kept_row + c, value);
                sums[k] += value;
            });
            const float mean = sum_four(sums) / columns;
            vfloat squares[4] = {};
            for_vectors(columns, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
                prefetch(x + next, c, k);
                if (residual != nullptr) prefetch(residual + next, c, k);
                vfloat centered = load(kept_row + c) - mean;
                if (count < LANES) centered = keep_lanes(centered, (1u << count) - 1);
                squares[k] += centered * centered;
            });
            const float rstd = 1.0f / __builtin_sqrtf(sum_four(squares) / columns + eps);
            means[row] = mean;
            rstds[row] = rstd;
            for_vectors(columns, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
                prefetch(z + next, c, k);
                prefetch(out + next, c, k);
                const vfloat normalized = (load(kept_row + c) - mean) * rstd;
                const vfloat scaled = normalized * load_first(weight + c, count) + load_first(ln_bias + c, count);
                store_first(out + start + c, scaled, count);
            });
        }
    });
    return DONE;
}

// grad_x null: not written (it equals grad_residual). grad_parameters: (3, columns) for weight, ln_bias, bias.
template <typename X, typename Z>
int backward(const Z* grad_out, const Z* z, const float* means, const float* rstds, const float* weight, X* grad_x,
             Z* grad_residual, float* grad_parameters, int64_t rows, int64_t columns, Dropout dropout, int threads) {
    const int64_t blocks = blocks_of(rows), width = padded(columns);
    const Scratch scratch(threads, row_bytes(columns)), sums(1, sizeof(float) * 3 * width * blocks);
    if (!scratch.ok() || !sums.ok()) return NO_MEMORY;
    parallel(threads, blocks, [&](int64_t block, int worker) {
        float* grads = scratch.of<float>(worker);
        uint64_t* words = reinterpret_cast<uint64_t*>(grads + width);
        float* sum_weight = sums.of<float>(0) + block * 3 * width;
        float *sum_ln_bias = sum_weight + width, *sum_bias = sum_ln_bias + width;
        memset(sum_weight, 0, sizeof(float) * 3 * width);
        const int64_t last = (block + 1) * BLOCK_ROWS < rows ? (block + 1) * BLOCK_ROWS : rows;
        for (int64_t row = block * BLOCK_ROWS; row < last; row++) {
            const int64_t start = row * columns, next = row + 1 < last ? start + columns : start;
            const float mean = means[row], rstd = rstds[row];
            dropout.draw(words, row, columns);
            vfloat sums_g[4] = {}, sums_gx[4] = {};
            for_vectors(columns, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
                const vfloat grad = load_first(grad_out + start + c, count);
                const vfloat normalized = (load_first(z + start + c, count) - mean) * rstd;
                const vfloat g = grad * load_first(weight + c, count);  // 0 past the row
                store(grads + c, g);
                store(sum_weight + c, load(sum_weight + c) + grad * normalized);
                store(sum_ln_bias + c, load(sum_ln_bias + c) + grad);
                sums_g[k] += g;
                sums_gx[k] += g * normalized;
            });
            const float mean_g = sum_four(sums_g) / columns, mean_gx = sum_four(sums_gx) / columns;
            for_vectors(columns, [&](int64_t c, int64_t count, int k) __attribute__((always_inline)) {
                prefetch(grad_out + next, c, k);
                prefetch(z + next, c, k);
                prefetch(grad_residual + next, c, k);
                const vfloat normalized = (load_first(z + start + c, count) - mean) * rstd;
                vfloat grad_z = (load(grads + c) - mean_g - normalized * mean_gx) * rstd;
                store_first(grad_residual + start + c, grad_z, count);
                grad_z = dropout.apply(grad_z, words, c);
                if (grad_x != nullptr) store_first(grad_x + start + c, grad_z, count);
                store(sum_bias + c, load(sum_bias + c) + grad_z);
            });
        }
    });
    parallel(threads, 3 * ((columns + 8 * LANES - 1) / (8 * LANES)), [&](int64_t strip, int) {
        const int64_t which = strip % 3, first = strip / 3 * 8 * LANES;
        for (int64_t c = first; c < columns && c < first + 8 * LANES; c += LANES) {
            vfloat sum = broadcast(0.0f);
            for (int64_t block = 0; block < blocks; block++)
                sum += load(sums.of<float>(0) + (block * 3 + which) * width + c);
            store_first(grad_parameters + which * columns + c, sum, columns - c);
        }
    });
    return DONE;
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

using namespace bert_fast::BERT_FAST_ISA;

// x of x_dtype; residual (or null), out and z of z_dtype, all (rows, columns); parameters float32 (columns,), bias
// may be null; means and rstds (rows,); row_key null: no dropout.
BERT_FAST_OPERATOR(residual_layernorm_fwd)(int x_dtype, int z_dtype, const void* x, const void* bias,
                                           const void* residual, const void* weight, const void* ln_bias, void* out,
                                           void* z, void* means, void* rstds, int64_t rows, int64_t columns, float eps,
                                           const void* row_key, int64_t key, int site, int threshold, float scale,
                                           int threads) {
    return with_dtypes(x_dtype, z_dtype, [&](auto t, auto r) {
        typedef decltype(t) X;
        typedef decltype(r) Z;
        const Dropout dropout = {static_cast<const int64_t*>(row_key), static_cast<uint64_t>(key),
                                 static_cast<uint32_t>(site), static_cast<uint32_t>(threshold), scale};
        return forward(static_cast<const X*>(x), static_cast<const float*>(bias), static_cast<const Z*>(residual),
                       static_cast<const float*>(weight), static_cast<const float*>(ln_bias), static_cast<Z*>(out),
                       static_cast<Z*>(z), static_cast<float*>(means), static_cast<float*>(rstds), rows, columns, eps,
                       dropout, threads);
    });
}

// grad_x of x_dtype or null; grad_out, z and grad_residual of z_dtype; grad_parameters (3, columns) float32: weight,
// ln_bias, bias.
BERT_FAST_OPERATOR(residual_layernorm_bwd)(int x_dtype, int z_dtype, const void* grad_out, const void* z,
                                           const void* means, const void* rstds, const void* weight, void* grad_x,
                                           void* grad_residual, void* grad_parameters, int64_t rows, int64_t columns,
                                           const void* row_key, int64_t key, int site, int threshold, float scale,
                                           int threads) {
    return with_dtypes(x_dtype, z_dtype, [&](auto t, auto r) {
        typedef decltype(t) X;
        typedef decltype(r) Z;
        const Dropout dropout = {static_cast<const int64_t*>(row_key), static_cast<uint64_t>(key),
                                 static_cast<uint32_t>(site), static_cast<uint32_t>(threshold), scale};
        return backward(static_cast<const Z*>(grad_out), static_cast<const Z*>(z), static_cast<const float*>(means),
                        static_cast<const float*>(rstds), static_cast<const float*>(weight), static_cast<X*>(grad_x),
                        static_cast<Z*>(grad_residual), static_cast<float*>(grad_parameters), rows, columns, dropout,
                        threads);
    });
}
