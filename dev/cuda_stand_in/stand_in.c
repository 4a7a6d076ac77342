/* Stands in for an H100's driver (README.md beside this says what for). Of cudart, cuBLAS and CUPTI it has in their
   place what would ask a driver for more than this one answers; all else of them is the real libraries'.

   It answers as the host sees an H100: properties, memory, streams, events, captures, graphs, modules. No kernel runs
   and no product is made: where one would have written lies what lay there before, zeros at first. Copies between host
   and device and fills are real; copies from one place on the device to another are up to SMALL bytes.

   Device memory cannot be touched by the host, as on a real machine; what it holds lies behind it (struct memory).
   What breaks a rule of CUDA's is told on stderr and in the file that CUDA_STAND_IN_LOG names, and fails with CUDA's
   error. */

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cupti.h>
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define TOTAL ((size_t)85029158912) /* bytes of device memory */
#define OPT_IN 232448               /* bytes of shared memory that a block can ask for */
#define SMALL ((size_t)1 << 20)     /* bytes up to which copies within the device are made */
#define STREAMS 16                  /* that can take part in one capture */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local cudaError_t last; /* what cudaGetLastError gives */
static _Thread_local int context;      /* whether the device's is current in this thread */
static _Thread_local enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static int lost; /* the kernel that CUDA_STAND_IN_BREAK names was launched: from then on every call fails */
static unsigned long launches, graph_launches, captures_ended, violations;

static void tell(const char *format, ...) {
    char text[600];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const char *path = getenv("CUDA_STAND_IN_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%d %s\n", getpid(), text);
        fclose(file);
    }
}

/* For the driver's own functions: they leave what cudaGetLastError gives as it was. */
#define DRIVER(call)                                                                                                   \
    ({                                                                                                                 \
        cudaError_t before_ = last;                                                                                    \
        CUresult result_ = (CUresult)(call);                                                                           \
        last = before_;                                                                                                \
        result_;                                                                                                       \
    })

static cudaError_t fail(cudaError_t error, const char *what) {
    violations++;
    fprintf(stderr, "stand-in: %s: error %d\n", what, error);
    tell("%s: error %d", what, error);
    return last = error;
}

