// From the states of warps to the output: within a block, between blocks, and back from plane space.
#include "attend_schedule.cuh"

// The dim of row r of chunk g of the dense sums (upper: of row r + 8), as `transposed` leaves them.
__device__ __forceinline__ int dense_dim(int g, int r, int upper) { return 16 * g + 4 * (r >> 1) + (r & 1) + 2 * upper; }

__device__ __forceinline__ void add_scaled(Float4& sum, const Float4& x, float w) {
    sum.x += w * x.x, sum.y += w * x.y, sum.z += w * x.z, sum.w += w * x.w;
}

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
#define AHEAD 8  // reads in flight: their latency is what joining costs

// Joins partial results into sm.joined: `at(k)` is where the k-th of `count` lies, `read` and `read4` load from there. By the whole block.
template <typename At, typename Read, typename Read4>
__device__ __forceinline__ void join(Shared& sm, int count, float* weights, At at, Read read, Read4 read4) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float peak = NOTHING, packed = 0.f, dense = 0.f;  // warp w joins peaks and masses of row w
    for (int k = lane; k < count; k += 32) peak = fmaxf(peak, read(at(k) + PEAKS + warp));
#pragma unroll
    for (int k = 16; k; k >>= 1) peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, k));
    for (int k = lane; k < count; k += 32) {
        const float* rows = at(k) + PEAKS + warp;
        const float w = exp2_approx(read(rows) - peak);
        weights[k * ROWS + warp] = w;
        packed += w * read(rows + ROWS), dense += w * read(rows + 2 * ROWS);
    }
#pragma unroll
    for (int k = 16; k; k >>= 1) packed += __shfl_xor_sync(FULL_WARP, packed, k), dense += __shfl_xor_sync(FULL_WARP, dense, k);
    if (lane == 0) sm.joined[PEAKS + warp] = peak, sm.joined[PEAKS + ROWS + warp] = packed, sm.joined[PEAKS + 2 * ROWS + warp] = dense;
    __syncthreads();
    for (int i = threadIdx.x; i < PEAKS / 4; i += THREADS) {
        const int row = i < ROWS * PV / 4 ? i / (PV / 4) : (i - ROWS * PV / 4) / (D / 4);
        Float4 sum = {0.f, 0.f, 0.f, 0.f};
        for (int first = 0; first < count; first += AHEAD) {
            Float4 x[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) x[k] = read4(at(min(first + k, count - 1)) + 4 * i);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) add_scaled(sum, x[k], first + k < count ? weights[(first + k) * ROWS + row] : 0.f);
        }
        *(Float4*)(sm.joined + 4 * i) = sum;
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

// Sums of a head in plane space, sm.joined, times the rows of V: `SLICES` parts of the output [8][D] in the warps' slots. By the whole block.
#define QUADS (D / 4)
#define SLICES (THREADS / QUADS)

__device__ void leave_plane_space(const Arguments& a, int head, Shared& sm) {
    const Float4* rows = (const Float4*)(a.value_rows + (i64)head * PV * D);
    const int quad = threadIdx.x % QUADS, slice = threadIdx.x / QUADS;
    if (slice >= SLICES) return;
    Float4 x[ROWS];
#pragma unroll
    for (int n = 0; n < ROWS; n++) x[n] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll AHEAD
    for (int p = slice; p < PV; p += SLICES) {
        const Float4 w = rows[p * QUADS + quad];
#pragma unroll
        for (int n = 0; n < ROWS; n++) add_scaled(x[n], w, sm.joined[n * PV + p]);
    }
    Float4* parts = (Float4*)sm.slots;
#pragma unroll
    for (int n = 0; n < ROWS; n++) parts[(slice * ROWS + n) * QUADS + quad] = x[n];
}

// The joined sums of a head to its output: back from plane space, mean added, divided by the mass. By the whole block.
__device__ void finish(const Arguments& a, const Stretch& s, Shared& sm) {
    leave_plane_space(a, s.head, sm);
    __syncthreads();
    const float* parts = (const float*)sm.slots;
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
        const int n = i / D, d = i - n * D, row = s.row_group * ROWS + n, position = row / a.groups, head = s.head * a.groups + row - position * a.groups;
        if (row >= a.groups * a.positions) break;
        const float packed = sm.joined[PEAKS + ROWS + n];
        float mass = packed + sm.joined[PEAKS + 2 * ROWS + n], sum = a.value_mean[s.head * D + d] * packed + sm.joined[ROWS * PV + i];
#pragma unroll
        for (int k = 0; k < SLICES; k++) sum += parts[k * ROWS * D + i];
#if USE_SINKS
        const float peak = sm.joined[PEAKS + n], sink = a.sinks[head] * 1.442695041f, top = fmaxf(peak, sink), shrink = exp2_approx(peak - top);
        mass = mass * shrink + exp2_approx(sink - top), sum *= shrink;
#endif
        const i64 at = (((i64)s.batch * a.positions + position) * (a.heads * a.groups) + head) * D + d;
        write_out(a, at, sm.joined[PEAKS + n] > 0.5f * NOTHING ? sum / mass : 0.f);  // a row that sees nothing is zero
    }
}

// A block's stretch of one head is done: the warps' states are joined. A whole head is finished; a part of one is left for the last block to come.
__device__ void leave(const Arguments& a, const Stretch& s, Shared& sm, i64 line, int share, int row_groups) {
    join(
        sm, WARPS, &sm.weight[0][0], [&](int k) { return (const float*)sm.slots[k]; }, [](const float* p) { return *p; },
        [](const float* p) { return *(const Float4*)p; });
    if (s.last - s.first < s.count) {
        // A block has at most two parts: of the head that it goes on with, and of the head that it begins and does not finish.
        float* mine = a.partials + (2 * (i64)blockIdx.x + (s.first == 0)) * PARTIAL;
        for (int i = threadIdx.x; i < PARTIAL / 4; i += THREADS) store_global16(mine + 4 * i, *(const Float4*)(sm.joined + 4 * i));
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
        join(
            sm, parts, (float*)sm.slots, [&](int k) { return first + (2 * (i64)k + (k == 0)) * PARTIAL; }, [](const float* p) { return load_global(p); },
            [](const float* p) { return load_global16(p); });
    }
    finish(a, s, sm);
}
