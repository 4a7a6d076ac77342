// The C++ operators under ThreadSanitizer, without Python: each runs on 1, 2, 3 and 11 std::threads and must give the same
// bits, in float32, bfloat16 and float16, attention on packed sequences and on one sequence with one head, whose queries
// the threads share. `make sanitize` builds it (CMake option BERT_FAST_SANITIZE=thread); every set that the CPU has runs.
//
// torch's own threads meet in an OpenMP barrier that ThreadSanitizer cannot see; here a team starts and joins threads,
// which it can. What the operators do between start and join is the same.

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <thread>
#include <vector>

#define OPERATORS(ISA)                                                                                                   \
    int attention_fwd_##ISA(int, const void*, const int32_t*, const int64_t*, const int64_t*, void*, float*, int64_t,    \
                            int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);                            \
    int attention_bwd_##ISA(int, const void*, const void*, const void*, const float*, const int32_t*, const int64_t*,   \
                            const int64_t*, void*, float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, \
                            float, int);                                                                                \
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
OPERATORS(avx512)
OPERATORS(avx512_bf16)
}

namespace {

#define OPERATORS_OF(ISA)                                                                                               \
    {                                                                                                                   \
        #ISA, attention_fwd_##ISA, attention_bwd_##ISA, bias_gelu_fwd_##ISA, bias_gelu_bwd_##ISA, dropout_mask_##ISA,   \
            mlm_loss_rows_##ISA, optimizer_norm_##ISA, optimizer_update_##ISA, residual_layernorm_fwd_##ISA,            \
            residual_layernorm_bwd_##ISA                                                                                \
    }
struct Operators {
    const char* instruction_set;
    decltype(&attention_fwd_scalar) attention_fwd;
    decltype(&attention_bwd_scalar) attention_bwd;
    decltype(&bias_gelu_fwd_scalar) bias_gelu_fwd;
    decltype(&bias_gelu_bwd_scalar) bias_gelu_bwd;
    decltype(&dropout_mask_scalar) dropout_mask;
    decltype(&mlm_loss_rows_scalar) mlm_loss_rows;
    decltype(&optimizer_norm_scalar) optimizer_norm;
    decltype(&optimizer_update_scalar) optimizer_update;
    decltype(&residual_layernorm_fwd_scalar) residual_layernorm_fwd;
    decltype(&residual_layernorm_bwd_scalar) residual_layernorm_bwd;
};
// In the order of bert_fast_instruction_sets().
const Operators SETS[] = {OPERATORS_OF(scalar), OPERATORS_OF(avx2), OPERATORS_OF(avx512), OPERATORS_OF(avx512_bf16)};

constexpr int64_t COLUMNS = 77, ROWS = 333, VOCABULARY = 501, THRESHOLD = 6554;
constexpr float KEEP_SCALE = 65536.0f / (65536 - THRESHOLD);
constexpr int64_t RNG = 0x123456789abcdef;

void team(void (*body)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> others;
    for (unsigned i = 1; i < threads; i++) others.emplace_back(body, data);
    body(data);
    for (std::thread& other : others) other.join();
}

typedef std::vector<char> Bytes;
typedef std::vector<Bytes> Results;

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };  // kernels/cpu/vector.h
size_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Normal in float32, cut off in bfloat16; in float16 of either sign, between 1/8 and 2.
Bytes random(size_t count, unsigned seed, int dtype) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> distribution;
    Bytes x(count * size_of(dtype));
    for (size_t i = 0; i < count; i++) {
        const float value = distribution(generator);
        uint32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        if (dtype == BFLOAT16) bits >>= 16;
        if (dtype == FLOAT16) bits = (bits >> 16 & 0x83ff) | (12 + bits % 4) << 10;
        memcpy(&x[i * size_of(dtype)], &bits, size_of(dtype));
    }
    return x;
}
Bytes zeros(size_t count, int dtype) { return Bytes(count * size_of(dtype)); }
float* floats(Bytes& x) { return reinterpret_cast<float*>(x.data()); }