__attribute__((destructor)) static void at_the_end(void) {
    if (launches)
        tell("%lu kernels, %lu captures, %lu graphs replayed, %lu calls refused", launches, captures_ended,
             graph_launches, violations);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* ---- Memory. The device's is mapped so that nobody can touch it; what it holds is mapped right behind it, each byte
   as far from its address on the device as the allocation is long. */

struct memory {
    char *at;
    size_t bytes;
    int host; /* pinned */
    struct memory *next;
};
static struct memory *memories;
static size_t used;

static struct memory *memory_of(const void *p) {
    struct memory *m = memories;
    while (m && !((char *)p >= m->at && (char *)p < m->at + m->bytes))
        m = m->next;
    return m;
}

static cudaError_t allocate(void **p, size_t bytes, int host) {
    size_t size = (bytes + 4095) & ~(size_t)4095;
    *p = NULL;
    if (!bytes)
        return cudaSuccess;
    if (!host && (used + size > TOTAL || size > TOTAL))
        return last = cudaErrorMemoryAllocation;
    char *at = mmap(NULL, host ? size : 2 * size, host ? PROT_READ | PROT_WRITE : PROT_NONE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || (!host && mprotect(at + size, size, PROT_READ | PROT_WRITE)))
        return last = cudaErrorMemoryAllocation;
    struct memory *m = malloc(sizeof *m);
    *m = (struct memory){at, size, host, memories};
    memories = m;
    used += host ? 0 : size;
    *p = at;
    return cudaSuccess;
}

static cudaError_t release(void *p) {
    struct memory **m = &memories;
    while (*m && (*m)->at != p)
        m = &(*m)->next;
    if (!p)
        return cudaSuccess;
    if (!*m)
        return fail(cudaErrorInvalidValue, "memory given back that was not allocated");
    struct memory *gone = *m;
    *m = gone->next;
    used -= gone->host ? 0 : gone->bytes;
    munmap(gone->at, gone->host ? gone->bytes : 2 * gone->bytes);
    free(gone);
    return cudaSuccess;
}

/* Where the bytes at p lie; NULL where p is the device's and some of them lie beyond its allocation. */
static char *contents(const void *p, size_t bytes) {
    struct memory *m = memory_of(p);
    if (!m || m->host)
        return (char *)p;
    return (char *)p + bytes <= m->at + m->bytes ? (char *)p + m->bytes : NULL;
}

static void copy(void *to, const void *from, size_t bytes) {
    struct memory *a = memory_of(to), *b = memory_of(from);
    if (a && b && !a->host && !b->host && bytes > SMALL)
        return;
    memmove(contents(to, bytes), contents(from, bytes), bytes);
}

static void fill(void *to, int value, size_t bytes) {
    char *at = contents(to, bytes), *first = (char *)(((size_t)at + 4095) & ~(size_t)4095);
    char *end = (char *)((size_t)(at + bytes) & ~(size_t)4095);
    if (value || bytes <= SMALL) {
        memset(at, value, bytes);
        return;
    }
    memset(at, 0, first - at);
    madvise(first, end - first, MADV_DONTNEED); /* zeros again, and no memory of the machine */
    memset(end, 0, at + bytes - end);
}

/* ---- Streams, captures, graphs, events. A capture counts what was put on each of its streams (done). Streams and
   events know how much of each they come after (seen), so that a stream left unjoined at the end is noticed. */

struct node {
    void *to;
    const void *from; /* of a copy */
    size_t bytes;     /* 0: a kernel */
    int value;        /* of a fill */
    const char *name;
};
struct CUgraph_st {
    struct node *nodes;
    size_t count, room;
};
struct capture {
    enum cudaStreamCaptureStatus status;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    unsigned long long id;
    struct CUgraph_st *graph;
    struct CUstream_st *origin;
    int streams;
    unsigned done[STREAMS];
    struct capture *next;
};
struct CUstream_st {
    unsigned flags;
    int priority, place; /* among the streams of the capture */
    struct capture *capture;
    unsigned seen[STREAMS];
    struct CUstream_st *next;
};
struct CUevent_st {
    unsigned flags;
    double time; /* 0: not recorded */
    struct capture *capture;
    unsigned seen[STREAMS];
};
static struct CUstream_st legacy, *streams = &legacy;
static struct capture *captures; /* that have not ended */

static struct CUstream_st *stream_of(cudaStream_t stream) {
    if (!stream || stream == cudaStreamLegacy || stream == cudaStreamPerThread)
        return &legacy;
    struct CUstream_st *s = streams;
    while (s && s != stream)
        s = s->next;
    return s;
}

static cudaError_t broken(struct capture *c, cudaError_t error, const char *what) {
    c->status = cudaStreamCaptureStatusInvalidated;
    return fail(error, what);
}

/* For what waits for all of the device: refused while anything is captured. */
static cudaError_t waits_for_device(const char *what) {
    cudaError_t error = lost ? (last = cudaErrorIllegalAddress) : cudaSuccess;
    for (struct capture *c = captures; c; c = c->next)
        error = broken(c, cudaErrorStreamCaptureUnsupported, what);
    return error;
}

/* For what is not safe during a capture: whether it is refused depends on the mode of the capture and of the thread, by
   the rule in the documentation of cudaThreadExchangeStreamCaptureMode. */
static cudaError_t unsafe(const char *what) {
    cudaError_t error = lost ? (last = cudaErrorIllegalAddress) : cudaSuccess;
    for (struct capture *c = captures; c; c = c->next) {
        int own = pthread_equal(c->thread, pthread_self()) && c->mode != cudaStreamCaptureModeRelaxed;
        int others = c->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (thread_mode != cudaStreamCaptureModeRelaxed && (own || others))
            error = broken(c, cudaErrorStreamCaptureUnsupported, what);
    }
    return error;
}

/* Something is put on a stream; *c is the capture that it becomes part of, or NULL. */
static cudaError_t put(cudaStream_t stream, struct CUstream_st **s, struct capture **c, const char *what) {
    context = 1; /* cudart makes it current at the first call that needs it */
    *c = NULL;
    if (lost)
        return last = cudaErrorIllegalAddress;
    if (!(*s = stream_of(stream)))
        return fail(cudaErrorInvalidResourceHandle, what);
    if (*s == &legacy)
        for (struct CUstream_st *other = streams; other; other = other->next)
            if (other->capture && !(other->flags & cudaStreamNonBlocking))
                return broken(other->capture, cudaErrorStreamCaptureImplicit, what);
    if (!(*s)->capture)
        return cudaSuccess;
    *c = (*s)->capture;
    if ((*c)->status == cudaStreamCaptureStatusInvalidated)
        return fail(cudaErrorStreamCaptureInvalidated, what);
    (*s)->seen[(*s)->place] = ++(*c)->done[(*s)->place];
    return cudaSuccess;
}

static void add(struct CUgraph_st *graph, struct node node) {
    if (graph->count == graph->room) {
        graph->room = graph->room ? 2 * graph->room : 1024;
        graph->nodes = realloc(graph->nodes, graph->room * sizeof node);
    }
    graph->nodes[graph->count++] = node;
}

/* CUPTI, as torch's profiler uses it: while it listens, a record for every kernel, each a microsecond long. */
static int profiling;
static CUpti_BuffersCallbackRequestFunc ask_buffer;
static CUpti_BuffersCallbackCompleteFunc give_buffer;
static CUpti_TimestampCallbackFunc cupti_clock;
static uint8_t *buffer;
static size_t buffer_bytes, recorded;

static void give_records(void) {
    if (buffer)
        give_buffer(NULL, 0, buffer, buffer_bytes, recorded * sizeof(CUpti_ActivityKernel10));
    buffer = NULL;
    recorded = 0;
}

static void run(struct node node) {
    if (node.bytes && node.from)
        copy(node.to, node.from, node.bytes);
    else if (node.bytes)
        fill(node.to, node.value, node.bytes);
    if (node.bytes || !profiling || !ask_buffer)
        return;
    size_t most;
    if (buffer && (recorded + 1) * sizeof(CUpti_ActivityKernel10) > buffer_bytes)
        give_records();
    if (!buffer)
        ask_buffer(&buffer, &buffer_bytes, &most);
    unsigned long long at = cupti_clock ? cupti_clock() : (unsigned long long)(1e9 * now());
    ((CUpti_ActivityKernel10 *)buffer)[recorded++] = (CUpti_ActivityKernel10){
        .kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, .name = node.name, .start = at, .end = at + 1000, .gridX = 1,
        .gridY = 1, .gridZ = 1, .blockX = 1, .blockY = 1, .blockZ = 1, .correlationId = recorded};
}

static cudaError_t enqueue(cudaStream_t stream, struct node node, const char *what) {
    struct CUstream_st *s;
    struct capture *c;
    pthread_mutex_lock(&lock);
    cudaError_t error = put(stream, &s, &c, what);
    if (!error && node.bytes && (!contents(node.to, node.bytes) || (node.from && !contents(node.from, node.bytes))))
        error = fail(cudaErrorInvalidValue, "a copy or fill beyond what was allocated");
    if (!error && c && node.from && (!memory_of(node.to) || !memory_of(node.from)))
        error = broken(c, cudaErrorStreamCaptureUnsupported, "a copy of memory that is not pinned");
    if (!error) {
        if (c)
            add(c->graph, node);
        else
            run(node);
        launches += !node.bytes;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

#define LOCKED(call)                                                                                                   \
    do {                                                                                                               \
        context = 1;                                                                                                   \
        pthread_mutex_lock(&lock);                                                                                     \
        cudaError_t error_ = (call);                                                                                   \
        pthread_mutex_unlock(&lock);                                                                                   \
        return error_;                                                                                                 \
    } while (0)

cudaError_t cudaMalloc(void **p, size_t n) {
    cudaError_t error = 0;
    LOCKED((error = unsafe("cudaMalloc")) ? error : allocate(p, n, 0));
}
cudaError_t cudaFree(void *p) {
    cudaError_t error = 0;
    LOCKED((error = unsafe("cudaFree")) ? error : release(p));
}
cudaError_t cudaHostAlloc(void **p, size_t n, unsigned flags) {
    cudaError_t error = 0;
    LOCKED((error = unsafe("cudaHostAlloc")) ? error : allocate(p, n, 1));
}
cudaError_t cudaFreeHost(void *p) {
    cudaError_t error = 0;
    LOCKED((error = unsafe("cudaFreeHost")) ? error : release(p));
}
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = TOTAL;
    *available = TOTAL - used;
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
    return n ? enqueue(stream, (struct node){to, from, n, 0, NULL}, "cudaMemcpyAsync") : cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t stream) {
    return n ? enqueue(stream, (struct node){to, NULL, n, value, NULL}, "cudaMemsetAsync") : cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
    pthread_mutex_lock(&lock);
    cudaError_t error = unsafe("cudaMemcpy");
    pthread_mutex_unlock(&lock);
    return error ? error : cudaMemcpyAsync(to, from, n, kind, NULL);
}
cudaError_t cudaMemset(void *to, int value, size_t n) {
    pthread_mutex_lock(&lock);
    cudaError_t error = unsafe("cudaMemset");
    pthread_mutex_unlock(&lock);
    return error ? error : cudaMemsetAsync(to, value, n, NULL);
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    pthread_mutex_lock(&lock);
    struct memory *m = memory_of(p);
    pthread_mutex_unlock(&lock);
    memset(a, 0, sizeof *a);
    a->type = !m ? cudaMemoryTypeUnregistered : m->host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    a->device = m ? 0 : -2;
    a->devicePointer = m ? (void *)p : NULL;
    a->hostPointer = m && !m->host ? NULL : (void *)p;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    struct CUstream_st *s = calloc(1, sizeof *s);
    s->flags = flags;
    s->priority = priority;
    pthread_mutex_lock(&lock);
    s->next = legacy.next;
    legacy.next = s;
    pthread_mutex_unlock(&lock);
    *stream = s;
    context = 1;
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    pthread_mutex_lock(&lock);
    struct CUstream_st *s = &legacy;
    while (s->next && s->next != stream)
        s = s->next;
    if (s->next)
        s->next = s->next->next;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream_of(stream)->priority;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

static cudaError_t waits_for_stream(cudaStream_t stream, const char *what) {
    pthread_mutex_lock(&lock);
    struct CUstream_st *s = stream_of(stream);
    cudaError_t error = !s           ? fail(cudaErrorInvalidResourceHandle, what)
                        : lost       ? (last = cudaErrorIllegalAddress)
                        : s->capture ? broken(s->capture, cudaErrorStreamCaptureUnsupported, what)
                                     : unsafe(what);
    pthread_mutex_unlock(&lock);
    return error;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waits_for_stream(stream, "cudaStreamSynchronize"); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return waits_for_stream(stream, "cudaStreamQuery"); }
cudaError_t cudaDeviceSynchronize(void) { LOCKED(waits_for_device("cudaDeviceSynchronize")); }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    static unsigned long long number;
    pthread_mutex_lock(&lock);
    struct CUstream_st *s = stream_of(stream);
    cudaError_t error = !s             ? fail(cudaErrorInvalidResourceHandle, "cudaStreamBeginCapture")
                        : s == &legacy ? fail(cudaErrorStreamCaptureUnsupported, "a capture of the default stream")
                        : s->capture   ? fail(cudaErrorIllegalState, "a capture in a capture")
                                       : cudaSuccess;
    if (!error) {
        struct capture *c = calloc(1, sizeof *c); /* stays: events know it */
        *c = (struct capture){.status = cudaStreamCaptureStatusActive, .mode = mode, .thread = pthread_self(),
                              .id = ++number, .graph = calloc(1, sizeof(struct CUgraph_st)), .origin = s, .streams = 1,
                              .next = captures};
        captures = s->capture = c;
        s->place = 0;
        memset(s->seen, 0, sizeof s->seen);
    }
    pthread_mutex_unlock(&lock);
    return error;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    pthread_mutex_lock(&lock);
    *graph = NULL;
    struct CUstream_st *s = stream_of(stream);
    struct capture *c = s ? s->capture : NULL, **at = &captures;
    cudaError_t error = cudaSuccess;
    if (!c)
        error = fail(cudaErrorIllegalState, "the end of a capture that did not begin");
    else if (c->origin != s)
        error = broken(c, cudaErrorStreamCaptureUnmatched, "the end of a capture that began on another stream");
    else if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self()))
        error = broken(c, cudaErrorStreamCaptureWrongThread, "the end of a capture by another thread");
    else {
        if (c->status == cudaStreamCaptureStatusInvalidated)
            error = fail(cudaErrorStreamCaptureInvalidated, "the end of a broken capture");
        for (int i = 0; i < c->streams && !error; i++)
            if (s->seen[i] < c->done[i])
                error = fail(cudaErrorStreamCaptureUnjoined, "a captured stream that is not joined");
        for (struct CUstream_st *other = streams; other; other = other->next)
            if (other->capture == c)
                other->capture = NULL;
        while (*at != c)
            at = &(*at)->next;
        *at = c->next;
        *graph = error ? NULL : c->graph;
        captures_ended += !error;
    }
    pthread_mutex_unlock(&lock);
    return error;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    pthread_mutex_lock(&lock);
    struct CUstream_st *s = stream_of(stream);
    *status = s && s->capture ? s->capture->status : cudaStreamCaptureStatusNone;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    cudaStreamIsCapturing(stream, status);
    struct capture *c = *status ? stream_of(stream)->capture : NULL;
    if (id)
        *id = c ? c->id : 0;
    if (graph)
        *graph = c ? c->graph : NULL;
    if (count)
        *count = 0;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = graph->count;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    struct CUgraph_st *own = malloc(sizeof *own);
    *own = *graph;
    size_t bytes = graph->count * sizeof(struct node);
    own->nodes = memcpy(malloc(bytes + 1), graph->nodes, bytes);
    *made = (cudaGraphExec_t)own;
    LOCKED(unsafe("cudaGraphInstantiate"));
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(made, graph, flags);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph->nodes);
    free(graph);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaGraphDestroy((cudaGraph_t)graph); }
