// mlm_loss: the pass over a chunk's logits between two matrix products. See bert_fast/reference.py.
//
// A row of logits (V float32, 120 KiB for BERT) is read from memory once and stays in the cache: the bias is added and
// the maximum taken, then the exponentials and their sum, then the gradient (softmax - onehot) / normalizer is
// written over it. The gradient of the bias: every BLOCK_ROWS rows give a partial sum, whatever the number of
// threads, added in their order, so the bits do not depend on the threads.

#include "parallel.h"
#include "vector.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 8;

BERT_FAST_INLINE vfloat lanes_or(vfloat x, int64_t count, float other) {
    if (count >= LANES) return x;
    for (int64_t i = count; i < LANES; i++) x[i] = other;
    return x;
}

// labels below 0 are ignored: loss 0, gradient 0. sums: (blocks, vocabulary), or null for the loss alone.
int forward(float* logits, const float* bias, const int64_t* labels, float scale, float* losses, float* sums,
            int64_t rows, int64_t vocabulary, int threads) {
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    parallel(threads, blocks, [&](int64_t block, int) {
        const int64_t last = (block + 1) * BLOCK_ROWS < rows ? (block + 1) * BLOCK_ROWS : rows;
        float* sum_bias = sums == nullptr ? nullptr : sums + block * vocabulary;
        if (sums != nullptr) memset(sum_bias, 0, sizeof(float) * vocabulary);
        for (int64_t row = block * BLOCK_ROWS; row < last; row++) {
            float* line = logits + row * vocabulary;
            losses[row] = 0.0f;
            if (labels[row] < 0) {
                if (sums != nullptr) memset(line, 0, sizeof(float) * vocabulary);
                continue;
            }
            vfloat largest = broadcast(-__builtin_inff());
            for (int64_t v = 0; v < vocabulary; v += LANES) {
                const int64_t count = vocabulary - v;
                const vfloat x = load_first(line + v, count) + load_first(bias + v, count);
                store_first(line + v, x, count);
                largest = max(largest, lanes_or(x, count, -__builtin_inff()));
            }
            const float top = max_lanes(largest), at_label = line[labels[row]];
            // Sums of 64 vectors apart, then of those: fewer roundings than one long sum.
            float total = 0.0f;
            for (int64_t v = 0; v < vocabulary;) {
                vfloat sum = broadcast(0.0f);
                for (int64_t end = v + 64 * LANES; v < vocabulary && v < end; v += LANES) {
                    const int64_t count = vocabulary - v;
                    const vfloat e = lanes_or(exp(load_first(line + v, count) - top), count, 0.0f);
                    store_first(line + v, e, count);
                    sum += e;
                }
                total += sum_lanes(sum);
            }
            losses[row] = __builtin_logf(total) + top - at_label;
            if (sums == nullptr) continue;
            const float factor = scale / total;
            // (e^(x_label - lse) - 1) without the cancellation that softmax - 1 has where the label is certain
            const float label_gradient = scale * __builtin_expm1f(-losses[row]);
            line[labels[row]] = 0.0f;  // its gradient is put in below: dividing by a factor of 0 would give NaN
            for (int64_t v = 0; v < vocabulary; v += LANES) {
                const int64_t count = vocabulary - v;
                const vfloat g = load_first(line + v, count) * factor;
                store_first(line + v, g, count);
                store_first(sum_bias + v, load_first(sum_bias + v, count) + g, count);
            }
            line[labels[row]] = label_gradient;
            sum_bias[labels[row]] += label_gradient;
        }
    });
    return DONE;
}

// grad_bias (vocabulary,) gets the sum of sums (blocks, vocabulary) added to what it holds.
int add_blocks(const float* sums, float* grad_bias, int64_t blocks, int64_t vocabulary, int threads) {
    constexpr int64_t STRIP = 64 * LANES;
    parallel(threads, (vocabulary + STRIP - 1) / STRIP, [&](int64_t strip, int) {
        for (int64_t v = strip * STRIP; v < vocabulary && v < (strip + 1) * STRIP; v += LANES) {
            const int64_t count = vocabulary - v;
            vfloat sum = load_first(grad_bias + v, count);
            for (int64_t block = 0; block < blocks; block++) sum += load_first(sums + block * vocabulary + v, count);
            store_first(grad_bias + v, sum, count);
        }
    });
    return DONE;
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

using namespace bert_fast::BERT_FAST_ISA;

// logits (rows, vocabulary) float32, overwritten by their gradient where with_grads; bias (vocabulary,) and grad_bias
// float32; labels (rows,), negative: ignored; scale: one over the normalizer; losses (rows,), not normalized.
BERT_FAST_OPERATOR(mlm_loss_rows)(void* logits, const void* bias, const void* labels, float scale, void* losses,
                                  void* grad_bias, int64_t rows, int64_t vocabulary, int with_grads, int threads) {
    const int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const Scratch sums(1, with_grads ? sizeof(float) * blocks * vocabulary : 0);
    if (!sums.ok()) return NO_MEMORY;
    forward(static_cast<float*>(logits), static_cast<const float*>(bias), static_cast<const int64_t*>(labels), scale,
            static_cast<float*>(losses), with_grads ? sums.of<float>(0) : nullptr, rows, vocabulary, threads);
    if (with_grads)
        add_blocks(sums.of<float>(0), static_cast<float*>(grad_bias), blocks, vocabulary, threads);
    return DONE;
}
