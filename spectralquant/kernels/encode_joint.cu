// The K-best search of codec/search.py and what it finds, packed (see encode.cuh for what is written): eight lanes per token, a path each.
//
// With R the table of reach and c = s + 3/2 the codes, the centre of symbol p given the later ones is
//
//     t_p - sum_{q > p} R_pq (s_q - t_q) = b_p - sum_{q > p} R_pq c_q,      b_p = t_p + sum_{q > p} R_pq (t_q + 3/2)
//
// and b is the same for all paths. Metrics are compared as the upper 28 bits of a positive float, with the place of the candidate in the lower 4: no ties.
#include "encode.cuh"

#if !defined(BLOCKS)
#error "define BLOCKS, the blocks of coordinates that are quantized jointly"
#endif

#define LANES 8
#define GROUPS (THREADS / LANES)
#define TOKENS (UNIT / GROUPS)  // of a group
#define DB (D / BLOCKS)
#define PB (PLANES / BLOCKS)
#define PAD ((PB + 3) / 4 * 4)
#define DIMS_PER_LANE ((DB + LANES - 1) / LANES)
#define PLANES_PER_LANE ((PB + LANES - 1) / LANES)
#define WORDS ((PB + 15) / 16)
#define LOST 1e30f  // metric of a path that loses to any other

struct Path {
    float metric;
    u32 words[WORDS];  // codes, two bits each
};

// Tables of one block of one head.
struct Tables {
    alignas(16) float reach[PB][PAD];  // strictly upper triangle
    float weight[PB];
    float filters[DB][PB];
    float rows[PB][DB];
};

struct Shared {
    Tables tables;
    u8 codes[UNIT][PLANES];
};

// What a group has found of one token.
struct Token {
    float rms;
    float zz, cross, qq;  // this lane's share
};

__device__ __forceinline__ float code_of(const u32 (&words)[WORDS], int plane) {
    const u32 bits = words[plane / 16] >> 2 * (plane % 16) & 3;
    return __uint_as_float(0x4b000000u | bits) - 8388608.f;  // cheaper than a conversion
}

// Sorts eight keys, one per lane of a group, by Batcher's bitonic network: ascending, or descending.
template <bool ASCENDING>
__device__ __forceinline__ u32 sorted(u32 key) {
    const int lane = threadIdx.x % LANES;
#pragma unroll
    for (int size = 2; size <= LANES; size *= 2)
#pragma unroll
        for (int step = size / 2; step; step /= 2) {
            const u32 other = __shfl_xor_sync(FULL_WARP, key, step);
            const bool smaller = ((lane & step) == 0) == (((lane & size) == 0) == ASCENDING);
            key = smaller ? min(key, other) : max(key, other);
        }
    return key;
}

// Keeps the best eight of the group's sixteen continuations of `plane`; low is the smaller of the two codes that a lane tries. Of two sorted lists, one
// backwards, the smaller of every pair are the smallest of all.
__device__ __forceinline__ void keep_best(Path& path, const float (&metric)[2], int low, int plane) {
    const int lane = threadIdx.x % LANES, base = threadIdx.x % 32 - lane;
    const u32 first = (__float_as_uint(metric[0]) & ~15u) | (2 * lane), second = (__float_as_uint(metric[1]) & ~15u) | (2 * lane + 1);
    const u32 kept = min(sorted<true>(first), sorted<false>(second)), from = base + (kept & 15) / 2;
#pragma unroll
    for (int w = plane / 16; w < WORDS; w++) path.words[w] = __shfl_sync(FULL_WARP, path.words[w], from);
    const u32 code = __shfl_sync(FULL_WARP, low, from) + (kept & 1);
    path.words[plane / 16] |= code << 2 * (plane % 16);
    path.metric = __uint_as_float(kept & ~15u);
}

