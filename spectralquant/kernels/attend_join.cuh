// From the states of warps to the output: within a block, between blocks, and back from plane space.
#include "attend_schedule.cuh"

// The dim of row r of chunk g of the dense sums (upper: of row r + 8), as `transposed` leaves them.
__device__ __forceinline__ int dense_dim(int g, int r, int upper) { return 16 * g + 4 * (r >> 1) + (r & 1) + 2 * upper; }

__device__ __forceinline__ void add_scaled(Float4& sum, const Float4& x, float w) {
    sum.x += w * x.x, sum.y += w * x.y, sum.z += w * x.z, sum.w += w * x.w;
}

// A warp's state into its slot of shared memory.
__device__ void write_state(State& st, float* to) {
    const int lane = threadIdx.x & 31, r = lane >> 2;
#pragma unroll
    for (int k = 4; k < 32; k <<= 1)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            st.packed_mass[i] += __shfl_xor_sync(FULL_WARP, st.packed_mass[i], k);
            st.dense_mass[i] += __shfl_xor_sync(FULL_WARP, st.dense_mass[i], k);
        }
    const float unscaled = 1 << 24 - WEIGHT_SCALE_LOG2;
#pragma unroll
    for (int k = 0; k < CV; k++)
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; i++) to[(16 * k + r + 8 * (i / COLUMNS)) * ROWS + own_row(i % COLUMNS)] = st.planes[k][i / COLUMNS * 2 + i % COLUMNS] * unscaled;
    float* dense = to + ROWS * PV;
#pragma unroll
    for (int g = 0; g < DIM_CHUNKS; g++)
#pragma unroll
        for (int i = 0; i < 2 * COLUMNS; i++) dense[dense_dim(g, r, i / COLUMNS) * ROWS + own_row(i % COLUMNS)] = st.dense[g][i / COLUMNS * 2 + i % COLUMNS];
    if (r == 0) {
        float* rows = dense + ROWS * D;
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) rows[own_row(i)] = st.peak[i], rows[ROWS + own_row(i)] = st.packed_mass[i], rows[2 * ROWS + own_row(i)] = st.dense_mass[i];
    }
}

#define PEAKS (ROWS * (PV + D))
#define QUADS (D / 4)
#define SLICES (THREADS / QUADS)  // threads that share four dims of the output

__device__ __forceinline__ float warp_most(float x) {
#pragma unroll
    for (int k = 16; k; k >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, k));
    return x;
}

__device__ __forceinline__ float warp_total(float x) {
#pragma unroll
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}

// The warps' states to one, in sm.joined. By the whole block.
__device__ void join_warps(Shared& sm) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const float* of_lane = (const float*)sm.slots[lane % WARPS] + PEAKS + warp % ROWS;  // warp w joins peaks and masses of row w
    const float peak = warp_most(*of_lane), w = lane < WARPS ? exp2_approx(*of_lane - peak) : 0.f;
    const float packed = warp_total(w * of_lane[ROWS]), dense = warp_total(w * of_lane[2 * ROWS]);
    if (warp < ROWS && lane < WARPS) sm.weight[lane][warp] = w;
    if (warp < ROWS && lane == 0) sm.joined[PEAKS + warp] = peak, sm.joined[PEAKS + ROWS + warp] = packed, sm.joined[PEAKS + 2 * ROWS + warp] = dense;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < PEAKS / 4; i += THREADS) {  // four rows of a plane or dim
        Float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < WARPS; k++) {
            const Float4 x = ((const Float4*)sm.slots[k])[i], w = *(const Float4*)&sm.weight[k][4 * (i % COLUMNS)];
            sum.x += w.x * x.x, sum.y += w.y * x.y, sum.z += w.z * x.z, sum.w += w.w * x.w;
        }
        ((Float4*)sm.joined)[i] = sum;
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

#define PLANES_OF_THREAD ((PV + SLICES - 1) / SLICES)
#define PLANES_AHEAD (PLANES_OF_THREAD < 10 ? PLANES_OF_THREAD : 10)  // rows of V in flight

// Rows of V that a thread needs: four dims of planes first, first + SLICES, ...
__device__ __forceinline__ void load_rows(const Arguments& a, int head, int first, Float4 (&rows)[PLANES_AHEAD]) {
    const Float4* of_head = (const Float4*)(a.value_rows + (i64)head * PV * D) + threadIdx.x % QUADS;
#pragma unroll
    for (int i = 0; i < PLANES_AHEAD; i++) rows[i] = of_head[min(first + SLICES * i, PV - 1) * QUADS];
}