cudaError_t cudaGraphUpload(cudaGraphExec_t graph, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    struct CUgraph_st *graph = (struct CUgraph_st *)exec;
    struct CUstream_st *s;
    struct capture *c;
    pthread_mutex_lock(&lock);
    cudaError_t error = put(stream, &s, &c, "cudaGraphLaunch");
    for (size_t i = 0; i < graph->count && !error && !c; i++) {
        struct node node = graph->nodes[i];
        if (node.bytes && (!memory_of(node.to) || (node.from && !memory_of(node.from))))
            error = fail(cudaErrorIllegalAddress, "a replay over memory that is gone");
        else
            run(node);
    }
    graph_launches++;
    pthread_mutex_unlock(&lock);
    return error;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof **event);
    (*event)->flags = flags;
    context = 1;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    struct CUstream_st *s;
    struct capture *c;
    pthread_mutex_lock(&lock);
    cudaError_t error = put(stream, &s, &c, "cudaEventRecord");
    if (!error) {
        event->time = now();
        event->capture = flags & cudaEventRecordExternal ? NULL : c;
        memcpy(event->seen, s->seen, sizeof s->seen);
    }
    pthread_mutex_unlock(&lock);
    return error;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
static cudaError_t waits_for_event(cudaEvent_t event, const char *what) {
    if (event->capture)
        return event->capture->graph ? fail(cudaErrorCapturedEvent, what) : cudaSuccess;
    return unsafe(what);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { LOCKED(waits_for_event(event, "cudaEventQuery")); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { LOCKED(waits_for_event(event, "cudaEventSynchronize")); }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    if (!start->time || !end->time || ((start->flags | end->flags) & cudaEventDisableTiming))
        return fail(cudaErrorInvalidResourceHandle, "the time between events that have none");
    if (start->capture || end->capture)
        return fail(cudaErrorCapturedEvent, "the time between captured events");
    *ms = 1e3 * (end->time - start->time) + 1e-3;
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    pthread_mutex_lock(&lock);
    struct CUstream_st *s = stream_of(stream);
    struct capture *c = event->capture, *own = s ? s->capture : NULL;
    cudaError_t error = cudaSuccess;
    if (!s)
        error = fail(cudaErrorInvalidResourceHandle, "cudaStreamWaitEvent");
    else if (!c && own && event->time && !(flags & cudaEventWaitExternal))
        error = broken(own, cudaErrorStreamCaptureIsolation, "a captured stream that waits for what is not captured");
    else if (c && own && own != c)
        error = broken(own, cudaErrorStreamCaptureMerge, "a captured stream that waits for another capture");
    else if (c && c->status == cudaStreamCaptureStatusInvalidated)
        error = fail(cudaErrorStreamCaptureInvalidated, "a wait for a broken capture");
    else if (c && !own) {
        struct capture *open = captures;
        while (open && open != c)
            open = open->next;
        if (!open)
            error = fail(cudaErrorCapturedEvent, "a wait for an event of a capture that has ended");
        else if (s == &legacy)
            error = broken(c, cudaErrorStreamCaptureImplicit, "the default stream waits for a capture");
        else {
            s->capture = c;
            s->place = c->streams++;
            memset(s->seen, 0, sizeof s->seen);
        }
    }
    if (!error && c)
        for (int i = 0; i < STREAMS; i++)
            s->seen[i] = s->seen[i] > event->seen[i] ? s->seen[i] : event->seen[i];
    pthread_mutex_unlock(&lock);
    return error;
}

/* ---- The device */

static int attribute(int which) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 0x7fffffff;
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
    case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return OPT_IN;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 233472;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR: return 65536;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return 1980000;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return 2619000;
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return 52428800;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
    case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
    case CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return 1;
    default: return 0;
    }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = attribute(which);
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    *p = (struct cudaDeviceProp){
        .name = "NVIDIA H100 80GB HBM3, stand-in", .totalGlobalMem = TOTAL, .sharedMemPerBlock = 49152,
        .regsPerBlock = 65536, .warpSize = 32, .memPitch = 0x7fffffff, .maxThreadsPerBlock = 1024,
        .maxThreadsDim = {1024, 1024, 64}, .maxGridSize = {0x7fffffff, 65535, 65535}, .totalConstMem = 65536,
        .major = 9, .textureAlignment = 512, .multiProcessorCount = 132, .canMapHostMemory = 1, .concurrentKernels = 1,
        .asyncEngineCount = 3, .unifiedAddressing = 1, .memoryBusWidth = 5120, .l2CacheSize = 52428800,
        .maxThreadsPerMultiProcessor = 2048, .sharedMemPerMultiprocessor = 233472, .regsPerMultiprocessor = 65536,
        .sharedMemPerBlockOptin = OPT_IN, .maxBlocksPerMultiProcessor = 32, .cooperativeLaunch = 1};
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    context = 1;
    return device ? fail(cudaErrorInvalidDevice, "cudaSetDevice") : cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int n, int device) { return snprintf(id, n, "0000:01:00.0"), cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function)
        tell("no driver function %s", name);
    if (status)
        *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

