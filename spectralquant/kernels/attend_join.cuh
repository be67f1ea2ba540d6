// From the states of warps to the output: within a block, between blocks, and back from plane space.
#include "attend_schedule.cuh"

// The dim of row r of chunk g of the dense sums (upper: of row r + 8), as `transposed` leaves them.
__device__ __forceinline__ int dense_dim(int g, int r, int upper) { return 16 * g + 4 * (r >> 1) + (r & 1) + 2 * upper; }

// A warp's state into its slot of shared memory, in the order of a partial result.
__device__ void write_state(State& st, float* to) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
#pragma unroll
    for (int k = 4; k < 32; k <<= 1)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            st.packed_mass[i] += __shfl_xor_sync(FULL_WARP, st.packed_mass[i], k);
            st.dense_mass[i] += __shfl_xor_sync(FULL_WARP, st.dense_mass[i], k);
        }
    const float unscaled = 16777216.f / WEIGHT_SCALE;
#pragma unroll
    for (int k = 0; k < CV; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[(2 * c + (i & 1)) * PV + 16 * k + r + 8 * (i >> 1)] = st.planes[k][i] * unscaled;
    float* dense = to + ROWS * PV;
#pragma unroll
    for (int g = 0; g < DIM_CHUNKS; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) dense[(2 * c + (i & 1)) * D + dense_dim(g, r, i >> 1)] = st.dense[g][i];
    if (r == 0) {
        float* rows = dense + ROWS * D;
#pragma unroll
        for (int i = 0; i < 2; i++) rows[2 * c + i] = st.peak[i], rows[ROWS + 2 * c + i] = st.packed_mass[i], rows[2 * ROWS + 2 * c + i] = st.dense_mass[i];
    }
}

#define PEAKS (ROWS * (PV + D))

// Joins partial results into sm.joined: `read(k, i)` is number i of the k-th of `count`. By the whole block.
template <typename Read>
__device__ __forceinline__ void join(Shared& sm, int count, float* weights, Read read) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float peak = NOTHING;  // warp w joins the peaks of row w
    for (int k = lane; k < count; k += 32) peak = fmaxf(peak, read(k, PEAKS + warp));
#pragma unroll
    for (int k = 16; k; k >>= 1) peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, k));
    for (int k = lane; k < count; k += 32) weights[k * ROWS + warp] = exp2_approx(read(k, PEAKS + warp) - peak);
    if (lane == 0) sm.joined[PEAKS + warp] = peak;
    __syncthreads();
    for (int i = threadIdx.x; i < PEAKS + 2 * ROWS; i += THREADS) {
        const int row = i < ROWS * PV ? i / PV : i < PEAKS ? (i - ROWS * PV) / D : (i - PEAKS) % ROWS;
        const int at = i < PEAKS ? i : i + ROWS;  // past the peaks: the masses
        float sum = 0.f;
        for (int k = 0; k < count; k++) sum += weights[k * ROWS + row] * read(k, at);
        sm.joined[at] = sum;
    }
    __syncthreads();
}

__device__ __forceinline__ void write_out(const Arguments& a, i64 at, float x) {
#if FLOAT_QUERY
    ((float*)a.out)[at] = x;
#elif IS_BF16
    ((u16*)a.out)[at] = (u16)pack_bf16(x, 0.f);
#else
    ((u16*)a.out)[at] = (u16)pack_f16(x, 0.f);
#endif
}

// The joined sums of a head to its output: back from plane space, mean added, divided by the mass. By the whole block.
__device__ void finish(const Arguments& a, const Stretch& s, const Shared& sm) {
    const float* rows = a.value_rows + (i64)s.head * PV * D;
    for (int i = threadIdx.x; i < 2 * D; i += THREADS) {
        const int d = i % D, half = i / D;
        float x[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int p = 0; p < PV; p++) {
            const float w = rows[p * D + d];
#pragma unroll
            for (int k = 0; k < 4; k++) x[k] += sm.joined[(4 * half + k) * PV + p] * w;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int n = 4 * half + k, row = s.row_group * ROWS + n, position = row / a.groups, head = s.head * a.groups + row - position * a.groups;
            if (row >= a.groups * a.positions) break;
            const float packed = sm.joined[PEAKS + ROWS + n];
            float mass = packed + sm.joined[PEAKS + 2 * ROWS + n], sum = x[k] + a.value_mean[s.head * D + d] * packed + sm.joined[ROWS * PV + n * D + d];
#if USE_SINKS
            const float peak = sm.joined[PEAKS + n], sink = a.sinks[head] * 1.442695041f, top = fmaxf(peak, sink), shrink = exp2_approx(peak - top);
            mass = mass * shrink + exp2_approx(sink - top), sum *= shrink;
#endif
            const i64 at = (((i64)s.batch * a.positions + position) * (a.heads * a.groups) + head) * D + d;
            write_out(a, at, sm.joined[PEAKS + n] > 0.5f * NOTHING ? sum / mass : 0.f);  // a row that sees nothing is zero
        }
    }
}

// A block's stretch of one head is done: the warps' states are joined. A whole head is finished; a part of one is left for the last block to come.
__device__ void leave(const Arguments& a, const Stretch& s, Shared& sm, i64 line, int share, int row_groups) {
    join(sm, WARPS, &sm.weight[0][0], [&](int k, int i) { return ((const float*)sm.slots[k])[i]; });
    if (s.last - s.first < s.count) {
        // A block has at most two parts: of the head that it goes on with, and of the head that it begins and does not finish.
        float* mine = a.partials + (2 * (i64)blockIdx.x + (s.first == 0)) * PARTIAL;
        for (int i = threadIdx.x; i < PARTIAL; i += THREADS) store_global(mine + i, sm.joined[i]);
        __threadfence();
        __syncthreads();
        const i64 begin = line - s.first;  // of the head's steps on the line
        const int first_block = (int)(begin / share), parts = (int)((begin + s.count - 1) / share) - first_block + 1;
        if (threadIdx.x == 0) {
            int* ticket = a.tickets + ((i64)s.head * row_groups + s.row_group) * a.batch + s.batch;
            sm.last = atomicAdd(ticket, 1) == parts - 1;
            if (sm.last) *ticket = 0;
            __threadfence();
        }
        __syncthreads();
        if (!sm.last) return;
        // In order of blocks: which one comes last must not change the sum.
        const float* first = a.partials + 2 * (i64)first_block * PARTIAL;
        join(sm, parts, (float*)sm.slots, [&](int k, int i) { return load_global(first + (2 * (i64)k + (k == 0)) * PARTIAL + i); });
    }
    finish(a, s, sm);
}
