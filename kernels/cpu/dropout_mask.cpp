// dropout_mask: the keep masks by themselves, as 64-bit words. The large operators draw them row by row; this is for
// embedding_layernorm, which runs once in a step, and for the tests.

#include "parallel.h"
#include "philox.h"

using namespace bert_fast::BERT_FAST_ISA;

// words (rows, blocks): block b covers elements 64b .. 64b+63. head < 0: hidden dropout, else attention dropout.
BERT_FAST_OPERATOR(dropout_mask)(const int64_t* row_key, const int64_t* rng_key, uint64_t* words, int64_t rows,
                                 int64_t blocks, int64_t site, int64_t head, int64_t threshold, int threads) {
    const uint64_t key = static_cast<uint64_t>(*rng_key);
    const uint32_t site32 = static_cast<uint32_t>(site), threshold32 = static_cast<uint32_t>(threshold);
    parallel(threads, rows, [&](int64_t row, int) {
        if (head < 0)
            hidden_keep_words(words + row * blocks, blocks, key, row_key[row], site32, 0, threshold32);
        else
            attention_keep_words(words + row * blocks, blocks, key, row_key[row], site32, static_cast<uint32_t>(head),
                                 0, threshold32);
    });
    return DONE;
}
