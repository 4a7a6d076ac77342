// The C++ operators under ThreadSanitizer, without Python: each runs on three std::threads, twice, and must give the
// same bits. `make sanitize` builds it (CMake option BERT_FAST_SANITIZE=thread); scalar and AVX2 run, in float32.
//
// torch's own threads meet in an OpenMP barrier that ThreadSanitizer cannot see; here a team starts and joins threads,
// which it can. What the operators do between start and join is the same.

#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <string>
#include <thread>
#include <vector>

#define OPERATORS(ISA)                                                                                                   \
    int attention_fwd_##ISA(int, const void*, const int32_t*, const int64_t*, const int64_t*, void*, float*, int64_t,    \
                            int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);                            \
    int attention_bwd_##ISA(int, const void*, const void*, const void*, const float*, const int32_t*, const int64_t*,   \
                            const int64_t*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float,  \
                            int);                                                                                       \
    int bias_gelu_fwd_##ISA(int, int, const void*, const void*, void*, int64_t, int64_t, int);                          \
    int bias_gelu_bwd_##ISA(int, int, const void*, const void*, const void*, void*, void*, int64_t, int64_t, int);      \
    int dropout_mask_##ISA(const int64_t*, const int64_t*, uint64_t*, int64_t, int64_t, int64_t, int64_t, int64_t,      \
                           int);                                                                                        \
    int mlm_loss_rows_##ISA(void*, const void*, const void*, float, void*, void*, int64_t, int64_t, int, int);          \
    int optimizer_norm_##ISA(int, const void*, const void*, int64_t, void*, int);                                       \
    int optimizer_update_##ISA(int, int, const void*, int64_t, const void*, float, float, float, float, float, float,   \
                               int);                                                                                    \
    int residual_layernorm_fwd_##ISA(int, int, const void*, const void*, const void*, const void*, const void*, void*,  \
                                     void*, void*, void*, int64_t, int64_t, float, const void*, int64_t, int, int,      \
                                     float, int);                                                                       \
    int residual_layernorm_bwd_##ISA(int, int, const void*, const void*, const void*, const void*, const void*, void*,  \
                                     void*, void*, int64_t, int64_t, const void*, int64_t, int, int, float, int);

extern "C" {
int bert_fast_instruction_sets();
void bert_fast_set_team(void*);
OPERATORS(scalar)
OPERATORS(avx2)
}

namespace {

constexpr int THREADS = 3;
constexpr int64_t HEADS = 3, SIZE = 24, COLUMNS = 77, VOCABULARY = 501, THRESHOLD = 6554;
constexpr float KEEP_SCALE = 65536.0f / (65536 - THRESHOLD);

void team(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; i++) others.emplace_back(body, data);
    body(data);
    for (std::thread& other : others) other.join();
}

typedef std::vector<float> Floats;

Floats normal(size_t count, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> distribution;
    Floats x(count);
    for (float& value : x) value = distribution(generator);
    return x;
}

