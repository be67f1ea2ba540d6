// Which steps a block takes: a stretch of the line of all heads' steps, computed from lengths in device memory.
#include "attend_shapes.cuh"

// A stretch of one head: steps first .. last - 1 of count, the packed ones before the dense ones.
struct Stretch {
    int head, row_group, batch, first, last, count;
    int units, raw;
};

__device__ __forceinline__ int dense_steps(const Arguments& a, int raw) {
    return (a.exact + TILE - 1) / TILE + (raw + TILE - 1) / TILE;
}

__device__ __forceinline__ int steps_of(const Arguments& a, int b, int& units, int& raw) {
    units = b < a.batch ? a.lengths[2 * b] : 0;
    raw = b < a.batch ? a.lengths[2 * b + 1] : 0;
    return units + raw ? units + dense_steps(a, raw) : 0;
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}

// Steps of all sequences for one head and row group. By a whole warp.
__device__ __forceinline__ int steps_per_item(const Arguments& a) {
    int sum = 0, units, raw;
    for (int b = threadIdx.x & 31; b < a.batch; b += 32) sum += steps_of(a, b, units, raw);
    return warp_sum(sum);
}

// The head that step x of the whole line belongs to. By a whole warp.
__device__ Stretch locate(const Arguments& a, i64 x, int per_item, int row_groups) {
    Stretch s;
    const int lane = threadIdx.x & 31, item = (int)(x / per_item);
    int rest = (int)(x - (i64)item * per_item);
    s.head = item / row_groups;
    s.row_group = item - s.head * row_groups;
    for (int base = 0;; base += 32) {
        int units, raw;
        const int count = steps_of(a, base + lane, units, raw);
        int sum = count;
#pragma unroll
        for (int k = 1; k < 32; k <<= 1) {
            const int below = __shfl_up_sync(FULL_WARP, sum, k);
            if (lane >= k) sum += below;
        }
        const u32 beyond = __ballot_sync(FULL_WARP, sum > rest);
        if (beyond) {
            const int at = __ffs(beyond) - 1;
            s.batch = base + at;
            s.count = __shfl_sync(FULL_WARP, count, at);
            s.units = __shfl_sync(FULL_WARP, units, at);
            s.raw = __shfl_sync(FULL_WARP, raw, at);
            s.first = rest - __shfl_sync(FULL_WARP, sum - count, at);
            return s;
        }
        rest -= __shfl_sync(FULL_WARP, sum, 31);
    }
}
