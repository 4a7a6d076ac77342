// AVX-512 and its bfloat16 unit on a processor that has AVX2 alone, to run and test the code of the instruction sets
// avx512 and avx512_bf16 where they would be illegal instructions (`make emulate`). Included before each of their
// sources (-include); GCC's vector extensions split 64-byte arithmetic by themselves, and here are the intrinsics that
// the operators use, each by the definition in Intel's "Software Developer's Manual", volume 2. Never in a library that is
// installed. An intrinsic that is missing here is an error of the compiler, which inlines none without its flag.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define BERT_FAST_EMULATED static inline __attribute__((always_inline))

namespace bert_fast_emulated {

typedef uint16_t words16 __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words32 __attribute__((vector_size(64)));
typedef uint64_t words64 __attribute__((vector_size(64)));

BERT_FAST_EMULATED __m512i set1_epi32(int x) { return reinterpret_cast<__m512i>(x + ints{}); }

// The second operand where either is NaN or both are zero.
BERT_FAST_EMULATED __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }

BERT_FAST_EMULATED __m512 sqrt_ps(__m512 x) {
    for (int i = 0; i < 16; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
}

BERT_FAST_EMULATED __m512 maskz_mov_ps(__mmask16 mask, __m512 x) {
    for (int i = 0; i < 16; i++) x[i] = mask >> i & 1 ? x[i] : 0.0f;
    return x;
}

BERT_FAST_EMULATED __m512i mul_epu32(__m512i a, __m512i b) {
    return reinterpret_cast<__m512i>((reinterpret_cast<words64>(a) & 0xffffffffu) *
                                     (reinterpret_cast<words64>(b) & 0xffffffffu));
}
BERT_FAST_EMULATED __m512i srli_epi64(__m512i x, unsigned count) {
    return reinterpret_cast<__m512i>(reinterpret_cast<words64>(x) >> count);
}

// In each group of four lanes: lane i from that which bits 2i, 2i + 1 of `order` name; unmasked lanes from `other`.
BERT_FAST_EMULATED __m512i mask_shuffle_epi32(__m512i other, __mmask16 mask, __m512i x, int order) {
    const words32 from = reinterpret_cast<words32>(x);
    words32 to = reinterpret_cast<words32>(other);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) to[i] = from[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
    return reinterpret_cast<__m512i>(to);
}

BERT_FAST_EMULATED __m512i permutexvar_epi16(__m512i order, __m512i x) {
    const words16 places = reinterpret_cast<words16>(order), from = reinterpret_cast<words16>(x);
    words16 to;
    for (int i = 0; i < 32; i++) to[i] = from[places[i] & 31];
    return reinterpret_cast<__m512i>(to);
}

BERT_FAST_EMULATED __m512 cvtph_ps(__m256i x) {
    const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                              _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
    __m512 wide;
    memcpy(&wide, halves, sizeof(wide));
    return wide;
}
// To nearest even: the one rounding that the operators ask for.
BERT_FAST_EMULATED __m256i cvtps_ph(__m512 x) {
    __m256 halves[2];
    memcpy(halves, &x, sizeof(x));
    const __m128i low = _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                   _mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), 1);
}

// Denormals become zeros of their sign.
BERT_FAST_EMULATED __m512 flush(__m512 x) {
    const words32 bits = reinterpret_cast<words32>(x);
    const words32 keep = reinterpret_cast<words32>((bits & 0x7f800000u) != 0u) | 0x80000000u;
    return reinterpret_cast<__m512>(bits & keep);
}

BERT_FAST_EMULATED words32 to_bfloat16(__m512 x) {  // in the low halves of the lanes
    const words32 bits = reinterpret_cast<words32>(flush(x));
    const words32 nan = reinterpret_cast<words32>((bits & 0x7fffffffu) > 0x7f800000u);
    return (nan & (bits >> 16 | 0x40u)) | (~nan & ((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16));
}
BERT_FAST_EMULATED __m256bh cvtneps_pbh(__m512 x) {
    typedef uint16_t halves __attribute__((vector_size(32)));
    return reinterpret_cast<__m256bh>(__builtin_convertvector(to_bfloat16(x), halves));
}
// `b` in the lower half.
BERT_FAST_EMULATED __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
    const __m256bh halves[2] = {cvtneps_pbh(b), cvtneps_pbh(a)};
    __m512bh both;
    memcpy(&both, halves, sizeof(both));
    return both;
}

// The odd elements' products first, then the even ones'; each a fused multiply-add, rounded to nearest even, that takes
// and makes no denormals.
BERT_FAST_EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const words32 x = reinterpret_cast<words32>(a), y = reinterpret_cast<words32>(b);
    const __m512 odd[2] = {reinterpret_cast<__m512>(x & 0xffff0000u), reinterpret_cast<__m512>(y & 0xffff0000u)};
    const __m512 even[2] = {reinterpret_cast<__m512>(x << 16), reinterpret_cast<__m512>(y << 16)};
    sum = flush(flush(sum) + flush(odd[0]) * flush(odd[1]));
    return flush(sum + flush(even[0]) * flush(even[1]));
}

}  // namespace bert_fast_emulated

#define __AVX512F__ 1
#define _mm512_set1_epi32 bert_fast_emulated::set1_epi32
#define _mm512_max_ps bert_fast_emulated::max_ps
#define _mm512_sqrt_ps bert_fast_emulated::sqrt_ps
#define _mm512_maskz_mov_ps bert_fast_emulated::maskz_mov_ps
#define _mm512_mul_epu32 bert_fast_emulated::mul_epu32
#define _mm512_srli_epi64 bert_fast_emulated::srli_epi64
#define _mm512_mask_shuffle_epi32 bert_fast_emulated::mask_shuffle_epi32
#define _mm512_permutexvar_epi16 bert_fast_emulated::permutexvar_epi16
#define _mm512_cvtph_ps bert_fast_emulated::cvtph_ps
#define _mm512_cvtps_ph(x, rounding) bert_fast_emulated::cvtps_ph(x)

#ifdef BERT_FAST_EMULATE_BF16
#define __AVX512BF16__ 1
#define _mm512_cvtneps_pbh bert_fast_emulated::cvtneps_pbh
#define _mm512_cvtne2ps_pbh bert_fast_emulated::cvtne2ps_pbh
#define _mm512_dpbf16_ps bert_fast_emulated::dpbf16_ps
#endif
