// attention: per sequence and head, out = dropout(softmax(scale q k^T)) v, over packed sequences, and its gradient.
// See bert_fast/reference.py for the formulas.
//
// A (sequence, head) is one piece of work: its keys and values, 2 S D elements, are copied once into rows that suit
// the products (matmul.h) and stay in the second-level cache, while QUERY_BLOCK queries at a time pass by. Softmax
// needs no rescaling: the scores of a block of queries exist for all keys at once. What the products multiply,
// float32 or pairs of bfloat16, is the Operands' matter (attention_operands.h); sums are float32.
//
// The backward recomputes the scores and sweeps KEY_BLOCK keys in the outer and QUERY_BLOCK queries in the inner
// loop, five products in one sweep, so that a key block's k, v, dk and dv stay in the cache. One worker owns a
// (sequence, head) from beginning to end: no atomics, and the same bits at any number of threads. Dropout's bits
// are drawn again: cheaper than keeping S^2 bits a head in memory between the passes. Where the gradient of a bias is
// wanted, dq and dv are summed over the tokens before they are rounded: a row of each for every (sequence, head), and
// then over the sequences in their order.
//
// The order of work follows T. Dao et al., "FlashAttention", NeurIPS 2022, with whole rows for the softmax.

#include "attention_operands.h"
#include "parallel.h"
#include "philox.h"