#define RUN(call)                                    \
    if ((call) != 0) {                               \
        fprintf(stderr, "%s failed\n", #call);       \
        return {};                                   \
    }

// All that the operators of one instruction set write, one after the other.
#define RUN_OPERATORS(ISA)                                                                                               \
    std::vector<Floats> run_##ISA() {                                                                                   \
        const std::vector<int32_t> cu = {0, 130, 130, 131, 198, 203};                                                   \
        const int64_t tokens = 205, sequences = 5, width = HEADS * SIZE, rows = 333;                                     \
        std::vector<int64_t> keys(rows), labels(130);                                                                   \
        for (int64_t i = 0; i < rows; i++) keys[i] = i << 32 | i % 7;                                                   \
        for (int64_t i = 0; i < 130; i++) labels[i] = i % 5 ? i % VOCABULARY : -1;                                      \
        const int64_t rng = 0x123456789abcdef;                                                                          \
        const Floats qkv = normal(3 * tokens * width, 1), grad_out = normal(tokens * width, 2);                         \
        const Floats x = normal(rows * COLUMNS, 3), grad = normal(rows * COLUMNS, 4), row = normal(COLUMNS, 5);         \
        Floats out(tokens * width), lse(HEADS * tokens), grad_qkv(qkv.size());                                          \
        RUN(attention_fwd_##ISA(0, qkv.data(), cu.data(), keys.data(), &rng, out.data(), lse.data(), sequences, tokens, \
                                HEADS, SIZE, 5, THRESHOLD, KEEP_SCALE, 0.2f, THREADS))                                   \
        RUN(attention_bwd_##ISA(0, grad_out.data(), qkv.data(), out.data(), lse.data(), cu.data(), keys.data(), &rng,   \
                                grad_qkv.data(), sequences, tokens, HEADS, SIZE, 5, THRESHOLD, KEEP_SCALE, 0.2f,        \
                                THREADS))                                                                               \
        Floats gelu(x.size()), grad_x(x.size()), grad_row(COLUMNS);                                                     \
        RUN(bias_gelu_fwd_##ISA(0, 0, x.data(), row.data(), gelu.data(), rows, COLUMNS, THREADS))                       \
        RUN(bias_gelu_bwd_##ISA(0, 0, grad.data(), x.data(), row.data(), grad_x.data(), grad_row.data(), rows, COLUMNS, \
                                THREADS))                                                                               \
        std::vector<uint64_t> mask(rows * 2);                                                                           \
        RUN(dropout_mask_##ISA(keys.data(), &rng, mask.data(), rows, 2, 3, -1, THRESHOLD, THREADS))                     \
        Floats logits = normal(130 * VOCABULARY, 6), losses(130), grad_bias(VOCABULARY);                                \
        const Floats table_bias = normal(VOCABULARY, 7);                                                                \
        RUN(mlm_loss_rows_##ISA(logits.data(), table_bias.data(), labels.data(), 0.01f, losses.data(), grad_bias.data(), \
                                130, VOCABULARY, 1, THREADS))                                                           \
        Floats normed(x.size()), z(x.size()), means(rows), rstds(rows), grad_z(x.size()), grads(3 * COLUMNS);           \
        Floats grad_residual(x.size());                                                                                 \
        RUN(residual_layernorm_fwd_##ISA(0, 0, x.data(), row.data(), grad.data(), row.data(), row.data(), normed.data(), \
                                         z.data(), means.data(), rstds.data(), rows, COLUMNS, 1e-5f, keys.data(), rng,  \
                                         2, THRESHOLD, KEEP_SCALE, THREADS))                                            \
        RUN(residual_layernorm_bwd_##ISA(0, 0, grad.data(), z.data(), means.data(), rstds.data(), row.data(),           \
                                         grad_z.data(), grad_residual.data(), grads.data(), rows, COLUMNS, keys.data(), \
                                         rng, 2, THRESHOLD, KEEP_SCALE, THREADS))                                       \
        std::vector<Floats> found = {out, lse, grad_qkv, gelu, grad_x, grad_row, logits, losses, grad_bias, normed, z,  \
                                     grad_z, grad_residual, grads};                                                     \
        for (int kind = 0; kind < 3; kind++) {                                                                          \
            const std::vector<int64_t> sizes = {100000, 1, 70001};                                                      \
            std::vector<Floats> weights, moments, squares, gradients;                                                   \
            std::vector<int64_t> table(18);                                                                             \
            for (int i = 0; i < 3; i++) {                                                                               \
                weights.push_back(normal(sizes[i], 8 + i));                                                             \
                gradients.push_back(normal(sizes[i], 18 + i));                                                          \
                moments.emplace_back(sizes[i]);                                                                         \
                squares.emplace_back(sizes[i]);                                                                         \
            }                                                                                                           \
            for (int i = 0; i < 3; i++) {                                                                               \
                table[i] = table[3 + i] = reinterpret_cast<int64_t>(weights[i].data());                                 \
                table[6 + i] = reinterpret_cast<int64_t>(gradients[i].data());                                          \
                table[9 + i] = reinterpret_cast<int64_t>(moments[i].data());                                            \
                table[12 + i] = reinterpret_cast<int64_t>(squares[i].data());                                           \
                table[15 + i] = sizes[i];                                                                               \
            }                                                                                                           \
            const Floats rates = {1e-2f, 0.1f, 10.0f, 30.0f, 1e-2f, 0.0f, 10.0f, 30.0f, 1e-2f, 0.1f, 10.0f, 30.0f};     \
            double sum = 0.0;                                                                                           \
            RUN(optimizer_norm_##ISA(0, &table[6], &table[15], 3, &sum, THREADS))                                       \
            RUN(optimizer_update_##ISA(kind, 0, table.data(), 3, rates.data(), 0.5f, 0.9f, 0.1f, 0.999f, 0.001f, 1e-6f, \
                                       THREADS))                                                                        \
            found.push_back({static_cast<float>(sum)});                                                                 \
            found.insert(found.end(), weights.begin(), weights.end());                                                  \
        }                                                                                                               \
        return found;                                                                                                   \
    }

RUN_OPERATORS(scalar)
RUN_OPERATORS(avx2)

bool check(const char* name, std::vector<Floats> (*run)()) {
    const std::vector<Floats> first = run(), second = run();
    bool same = !first.empty() && first.size() == second.size();
    for (size_t i = 0; same && i < first.size(); i++)
        same = memcmp(first[i].data(), second[i].data(), first[i].size() * sizeof(float)) == 0;
    printf("%s: %s\n", name, same ? "the same bits twice on 3 threads" : "FAILED");
    return same;
}

}  // namespace

int main() {
    bert_fast_set_team(reinterpret_cast<void*>(&team));
    bool good = check("scalar", run_scalar);
    if (bert_fast_instruction_sets() & 2) good = check("avx2", run_avx2) && good;
    return good ? 0 : 1;
}
