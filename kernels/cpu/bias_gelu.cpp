// bias_gelu: out = u Phi(u) with u = x + bias; d u = grad (Phi(u) + u phi(u)). See bert_fast/reference.py.
//
// Both directions stream: one read of x (and grad_out), one write. Phi comes from Phi(-|u|) = exp(-u^2/2) g(|u|),
// where g is half the scaled complementary error function of |u|/sqrt(2): one exponential serves Phi and phi, no
// branch, and the relative error stays small far into the negative tail. g(u) (u + K) is smooth and bounded, and
// a polynomial in s = u / (u + K) (the substitution of M. Shepherd and J. Laframboise, "Chebyshev approximation
// of (1 + 2x) exp(x^2) erfc x in 0 <= x < infinity", Math. Comp. 36, 1981); minimax fit, relative error 6e-9.
//
// The gradient of the bias: every BLOCK_ROWS rows give a partial sum, whatever the number of threads, and the
// partial sums are added in their order, so the bits do not depend on the threads.

#include "parallel.h"
#include "vector.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 64;
constexpr float LIMIT = 30.0f;  // beyond it Phi is 0 or 1 and phi is 0: clamped, infinities give no infinity times zero

struct Normal {
    vfloat cdf, pdf;
};

BERT_FAST_INLINE Normal normal_distribution(vfloat u) {
    const vfloat magnitude = min(broadcast(LIMIT), abs(u));
    const vfloat reciprocal = 1.0f / (magnitude + 3.5f);
    const vfloat s = magnitude * reciprocal;
    vfloat g = broadcast(0.057720769196748734f);
    g = g * s + broadcast(-0.15077465772628784f);
    g = g * s + broadcast(0.020296147093176842f);
    g = g * s + broadcast(0.17493906617164612f);
    g = g * s + broadcast(0.1772567182779312f);
    g = g * s + broadcast(-0.4770847260951996f);
    g = g * s + broadcast(-0.7110438346862793f);
    g = g * s + broadcast(2.6947271823883057f);
    g = g * s + broadcast(-3.137044906616211f);
    g = g * s + broadcast(1.75f);
    const vfloat bell = exp(magnitude * magnitude * -0.5f);
    const vfloat tail = bell * g * reciprocal;
    const vint negative = u < broadcast(0.0f);
    return {negative ? tail : 1.0f - tail, bell * 0.398942280401432677940f};
}

BERT_FAST_INLINE vfloat gelu(vfloat u) { return max(broadcast(-LIMIT), u) * normal_distribution(u).cdf; }

BERT_FAST_INLINE vfloat gelu_slope(vfloat u) {
    const Normal normal = normal_distribution(u);
    return normal.cdf + min(broadcast(LIMIT), max(broadcast(-LIMIT), u)) * normal.pdf;
}

template <typename T, typename B>
int forward(const T* x, const B* bias, T* out, int64_t rows, int64_t columns, int threads) {
    parallel(threads, (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, [&](int64_t block, int) {
        const int64_t first = block * BLOCK_ROWS, last = first + BLOCK_ROWS < rows ? first + BLOCK_ROWS : rows;
        for (int64_t row = first; row < last; row++) {
            const T* in = x + row * columns;
            T* to = out + row * columns;
            for (int64_t c = 0; c < columns; c += LANES) {
                const int64_t count = columns - c;
                vfloat u = load_first(in + c, count);
                if (bias != nullptr) u += load_first(bias + c, count);
                store_first(to + c, gelu(u), count);
            }
        }
    });
    return DONE;
}

template <typename T, typename B>
int backward(const T* grad_out, const T* x, const B* bias, T* grad_x, B* grad_bias, int64_t rows, int64_t columns,
             int threads) {
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t padded = (columns + LANES - 1) / LANES * LANES;
    const Scratch partial_sums(1, bias == nullptr ? 0 : sizeof(float) * padded * blocks);
    if (!partial_sums.ok()) return NO_MEMORY;
    parallel(threads, blocks, [&](int64_t block, int) {
        const int64_t first = block * BLOCK_ROWS, last = first + BLOCK_ROWS < rows ? first + BLOCK_ROWS : rows;
        float* sums = bias == nullptr ? nullptr : partial_sums.of<float>(0) + block * padded;
        for (int64_t row = first; row < last; row++) {  // a row of sums stays in the first-level cache
            for (int64_t c = 0; c < columns; c += LANES) {
                const int64_t count = columns - c, at = row * columns + c;
                vfloat u = load_first(x + at, count);
                if (bias != nullptr) u += load_first(bias + c, count);
                const vfloat grad = load_first(grad_out + at, count) * gelu_slope(u);
                store_first(grad_x + at, grad, count);
                if (bias != nullptr) store(sums + c, row == first ? grad : load(sums + c) + grad);
            }
        }
    });
    if (bias == nullptr) return DONE;
    parallel(threads, (columns + 4 * LANES - 1) / (4 * LANES), [&](int64_t strip, int) {
        for (int64_t c = strip * 4 * LANES; c < columns && c < (strip + 1) * 4 * LANES; c += LANES) {
            vfloat sum = broadcast(0.0f);
            for (int64_t block = 0; block < blocks; block++) sum += load(partial_sums.of<float>(0) + block * padded + c);
            store_first(grad_bias + c, sum, columns - c);
        }
    });
    return DONE;
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

using namespace bert_fast::BERT_FAST_ISA;

// x and out (rows, columns) of dtype; bias (columns,) of bias_dtype, or null.
BERT_FAST_OPERATOR(bias_gelu_fwd)(int dtype, int bias_dtype, const void* x, const void* bias, void* out, int64_t rows,
                                  int64_t columns, int threads) {
    return with_dtypes(dtype, bias_dtype, [&](auto t, auto b) {
        typedef decltype(t) T;
        typedef decltype(b) B;
        return forward(static_cast<const T*>(x), static_cast<const B*>(bias), static_cast<T*>(out), rows, columns,
                       threads);
    });
}

// grad_out, x and grad_x (rows, columns) of dtype; bias and grad_bias (columns,) of bias_dtype, or null.
BERT_FAST_OPERATOR(bias_gelu_bwd)(int dtype, int bias_dtype, const void* grad_out, const void* x, const void* bias,
                                  void* grad_x, void* grad_bias, int64_t rows, int64_t columns, int threads) {
    return with_dtypes(dtype, bias_dtype, [&](auto t, auto b) {
        typedef decltype(t) T;
        typedef decltype(b) B;
        return backward(static_cast<const T*>(grad_out), static_cast<const T*>(x), static_cast<const B*>(bias),
                        static_cast<T*>(grad_x), static_cast<B*>(grad_bias), rows, columns, threads);
    });
}
