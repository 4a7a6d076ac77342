// Threads: the pool of the OpenMP runtime that torch brought, reached through its entry point GOMP_parallel.
//
// Nothing here is compiled with -fopenmp or linked to an OpenMP runtime, so there is never a second one in the
// process: kernels/cpu/__init__.py looks GOMP_parallel up in torch's own libraries (GNU's, LLVM's and Intel's
// runtimes all have it) and hands it over. Without it everything runs on the calling thread.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define BERT_FAST_EXPORT __attribute__((visibility("default")))

namespace bert_fast {
typedef void (*run_team_function)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern run_team_function run_team;
}  // namespace bert_fast

#ifdef BERT_FAST_ISA

#define BERT_FAST_JOIN2(a, b) a##_##b
#define BERT_FAST_JOIN(a, b) BERT_FAST_JOIN2(a, b)
// The head of an operator's entry point: `BERT_FAST_OPERATOR(attention_fwd)(const void* qkv, ...) { ... }`. It
// returns 0, or NO_MEMORY; the loader finds it as attention_fwd_<instruction set>.
#define BERT_FAST_OPERATOR(name) extern "C" BERT_FAST_EXPORT int BERT_FAST_JOIN(name, BERT_FAST_ISA)

// Everything that is compiled per instruction set lies in that set's namespace: functions that the linker may
// merge (inline, templates) must not be shared between sets, or a machine could meet instructions it lacks.
namespace bert_fast {
namespace BERT_FAST_ISA {

enum Status { DONE = 0, NO_MEMORY = 1 };

template <typename Body>
struct Job {
    const Body* body;
    int64_t items;
    int64_t next_item;
    int next_worker;

    static void work(void* data) {
        Job& job = *static_cast<Job*>(data);
        const int worker = __atomic_fetch_add(&job.next_worker, 1, __ATOMIC_RELAXED);
        for (;;) {
            const int64_t item = __atomic_fetch_add(&job.next_item, 1, __ATOMIC_RELAXED);
            if (item >= job.items) return;
            (*job.body)(item, worker);
        }
    }
};

// body(item, worker) for item 0 .. items-1, on at most `threads` threads; worker is 0 .. threads-1 and belongs to
// one thread. Which worker gets which item is not fixed: an item's result must not depend on it.
template <typename Body>
inline void parallel(int threads, int64_t items, const Body& body) {
    Job<Body> job{&body, items, 0, 0};
    if (threads > items) threads = static_cast<int>(items);
    if (threads > 1 && run_team != nullptr)
        run_team(&Job<Body>::work, &job, static_cast<unsigned>(threads), 0);
    else
        Job<Body>::work(&job);
}

// Memory for `workers` workers, `bytes` each, aligned to two cache lines; `ok()` says whether there was enough.
class Scratch {
  public:
    Scratch(int workers, size_t bytes) : bytes_((bytes + 127) / 128 * 128) {
        if (posix_memalign(&data_, 128, bytes_ * static_cast<size_t>(workers > 0 ? workers : 1)) != 0) data_ = nullptr;
    }
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    bool ok() const { return data_ != nullptr; }
    template <typename T>
    T* of(int worker) const {
        return reinterpret_cast<T*>(static_cast<char*>(data_) + bytes_ * static_cast<size_t>(worker));
    }

  private:
    size_t bytes_;
    void* data_ = nullptr;
};

}  // namespace BERT_FAST_ISA
}  // namespace bert_fast

#endif  // BERT_FAST_ISA