/* ---- Kernels: torch's, of which only the names are known, and those of modules (Triton's), whose ELF says the rest */

struct CUfunc_st {
    const char *name;
    int registers;       /* of a thread */
    int shared, dynamic; /* bytes that a block has of itself, and that a launch may add */
    struct CUfunc_st *next;
};
struct CUmod_st {
    struct CUfunc_st *functions;
};

static cudaError_t launch(struct CUfunc_st *f, dim3 grid, dim3 block, size_t dynamic, cudaStream_t stream) {
    size_t threads = (size_t)block.x * block.y * block.z;
    size_t warps = (threads + 31) / 32, registers = (f->registers + 7) / 8 * 8;
    if (!grid.x || !grid.y || !grid.z || !threads || threads > 1024 || grid.x > 0x7fffffff || grid.y > 65535 ||
        grid.z > 65535 || block.z > 64)
        return fail(cudaErrorInvalidConfiguration, f->name);
    if (dynamic > (size_t)f->dynamic)
        return fail(cudaErrorInvalidValue, f->name);
    if (warps * 32 * registers > 65536)
        return fail(cudaErrorLaunchOutOfResources, f->name);
    const char *breaks = getenv("CUDA_STAND_IN_BREAK");
    cudaError_t error = enqueue(stream, (struct node){.name = f->name}, f->name);
    lost |= breaks && !strcmp(breaks, f->name);
    return error;
}