void check(const char* call, int status) {
    if (status == 0) return;
    fprintf(stderr, "%s failed\n", call);
    exit(1);
}
#define RUN(call) check(#call, call)

std::vector<int64_t> row_keys(int64_t rows) {
    std::vector<int64_t> keys(rows);
    for (int64_t i = 0; i < rows; i++) keys[i] = i << 32 | i % 7;
    return keys;
}

// What attention writes; two tokens follow the last sequence.
Results attention(const Operators& operators, int dtype, const std::vector<int32_t>& cu, int64_t heads, int64_t size,
                  int threads) {
    const int64_t sequences = static_cast<int64_t>(cu.size()) - 1, tokens = cu.back() + 2, width = heads * size;
    const std::vector<int64_t> keys = row_keys(tokens);
    const Bytes qkv = random(3 * tokens * width, 1, dtype), grad_out = random(tokens * width, 2, dtype);
    Bytes out = zeros(tokens * width, dtype), lse = zeros(heads * tokens, FLOAT32), grad_qkv = zeros(3 * tokens * width, dtype);
    Bytes grad_bias = zeros(3 * width, FLOAT32);
    RUN(operators.attention_fwd(dtype, qkv.data(), cu.data(), keys.data(), &RNG, out.data(), floats(lse), sequences, tokens,
                                heads, size, 5, THRESHOLD, KEEP_SCALE, 0.2f, threads));
    RUN(operators.attention_bwd(dtype, grad_out.data(), qkv.data(), out.data(), floats(lse), cu.data(), keys.data(), &RNG,
                                grad_qkv.data(), floats(grad_bias), sequences, tokens, heads, size, 5, THRESHOLD, KEEP_SCALE,
                                0.2f, threads));
    return {out, lse, grad_qkv, grad_bias};
}

Results rows(const Operators& operators, int dtype, int threads) {
    const std::vector<int64_t> keys = row_keys(ROWS);
    const size_t all = ROWS * COLUMNS;
    const Bytes x = random(all, 3, dtype), grad = random(all, 4, dtype), row = random(COLUMNS, 5, dtype);
    const Bytes parameters = random(COLUMNS, 7, FLOAT32);
    Bytes gelu = zeros(all, dtype), grad_x = gelu, normed = gelu, z = gelu, grad_z = gelu, grad_residual = gelu;
    Bytes grad_row = zeros(COLUMNS, FLOAT32), means = zeros(ROWS, FLOAT32), rstds = means, grads = zeros(3 * COLUMNS, FLOAT32);
    RUN(operators.bias_gelu_fwd(dtype, dtype, x.data(), row.data(), gelu.data(), ROWS, COLUMNS, threads));
    RUN(operators.bias_gelu_bwd(dtype, dtype, grad.data(), x.data(), row.data(), grad_x.data(), grad_row.data(), ROWS,
                                COLUMNS, threads));
    RUN(operators.residual_layernorm_fwd(dtype, dtype, x.data(), parameters.data(), grad.data(), parameters.data(),
                                         parameters.data(), normed.data(), z.data(), means.data(), rstds.data(), ROWS, COLUMNS, 1e-5f,
                                         keys.data(), RNG, 2, THRESHOLD, KEEP_SCALE, threads));
    RUN(operators.residual_layernorm_bwd(dtype, dtype, grad.data(), z.data(), means.data(), rstds.data(), parameters.data(),
                                         grad_z.data(), grad_residual.data(), grads.data(), ROWS, COLUMNS, keys.data(),
                                         RNG, 2, THRESHOLD, KEEP_SCALE, threads));
    return {gelu, grad_x, grad_row, normed, z, grad_z, grad_residual, grads};
}