// Sums [ROWS][D] of sm.joined's planes times the rows of V, in SLICES parts in the warps' slots; `ahead` are the first rows. By the whole block.
__device__ __forceinline__ void leave_plane_space(const Arguments& a, int head, Shared& sm, Float4 (&ahead)[PLANES_AHEAD]) {
    const int quad = threadIdx.x % QUADS, slice = threadIdx.x / QUADS;
    if (slice >= SLICES) return;
    Float4 x[ROWS];
#pragma unroll
    for (int n = 0; n < ROWS; n++) x[n] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int first = slice; first < PV; first += SLICES * PLANES_AHEAD) {
        if (first != slice) load_rows(a, head, first, ahead);
#pragma unroll
        for (int i = 0; i < PLANES_AHEAD; i++) {
            const int p = first + SLICES * i;
            if (PV % (SLICES * PLANES_AHEAD) == 0 || p < PV)  // a check less where planes come out even
#pragma unroll
                for (int n = 0; n < ROWS; n++) add_scaled(x[n], ahead[i], sm.joined[p * ROWS + n]);
        }
    }
    Float4* parts = (Float4*)sm.slots;
#pragma unroll
    for (int n = 0; n < ROWS; n++) parts[(slice * ROWS + n) * QUADS + quad] = x[n];
}

// Four dims of a row's sum of all that this block has joined, V's mean and exact tokens included. Once leave_plane_space is done.
__device__ __forceinline__ Float4 sum_of_parts(const Arguments& a, int head, const Shared& sm, int row, int quad) {
    const Float4* parts = (const Float4*)sm.slots + row * QUADS + quad;
    const float* dense = sm.joined + ROWS * (PV + 4 * quad) + row;
    Float4 sum = {dense[0], dense[ROWS], dense[2 * ROWS], dense[3 * ROWS]};
    add_scaled(sum, ((const Float4*)a.value_mean)[head * QUADS + quad], sm.joined[PEAKS + ROWS + row]);
#pragma unroll
    for (int k = 0; k < SLICES; k++) add_scaled(sum, parts[k * ROWS * QUADS], 1.f);
    return sum;
}

__device__ __forceinline__ float mass_of(const Shared& sm, int row) { return sm.joined[PEAKS + ROWS + row] + sm.joined[PEAKS + 2 * ROWS + row]; }

// Four dims of the output from the sum, mass and peak of their row.
__device__ __forceinline__ void finish(const Arguments& a, const Stretch& s, int row_of_group, int quad, Float4 sum, float mass, float peak) {
    const int row = s.row_group * ROWS + row_of_group, position = row / a.groups, head = s.head * a.groups + row - position * a.groups;
    float factor = peak > 0.5f * NOTHING ? 1.f : 0.f;  // a row that sees nothing is zero
#if USE_SINKS
    const float sink = a.sinks[head] * 1.442695041f, top = fmaxf(peak, sink), shrink = exp2_approx(peak - top);
    mass = mass * shrink + exp2_approx(sink - top), factor *= shrink;
#endif
    factor = factor == 0.f ? 0.f : factor / mass;
    const i64 at = (((i64)s.place * a.positions + position) * (a.heads * a.groups) + head) * D + 4 * quad;
    write_out(a, at, sum.x * factor), write_out(a, at + 1, sum.y * factor), write_out(a, at + 2, sum.z * factor), write_out(a, at + 3, sum.w * factor);
}

// Adds one and tells what was there before; what this block's threads wrote before the barrier is seen by whoever sees the new number.
__device__ __forceinline__ bool is_last(int* ticket, int blocks) {
    if (atomic_add_ordered(ticket, 1) != blocks - 1) return false;
    *ticket = 0;
    return true;
}

#define AHEAD 8  // reads in flight: their latency is what joining costs
#define SUMMERS LARGER(THREADS / (ROWS * QUADS), 1)  // threads that share four dims of a row

