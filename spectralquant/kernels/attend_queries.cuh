// Queries: into shared memory as rotary pairs and as fragments, and from there to the planes of a run.
#include "attend_schedule.cuh"

// Two neighbouring rotary pairs, as lower and upper coordinate each.
__device__ __forceinline__ void pair_dims(const Arguments& a, int pair, int& lower, int& upper) {
    const int beyond = pair - a.rotary_pairs;  // coordinates that do not turn are paired as they come
    if (beyond >= 0) {
        lower = 2 * (a.rotary_pairs + beyond);
        upper = lower + 1;
    } else {
        lower = a.interleaved ? 2 * pair : pair;
        upper = a.interleaved ? lower + 1 : pair + a.rotary_pairs;
    }
}

__device__ __forceinline__ void unpack_exact(u32 x, float& low, float& high) {
    if (IS_BF16) unpack_bf16(x, low, high);
    else unpack_f16(x, low, high);
}

__device__ __forceinline__ float read_query(const Arguments& a, i64 at) {
#if FLOAT_QUERY
    return ((const float*)a.query)[at];
#else
    const u32 bits = ((const u16*)a.query)[at];
    float low, high;
    unpack_exact(bits, low, high);
    return low;
#endif
}

__device__ __forceinline__ void turn(float& lower, float& upper, float c, float s) {
    const float x = lower * c - upper * s;
    upper = upper * c + lower * s;
    lower = x;
}

// Queries of an item into shared memory, a row per warp. By the whole block; ends without a barrier.
#define PAIRS_PER_LANE ((D / 2 + 31) / 32)

__device__ void load_queries(const Arguments& a, const Stretch& s, Shared& sm) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (warp >= ROWS) return;
    const int row = s.row_group * ROWS + warp, position = row / a.groups, group = row - position * a.groups;
    const bool used = row < a.groups * a.positions;
    const i64 base = s.place * a.query_strides[0] + (s.head * a.groups + group) * a.query_strides[1] + position * a.query_strides[2];
    float x[PAIRS_PER_LANE], y[PAIRS_PER_LANE], mean = 0.f;
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) {
        const int pair = lane + 32 * i;
        x[i] = y[i] = 0.f;
        if (pair < D / 2 && used) {
            int lower, upper;
            pair_dims(a, pair, lower, upper);
            x[i] = read_query(a, base + lower), y[i] = read_query(a, base + upper);
#if !RUN
            const float* of_head = (const float*)a.table + s.head * D;
            mean += x[i] * of_head[lower] + y[i] * of_head[upper];
#endif
        }
        largest = fmaxf(largest, fmaxf(fabsf(x[i]), fabsf(y[i])));
    }
#if RUN
    Pairf coarse[PAIRS_PER_LANE], fine[PAIRS_PER_LANE];
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) {
        const int pair = min(lane + 32 * i, D / 2 - 1);
        coarse[i] = ((const Pairf*)a.anchors)[s.start / RUN * (D / 2) + pair];
        fine[i] = ((const Pairf*)a.turns)[s.start % RUN * (D / 2) + pair];
    }
#endif
#pragma unroll
    for (int k = 16; k; k >>= 1) {
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, k));
        if (!RUN) mean += __shfl_xor_sync(FULL_WARP, mean, k);
    }
    const u32 exponent = __float_as_uint(largest) & 0x7f800000u;  // 2^floor(log2)
    const float norm = exponent < 0x7f000000u && exponent > 0x00800000u ? __uint_as_float(exponent + 0x00800000u) : 1.f, inverse = 1.f / norm;
    if (lane == 0) sm.norm[warp] = norm, sm.mean[warp] = mean * a.scale;
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) {
        const int pair = lane + 32 * i;
        if (pair < D / 2) {
            x[i] *= inverse, y[i] *= inverse;
#if RUN
            turn(x[i], y[i], coarse[i].x, coarse[i].y);
            turn(x[i], y[i], fine[i].x, fine[i].y);
#endif
            sm.pairs[warp][2 * pair] = x[i];
            sm.pairs[warp][2 * pair + 1] = y[i];
        }
    }
    // Fragments: lane 4 r + c of chunk g, r the column of the tile, holds dims 16 g + 4 c .. + 3, as k 2c, 2c + 1, 2c + 8, 2c + 9. Any order of k will do if keys are read alike.
