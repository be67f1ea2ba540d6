// A GPU's threads on the host, for tests: every thread of a block is a fiber, and fibers meet at the operations that threads of a warp or a
// block do together. Exact in what it computes and in which lane holds what; it knows no time, so it can't find races or missing waits.
#pragma once
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
using std::max;
using std::min;
struct uint4 { unsigned x, y, z, w; };
static struct { unsigned x; } blockIdx, blockDim, threadIdx, gridDim;
alignas(128) static unsigned char shared[256 * 1024];

// Fibers -------------------------------------------------------------------------------------------------------------------------------------

static constexpr int STACK = 256 * 1024, MOST = 1024;
static struct Fiber { jmp_buf at; char* stack; bool done; } fibers[MOST];
static jmp_buf scheduler;
static std::function<void()> body;
static unsigned arrived[MOST / 32 + 1], generation[MOST / 32 + 1];  // of each warp; the last entry is the block's

static void yield() {
    const unsigned me = threadIdx.x;
    if (!_setjmp(fibers[me].at)) _longjmp(scheduler, 1);
}

static void meet(unsigned group, unsigned members) {
    const unsigned now = generation[group];
    if (++arrived[group] == members) arrived[group] = 0, ++generation[group];
    else while (generation[group] == now) yield();
}

static void start_fiber() {
    if (!_setjmp(fibers[threadIdx.x].at)) _longjmp(scheduler, 1);
    body();
    fibers[threadIdx.x].done = true;
    _longjmp(scheduler, 1);
}

static void run_block(unsigned threads) {
    static ucontext_t context, back;
    for (unsigned i = 0; i < threads; ++i) {
        if (!fibers[i].stack) fibers[i].stack = (char*)std::malloc(STACK);
        fibers[i].done = false;
        getcontext(&context);
        context.uc_stack.ss_sp = fibers[i].stack, context.uc_stack.ss_size = STACK, context.uc_link = nullptr;
        makecontext(&context, start_fiber, 0);
        threadIdx.x = i;
        if (!_setjmp(scheduler)) setcontext(&context);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (volatile unsigned i = 0; i < threads; i = i + 1) {
            if (fibers[i].done) continue;
            alive = true;
            threadIdx.x = i;
            if (!_setjmp(scheduler)) _longjmp(fibers[i].at, 1);
        }
    }
}

// Runs a kernel, block after block.
template <class... P, class... A>
static void run(void (*kernel)(P...), unsigned grid, unsigned block, A... args) {
    blockDim.x = block, gridDim.x = grid;
    body = [=] { kernel(args...); };
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        std::memset(shared, 0xff, sizeof shared);  // NaNs: nothing may be read before it is written
        run_block(block);
    }
}

// What threads do together ---------------------------------------------------------------------------------------------------------------------

static unsigned char mailbox[MOST / 32][32][32];

// Every lane leaves a value; returns the warp's. Valid until the lane calls `release`.
template <class T>
static const unsigned char (*exchange(T value))[32] {
    const unsigned warp = threadIdx.x / 32;
    std::memcpy(mailbox[warp][threadIdx.x % 32], &value, sizeof value);
    meet(warp, 32);
    return mailbox[warp];
}

template <class T>
static T from(const unsigned char (*box)[32], unsigned lane) {
    T value;
    std::memcpy(&value, box[lane], sizeof value);
    return value;
}

static void release() { meet(threadIdx.x / 32, 32); }
static void __syncwarp() { meet(threadIdx.x / 32, 32); }
static void __syncthreads() { meet(MOST / 32, blockDim.x); }

template <class T>
static T shuffled(T value, unsigned lane) {
    const T found = from<T>(exchange(value), lane);
    release();
    return found;
}
template <class T> static T __shfl_sync(unsigned, T value, int lane) { return shuffled(value, lane & 31); }
template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) { return shuffled(value, (threadIdx.x ^ mask) & 31); }
template <class T> static T __shfl_up_sync(unsigned, T value, unsigned by) { const unsigned lane = threadIdx.x % 32; return shuffled(value, lane < by ? lane : lane - by); }

static unsigned __ballot_sync(unsigned, int predicate) {
    const auto box = exchange(predicate);
    unsigned found = 0;
    for (unsigned lane = 0; lane < 32; ++lane) found |= (unsigned)(from<int>(box, lane) != 0) << lane;
    release();
    return found;
}
static int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static void sincospi(double x, double* sin, double* cos) { *sin = std::sin(M_PI * std::fmod(x, 2.)), *cos = std::cos(M_PI * std::fmod(x, 2.)); }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __ffs(unsigned x) { return __builtin_ffs((int)x); }
static unsigned __float_as_uint(float x) { unsigned y; std::memcpy(&y, &x, 4); return y; }
static float __uint_as_float(unsigned x) { float y; std::memcpy(&y, &x, 4); return y; }
static unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t both = (uint64_t)y << 32 | x;
    unsigned out = 0;
    for (int i = 0; i < 4; ++i) out |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return out;
}