// The partial results of an item to the output, in an order that does not depend on which block came last. By the whole block.
__device__ void join_blocks(const Arguments& a, const Stretch& s, Shared& sm, int rows) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, share = threadIdx.x / (ROWS * QUADS);
    const float* first = a.partials + 2 * (i64)s.first_block * PARTIAL;
    auto at = [&](int k) { return first + (2 * k + (k == 0)) * PARTIAL; };
    auto load_sums = [&](int k0, int i, Float4(&x)[AHEAD]) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) x[k] = load_global16(at(min(k0 + SUMMERS * k, s.blocks - 1)) + 2 * ROWS + 4 * i);
    };
    Float4 x[AHEAD];
    load_sums(share, threadIdx.x % (ROWS * QUADS), x);
    float* weights = (float*)sm.slots;  // [blocks][ROWS]
    float* masses = weights + s.blocks * ROWS;
    Float4* sums = (Float4*)(masses + s.blocks * ROWS);
    if (warp < ROWS) {  // warp w joins peaks and masses of row w
        float peak = NOTHING, mass = 0.f;
#pragma unroll 1
        for (int k = lane; k < s.blocks; k += 32) {
            const float own = load_global(at(k) + warp);
            masses[k * ROWS + warp] = load_global(at(k) + ROWS + warp), weights[k * ROWS + warp] = own;
            peak = fmaxf(peak, own);
        }
        peak = warp_most(peak);
#pragma unroll 1
        for (int k = lane; k < s.blocks; k += 32) {
            const float w = exp2_approx(weights[k * ROWS + warp] - peak);
            weights[k * ROWS + warp] = w;
            mass += w * masses[k * ROWS + warp];
        }
        mass = warp_total(mass);
        if (lane == 0) sm.joined[warp] = peak, sm.joined[ROWS + warp] = mass;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < SUMMERS * ROWS * QUADS; i += THREADS) {
        const int quad = i % (ROWS * QUADS), row = quad / QUADS;
        Float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
        for (int k0 = share; k0 < s.blocks; k0 += SUMMERS * AHEAD) {
            if (k0 != share || i != threadIdx.x) load_sums(k0, quad, x);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) add_scaled(sum, x[k], k0 + SUMMERS * k < s.blocks ? weights[(k0 + SUMMERS * k) * ROWS + row] : 0.f);
        }
        if (SUMMERS == 1 && row < rows) finish(a, s, row, quad - row * QUADS, sum, sm.joined[ROWS + row], sm.joined[row]);
        if (SUMMERS > 1) sums[i] = sum;
    }
    if (SUMMERS == 1) return;
    __syncthreads();
    const int row = threadIdx.x / QUADS;
    if (row >= rows) return;
    Float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < SUMMERS; k++) add_scaled(sum, sums[k * ROWS * QUADS + threadIdx.x], 1.f);
    finish(a, s, row, threadIdx.x - row * QUADS, sum, sm.joined[ROWS + row], sm.joined[row]);
}

// A block's stretch of an item is done. A whole item is finished; a part of one is left for the last block to come.
__device__ void leave(const Arguments& a, const Stretch& s, Shared& sm) {
    const int rows = min(ROWS, a.groups * a.positions - s.row_group * ROWS);
    Float4 ahead[PLANES_AHEAD];
    load_rows(a, s.head, threadIdx.x / QUADS, ahead);
    join_warps(sm);
    leave_plane_space(a, s.head, sm, ahead);
    __syncthreads();
    const bool whole = s.last - s.first == s.count;
    // A block has at most two parts: of the item that it goes on with, and of the one that it begins and does not finish.
    float* mine = a.partials + (2 * (i64)blockIdx.x + (s.first == 0)) * PARTIAL;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * QUADS; i += THREADS) {
        const int row = i / QUADS, quad = i - row * QUADS;
        const Float4 sum = sum_of_parts(a, s.head, sm, row, quad);
        if (whole) finish(a, s, row, quad, sum, mass_of(sm, row), sm.joined[PEAKS + row]);
        else store_global16(mine + 2 * ROWS + 4 * i, sum);
    }
    if (whole) return;
    if (threadIdx.x < ROWS) store_global(mine + threadIdx.x, sm.joined[PEAKS + threadIdx.x]), store_global(mine + ROWS + threadIdx.x, mass_of(sm, threadIdx.x));
    __syncthreads();
    if (threadIdx.x == 0) sm.last = is_last(a.tickets + ((i64)s.head * a.row_groups + s.row_group) * a.batch + s.batch, s.blocks);
    __syncthreads();
    if (sm.last) join_blocks(a, s, sm, rows);
}