struct registered {
    const void *host;
    struct CUfunc_st function;
};
static struct registered *kernels; /* by the address of the host's function */
static size_t kernel_count, kernel_room, kernels_sorted;

void **__cudaRegisterFatBinary(void *binary) { return calloc(1, sizeof(void *)); }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int ext, size_t size, int constant,
                       int global) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, uint3 *tid,
                            uint3 *bid, dim3 *block, dim3 *grid, int *warp) {
    pthread_mutex_lock(&lock);
    if (kernel_count == kernel_room)
        kernels = realloc(kernels, (kernel_room = kernel_room ? 2 * kernel_room : 65536) * sizeof *kernels);
    struct registered *r = &kernels[kernel_count++];
    *r = (struct registered){host, {.name = name, .registers = 32, .dynamic = OPT_IN}};
    pthread_mutex_unlock(&lock);
}
static int by_host(const void *a, const void *b) {
    const char *x = ((const struct registered *)a)->host, *y = ((const struct registered *)b)->host;
    return (x > y) - (x < y);
}
static struct CUfunc_st *registered(const void *host) {
    pthread_mutex_lock(&lock);
    if (kernels_sorted < kernel_count) {
        qsort(kernels, kernel_count, sizeof *kernels, by_host);
        kernels_sorted = kernel_count;
    }
    struct registered key = {.host = host};
    struct registered *found = bsearch(&key, kernels, kernel_count, sizeof *kernels, by_host);
    pthread_mutex_unlock(&lock);
    static struct CUfunc_st unknown = {.name = "a kernel", .registers = 32, .dynamic = OPT_IN};
    return found ? &found->function : &unknown;
}