// Those that have no dtype: dropout's words, and the pass over logits.
Results float_rows(const Operators& operators, int threads) {
    constexpr int64_t POSITIONS = 130;
    const std::vector<int64_t> keys = row_keys(ROWS);
    std::vector<int64_t> labels(POSITIONS);
    for (int64_t i = 0; i < POSITIONS; i++) labels[i] = i % 5 ? i % VOCABULARY : -1;
    Bytes words(ROWS * 2 * sizeof(uint64_t));
    RUN(operators.dropout_mask(keys.data(), &RNG, reinterpret_cast<uint64_t*>(words.data()), ROWS, 2, 3, -1, THRESHOLD,
                               threads));
    const Bytes bias = random(VOCABULARY, 7, FLOAT32);
    Bytes logits = random(POSITIONS * VOCABULARY, 6, FLOAT32), losses = zeros(POSITIONS, FLOAT32);
    Bytes grad_bias = zeros(VOCABULARY, FLOAT32);
    RUN(operators.mlm_loss_rows(logits.data(), bias.data(), labels.data(), 0.01f, losses.data(), grad_bias.data(), POSITIONS,
                                VOCABULARY, 1, threads));
    return {words, logits, losses, grad_bias};
}

// AdamW, LAMB, and LAMB with a ratio for every parameter.
Results optimizers(const Operators& operators, int dtype, int threads) {
    const std::vector<int64_t> sizes = {100000, 1, 70001};
    const std::vector<float> rates = {1e-2f, 0.1f, 10.0f, 30.0f, 1e-2f, 0.0f, 10.0f, 30.0f, 1e-2f, 0.1f, 10.0f, 30.0f};
    Results written;
    for (int kind = 0; kind < 3; kind++) {
        Results params, masters, gradients, moments, squares;
        std::vector<int64_t> table(18);
        for (int i = 0; i < 3; i++) {
            params.push_back(random(sizes[i], 8 + i, dtype));
            masters.push_back(random(sizes[i], 8 + i, FLOAT32));
            gradients.push_back(random(sizes[i], 18 + i, dtype));
            moments.push_back(zeros(sizes[i], FLOAT32));
            squares.push_back(zeros(sizes[i], FLOAT32));
            const Bytes* tensors[5] = {&params[i], dtype == FLOAT32 ? &params[i] : &masters[i], &gradients[i], &moments[i],
                                       &squares[i]};
            for (int k = 0; k < 5; k++) table[3 * k + i] = reinterpret_cast<int64_t>(tensors[k]->data());
            table[15 + i] = sizes[i];
        }
        Bytes sum(sizeof(double));
        RUN(operators.optimizer_norm(dtype, &table[6], &table[15], 3, sum.data(), threads));
        RUN(operators.optimizer_update(kind, dtype, table.data(), 3, rates.data(), 0.5f, 0.9f, 0.1f, 0.999f, 0.001f, 1e-6f,
                                       threads));
        written.push_back(sum);
        for (const Results& each : {params, masters, moments, squares}) written.insert(written.end(), each.begin(), each.end());
    }
    return written;
}

Results everything(const Operators& operators, int dtype, int threads) {
    Results all = float_rows(operators, threads);
    for (const Results& each : {attention(operators, dtype, {0, 130, 130, 131, 198, 203}, 3, 24, threads),
                                attention(operators, dtype, {0, 145}, 1, 40, threads), rows(operators, dtype, threads),
                                optimizers(operators, dtype, threads)})
        all.insert(all.end(), each.begin(), each.end());
    return all;
}

bool check(const Operators& operators) {
    bool good = true;
    for (int dtype : {FLOAT32, BFLOAT16, FLOAT16}) {
        const Results expected = everything(operators, dtype, 1);
        for (int threads : {2, 3, 11}) {
            const bool same = everything(operators, dtype, threads) == expected;
            if (!same) printf("%s, dtype %d: other bits on %d threads\n", operators.instruction_set, dtype, threads);
            good = good && same;
        }
    }
    printf("%s: %s\n", operators.instruction_set, good ? "the same bits on 1, 2, 3 and 11 threads" : "FAILED");
    return good;
}

}  // namespace

int main() {
    bert_fast_set_team(reinterpret_cast<void*>(&team));
    bool good = true;
    for (int i = 0; i < 4; i++)
        if (bert_fast_instruction_sets() >> i & 1) good = check(SETS[i]) && good;
    return good ? 0 : 1;
}