#pragma unroll 1
    for (int i = lane; i < DIM_CHUNKS * 4; i += 32) {
        const int chunk = i >> 2, c = i & 3, to = 4 * (2 / COLUMNS * warp) + c;
        float x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = used ? read_query(a, base + chunk * 16 + 4 * c + k) : 0.f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float low = x[2 * half], high = x[2 * half + 1];
#if FLOAT_QUERY
            low *= inverse;
            high *= inverse;
#endif
            const u32 rounded = pack_exact(low, high);
            float l, h;
            unpack_exact(rounded, l, h);
            sm.dense_query[chunk][0][to][half] = rounded;
            sm.dense_query[chunk][1][to][half] = pack_exact(low - l, high - h);
        }
    }
}

// Queries of RUNS_OF_TILE runs, mapped to the planes of K and to the rank of its mean, as B fragments. With two runs, the second has the odd columns.
struct Mapped {
    u32 planes[CK][2];
    u32 mean[LARGER(MEAN_CHUNKS, 1)][2];  // when split: the last one is what the first one leaves
    float zero[2];                        // 1.5 sum_p q'_p of columns 2c and 2c + 1
};

// Chunk k of the queries' pairs in the frames of RUNS_OF_TILE runs (rows 0..7) and of as many after them (8..15) with the turns t; residual: what fp16 leaves.
__device__ __forceinline__ void rotated_fragment(const Shared& sm, int k, const Float4 (&t)[2], u32 (&out)[4], u32 (&residual)[4]) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
    const Float4 x = *(const Float4*)&sm.pairs[COLUMNS == 2 ? r : r / 2][2 * (8 * k + 2 * c)];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float l0 = x.x, u0 = x.y, l1 = x.z, u1 = x.w;
        if (RUN) turn(l0, u0, t[i].x, -t[i].y), turn(l1, u1, t[i].z, -t[i].w);
        out[i] = pack_f16(l0, l1);
        out[2 + i] = pack_f16(u0, u1);
        float l, h;
        unpack_f16(out[i], l, h);
        residual[i] = pack_f16(l0 - l, l1 - h);
        unpack_f16(out[2 + i], l, h);
        residual[2 + i] = pack_f16(u0 - l, u1 - h);
    }
}

// B fragments of two column tiles: the rows of chunk k of the pairs, the 16 columns of `chunk` of the transform.
__device__ __forceinline__ Quad32 transform_fragment(const Arguments& a, const Shared& sm, int head, int chunk, int k) {
    const int at = (chunk * DIM_CHUNKS + k) * 32 + (threadIdx.x & 31);
#if TRANSFORM_IN_SHARED
    return load_shared16(shared_address(sm.transform) + at * 16);
#else
    return a.transform[(i64)head * (TRANSFORM_BYTES / 16) + at];
#endif
}

// Columns of one chunk of the transform as a B fragment, rows 0..7, or 8..15 (of the next runs).
__device__ __forceinline__ Pair32 pack_columns(const float (&y)[4], const float (&z)[4], int row_half, float scale) {
    return {pack_f16(y[2 * row_half] * scale, y[2 * row_half + 1] * scale), pack_f16(z[2 * row_half] * scale, z[2 * row_half + 1] * scale)};
}

__device__ __forceinline__ Pair32 pack_rest(const float (&y)[4], const float (&z)[4], int row_half, float scale, const Pair32& of) {
    float l, h, l2, h2;
    unpack_f16(of.x, l, h), unpack_f16(of.y, l2, h2);
    return {pack_f16(y[2 * row_half] * scale - l, y[2 * row_half + 1] * scale - h), pack_f16(z[2 * row_half] * scale - l2, z[2 * row_half + 1] * scale - h2)};
}

__device__ __forceinline__ float sum_of(const Pair32& pairs) {
    float l, h, l2, h2;
    unpack_f16(pairs.x, l, h), unpack_f16(pairs.y, l2, h2);
    return l + h + l2 + h2;
}

// Chunk c of the mapped queries of a warp's next runs.
__device__ __forceinline__ Pair32& next_chunk(Shared& sm, int c) { return sm.next[threadIdx.x >> 5][c][threadIdx.x & 31]; }

#define TURNS 4     // chunks of turns that are loaded at a time: their latency is long
#define TOGETHER 2  // chunks of the transform at a time: four chains of sums hide the latency of the products

