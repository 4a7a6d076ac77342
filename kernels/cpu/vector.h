// Vectors: LANES float32 (or 32-bit integers) of the instruction set this file is compiled for.
//
// GCC's and clang's vector extensions carry the arithmetic (a * b + c contracts to one fused multiply-add), so
// the same source serves AVX-512, AVX2, SSE2 and NEON; intrinsics stand only where the extensions have no word.
// bfloat16 and float16 are storage formats: loads widen to float32, stores round to nearest even.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bert_fast {
namespace BERT_FAST_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalfword __attribute__((vector_size(2 * LANES)));

#define BERT_FAST_INLINE inline __attribute__((always_inline))

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

BERT_FAST_INLINE vfloat broadcast(float x) { return x - vfloat{}; }
BERT_FAST_INLINE vuint broadcast(uint32_t x) { return x + vuint{}; }
BERT_FAST_INLINE vfloat as_float(vuint x) { return reinterpret_cast<vfloat>(x); }
BERT_FAST_INLINE vuint as_uint(vfloat x) { return reinterpret_cast<vuint>(x); }

// 0, 1, 2, ...
BERT_FAST_INLINE vuint lane_numbers() {
    vuint lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = static_cast<uint32_t>(i);
    return lanes;
}

// max and min: the second operand where either is NaN, so a NaN in the second comes through.
BERT_FAST_INLINE vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return reinterpret_cast<vfloat>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<vfloat>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}
BERT_FAST_INLINE vfloat min(vfloat a, vfloat b) { return -max(-a, -b); }
BERT_FAST_INLINE vfloat abs(vfloat x) { return as_float(as_uint(x) & 0x7fffffffu); }

