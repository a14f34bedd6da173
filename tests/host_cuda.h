// CUDA C on the CPU, to test kernels without a GPU: the very same source, one block at a time.
//
// The threads of a block take turns: each runs until it waits (__syncthreads, or a shuffle), then the next one does. A kernel
// that lacks a barrier therefore reads what others have not written yet, and fails; that the threads may run in either order
// makes this sure. A block whose threads do not all come to the same barriers is reported.
#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

struct Three { unsigned x = 1, y = 1, z = 1; };
static Three gridDim, blockDim, blockIdx, threadIdx;

#define __global__
#define __device__
#define __shared__ static
using std::erf; using std::exp; using std::log; using std::sqrt; using std::tanh;

template <class V> V atomicAdd(V* where, V what) { V old = *where; *where += what; return old; }

namespace host {

struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    int waiting;                                        // at how many barriers it has been
};

static std::vector<Thread> threads;
static ucontext_t scheduler;
static unsigned now;                                    // whose turn it is
static void (*body)(void**);
static void** arguments;
static double exchange[1024];                           // what each thread shows to the others in a shuffle

static void entry() {
    body(arguments);
    threads[now].done = true;
    swapcontext(&threads[now].context, &scheduler);
}

static void barrier() {
    threads[now].waiting += 1;
    swapcontext(&threads[now].context, &scheduler);
    threadIdx.x = now;
}

// One block, its threads as coroutines. 1 if some wait at a barrier to which others do not come.
static int run_block(bool backwards) {
    unsigned n = blockDim.x;
    if (threads.size() < n) threads.resize(n);
    for (unsigned i = 0; i < n; i++) {
        Thread& t = threads[i];
        if (t.stack.empty()) t.stack.resize(1 << 16);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link = nullptr;
        t.done = false;
        t.waiting = 0;
        makecontext(&t.context, entry, 0);
    }
    for (;;) {
        unsigned finished = 0;
        for (unsigned i = 0; i < n; i++) {
            now = backwards ? n - 1 - i : i;
            if (!threads[now].done) {
                threadIdx.x = now;
                swapcontext(&scheduler, &threads[now].context);
            }
            finished += threads[now].done;
        }
        for (unsigned i = 1; i < n; i++)
            if (threads[i].waiting != threads[0].waiting) return 1;
        if (finished == n) return 0;
    }
}

static int run(void (*kernel)(void**), void** args, long long blocks, int size, bool waits, bool backwards) {
    body = kernel, arguments = args;
    gridDim.x = blocks, blockDim.x = size;
    for (long long b = 0; b < blocks; b++) {
        blockIdx.x = b;
        if (waits) {
            if (run_block(backwards)) return 1;
            continue;
        }
        for (int i = 0; i < size; i++) {
            threadIdx.x = backwards ? size - 1 - i : i;
            kernel(args);
        }
    }
    return 0;
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(A*)args[I]...);
}
template <class... A> void call(void (*kernel)(A...), void** args) { call(kernel, args, std::index_sequence_for<A...>()); }
template <class... A> int parameters(void (*)(A...)) { return sizeof...(A); }
}  // namespace host

static void __syncthreads() { host::barrier(); }

template <class V> V __shfl_xor_sync(unsigned, V x, int lanes) {
    host::exchange[threadIdx.x] = x;
    host::barrier();                                    // all have shown theirs
    V other = host::exchange[threadIdx.x ^ lanes];
    host::barrier();                                    // all have looked
    return other;
}

// What Python calls for a kernel: arguments are pointers to the values, as in cuLaunchKernel.
#define ON_HOST(kernel)                                                                                                       \
    extern "C" int parameters_of_##kernel() { return host::parameters(kernel); }                                              \
    extern "C" int run_##kernel(void** args, long long blocks, int threads, int waits, int backwards) {                       \
        return host::run([](void** a) { host::call(kernel, a); }, args, blocks, threads, waits, backwards);                   \
    }