__device__ void map_queries(const Arguments& a, Shared& sm, int head, int run, float mean_scale, Mapped& q) {
    const int lane = threadIdx.x & 31, c4 = lane & 3, own_run = run + (RUNS_OF_TILE == 2 ? lane >> 2 & 1 : 0);
    u32 f[DIM_CHUNKS][4];
    {
        float y[4] = {0.f, 0.f, 0.f, 0.f}, z[4] = {0.f, 0.f, 0.f, 0.f};
        Float4 turns[TURNS][2] = {};
#pragma unroll
        for (int k = 0; k < DIM_CHUNKS; k++) {
#if RUN
            if (k % TURNS == 0)
#pragma unroll
                for (int i = 0; i < 2 * TURNS; i++)
                    if (k + i / 2 < DIM_CHUNKS) turns[i / 2][i % 2] = a.anchors[(i64)(own_run + i % 2 * RUNS_OF_TILE) * (D / 4) + 4 * (k + i / 2) + c4];
#endif
            u32 rest[4];
            rotated_fragment(sm, k, turns[k % TURNS], f[k], rest);
#if SPLIT_BIAS
            const Quad32 m = transform_fragment(a, sm, head, CK, k), low = transform_fragment(a, sm, head, CK + CB, k);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], m.x, m.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], m.z, m.w);
            mma_f16(y, rest[0], rest[1], rest[2], rest[3], m.x, m.y);
            mma_f16(z, rest[0], rest[1], rest[2], rest[3], m.z, m.w);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], low.x, low.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], low.z, low.w);
#endif
        }
#if SPLIT_BIAS
        const Pair32 high = pack_columns(y, z, 0, mean_scale), low = pack_rest(y, z, 0, mean_scale, high), next = pack_columns(y, z, 1, mean_scale);
        q.mean[0][0] = high.x, q.mean[0][1] = high.y, q.mean[CB][0] = low.x, q.mean[CB][1] = low.y;
        next_chunk(sm, CK) = next, next_chunk(sm, CK + CB) = pack_rest(y, z, 1, mean_scale, next);
#endif
    }
    constexpr int CHUNKS = CK + CB - SPLIT_BIAS;  // planes, then what is left of the mean
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int c0 = 0; c0 < CHUNKS; c0 += TOGETHER) {
        float y[TOGETHER][4], z[TOGETHER][4];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) y[t][i] = z[t][i] = 0.f;
#pragma unroll
        for (int k = 0; k < DIM_CHUNKS; k++)
#pragma unroll
            for (int t = 0; t < TOGETHER; t++)
                if (c0 + t < CHUNKS) {
                    const Quad32 m = transform_fragment(a, sm, head, c0 + t < CK ? c0 + t : c0 + t + SPLIT_BIAS, k);
                    mma_f16(y[t], f[k][0], f[k][1], f[k][2], f[k][3], m.x, m.y);
                    mma_f16(z[t], f[k][0], f[k][1], f[k][2], f[k][3], m.z, m.w);
                }
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const int c = c0 + t, to = c < CK ? c : c + SPLIT_BIAS;
            if (c >= CHUNKS) continue;
            const float scale = c < CK ? 1.f : mean_scale;
            const Pair32 own = pack_columns(y[t], z[t], 0, scale), next = pack_columns(y[t], z[t], 1, scale);
            if (c < CK) {
                q.planes[c][0] = own.x, q.planes[c][1] = own.y;
                sum[0] += sum_of(own), sum[1] += sum_of(next);  // the zero point of what is really multiplied
            } else {
                q.mean[to - CK][0] = own.x, q.mean[to - CK][1] = own.y;
            }
            next_chunk(sm, to) = next;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 1);
        sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 2);
        sum[i] *= 1.5f;  // of row r, which is a column next; the lane needs those of 2c and 2c + 1
        const float zero[2] = {__shfl_sync(FULL_WARP, sum[i], 8 * c4), __shfl_sync(FULL_WARP, sum[i], 8 * c4 + 4)};
        if (i == 0) q.zero[0] = zero[0], q.zero[1] = zero[1];
        else next_chunk(sm, TRANSFORM_CHUNKS) = {__float_as_uint(zero[0]), __float_as_uint(zero[1])};
    }
}

// The queries of the following runs, which map_queries left in shared memory. Lanes read what they wrote.
__device__ __forceinline__ void take_next(Shared& sm, Mapped& q) {
#pragma unroll
    for (int c = 0; c < TRANSFORM_CHUNKS; c++) {
        const Pair32 x = next_chunk(sm, c);
        u32(&to)[2] = c < CK ? q.planes[c < CK ? c : 0] : q.mean[c < CK ? 0 : c - CK];
        to[0] = x.x, to[1] = x.y;
    }
    const Pair32 zero = next_chunk(sm, TRANSFORM_CHUNKS);
    q.zero[0] = __uint_as_float(zero.x), q.zero[1] = __uint_as_float(zero.y);
}
