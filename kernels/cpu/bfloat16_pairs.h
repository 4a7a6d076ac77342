// Pairs of bfloat16: the operands of vdpbf16ps, which adds to each float32 lane the products of two neighbours along k.
//
// The unit takes denormals as zero and flushes them, in its factors, sums and conversions (vcvtne2ps2bf16 too, which
// keeps a NaN one, quiet). So these conversions serve operands of products alone: results are stored by vector.h's
// integer rounding, which keeps denormals, as on every other instruction set.
#pragma once

#include "vector.h"

#if defined(__AVX512BF16__)

namespace bert_fast {
namespace BERT_FAST_ISA {

// Elements k (low half) and k + 1 (high half) of a row.
struct __attribute__((may_alias)) bfloat16_pair {
    uint32_t bits;
};

BERT_FAST_INLINE vuint load(const bfloat16_pair* p) { return load_bits<vuint>(p); }
BERT_FAST_INLINE vuint broadcast(bfloat16_pair x) { return broadcast(x.bits); }
BERT_FAST_INLINE void store(bfloat16_pair* p, vuint pairs) { memcpy(p, &pairs, sizeof(pairs)); }

// sum + a b, over both elements of each pair.
BERT_FAST_INLINE vfloat multiply_add(vfloat sum, vuint a, vuint b) {
    return reinterpret_cast<vfloat>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a),
                                                     reinterpret_cast<__m512bh>(b)));
}

// Two rows' lanes as bfloat16, in one conversion: the first row's sixteen, then the second's.
typedef uint16_t vtworows __attribute__((vector_size(4 * LANES)));
BERT_FAST_INLINE vtworows narrow(vfloat first, vfloat second) {
    return reinterpret_cast<vtworows>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}
// ... as pairs of (first row, second row).
BERT_FAST_INLINE vuint pair_rows(vtworows rows) {
    const vtworows order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return reinterpret_cast<vuint>(
        _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(order), reinterpret_cast<__m512i>(rows)));
}

// One row's lanes, as LANES / 2 pairs of neighbours.
BERT_FAST_INLINE void store_row(bfloat16_pair* p, vfloat x) {
    const __m256bh row = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    memcpy(p, &row, sizeof(row));
}

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

#endif  // __AVX512BF16__
