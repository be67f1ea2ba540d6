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

// Pairs in the type of exact tokens.
__device__ __forceinline__ u32 pack_exact(float low, float high) { return IS_BF16 ? pack_bf16(low, high) : pack_f16(low, high); }

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

// Queries of one head into shared memory. By the whole block; ends without a barrier.
__device__ void load_queries(const Arguments& a, const Stretch& s, Shared& sm) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int row = s.row_group * ROWS + warp, position = row / a.groups, group = row - position * a.groups;
    const bool used = row < a.groups * a.positions;
    const i64 base = s.batch * a.query_strides[0] + (s.head * a.groups + group) * a.query_strides[1] + position * a.query_strides[2];
    float largest = 0.f;
    for (int d = lane; d < D; d += 32) largest = fmaxf(largest, used ? fabsf(read_query(a, base + d)) : 0.f);
#pragma unroll
    for (int k = 16; k; k >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, k));
    const u32 exponent = __float_as_uint(largest) & 0x7f800000u;  // 2^floor(log2)
    const float norm = exponent < 0x7f000000u && exponent > 0x00800000u ? __uint_as_float(exponent + 0x00800000u) : 1.f, inverse = 1.f / norm;
    if (lane == 0) sm.norm[warp] = norm;
    const i64 start = RUN ? a.start[s.batch] : 0;
    for (int pair = lane; pair < D / 2; pair += 32) {
        int lower, upper;
        pair_dims(a, pair, lower, upper);
        float x = used ? read_query(a, base + lower) * inverse : 0.f, y = used ? read_query(a, base + upper) * inverse : 0.f;
#if RUN
        const float* coarse = (const float*)(a.anchors + (start / RUN) * (D / 4)) + 2 * pair;
        const float* fine = (const float*)(a.turns + (start % RUN) * (D / 4)) + 2 * pair;
        turn(x, y, coarse[0], coarse[1]);
        turn(x, y, fine[0], fine[1]);
#endif
        sm.pairs[warp][2 * pair] = x;
        sm.pairs[warp][2 * pair + 1] = y;
    }
    // Fragments: lane 4 r + c of chunk g holds dims 16 g + 4 c .. + 3 of row r, as k 2c, 2c + 1, 2c + 8, 2c + 9. Any order of k will do if keys are read alike.
    for (int i = lane; i < DIM_CHUNKS * 4; i += 32) {
        const int chunk = i >> 2, c = i & 3, to = 4 * warp + c;
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

// Queries of a run and of the next one, mapped to the planes of K and to the rank of its mean.
struct Mapped {
    u32 planes[2][CK][2];
    u32 mean[2][CB][BIAS_COPIES][2];
    float zero[2][2];  // 1.5 sum_p q'_p of the lane's two columns
};

// A fragment of queries in the frames of two runs (rows 0..7 and 8..15), chunk k of the pairs; residual: what fp16 leaves.
__device__ __forceinline__ void rotated_fragment(const Arguments& a, const Shared& sm, int run, int k, u32 (&out)[4], u32 (&residual)[4]) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
    const Float4 x = *(const Float4*)&sm.pairs[r][2 * (8 * k + 2 * c)];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#if RUN
        const Float4 t = a.anchors[(i64)(run + i) * (D / 4) + 4 * k + c];
        const float l0 = x.x * t.x + x.y * t.y, u0 = x.y * t.x - x.x * t.y, l1 = x.z * t.z + x.w * t.w, u1 = x.w * t.z - x.z * t.w;
#else
        const float l0 = x.x, u0 = x.y, l1 = x.z, u1 = x.w;
#endif
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

__device__ void map_queries(const Arguments& a, const Shared& sm, int head, int run, float mean_scale, Mapped& q) {
    const int lane = threadIdx.x & 31, c4 = lane & 3;
    u32 f[DIM_CHUNKS][4], rest[4];
#pragma unroll
    for (int k = 0; k < DIM_CHUNKS; k++) rotated_fragment(a, sm, run, k, f[k], rest);
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < CK; c++) {
        float y[4] = {0.f, 0.f, 0.f, 0.f}, z[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < DIM_CHUNKS; k++) {
            const Quad32 m = transform_fragment(a, sm, head, c, k);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], m.x, m.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], m.z, m.w);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            q.planes[i][c][0] = pack_f16(y[2 * i], y[2 * i + 1]);
            q.planes[i][c][1] = pack_f16(z[2 * i], z[2 * i + 1]);
            float l, h;  // the zero point of what is really multiplied
            unpack_f16(q.planes[i][c][0], l, h);
            sum[i] += l + h;
            unpack_f16(q.planes[i][c][1], l, h);
            sum[i] += l + h;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 1);
        sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 2);
        sum[i] *= 1.5f;  // of row r; the lane needs those of rows 2c and 2c + 1
        q.zero[i][0] = __shfl_sync(FULL_WARP, sum[i], 8 * c4);
        q.zero[i][1] = __shfl_sync(FULL_WARP, sum[i], 8 * c4 + 4);
    }
#pragma unroll
    for (int c = 0; c < CB; c++) {
        float y[4] = {0.f, 0.f, 0.f, 0.f}, z[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < DIM_CHUNKS; k++) {
            const Quad32 m = transform_fragment(a, sm, head, CK + c, k);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], m.x, m.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], m.z, m.w);
#if SPLIT_BIAS
            u32 again[4];
            rotated_fragment(a, sm, run, k, again, rest);
            mma_f16(y, rest[0], rest[1], rest[2], rest[3], m.x, m.y);
            mma_f16(z, rest[0], rest[1], rest[2], rest[3], m.z, m.w);
            const Quad32 low = transform_fragment(a, sm, head, CK + CB + c, k);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], low.x, low.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], low.z, low.w);
#endif
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float low = (half ? z : y)[2 * i] * mean_scale, high = (half ? z : y)[2 * i + 1] * mean_scale;
                q.mean[i][c][0][half] = pack_f16(low, high);
#if SPLIT_BIAS
                float l, h;
                unpack_f16(q.mean[i][c][0][half], l, h);
                q.mean[i][c][1][half] = pack_f16(low - l, high - h);
#endif
            }
    }
}

// The second run to the front: registers can't be indexed.
__device__ __forceinline__ void move_up(Mapped& q) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        q.zero[0][i] = q.zero[1][i];
#pragma unroll
        for (int c = 0; c < CK; c++) q.planes[0][c][i] = q.planes[1][c][i];
#pragma unroll
        for (int c = 0; c < CB; c++)
#pragma unroll
            for (int k = 0; k < BIAS_COPIES; k++) q.mean[0][c][k][i] = q.mean[1][c][k][i];
    }
}
