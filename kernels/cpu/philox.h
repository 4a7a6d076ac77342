// Dropout's random bits: Philox 4x32-7 on vectors of counters. The specification is bert_fast/random.py.
//
// One call makes eight 16-bit halves for each of LANES counters. A row's mask comes as one 64-bit word per 64
// columns (or keys), bit i for element i of the block, set where the element is kept.
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

// The words of counters (c0, c1, c2, c3), c0 one per lane.
BERT_FAST_INLINE PhiloxWords philox(uint64_t key, vuint c0, uint32_t c1_all, uint32_t c2_all, uint32_t c3_all) {
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    vuint c1 = broadcast(c1_all), c2 = broadcast(c2_all), c3 = broadcast(c3_all);
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

// words[b] gets byte j of block b from half j of the groups 8b .. 8b+7 (bit g % 8 of the byte: group g), b < blocks.
inline void keep_bytes(uint64_t* words, int64_t blocks, uint64_t key, int64_t row_key, uint32_t site_head,
                       int64_t first_block, uint32_t threshold) {
    const uint32_t position = static_cast<uint32_t>(row_key), sample = static_cast<uint32_t>(row_key >> 32);
    // half >= threshold exactly where half + (2^31 - threshold) has its top bit set
    const uint32_t bias = 0x80000000u - threshold;
    constexpr int STEP = LANES >= 8 ? LANES / 8 : 1;  // blocks per call
    for (int64_t block = 0; block < blocks; block += STEP) {
        uint64_t word[STEP] = {};
        for (int part = 0; part < (LANES >= 8 ? 1 : 8 / LANES); part++) {
            const uint32_t group = static_cast<uint32_t>((first_block + block) * 8 + part * LANES);
            const PhiloxWords random = philox(key, lane_numbers() + group, position, sample, site_head);
            for (int j = 0; j < 8; j++) {
                const vuint words32 = random.word[j / 2];
                const vuint half = j % 2 ? words32 >> 16 : words32 & 0xffffu;
                const uint32_t kept = sign_bits(half + bias);
                for (int step = 0; step < STEP; step++)
                    word[step] |= static_cast<uint64_t>((kept >> (8 * step)) & 0xffu) << (8 * j + part * LANES);
            }
        }
        for (int step = 0; step < STEP && block + step < blocks; step++) words[block + step] = word[step];
    }
}

// Attention dropout: words[b] is the mask of keys 64b .. 64b+63 for one query, b < blocks.
BERT_FAST_INLINE void attention_keep_words(uint64_t* words, int64_t blocks, uint64_t key, int64_t query_key,
                                           uint32_t site, uint32_t head, int64_t first_block, uint32_t threshold) {
    keep_bytes(words, blocks, key, query_key, (site << 16) | head, first_block, threshold);
}

// Hidden dropout: words[b] is the mask of columns 64b .. 64b+63 of one row, b < blocks. A lane is a group of eight
// neighbours here, so the 8 x 8 bits of a word are transposed.
BERT_FAST_INLINE void hidden_keep_words(uint64_t* words, int64_t blocks, uint64_t key, int64_t row_key, uint32_t site,
                                        int64_t first_block, uint32_t threshold) {
    keep_bytes(words, blocks, key, row_key, site << 16, first_block, threshold);
    for (int64_t block = 0; block < blocks; block++) {
        uint64_t x = words[block], swap;
        swap = (x ^ (x >> 7)) & 0x00aa00aa00aa00aaull;
        x ^= swap ^ (swap << 7);
        swap = (x ^ (x >> 14)) & 0x0000cccc0000ccccull;
        x ^= swap ^ (swap << 14);
        swap = (x ^ (x >> 28)) & 0x00000000f0f0f0f0ull;
        x ^= swap ^ (swap << 28);
        words[block] = x;
    }
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