namespace bert_fast {
namespace BERT_FAST_ISA {
namespace {

constexpr int64_t QUERY_BLOCK = 48;  // rows of scores at a time: whole tiles of 6 and of 12, even
constexpr int64_t KEY_BLOCK = 256;   // of the backward; a multiple of 64, dropout's block

struct Shape {
    const int32_t* cu_seqlens;
    int64_t sequences, tokens, heads, size;
    int64_t longest() const {
        int64_t most = 0;
        for (int64_t i = 0; i < sequences; i++)
            if (cu_seqlens[i + 1] - cu_seqlens[i] > most) most = cu_seqlens[i + 1] - cu_seqlens[i];
        return most;
    }
    int64_t token_stride() const { return 3 * heads * size; }  // of qkv
    int64_t out_stride() const { return heads * size; }
};

struct Dropout {
    const int64_t* row_key;
    uint64_t key;
    uint32_t site, threshold;
    float scale;
    bool active() const { return row_key != nullptr; }
};

template <typename T>
void store_rows(T* to, int64_t to_row, const float* from, int64_t from_row, int64_t count, int64_t size,
                float factor) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < size; d += LANES)
            store_first(to + i * to_row + d, load(from + i * from_row + d) * factor, size - d);
}

// sums (size) += factor * the sum of the `count` rows of `from`; by sums of few rows, which lose less than one of all.
void add_rows(float* sums, const float* from, int64_t from_row, int64_t count, int64_t size, float factor) {
    constexpr int64_t FEW = 16;
    for (int64_t first = 0; first < count; first += FEW)
        for (int64_t d = 0; d < size; d += LANES) {
            vfloat sum = broadcast(0.0f);
            for (int64_t i = first; i < smaller(count, first + FEW); i++) sum += load(from + i * from_row + d);
            store(sums + d, load(sums + d) + sum * factor);
        }
}

template <typename T>
int forward(const T* qkv, T* out, float* lse, const Shape& shape, float scale, const Dropout& dropout, int threads) {
    typedef typename OperandsOf<T>::type Operands;
    typedef typename Operands::Unit Unit;
    constexpr int64_t DEPTH = Operands::DEPTH;
    const float q_factor = Operands::in_operands({scale, 1.0f}).q, score_factor = Operands::in_results({scale, 1.0f}).q;
    const int64_t size = shape.size, most = shape.longest();
    const int64_t d_row = padded_stride(size), s_row = padded_stride(most), words = (most + 63) / 64;
    const int64_t d_padded = round_up(size, TILE_COLUMNS), d_units = (size + DEPTH - 1) / DEPTH;
    const size_t floats = most * d_row + d_units * s_row + QUERY_BLOCK * (2 * d_row + s_row);
    // Threads beyond the (sequence, head) pairs share a pair's queries; each copies the keys and values for itself.
    const int64_t pairs = shape.sequences * shape.heads;
    const int64_t parts = pairs > 0 && threads > pairs ? (threads + pairs - 1) / pairs : 1;
    if (threads > pairs * parts) threads = static_cast<int>(pairs * parts);
    const Scratch scratch(threads, floats * sizeof(float) + words * sizeof(uint64_t));
    if (!scratch.ok()) return NO_MEMORY;

    parallel(threads, pairs * parts, [&](int64_t item, int worker) {
        const int64_t pair = item / parts, part = item % parts;
        const int64_t sequence = pair / shape.heads, head = pair % shape.heads;
        const int64_t start = shape.cu_seqlens[sequence], keys = shape.cu_seqlens[sequence + 1] - start;
        const int64_t blocks = (keys + QUERY_BLOCK - 1) / QUERY_BLOCK;
        const int64_t first_query = blocks * part / parts * QUERY_BLOCK;
        const int64_t last_query = smaller(keys, blocks * (part + 1) / parts * QUERY_BLOCK);
        if (first_query >= last_query) return;
        Unit* v = scratch.of<Unit>(worker);
        Unit* k_transposed = v + most * d_row;
        Unit* q = k_transposed + d_units * s_row;
        float* o = reinterpret_cast<float*>(q + QUERY_BLOCK * d_row);
        float* scores = o + QUERY_BLOCK * d_row;
        uint64_t* mask = reinterpret_cast<uint64_t*>(scores + QUERY_BLOCK * s_row);

        const T* q_in = qkv + start * shape.token_stride() + head * size;
        const T* k_in = q_in + shape.heads * size;
        const T* v_in = k_in + shape.heads * size;
        Operands::rows(v, d_row, k_in, shape.token_stride(), keys, size, 1.0f);
        transpose(k_transposed, s_row, v, d_row, keys, d_units);
        Operands::groups(v, d_row, v_in, shape.token_stride(), keys, size);

        for (int64_t first = first_query; first < last_query; first += QUERY_BLOCK) {
            const int64_t queries = smaller(QUERY_BLOCK, last_query - first);
            Operands::rows(q, d_row, q_in + first * shape.token_stride(), shape.token_stride(), queries, size,
                           q_factor);
            for (int64_t i = first + queries; i < smaller(keys, first + 2 * QUERY_BLOCK); i++)
                prefetch_row(q_in + i * shape.token_stride(), size);
            product(queries, round_up(keys, TILE_COLUMNS), d_units, q, d_row, 1, k_transposed, s_row, scores, s_row,
                    false);
            RowSum rows[QUERY_BLOCK];
            for (int64_t i = 0; i < queries; i++) {
                if (dropout.active()) {
                    attention_keep_words(mask, (keys + 63) / 64, dropout.key, dropout.row_key[start + first + i],
                                         dropout.site, static_cast<uint32_t>(head), 0, dropout.threshold);
                    rows[i] = softmax_row<Operands, true>(scores + i * s_row, keys, score_factor, mask);
                } else {
                    rows[i] = softmax_row<Operands, false>(scores + i * s_row, keys, score_factor, nullptr);
                }
            }
            product(queries, d_padded, (keys + DEPTH - 1) / DEPTH, reinterpret_cast<const Unit*>(scores), s_row, 1, v,
                    d_row, o, d_row, false);
            for (int64_t i = 0; i < queries; i++) {
                const int64_t token = start + first + i;
                store_rows(out + token * shape.out_stride() + head * size, 0, o + i * d_row, d_row, 1, size,
                           dropout.scale / rows[i].sum);
                lse[head * shape.tokens + token] = rows[i].max + __builtin_logf(rows[i].sum);
            }
        }
    });
    const int64_t used = shape.cu_seqlens[shape.sequences];
    if (used < shape.tokens) memset(static_cast<void*>(out + used * shape.out_stride()), 0,
           (shape.tokens - used) * shape.out_stride() * sizeof(T));
    for (int64_t head = 0; used < shape.tokens && head < shape.heads; head++)
        memset(lse + head * shape.tokens + used, 0, (shape.tokens - used) * sizeof(float));
    return DONE;
}

template <typename T>
int backward(const T* grad_out, const T* qkv, const T* out, const float* lse, T* grad_qkv, float* grad_bias,
             const Shape& shape, float scale, const Dropout& dropout, int threads) {
    typedef typename OperandsOf<T>::type Operands;
    typedef typename Operands::Unit Unit;
    constexpr int64_t DEPTH = Operands::DEPTH;
    constexpr bool GROUPS = DEPTH > 1;  // operands along rows lie otherwise than those along columns
    const Factors factor = Operands::in_operands({scale, dropout.scale});
    const Factors later = Operands::in_results({scale, dropout.scale});
    const int64_t size = shape.size, most = shape.longest(), key_block = smaller(KEY_BLOCK, most);
    const int64_t d_row = padded_stride(size), s_row = padded_stride(key_block), words = (key_block + 63) / 64;
    const int64_t d_padded = round_up(size, TILE_COLUMNS), d_units = (size + DEPTH - 1) / DEPTH;
    const int64_t lines = round_up(most, 16), extra = GROUPS ? QUERY_BLOCK * (d_row + s_row) : 0;
    const size_t floats = 3 * key_block * d_row + 2 * d_units * s_row + most * d_row +
                          2 * QUERY_BLOCK * (d_row + s_row) + lines + extra;
    if (threads > shape.sequences * shape.heads) threads = static_cast<int>(shape.sequences * shape.heads);
    const Scratch scratch(threads, floats * sizeof(float) + DEPTH * words * sizeof(uint64_t));
    // Of every (sequence, head), the sums of dq and of dv.
    const int64_t sums_row = round_up(size, LANES), pairs = grad_bias ? shape.sequences * shape.heads : 0;
    const Scratch sums(1, (2 * pairs + 1) * sums_row * sizeof(float));
    if (!scratch.ok() || !sums.ok()) return NO_MEMORY;
    memset(sums.of<float>(0), 0, pairs * 2 * sums_row * sizeof(float));

    parallel(threads, shape.sequences * shape.heads, [&](int64_t item, int worker) {
        const int64_t sequence = item / shape.heads, head = item % shape.heads;
        const int64_t start = shape.cu_seqlens[sequence], length = shape.cu_seqlens[sequence + 1] - start;
        if (length == 0) return;
        Unit* k = scratch.of<Unit>(worker);
        Unit* k_transposed = k + key_block * d_row;
        Unit* v_transposed = k_transposed + d_units * s_row;
        float* grad_k = reinterpret_cast<float*>(v_transposed + d_units * s_row);
        float* grad_v = grad_k + key_block * d_row;
        Unit* q = reinterpret_cast<Unit*>(grad_v + key_block * d_row);
        Unit* grad_o = q + QUERY_BLOCK * d_row;
        float* scores = reinterpret_cast<float*>(grad_o + QUERY_BLOCK * d_row);
        float* grad_s = scores + QUERY_BLOCK * s_row;
        float* grad_q = grad_s + QUERY_BLOCK * s_row;
        float* delta = grad_q + most * d_row;
        uint64_t* mask = reinterpret_cast<uint64_t*>(delta + lines + extra);
        // Where a group of queries is one row, these are the rows' own memory.
        Unit* q_groups = GROUPS ? reinterpret_cast<Unit*>(delta + lines) : q;
        Unit* grad_o_groups = GROUPS ? q_groups + QUERY_BLOCK / DEPTH * d_row : grad_o;
        Unit* p_groups = reinterpret_cast<Unit*>(scores);
        Unit* grad_s_groups = reinterpret_cast<Unit*>(grad_s);
        Unit* grad_s_rows = GROUPS ? q_groups + QUERY_BLOCK * d_row : grad_s_groups;
        const float* lse_in = lse + head * shape.tokens + start;

        const int64_t stride = shape.token_stride(), part = shape.heads * size;
        const T* q_in = qkv + start * stride + head * size;
        T* grad_q_out = grad_qkv + start * stride + head * size;
        const T* grad_in = grad_out + start * part + head * size;
        const T* out_in = out + start * part + head * size;
        for (int64_t i = 0; i < length; i++) {
            if (i + AHEAD < length) {
                prefetch_row(grad_in + (i + AHEAD) * part, size);
                prefetch_row(out_in + (i + AHEAD) * part, size);
            }
            vfloat sum = broadcast(0.0f);
            for (int64_t d = 0; d < size; d += LANES)
                sum += load_first(grad_in + i * part + d, size - d) * load_first(out_in + i * part + d, size - d);
            delta[i] = sum_lanes(sum);
        }

        for (int64_t first_key = 0; first_key < length; first_key += KEY_BLOCK) {
            const int64_t keys = smaller(KEY_BLOCK, length - first_key), keys_padded = round_up(keys, TILE_COLUMNS);
            const T* k_in = q_in + part + first_key * stride;
            Operands::rows(k, d_row, k_in + part, stride, keys, size, 1.0f);
            transpose(v_transposed, s_row, k, d_row, keys, d_units);
            Operands::rows(k, d_row, k_in, stride, keys, size, 1.0f);
            transpose(k_transposed, s_row, k, d_row, keys, d_units);
            if (GROUPS) Operands::groups(k, d_row, k_in, stride, keys, size);

            for (int64_t first = 0; first < length; first += QUERY_BLOCK) {
                const int64_t queries = smaller(QUERY_BLOCK, length - first);
                const bool more_queries = first > 0;
                Operands::rows(q, d_row, q_in + first * stride, stride, queries, size, factor.q);
                Operands::rows(grad_o, d_row, grad_in + first * part, part, queries, size, factor.grad_out);
                if (GROUPS) {
                    Operands::groups(q_groups, d_row, q_in + first * stride, stride, queries, size);
                    Operands::groups(grad_o_groups, d_row, grad_in + first * part, part, queries, size);
                }
                for (int64_t i = first + queries; i < smaller(length, first + 2 * QUERY_BLOCK); i++) {
                    prefetch_row(q_in + i * stride, size);
                    prefetch_row(grad_in + i * part, size);
                }
                product(queries, keys_padded, d_units, q, d_row, 1, k_transposed, s_row, scores, s_row, false);
                product(queries, keys_padded, d_units, grad_o, d_row, 1, v_transposed, s_row, grad_s, s_row, false);
                if (length == 1) delta[0] = grad_s[0] = 0.0f;  // constant softmax: no gradient, not even by rounding
                for (int64_t i = 0; i < queries; i += DEPTH) {
                    const int64_t at = first + i, rows = smaller(DEPTH, queries - i);
                    const auto softmax_bwd = [&](auto softmax, const uint64_t* words_in) {
                        softmax(scores + i * s_row, grad_s + i * s_row, s_row, grad_s_rows + i * s_row, rows, keys,
                                later, words_in, words, lse_in + at, delta + at);
                    };
                    for (int64_t row = 0; dropout.active() && row < rows; row++)
                        attention_keep_words(mask + row * words, (keys + 63) / 64, dropout.key,
                                             dropout.row_key[start + at + row], dropout.site,
                                             static_cast<uint32_t>(head), first_key / 64, dropout.threshold);
                    if (dropout.active())
                        softmax_bwd(&Operands::template softmax_bwd<true>, mask);
                    else
                        softmax_bwd(&Operands::template softmax_bwd<false>, nullptr);
                }
                const int64_t groups = (queries + DEPTH - 1) / DEPTH, group = DEPTH * s_row;
                product(keys, d_padded, groups, p_groups, 1, group, grad_o_groups, d_row, grad_v, d_row, more_queries);
                product(keys, d_padded, groups, grad_s_groups, 1, group, q_groups, d_row, grad_k, d_row, more_queries);
                product(queries, d_padded, (keys + DEPTH - 1) / DEPTH, grad_s_rows, s_row, 1, k, d_row,
                        grad_q + first * d_row, d_row, first_key > 0);
            }
            T* grad_k_out = grad_q_out + part + first_key * stride;
            store_rows(grad_k_out, stride, grad_k, d_row, keys, size, later.q);
            store_rows(grad_k_out + part, stride, grad_v, d_row, keys, size, later.grad_out);
            if (grad_bias)
                add_rows(sums.of<float>(0) + (2 * item + 1) * sums_row, grad_v, d_row, keys, size, later.grad_out);
        }
        store_rows(grad_q_out, stride, grad_q, d_row, length, size, scale);
        if (grad_bias) add_rows(sums.of<float>(0) + 2 * item * sums_row, grad_q, d_row, length, size, scale);
    });
    if (grad_bias) {
        memset(grad_bias, 0, 3 * shape.heads * size * sizeof(float));  // and the key's part stays zero
        for (int64_t item = 0; item < pairs; item++)
            for (int64_t which = 0; which < 2; which++) {
                const float* from = sums.of<float>(0) + (2 * item + which) * sums_row;
                float* to = grad_bias + (2 * which * shape.heads + item % shape.heads) * size;
                for (int64_t d = 0; d < size; d++) to[d] += from[d];
            }
    }
    const int64_t used = shape.cu_seqlens[shape.sequences];
    if (used < shape.tokens) memset(static_cast<void*>(grad_qkv + used * shape.token_stride()), 0,
           (shape.tokens - used) * shape.token_stride() * sizeof(T));
    return DONE;
}

}  // namespace
}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

using namespace bert_fast::BERT_FAST_ISA;

// qkv (tokens, 3, heads, size) and out (tokens, heads * size) of dtype; lse (heads, tokens) float32; cu_seqlens
// (sequences + 1,). row_key (tokens,) and rng_key (1,) are null without dropout; then dropout_scale is 1.
BERT_FAST_OPERATOR(attention_fwd)(int dtype, const void* qkv, const int32_t* cu_seqlens, const int64_t* row_key,
                                  const int64_t* rng_key, void* out, float* lse, int64_t sequences, int64_t tokens,
                                  int64_t heads, int64_t size, int64_t site, int64_t threshold, float dropout_scale,
                                  float scale, int threads) {
    const Shape shape{cu_seqlens, sequences, tokens, heads, size};
    const Dropout dropout{row_key, row_key ? static_cast<uint64_t>(*rng_key) : 0, static_cast<uint32_t>(site),
                          static_cast<uint32_t>(threshold), dropout_scale};
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        return forward(static_cast<const T*>(qkv), static_cast<T*>(out), lse, shape, scale, dropout, threads);
    });
}

// The forward's arguments, with grad_out like out; grad_qkv like qkv and, unless it is null, grad_bias (3, heads, size)
// float32 to be written: the sums of dq and dv over all tokens, and zeros for the sum of dk (bert_fast/reference.py).
BERT_FAST_OPERATOR(attention_bwd)(int dtype, const void* grad_out, const void* qkv, const void* out, const float* lse,
                                  const int32_t* cu_seqlens, const int64_t* row_key, const int64_t* rng_key,
                                  void* grad_qkv, float* grad_bias, int64_t sequences, int64_t tokens, int64_t heads,
                                  int64_t size, int64_t site, int64_t threshold, float dropout_scale, float scale,
                                  int threads) {
    const Shape shape{cu_seqlens, sequences, tokens, heads, size};
    const Dropout dropout{row_key, row_key ? static_cast<uint64_t>(*rng_key) : 0, static_cast<uint32_t>(site),
                          static_cast<uint32_t>(threshold), dropout_scale};
    return with_dtype(dtype, [&](auto t) {
        typedef decltype(t) T;
        return backward(static_cast<const T*>(grad_out), static_cast<const T*>(qkv), static_cast<const T*>(out), lse,
                        static_cast<T*>(grad_qkv), grad_bias, shape, scale, dropout, threads);
    });
}