// The best path for the targets whose b a group holds: plane p in lane p % 8, entry p / 8.
__device__ __forceinline__ Path search(const float (&b)[PLANES_PER_LANE], const Tables& tables, float ridge) {
    const int lane = threadIdx.x % LANES, base = threadIdx.x % 32 - lane;
    Path path;
    path.metric = lane == 0 ? 2.25f * PB * ridge : LOST;  // ridge |s|^2 is taken off on the way: never negative
#pragma unroll
    for (int w = 0; w < WORDS; w++) path.words[w] = 0;
#pragma unroll
    for (int p = PB - 1; p >= 0; p--) {
        float centre = __shfl_sync(FULL_WARP, b[p / LANES], base + p % LANES);
#pragma unroll
        for (int c = (p + 1) / 4; c < PAD / 4; c++) {
            const Float4 r = *(const Float4*)&tables.reach[p][4 * c];
            const float factor[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (4 * c + i > p && 4 * c + i < PB) centre -= factor[i] * code_of(path.words, 4 * c + i);
        }
        const float low = fminf(fmaxf(floorf(centre + 1.5f), 0.f), 2.f);
        float metric[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float symbol = low + i - 1.5f, off = symbol - centre;
            metric[i] = fmaxf(path.metric + tables.weight[p] * off * off - ridge * symbol * symbol, 0.f);
        }
        keep_best(path, metric, (int)low, p);
    }
    u32 least = (__float_as_uint(path.metric) & ~15u) | lane;
#pragma unroll
    for (int k = 1; k < LANES; k <<= 1) least = min(least, __shfl_xor_sync(FULL_WARP, least, k));
#pragma unroll
    for (int w = 0; w < WORDS; w++) path.words[w] = __shfl_sync(FULL_WARP, path.words[w], base + least % 16);
    return path;
}

// b of the targets x @ filters; x: coordinate k of the block in lane k % 8, entry k / 8.
__device__ __forceinline__ void make_targets(const float (&x)[DIMS_PER_LANE], const Tables& tables, float (&b)[PLANES_PER_LANE]) {
    const int lane = threadIdx.x % LANES, base = threadIdx.x % 32 - lane;
    float t[PLANES_PER_LANE];
#pragma unroll
    for (int i = 0; i < PLANES_PER_LANE; i++) t[i] = 0.f;
#pragma unroll
    for (int k = 0; k < DB; k++) {
        const float value = __shfl_sync(FULL_WARP, x[k / LANES], base + k % LANES);
#pragma unroll
        for (int i = 0; i < PLANES_PER_LANE; i++)
            if (lane + LANES * i < PB) t[i] += value * tables.filters[k][lane + LANES * i];
    }
#pragma unroll
    for (int i = 0; i < PLANES_PER_LANE; i++) b[i] = t[i];
#pragma unroll
    for (int q = 1; q < PB; q++) {
        const float later = __shfl_sync(FULL_WARP, t[q / LANES], base + q % LANES) + 1.5f;
#pragma unroll
        for (int i = 0; i < PLANES_PER_LANE; i++)
            if (lane + LANES * i < PB) b[i] += tables.reach[lane + LANES * i][q] * later;
    }
}

// index [BLOCKS, DB]: coordinates of the blocks; kept [heads, D]; scale [heads, D]. Per head and block: filters [DB, PB], reach [PB, PB], weight [PB], ridge [1],
// and rows [PB, DB], the codebook times the scale.
extern "C" __global__ void __launch_bounds__(THREADS) encode_joint(
    const float* __restrict__ u,
    const i64* __restrict__ index,
    const u8* __restrict__ kept,
    const float* __restrict__ scale,
    const float* __restrict__ filters,
    const float* __restrict__ reach,
    const float* __restrict__ weight,
    const float* __restrict__ ridge,
    const float* __restrict__ rows,
    u8* records,
    u8* gains,
    i64 units,
    i64 row_stride,
    i64 record_bytes,
    i64 heads) {
    extern __shared__ u8 shared[];
    Shared& sm = *(Shared*)shared;
    const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const i64 row = blockIdx.x / units, unit = blockIdx.x % units, head = row % heads, first = (row * units + unit) * UNIT;
    scale += head * D, kept += head * D;
    Token tokens[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        const float* from = u + (first + group + GROUPS * i) * D;
        float square = 0.f, count = 0.f;
#pragma unroll 4
        for (int d = lane; d < D; d += LANES) {
            const float x = from[d];
            if (kept[d]) square += x * x, count += 1.f;
        }
        tokens[i].rms = fmaxf(sqrtf(sum_over<LANES>(square) / sum_over<LANES>(count)), EPS);
        tokens[i].zz = tokens[i].cross = tokens[i].qq = 0.f;
    }
#pragma unroll 1
    for (int block = 0; block < BLOCKS; block++) {
        const i64 which = head * BLOCKS + block;
        __syncthreads();
        for (int i = threadIdx.x; i < PB * PB; i += THREADS) sm.tables.reach[i / PB][i % PB] = i % PB > i / PB ? reach[which * PB * PB + i] : 0.f;
        for (int i = threadIdx.x; i < DB * PB; i += THREADS) {
            sm.tables.filters[i / PB][i % PB] = filters[which * DB * PB + i];
            sm.tables.rows[i / DB][i % DB] = rows[which * DB * PB + i];
        }
        for (int i = threadIdx.x; i < PB; i += THREADS) sm.tables.weight[i] = weight[which * PB + i];
        __syncthreads();
        auto encode = [&](Token& token, int at) {
            float x[DIMS_PER_LANE], z[DIMS_PER_LANE], b[PLANES_PER_LANE];  // coordinates lane, lane + 8, ... of the block
#pragma unroll
            for (int i = 0; i < DIMS_PER_LANE; i++) {
                const int k = lane + LANES * i;
                const i64 d = k < DB ? index[block * DB + k] : 0;
                const float s = k < DB ? scale[d] : 0.f, plain = u[(first + at) * D + d];
                x[i] = plain / token.rms * s;
                z[i] = kept[d] ? plain * s : 0.f;
            }
            make_targets(x, sm.tables, b);
            const Path path = search(b, sm.tables, ridge[which]);
#pragma unroll
            for (int i = 0; i < DIMS_PER_LANE; i++) {
                const int k = lane + LANES * i;
                float q = 0.f;
                if (k < DB) {
#pragma unroll
                    for (int p = 0; p < PB; p++) q += (code_of(path.words, p) - 1.5f) * sm.tables.rows[p][k];
                }
                token.zz += z[i] * z[i], token.cross += z[i] * q, token.qq += q * q;
            }
#pragma unroll
            for (int p = 0; p < PB; p++)
                if (p % LANES == lane) sm.codes[at][block * PB + p] = path.words[p / 16] >> 2 * (p % 16) & 3;
        };
#pragma unroll 1  // code must fit the instruction cache; what differs between tokens goes through registers that can't be indexed
        for (int i = 0; i < TOKENS; i++) {
            Token token = i == 0 ? tokens[0] : i == 1 ? tokens[1] : i == 2 ? tokens[2] : tokens[3];
            encode(token, group + GROUPS * i);
#pragma unroll
            for (int j = 0; j < TOKENS; j++)
                if (i == j) tokens[j] = token;
        }
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
        const float gain = fitted_gain(sum_over<LANES>(tokens[i].zz), sum_over<LANES>(tokens[i].cross), sum_over<LANES>(tokens[i].qq));
        if (lane == 0) gains[first + group + GROUPS * i] = (u8)nearest_gain(gain);
    }
    __syncthreads();
    write_codes(records + row * row_stride + unit * record_bytes, [&](int token, int plane) { return sm.codes[token][plane]; });
}