// Sums and maxima over the lanes, always in the same order: halves are folded onto each other.
BERT_FAST_INLINE float sum_lanes(vfloat x) {
    float lanes[LANES];
    memcpy(lanes, &x, sizeof(x));
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}
BERT_FAST_INLINE float max_lanes(vfloat x) {
    float lanes[LANES];
    memcpy(lanes, &x, sizeof(x));
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// ---------------------------------------------------------------------------------------------------------
// Loads and stores, at any alignment

template <typename V, typename T>
BERT_FAST_INLINE V load_bits(const T* p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
}

BERT_FAST_INLINE vfloat load(const float* p) { return load_bits<vfloat>(p); }
BERT_FAST_INLINE void store(float* p, vfloat x) { memcpy(p, &x, sizeof(x)); }

BERT_FAST_INLINE vfloat load(const bfloat16* p) {
    return as_float(__builtin_convertvector(load_bits<vhalfword>(p), vuint) << 16);
}
BERT_FAST_INLINE void store(bfloat16* p, vfloat x) {
    const vuint bits = as_uint(x);
    const vuint rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vuint quiet = (bits >> 16) | 0x40u;  // a NaN stays one: rounding could carry it into infinity
    const vint is_nan = x != x;
    const vuint mask = reinterpret_cast<vuint>(is_nan);
    const vhalfword out = __builtin_convertvector((quiet & mask) | (rounded & ~mask), vhalfword);
    memcpy(p, &out, sizeof(out));
}

#if defined(__AVX512F__)
BERT_FAST_INLINE vfloat load(const float16* p) {
    return reinterpret_cast<vfloat>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
BERT_FAST_INLINE void store(float16* p, vfloat x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
BERT_FAST_INLINE vfloat load(const float16* p) {
    return reinterpret_cast<vfloat>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
BERT_FAST_INLINE void store(float16* p, vfloat x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
typedef __fp16 vfloat16 __attribute__((vector_size(2 * LANES)));
BERT_FAST_INLINE vfloat load(const float16* p) {
    return __builtin_convertvector(load_bits<vfloat16>(p), vfloat);
}
BERT_FAST_INLINE void store(float16* p, vfloat x) {
    const vfloat16 out = __builtin_convertvector(x, vfloat16);
    memcpy(p, &out, sizeof(out));
}
#else
// In integers: the exponent moves by 112; below 2^-14 the float adder does the shifting and the rounding.
BERT_FAST_INLINE vfloat load(const float16* p) {
    const vuint half = __builtin_convertvector(load_bits<vhalfword>(p), vuint);
    const vuint magnitude = (half & 0x7fffu) << 13;
    const vuint special = reinterpret_cast<vuint>(magnitude >= broadcast(0x0f800000u)) & 0x7f800000u;
    const vfloat scaled = as_float(magnitude) * broadcast(0x1p112f);
    return as_float(as_uint(scaled) | special | ((half & 0x8000u) << 16));
}
BERT_FAST_INLINE void store(float16* p, vfloat x) {
    const vuint bits = as_uint(x), magnitude = bits & 0x7fffffffu;
    const vuint normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const vuint tiny = as_uint(as_float(magnitude) + broadcast(0.5f)) - 0x3f000000u;
    const vuint is_tiny = reinterpret_cast<vuint>(magnitude < broadcast(0x38800000u));
    const vuint is_huge = reinterpret_cast<vuint>(magnitude >= broadcast(0x477ff000u));
    const vuint is_nan = reinterpret_cast<vuint>(magnitude > broadcast(0x7f800000u));
    vuint out = (tiny & is_tiny) | (normal & ~is_tiny);
    out = (out & ~is_huge) | (is_huge & 0x7c00u) | (is_nan & 0x0200u);
    const vhalfword half = __builtin_convertvector(out | ((bits >> 16) & 0x8000u), vhalfword);
    memcpy(p, &half, sizeof(half));
}
#endif

// The first `count` lanes alone (0 <= count <= LANES); the others read as zero and are not written.
template <typename T>
BERT_FAST_INLINE vfloat load_first(const T* p, int64_t count) {
    if (count >= LANES) return load(p);
    T buffer[LANES] = {};
    for (int64_t i = 0; i < count; i++) buffer[i] = p[i];
    return load(buffer);
}
template <typename T>
BERT_FAST_INLINE void store_first(T* p, vfloat x, int64_t count) {
    if (count >= LANES) return store(p, x);
    T buffer[LANES];
    store(buffer, x);
    for (int64_t i = 0; i < count; i++) p[i] = buffer[i];
}

// x where bit i of `bits` is set, 0 elsewhere.
BERT_FAST_INLINE vfloat keep_lanes(vfloat x, uint32_t bits) {
#if defined(__AVX512F__)
    return reinterpret_cast<vfloat>(_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(x)));
#else
    vuint lane_bits;
    for (int i = 0; i < LANES; i++) lane_bits[i] = 1u << i;
    const vint kept = (broadcast(bits) & lane_bits) == lane_bits;
    return as_float(as_uint(x) & reinterpret_cast<vuint>(kept));
#endif
}

// ---------------------------------------------------------------------------------------------------------
// Functions

BERT_FAST_INLINE vfloat sqrt(vfloat x) {
#if defined(__AVX512F__)
    return reinterpret_cast<vfloat>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<vfloat>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
    vfloat root;
    for (int i = 0; i < LANES; i++) root[i] = __builtin_sqrtf(x[i]);
    return root;
#endif
}

// e^x for x < 88: relative error below 1e-7, 0 from -87.3 (2^-126) down, NaN for NaN. e^x is 2^n e^r with n the
// nearest integer to x / ln 2; ln 2 is taken off in two parts, the first exact in a product with n. The polynomial is
// a minimax fit of e^r on [-ln 2 / 2, ln 2 / 2] (relative error 3e-09).
BERT_FAST_INLINE vfloat exp(vfloat x) {
    const vfloat magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const vfloat shifted = x * broadcast(1.44269504088896340736f) + magic;
    const vfloat n = shifted - magic;
    const vfloat r = (x - n * broadcast(0.693359375f)) - n * broadcast(-0.00021219444170128554f);
    vfloat p = broadcast(0.0013814540579915047f);
    p = p * r + broadcast(0.00836874544620514f);
    p = p * r + broadcast(0.04166838899254799f);
    p = p * r + broadcast(0.1666652113199234f);
    p = p * r + broadcast(0.4999999403953552f);
    p = p * r + broadcast(1.0f);
    p = p * r + broadcast(1.0f);
    const vint vanishes = x <= broadcast(-87.3f);
    return as_float((as_uint(p) + (as_uint(shifted) << 23)) & ~reinterpret_cast<vuint>(vanishes));
}

// ---------------------------------------------------------------------------------------------------------
// Dtypes at the library's door: 0 float32, 1 bfloat16, 2 float16 (kernels/cpu/__init__.py)

// run(T()) with the type of `dtype`.
template <typename Run>
inline int with_dtype(int dtype, const Run& run) {
    if (dtype == 1) return run(bfloat16());
    if (dtype == 2) return run(float16());
    return run(float());
}

// run(T(), P()): T is the type of `dtype`, P of `other`, which is float32 or the same (parameters' dtype).
template <typename Run>
inline int with_dtypes(int dtype, int other, const Run& run) {
    return with_dtype(dtype, [&](auto t) {
        if (other == 0) return run(t, float());
        return run(t, t);
    });
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast
