// Dropout's random bits: Philox 4x32-7 on vectors of counters. The specification is bert_fast/dropout_mask.py.
//
// One call makes the bits of eight columns, or of sixteen keys, for each of LANES counters. A row's mask comes as one
// 64-bit word per 64 columns (or keys), bit i for element i of the block, set where the element is kept.
#pragma once

#include "vector.h"

namespace bert_fast {
namespace BERT_FAST_ISA {

constexpr int ROUNDS = 7;

struct Product {
    vuint low, high;
};

// The 64-bit products of 32-bit lanes and a constant, in halves.
BERT_FAST_INLINE Product multiply(vuint x, uint32_t constant) {
#if defined(__AVX512F__)
    const __m512i a = reinterpret_cast<__m512i>(x), c = _mm512_set1_epi32(static_cast<int>(constant));
    const __m512i even = _mm512_mul_epu32(a, c), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), c);
    return {reinterpret_cast<vuint>(_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, static_cast<_MM_PERM_ENUM>(0xa0))),
            reinterpret_cast<vuint>(_mm512_mask_shuffle_epi32(odd, 0x5555, even, static_cast<_MM_PERM_ENUM>(0xf5)))};
#elif defined(__AVX2__)
    const __m256i a = reinterpret_cast<__m256i>(x), c = _mm256_set1_epi32(static_cast<int>(constant));
    const __m256i even = _mm256_mul_epu32(a, c), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), c);
    return {reinterpret_cast<vuint>(_mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xa0), 0xaa)),
            reinterpret_cast<vuint>(_mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xf5), odd, 0xaa))};
#else
    Product product;
    for (int i = 0; i < LANES; i++) {
        const uint64_t wide = static_cast<uint64_t>(x[i]) * constant;
        product.low[i] = static_cast<uint32_t>(wide);
        product.high[i] = static_cast<uint32_t>(wide >> 32);
    }
    return product;
#endif
}

struct PhiloxWords {
    vuint word[4];
};

// The words of the groups `first_group` .. of a row, one per lane.
BERT_FAST_INLINE PhiloxWords philox(uint64_t key, int64_t first_group, int64_t row_key, uint32_t site_head) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    vuint c0 = lane_numbers() + static_cast<uint32_t>(first_group), c3 = broadcast(site_head);
    vuint c1 = broadcast(static_cast<uint32_t>(row_key)), c2 = broadcast(static_cast<uint32_t>(row_key >> 32));
    for (int round = 0; round < ROUNDS; round++) {
        const Product a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
        c0 = b.high ^ c1 ^ k0;
        c2 = a.high ^ c3 ^ k1;
        c1 = b.low;
        c3 = a.low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// The bits of a word whose numbers have the bit `low` and not the bit `high`.
constexpr uint64_t numbers_with(int low, int high) {
    uint64_t bits = 0;
    for (int i = 0; i < 64; i++)
        if ((i >> low & 1) && !(i >> high & 1)) bits |= uint64_t{1} << i;
    return bits;
}

// The words whose bit i is the bit of x with the number that i becomes when its bits HIGH and LOW change places.
template <int HIGH, int LOW, typename Words>
BERT_FAST_INLINE Words exchange_index_bits(Words x) {
    constexpr uint64_t mask = numbers_with(LOW, HIGH);
    constexpr int distance = (1 << HIGH) - (1 << LOW);
    const Words swap = (x ^ (x >> distance)) & mask;
    return x ^ swap ^ (swap << distance);
}

// The `count` first bytes of x, all of them in one store where there are as many.
template <typename V>
BERT_FAST_INLINE void store_bytes(char* to, V x, int64_t count) {
    if (count >= static_cast<int64_t>(sizeof(x)))
        memcpy(to, &x, sizeof(x));
    else
        memcpy(to, &x, count);
}

template <int BITS>
BERT_FAST_INLINE vuint rotate_left(vuint x) {
    return x << BITS | x >> (32 - BITS);
}

// Of every 16-bit half in x all bits where it is kept, else none.
class Threshold {
  public:
    typedef uint16_t vhalves __attribute__((vector_size(4 * LANES)));

    // An element is kept where its 16 bits are at least `threshold`: all at 0, none at 65536.
    explicit Threshold(uint32_t threshold)
        : least(static_cast<int16_t>(threshold - 1 - 0x8000)), all(threshold == 0 ? ~0u : 0u) {}
    BERT_FAST_INLINE vuint kept(vuint x) const {  // signed: what AVX2 and SSE2 compare
        return reinterpret_cast<vuint>(reinterpret_cast<vsigned>(x ^ 0x80008000u) > least) | all;
    }

  private:
    typedef int16_t vsigned __attribute__((vector_size(4 * LANES)));
    int16_t least;
    uint32_t all;
};

// Attention dropout: words[b] is the mask of keys 64b .. 64b+63 for one query, b < blocks.
inline void attention_keep_words(uint64_t* words, int64_t blocks, uint64_t key, int64_t query_key, uint32_t site,
                                 uint32_t head, int64_t first_block, uint32_t threshold) {
    typedef uint8_t vbytes __attribute__((vector_size(2 * LANES)));
    typedef uint64_t vwords __attribute__((vector_size(2 * LANES)));
    const Threshold bound(threshold);
    char* bytes = reinterpret_cast<char*>(words);
    for (int64_t group = 0; group < 4 * blocks; group += LANES) {  // a pair of neighbours in each 8 of 64 keys
        const PhiloxWords random = philox(key, 4 * first_block + group, query_key, (site << 16) | head);
        vuint kept = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            kept |= bound.kept(random.word[i]) & (0x00010001u << (2 * i));
            kept |= bound.kept(rotate_left<8>(random.word[i])) & (0x00020002u << (2 * i));
        }
        // Of each lane 8 bits for the upper halves, which begin at a word's first two bytes, and 8 for the lower ones.
        const auto upper_first = reinterpret_cast<Threshold::vhalves>(rotate_left<16>(kept));
        const vbytes narrow = __builtin_convertvector(upper_first, vbytes);
        // A bit's number is made of the pair (2 bits), key / 8 % 2, key / 16 (2 bits) and key % 2.
        const vwords mask = exchange_index_bits<4, 1>(exchange_index_bits<5, 2>(reinterpret_cast<vwords>(narrow)));
        store_bytes(bytes + 2 * group, mask, 2 * (4 * blocks - group));
    }
}

// Hidden dropout: words[b] is the mask of columns 64b .. 64b+63 of one row, b < blocks.
inline void hidden_keep_words(uint64_t* words, int64_t blocks, uint64_t key, int64_t row_key, uint32_t site,
                              int64_t first_block, uint32_t threshold) {
    typedef uint8_t vbytes __attribute__((vector_size(LANES)));
    const Threshold bound(threshold);
    char* bytes = reinterpret_cast<char*>(words);
    for (int64_t group = 0; group < 8 * blocks; group += LANES) {  // eight neighbours
        const PhiloxWords random = philox(key, 8 * first_block + group, row_key, site << 16);
        vuint kept = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) kept |= bound.kept(random.word[i]) & (0x00020001u << (2 * i));
        // In two steps: in one, GCC goes lane by lane.
        const vhalfword halves = __builtin_convertvector(kept | kept >> 16, vhalfword);
        const vbytes narrow = __builtin_convertvector(halves, vbytes);
        store_bytes(bytes + group, narrow, 8 * blocks - group);
    }
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