static _Thread_local struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} pushed[8];
static _Thread_local int depth;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
    pushed[depth].grid = grid, pushed[depth].block = block;
    pushed[depth].shared = shared, pushed[depth].stream = stream;
    depth++;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    depth--;
    *grid = pushed[depth].grid, *block = pushed[depth].block;
    *shared = pushed[depth].shared, *(cudaStream_t *)stream = pushed[depth].stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    return *kernel = (cudaKernel_t)host, cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return launch(registered(kernel), grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    return launch(registered(host), grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *host, void **arguments) {
    return launch(registered(host), c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute which, int value) { return cudaSuccess; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *host) {
    *a = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90,
                                     .maxDynamicSharedSizeBytes = OPT_IN};
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = threads > 0 && threads <= 2048 ? 2048 / threads : 1;
    return cudaSuccess;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (!context)
        return DRIVER(fail(cudaErrorDeviceUninitialized, "cuModuleLoadData"));
    pthread_mutex_lock(&lock);
    CUresult error = DRIVER(unsafe("cuModuleLoadData"));
    pthread_mutex_unlock(&lock);
    const Elf64_Ehdr *elf = image;
    if (error || memcmp(elf->e_ident, ELFMAG, SELFMAG))
        return error ? error : CUDA_ERROR_INVALID_IMAGE;
    const Elf64_Shdr *sections = (const void *)((const char *)image + elf->e_shoff);
    const char *names = (const char *)image + sections[elf->e_shstrndx].sh_offset;
    *module = calloc(1, sizeof **module);
    for (int i = 0; i < elf->e_shnum; i++) {
        const char *name = names + sections[i].sh_name;
        if (strncmp(name, ".text.", 6))
            continue;
        struct CUfunc_st *f = calloc(1, sizeof *f);
        f->name = strdup(name + 6);
        f->registers = sections[i].sh_info >> 24; /* where a cubin has them */
        for (int j = 0; j < elf->e_shnum; j++)
            if (!strncmp(names + sections[j].sh_name, ".nv.shared.", 11) &&
                !strcmp(names + sections[j].sh_name + 11, f->name))
                /* the first KiB is the driver's */
                f->shared = sections[j].sh_size > 1024 ? sections[j].sh_size - 1024 : 0;
        f->dynamic = 49152 - f->shared;
        f->next = (*module)->functions;
        (*module)->functions = f;
    }
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "r");
    if (!file)
        return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    size_t size = ftell(file);
    char *image = malloc(size);
    rewind(file);
    CUresult error = fread(image, 1, size, file) == size ? cuModuleLoadData(module, image) : CUDA_ERROR_INVALID_IMAGE;
    free(image);
    fclose(file);
    return error;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    struct CUfunc_st *f = module->functions;
    while (f && strcmp(f->name, name))
        f = f->next;
    *function = f;
    return f ? CUDA_SUCCESS : DRIVER(fail(cudaErrorSymbolNotFound, name));
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction f) {
    int most = f->registers ? 65536 / ((f->registers + 7) / 8 * 8) / 32 * 32 : 1024;
    *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS                ? f->registers
             : which == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES     ? f->shared
             : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? (most < 1024 ? most : 1024)
                                                                : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
    if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
        return CUDA_SUCCESS;
    if (value + f->shared > OPT_IN)
        return DRIVER(fail(cudaErrorInvalidValue, "more shared memory than a block can have"));
    f->dynamic = value;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **arguments, void **extra) {
    if (!context)
        return DRIVER(fail(cudaErrorDeviceUninitialized, f->name));
    dim3 grid = {c->gridDimX, c->gridDimY, c->gridDimZ}, block = {c->blockDimX, c->blockDimY, c->blockDimZ};
    return DRIVER(launch(f, grid, block, c->sharedMemBytes, c->hStream));
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void **arguments, void **extra) {
    CUlaunchConfig config = {gx, gy, gz, bx, by, bz, shared, stream, NULL, 0};
    return cuLaunchKernelEx(&config, f, arguments, extra);
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction f, int threads, size_t shared) {
    return *blocks = threads ? 2048 / threads : 1, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction f, const CUlaunchConfig *c) {
    return *clusters = 66, CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *size, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill oob) {
    int right = rank >= 1 && rank <= 5 && !((size_t)address & 15) && memory_of(address);
    for (unsigned i = 0; right && i < rank; i++)
        right = box[i] >= 1 && box[i] <= 256 && size[i] >= 1 && (i + 1 == rank || !(strides[i] & 15));
    memset(map, 0, sizeof *map);
    return right ? CUDA_SUCCESS : DRIVER(fail(cudaErrorInvalidValue, "cuTensorMapEncodeTiled"));
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    return *value = attribute(which), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    return *flags = 0, *active = context, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) { return *c = (CUcontext)&legacy, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { return *c = context ? (CUcontext)&legacy : NULL, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return context = c != NULL, CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) {
    pthread_mutex_lock(&lock);
    struct memory *m = memory_of((void *)p);
    pthread_mutex_unlock(&lock);
    if (!m)
        return CUDA_ERROR_INVALID_VALUE;
    if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
        *(int *)value = m->host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    else
        *(CUdeviceptr *)value = p;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    return *text = cudaGetErrorString((cudaError_t)error), CUDA_SUCCESS;
}

/* NAME: another name of a function here that serves whatever the arguments are. */
CUresult fine(void) { return CUDA_SUCCESS; }
#define NAME(name, function) __asm__(".globl " #name "\n.type " #name ", @function\n.set " #name ", " #function);

/* What must be there to be linked; nothing that is rehearsed calls those that are not_here. */
CUresult not_here(void) { return DRIVER(fail(cudaErrorNotSupported, "a function of the driver that is not here")); }
NAME(cuLaunchCooperativeKernel, not_here)
NAME(cuLinkAddData_v2, not_here)
NAME(cuLinkComplete, not_here)
NAME(cuLinkCreate_v2, not_here)
NAME(cuCtxSetLimit, fine)
NAME(cuCtxGetLimit, fine)

/* ---- cuBLAS: every product is a kernel, which does nothing, on its handle's stream */

struct cublas {
    cudaStream_t stream;
    int math, pointers;
};
struct found { /* cublasLtMatmulHeuristicResult_t */
    unsigned long long algorithm[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};
int cublasCreate_v2(struct cublas **handle) {
    pthread_mutex_lock(&lock);
    cudaError_t error = unsafe("cublasCreate"); /* it allocates */
    pthread_mutex_unlock(&lock);
    *handle = calloc(1, sizeof **handle);
    return error;
}
int cublasDestroy_v2(struct cublas *handle) { return free(handle), 0; }
int cublasSetStream_v2(struct cublas *handle, cudaStream_t stream) { return handle->stream = stream, 0; }
int cublasSetMathMode(struct cublas *handle, int mode) { return handle->math = mode, 0; }
int cublasGetMathMode(struct cublas *handle, int *mode) { return *mode = handle->math, 0; }
int cublasSetPointerMode_v2(struct cublas *handle, int mode) { return handle->pointers = mode, 0; }
int cublasGetPointerMode_v2(struct cublas *handle, int *mode) { return *mode = handle->pointers, 0; }
int product(struct cublas *handle) {
    return enqueue(handle->stream, (struct node){.name = "a product of cuBLAS"}, "a product of cuBLAS")
               ? 13 /* CUBLAS_STATUS_EXECUTION_FAILED */
               : 0;
}
NAME(cublasSetWorkspace_v2, fine)
NAME(cublasGemmEx, product)
NAME(cublasGemmStridedBatchedEx, product)
NAME(cublasSgemmEx, product)
NAME(cublasSgemm_v2, product)
NAME(cublasDgemm_v2, product)
NAME(cublasSgemmStridedBatched, product)
NAME(cublasDgemmStridedBatched, product)
NAME(cublasSgemv_v2, product)
NAME(cublasDgemv_v2, product)
NAME(cublasDotEx, product)
NAME(cublasSdot_v2, product)
NAME(cublasDdot_v2, product)

/* cublasLt's descriptions of layouts are the real library's: they need no device. Its search for an algorithm does. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *description, void *a, void *b, void *c, void *d,
                                   void *preference, int asked, struct found results[], int *count) {
    memset(results, 0, sizeof *results);
    return *count = 1, 0;
}
int cublasLtMatmul(void *handle, void *description, void *alpha, void *A, void *a, void *B, void *b, void *beta,
                   void *C, void *c, void *D, void *d, void *algorithm, void *workspace, size_t bytes,
                   cudaStream_t stream) {
    return product(&(struct cublas){stream});
}

/* ---- CUPTI */

CUptiResult cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc ask,
                                           CUpti_BuffersCallbackCompleteFunc give) {
    ask_buffer = ask, give_buffer = give;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityRegisterTimestampCallback(CUpti_TimestampCallbackFunc clock) {
    return cupti_clock = clock, CUPTI_SUCCESS;
}
CUptiResult cuptiActivityEnable(CUpti_ActivityKind kind) {
    profiling |= kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityDisable(CUpti_ActivityKind kind) {
    profiling &= kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityFlushAll(uint32_t flag) {
    give_records();
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityGetNextRecord(uint8_t *buffer, size_t bytes, CUpti_Activity **record) {
    uint8_t *next = *record ? (uint8_t *)*record + sizeof(CUpti_ActivityKernel10) : buffer;
    if (next >= buffer + bytes)
        return CUPTI_ERROR_MAX_LIMIT_REACHED;
    *record = (CUpti_Activity *)next;
    return CUPTI_SUCCESS;
}
CUptiResult cuptiActivityGetNumDroppedRecords(CUcontext c, uint32_t stream, size_t *n) { return *n = 0, CUPTI_SUCCESS; }
CUptiResult cuptiGetVersion(uint32_t *version) { return *version = CUPTI_API_VERSION, CUPTI_SUCCESS; }
NAME(cuptiActivityEnableCudaEventDeviceTimestamps, fine)
NAME(cuptiActivityEnableDriverApi, fine)
NAME(cuptiActivityEnableRuntimeApi, fine)
NAME(cuptiActivityPushExternalCorrelationId, fine)
NAME(cuptiActivityPopExternalCorrelationId, fine)
NAME(cuptiActivitySetAttribute, fine)
NAME(cuptiEnableCallback, fine)
NAME(cuptiEnableDomain, fine)
NAME(cuptiFinalize, fine)
NAME(cuptiSubscribe, fine)
NAME(cuptiUnsubscribe, fine)
