// optimizer: AdamW and LAMB over all parameters at once. See bert_fast/optim/reference.py for the formulas.
//
// The tensors are cut into chunks of CHUNK elements, whatever the number of threads; a chunk is one item of work. Sums
// of squares are float32 over SUM_BLOCK elements a lane apart, float64 beyond, and the chunks' sums are added in
// their order, so the bits do not depend on the threads. Bytes an element, all float32: norm 4 (the gradient); AdamW
// 28 (reads w, g, m, v; writes w, m, v); LAMB 24 for moments and norms and 16 for the update, which computes u again
// from m and v rather than keep it.

#include <math.h>

#include "parallel.h"
#include "vector.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr int64_t CHUNK = 1 << 15, SUM_BLOCK = 1 << 10;

struct Chunk {
    int64_t tensor, first, count;
};

// The chunks of `tensors` tensors of `sizes` elements.
class Chunks {
  public:
    Chunks(const int64_t* sizes, int64_t tensors) : sizes_(sizes), tensors_(tensors), starts_(1, 8 * (tensors + 1)) {
        if (!ok()) return;
        int64_t* starts = starts_.of<int64_t>(0);
        starts[0] = 0;
        for (int64_t i = 0; i < tensors; i++) starts[i + 1] = starts[i] + (sizes[i] + CHUNK - 1) / CHUNK;
    }
    bool ok() const { return starts_.ok(); }
    int64_t count() const { return starts_.of<int64_t>(0)[tensors_]; }
    int64_t start(int64_t tensor) const { return starts_.of<int64_t>(0)[tensor]; }
    Chunk at(int64_t chunk) const {
        int64_t low = 0, high = tensors_;  // the last tensor that starts at or before the chunk
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (start(middle) <= chunk ? low : high) = middle;
        }
        while (start(low + 1) <= chunk) low++;  // past tensors without an element
        const int64_t first = (chunk - start(low)) * CHUNK, left = sizes_[low] - first;
        return {low, first, left < CHUNK ? left : CHUNK};
    }

  private:
    const int64_t* sizes_;
    int64_t tensors_;
    Scratch starts_;
};

template <typename T>
T* tensor(const int64_t* addresses, const Chunk& chunk) {
    return reinterpret_cast<T*>(addresses[chunk.tensor]) + chunk.first;
}

template <typename T>
double sum_of_squares(const T* x, int64_t count) {
    double total = 0.0;
    for (int64_t block = 0; block < count; block += SUM_BLOCK) {
        const int64_t end = block + SUM_BLOCK < count ? block + SUM_BLOCK : count;
        vfloat sum = broadcast(0.0f);
        for (int64_t i = block; i < end; i += LANES) {
            const vfloat value = load_first(x + i, end - i);
            sum += value * value;
        }
        total += sum_lanes(sum);
    }
    return total;
}

template <typename T>
int norm(const int64_t* tensors, const int64_t* sizes, int64_t count, double* out, int threads) {
    const Chunks chunks(sizes, count);
    if (!chunks.ok()) return NO_MEMORY;
    const Scratch sums(1, sizeof(double) * (chunks.count() + 1));
    if (!sums.ok()) return NO_MEMORY;
    double* parts = sums.of<double>(0);
    parallel(threads, chunks.count(), [&](int64_t item, int) {
        const Chunk chunk = chunks.at(item);
        parts[item] = sum_of_squares(tensor<const T>(tensors, chunk), chunk.count);
    });
    double total = 0.0;
    for (int64_t i = 0; i < chunks.count(); i++) total += parts[i];
    *out = total;
    return DONE;
}

struct Hyper {
    const float* rates;  // (tensors, 4)
    float clip, beta1, rest1, beta2, rest2, eps;  // rest: 1 - beta, rounded once from float64
};

struct Rates {
    vfloat lr, decay, c1, c2;
    Rates(const float* row) : lr(broadcast(row[0])), decay(broadcast(row[1])), c1(broadcast(row[2])), c2(broadcast(row[3])) {}
};

struct Element {
    vfloat m, v;
};

BERT_FAST_INLINE Element moments(vfloat grad, vfloat m, vfloat v, const Hyper& hyper) {
    const vfloat g = grad * broadcast(hyper.clip);
    return {broadcast(hyper.beta1) * m + broadcast(hyper.rest1) * g,
            broadcast(hyper.beta2) * v + broadcast(hyper.rest2) * g * g};
}

BERT_FAST_INLINE vfloat direction(const Element& e, const Rates& rates, const Hyper& hyper) {
    return rates.c1 * e.m / (rates.c2 * sqrt(e.v) + broadcast(hyper.eps));
}

template <typename T>
BERT_FAST_INLINE void store_weight(T* param, float* master, vfloat w, int64_t count) {
    store_first(master, w, count);
    if (sizeof(T) < sizeof(float)) store_first(param, w, count);
}

struct Tensors {
    const int64_t *params, *masters, *grads, *exp_avgs, *exp_avg_sqs, *sizes;
    int64_t count;
};

template <typename T>
int adamw(const Tensors& t, const Hyper& hyper, int threads) {
    const Chunks chunks(t.sizes, t.count);
    if (!chunks.ok()) return NO_MEMORY;
    parallel(threads, chunks.count(), [&](int64_t item, int) {
        const Chunk chunk = chunks.at(item);
        T* param = tensor<T>(t.params, chunk);
        float *w = tensor<float>(t.masters, chunk), *m = tensor<float>(t.exp_avgs, chunk);
        float* v = tensor<float>(t.exp_avg_sqs, chunk);
        const T* grad = tensor<const T>(t.grads, chunk);
        const Rates rates(hyper.rates + 4 * chunk.tensor);
        const vfloat kept = 1.0f - rates.lr * rates.decay;
        for (int64_t i = 0; i < chunk.count; i += LANES) {
            const int64_t left = chunk.count - i;
            const Element e = moments(load_first(grad + i, left), load_first(m + i, left), load_first(v + i, left), hyper);
            store_first(m + i, e.m, left);
            store_first(v + i, e.v, left);
            store_weight(param + i, w + i, kept * load_first(w + i, left) - rates.lr * direction(e, rates, hyper), left);
        }
    });
    return DONE;
}

template <typename T>
int lamb(const Tensors& t, const Hyper& hyper, bool adapt_all, int threads) {
    const Chunks chunks(t.sizes, t.count);
    if (!chunks.ok()) return NO_MEMORY;
    const Scratch sums(1, 2 * sizeof(double) * (chunks.count() + 1)), ratios(1, sizeof(float) * (t.count + 1));
    if (!sums.ok() || !ratios.ok()) return NO_MEMORY;
    double* parts = sums.of<double>(0);
    float* ratio = ratios.of<float>(0);
    parallel(threads, chunks.count(), [&](int64_t item, int) {
        const Chunk chunk = chunks.at(item);
        const float* w = tensor<float>(t.masters, chunk);
        float *m = tensor<float>(t.exp_avgs, chunk), *v = tensor<float>(t.exp_avg_sqs, chunk);
        const T* grad = tensor<const T>(t.grads, chunk);
        const Rates rates(hyper.rates + 4 * chunk.tensor);
        double weights = 0.0, updates = 0.0;
        for (int64_t block = 0; block < chunk.count; block += SUM_BLOCK) {
            const int64_t end = block + SUM_BLOCK < chunk.count ? block + SUM_BLOCK : chunk.count;
            vfloat w_sum = broadcast(0.0f), u_sum = broadcast(0.0f);
            for (int64_t i = block; i < end; i += LANES) {
                const int64_t left = end - i;
                const Element e =
                    moments(load_first(grad + i, left), load_first(m + i, left), load_first(v + i, left), hyper);
                store_first(m + i, e.m, left);
                store_first(v + i, e.v, left);
                const vfloat weight = load_first(w + i, left);
                vfloat u = direction(e, rates, hyper) + rates.decay * weight;
                if (left < LANES) u = keep_lanes(u, (1u << left) - 1);  // past the end 0 / eps, NaN where eps is 0
                w_sum += weight * weight;
                u_sum += u * u;
            }
            weights += sum_lanes(w_sum);
            updates += sum_lanes(u_sum);
        }
        parts[2 * item] = weights;
        parts[2 * item + 1] = updates;
    });
    for (int64_t i = 0; i < t.count; i++) {
        double weights = 0.0, updates = 0.0;
        for (int64_t chunk = chunks.start(i); chunk < chunks.start(i + 1); chunk++) {
            weights += parts[2 * chunk];
            updates += parts[2 * chunk + 1];
        }
        const bool adapts = weights > 0.0 && updates > 0.0 && (adapt_all || hyper.rates[4 * i + 1] > 0.0f);
        ratio[i] = adapts ? static_cast<float>(::sqrt(weights) / ::sqrt(updates)) : 1.0f;
    }
    parallel(threads, chunks.count(), [&](int64_t item, int) {
        const Chunk chunk = chunks.at(item);
        T* param = tensor<T>(t.params, chunk);
        float* w = tensor<float>(t.masters, chunk);
        const float *m = tensor<float>(t.exp_avgs, chunk), *v = tensor<float>(t.exp_avg_sqs, chunk);
        const Rates rates(hyper.rates + 4 * chunk.tensor);
        const vfloat size = rates.lr * broadcast(ratio[chunk.tensor]);
        for (int64_t i = 0; i < chunk.count; i += LANES) {
            const int64_t left = chunk.count - i;
            const Element e{load_first(m + i, left), load_first(v + i, left)};
            const vfloat weight = load_first(w + i, left);
            const vfloat u = direction(e, rates, hyper) + rates.decay * weight;
            store_weight(param + i, w + i, weight - size * u, left);
        }
    });
    return DONE;
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

using namespace bert_fast::BERT_FAST_ISA;

// tensors (count,) addresses of tensors of dtype with sizes (count,) elements; out () float64: the sum of squares.
BERT_FAST_OPERATOR(optimizer_norm)(int dtype, const void* tensors, const void* sizes, int64_t count, void* out,
                                   int threads) {
    return with_dtype(dtype, [&](auto t) {
        return norm<decltype(t)>(static_cast<const int64_t*>(tensors), static_cast<const int64_t*>(sizes), count,
                                 static_cast<double*>(out), threads);
    });
}

// table (6, count) int64: addresses of params and masters, grads, first and second moments, then sizes; params and
// grads are of dtype. rates (count, 4) float32. kind: 0 AdamW; LAMB 1, or 2 with a ratio for every parameter.
BERT_FAST_OPERATOR(optimizer_update)(int kind, int dtype, const void* table, int64_t count, const void* rates, float clip,
                                     float beta1, float rest1, float beta2, float rest2, float eps, int threads) {
    if (clip != clip) return DONE;  // NaN: nothing changes
    const int64_t* rows = static_cast<const int64_t*>(table);
    const Tensors tensors{rows, rows + count, rows + 2 * count, rows + 3 * count, rows + 4 * count, rows + 5 * count, count};
    const Hyper hyper{static_cast<const float*>(rates), clip, beta1, rest1, beta2, rest2, eps};
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        return kind == 0 ? adamw<T>(tensors, hyper, threads) : lamb<T>(tensors, hyper, kind == 2, threads);
    });
}
