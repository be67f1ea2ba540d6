// Whitened coordinates to packed codes, one side (K or V) per launch. Reference: SideCodec.encode of codec/codec.py, pack_planes of codec/layout.py.
//
// Definitions: D (head size), PLANES (planes per token, a multiple of 16), IS_KEY (1: K's order in records, 0: V's), GAIN (0: least squares, 1: unbiased,
// 2: search), BLOCKS (of joint quantization; 1 for encode_scalar).
//
// u is [rows, units * 128, D] float32, rows = sequences x KV heads. A block of threads does one unit: codes of its 128 tokens go to shared memory, then to
// `records`, which points to the side's first byte of the first unit; units are record_bytes apart, rows row_stride. gains [rows, units * 128] are bytes in token
// order, error [rows, units * 128] is |z - z^|^2 in the metric of the basis. Launch rows * units blocks of THREADS threads.
//
// Sums are in another order than the reference's, so a coordinate within a rounding of a cell's border, or two gains or paths whose errors agree to the last
// bits, may come out on the other side: equally good codes.
#include "unpack.cuh"

#if !defined(D) || !defined(PLANES) || !defined(IS_KEY) || !defined(GAIN) || !defined(BLOCKS)
#error "define D, PLANES, IS_KEY, GAIN and BLOCKS"
#endif

#define THREADS 256
#define WARPS (THREADS / 32)
#define PER_LANE ((D + 31) / 32)
#define EPS 1e-9f   // of codec/quantizer.py
#define TINY 1e-30f  // of codec/codec.py

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}

__device__ __forceinline__ int nearest_gain(float gain) { return (int)fminf(fmaxf(rintf(log2f(gain) * GAIN_STEPS) + GAIN_OFFSET, 1.f), 255.f); }

__device__ __forceinline__ float gain_of(int code) { return exp2f((code - GAIN_OFFSET) / GAIN_STEPS); }

// zz = <z, z>, cross = <z, q>, qq = <q, q> of a vector and its quantized shape.
__device__ __forceinline__ float fitted_gain(float zz, float cross, float qq) {
    const float safe = fmaxf(cross, TINY);
    return fmaxf(GAIN == 1 ? zz / safe : safe / fmaxf(qq, TINY), EPS);
}

// Codes of a unit in shared memory to the order of records; `code(token, plane)` gives 0..3.
template <class Code>
__device__ __forceinline__ void write_codes(u8* to, Code code) {
    for (int i = threadIdx.x; i < PLANES / CHUNK_PLANES * 128; i += THREADS) {
        const int chunk = i / 128, lane = i / 4 % 32, a = i % 4;
        u32 word = 0;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < SUB_TILES; j++) {
                const CodePlace place = code_place<IS_KEY>(lane, a, j, half);
                word |= (u32)code(place.token, chunk * CHUNK_PLANES + place.plane) << (16 * half + 2 * j);
            }
        *(u32*)(to + chunk * CHUNK_BYTES + lane * LANE_BYTES + a * 4) = word;
    }
}

// Scalar planes: one warp per token. step, top (2^b - 1), scale [heads, D]; coordinate, shift [heads, PLANES]: what each plane holds.
extern "C" __global__ void __launch_bounds__(THREADS) encode_scalar(
    const float* __restrict__ u,
    const float* __restrict__ step,
    const float* __restrict__ top,
    const float* __restrict__ scale,
    const i64* __restrict__ coordinate,
    const u8* __restrict__ shift,
    u8* records,
    u8* gains,
    float* error,
    i64 units,
    i64 row_stride,
    i64 record_bytes,
    i64 heads) {
    extern __shared__ u8 shared[];  // [128][D]: codes of coordinates
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 row = blockIdx.x / units, unit = blockIdx.x % units, head = row % heads;
    float width[PER_LANE], most[PER_LANE], weight[PER_LANE];
    int kept = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int d = lane + 32 * i;
        const bool there = d < D;
        width[i] = there ? step[head * D + d] : 0.f, most[i] = there ? top[head * D + d] : 0.f, weight[i] = there ? scale[head * D + d] : 0.f;
        kept += width[i] > 0.f;
    }
    const float count = sum_of_warp((float)kept);
    for (int token = warp; token < UNIT; token += WARPS) {
        const i64 at = (row * units + unit) * UNIT + token;
        float x[PER_LANE], square = 0.f;
        int code[PER_LANE];
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = lane + 32 * i;
            x[i] = d < D ? u[at * D + d] : 0.f;
            if (width[i] > 0.f) square += x[i] * x[i];
        }
        // Codes and levels for a gain; returns this lane's share of the error.
        auto quantize = [&](float gain, float (&level)[PER_LANE]) {
            float off = 0.f;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                const float cell = floorf(x[i] / gain / fmaxf(width[i], EPS) + (most[i] + 1.f) / 2.f);
                code[i] = (int)fminf(fmaxf(cell, 0.f), most[i]);
                level[i] = (code[i] - most[i] / 2.f) * width[i];
                const float miss = (level[i] * gain - x[i]) * weight[i];
                off += miss * miss;
            }
            return off;
        };
        float level[PER_LANE];
        quantize(fmaxf(sqrtf(sum_of_warp(square) / count), EPS), level);
        float zz = 0.f, cross = 0.f, qq = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float q = level[i] * weight[i], z = width[i] > 0.f ? x[i] * weight[i] : 0.f;
            zz += z * z, cross += z * q, qq += q * q;
        }
        int best = nearest_gain(fitted_gain(sum_of_warp(zz), sum_of_warp(cross), sum_of_warp(qq)));
        float least;
#if GAIN == 2
        const int start = best;
        least = 3e38f;
#pragma unroll
        for (int k = 0; k < 3; k++) {
            const int tried = min(max(start + (k == 0 ? 0 : 2 * k - 3), 1), 255);
            const float off = sum_of_warp(quantize(gain_of(tried), level));
            if (off < least) least = off, best = tried;
        }
        quantize(gain_of(best), level);
#else
        least = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float miss = (level[i] * gain_of(best) - x[i]) * weight[i];
            least += miss * miss;
        }
        least = sum_of_warp(least);
#endif
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i < D) shared[token * D + lane + 32 * i] = (u8)code[i];
        if (lane == 0) gains[at] = (u8)best, error[at] = least;
    }
    __syncthreads();
    const i64* place = coordinate + head * PLANES;
    const u8* digit = shift + head * PLANES;
    write_codes(records + row * row_stride + unit * record_bytes,
                [&](int token, int plane) { return shared[token * D + place[plane]] >> digit[plane] & 3; });
}

// Joint planes: the K-best search of codec/search.py, eight lanes per token, a path each. Codes are two bits of a path's words.
#define LANES 8
#define GROUPS (THREADS / LANES)
#define DB (D / BLOCKS)
#define PB (PLANES / BLOCKS)
#define DIMS_PER_LANE ((DB + LANES - 1) / LANES)
#define PLANES_PER_LANE ((PB + LANES - 1) / LANES)
#define WORDS ((PB + 15) / 16)

struct Path {
    float metric;
    u32 words[WORDS];
};

__device__ __forceinline__ float sum_of_group(float x) {
#pragma unroll
    for (int k = 1; k < LANES; k <<= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}

__device__ __forceinline__ int code_of(const u32 (&words)[WORDS], int plane) { return words[plane / 16] >> 2 * (plane % 16) & 3; }

// Keeps the best eight of the group's sixteen continuations; `slots` are the group's, `low` is the smaller code and its metric.
__device__ __forceinline__ void keep_best(Path& path, const float (&metric)[2], int low, int plane, Path* slots) {
    const int lane = threadIdx.x % LANES;
    int rank[2] = {metric[1] < metric[0], metric[0] <= metric[1]};
#pragma unroll
    for (int k = 1; k < LANES; k++) {
        const bool before = (lane ^ k) < lane;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float other = __shfl_xor_sync(FULL_WARP, metric[i], k);
#pragma unroll
            for (int mine = 0; mine < 2; mine++) rank[mine] += other < metric[mine] || (before && other == metric[mine]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (rank[i] < LANES) {
            Path next = path;
            next.metric = metric[i];
            next.words[plane / 16] |= (u32)(low + i) << 2 * (plane % 16);
            slots[rank[i]] = next;
        }
    __syncwarp();
    path = slots[lane];
    __syncwarp();
}

// The eight best paths for targets t under one block's tables: reach [PB, PB], weight [PB].
__device__ __forceinline__ Path search(const float (&t)[PB], const float* __restrict__ reach, const float* __restrict__ weight, float ridge, Path* slots) {
    Path path;
    path.metric = threadIdx.x % LANES == 0 ? 0.f : 1e30f;  // one path, seven that lose to any other
#pragma unroll
    for (int w = 0; w < WORDS; w++) path.words[w] = 0;
#pragma unroll
    for (int p = PB - 1; p >= 0; p--) {
        float centre = t[p];
#pragma unroll
        for (int q = p + 1; q < PB; q++) centre -= reach[p * PB + q] * (code_of(path.words, q) - 1.5f - t[q]);
        const int low = (int)fminf(fmaxf(floorf(centre + 1.5f), 0.f), 2.f);
        float metric[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float symbol = low + i - 1.5f, off = symbol - centre;
            metric[i] = path.metric + weight[p] * off * off - ridge * symbol * symbol;
        }
        keep_best(path, metric, low, p, slots);
    }
    return path;
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
    extern __shared__ u8 shared[];  // paths [GROUPS][LANES], then codes [128][PLANES]
    const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES, base = threadIdx.x % 32 - lane;
    Path* slots = (Path*)shared + group * LANES;
    u8* codes = shared + GROUPS * LANES * sizeof(Path);
    const i64 row = blockIdx.x / units, unit = blockIdx.x % units, head = row % heads;
    for (int token = group; token < UNIT; token += GROUPS) {
        const i64 at = (row * units + unit) * UNIT + token;
        float square = 0.f, count = 0.f;
        for (int d = lane; d < D; d += LANES) {
            const float x = u[at * D + d];
            if (kept[head * D + d]) square += x * x, count += 1.f;
        }
        const float rms = fmaxf(sqrtf(sum_of_group(square) / sum_of_group(count)), EPS);
        float zz = 0.f, cross = 0.f, qq = 0.f;
        for (int block = 0; block < BLOCKS; block++) {
            const i64 which = head * BLOCKS + block;
            float x[DIMS_PER_LANE], z[DIMS_PER_LANE];  // coordinates lane, lane + 8, ... of the block
#pragma unroll
            for (int i = 0; i < DIMS_PER_LANE; i++) {
                const int k = lane + LANES * i;
                const i64 d = k < DB ? index[block * DB + k] : 0;
                const float s = k < DB ? scale[head * D + d] : 0.f, plain = u[at * D + d];
                x[i] = plain / rms * s;
                z[i] = kept[head * D + d] ? plain * s : 0.f;
            }
            float mine[PLANES_PER_LANE];
#pragma unroll
            for (int i = 0; i < PLANES_PER_LANE; i++) mine[i] = 0.f;
#pragma unroll
            for (int k = 0; k < DB; k++) {
                const float value = __shfl_sync(FULL_WARP, x[k / LANES], base + k % LANES);
#pragma unroll
                for (int i = 0; i < PLANES_PER_LANE; i++)
                    if (lane + LANES * i < PB) mine[i] += value * filters[(which * DB + k) * PB + lane + LANES * i];
            }
            float t[PB];
#pragma unroll
            for (int p = 0; p < PB; p++) t[p] = __shfl_sync(FULL_WARP, mine[p / LANES], base + p % LANES);
            Path path = search(t, reach + which * PB * PB, weight + which * PB, ridge[which], slots);
            int winner = lane;  // the first of the least metrics
            float least = path.metric;
#pragma unroll
            for (int k = 1; k < LANES; k <<= 1) {
                const float other = __shfl_xor_sync(FULL_WARP, least, k);
                const int whose = __shfl_xor_sync(FULL_WARP, winner, k);
                if (other < least || (other == least && whose < winner)) least = other, winner = whose;
            }
#pragma unroll
            for (int w = 0; w < WORDS; w++) path.words[w] = __shfl_sync(FULL_WARP, path.words[w], base + winner);
#pragma unroll
            for (int i = 0; i < DIMS_PER_LANE; i++) {
                const int k = lane + LANES * i;
                float q = 0.f;
                if (k < DB) {
#pragma unroll
                    for (int p = 0; p < PB; p++) q += (code_of(path.words, p) - 1.5f) * rows[(which * PB + p) * DB + k];
                }
                zz += z[i] * z[i], cross += z[i] * q, qq += q * q;
            }
#pragma unroll
            for (int p = 0; p < PB; p++)
                if (p % LANES == lane) codes[token * PLANES + block * PB + p] = (u8)code_of(path.words, p);
        }
        const float gain = fitted_gain(sum_of_group(zz), sum_of_group(cross), sum_of_group(qq));
        if (lane == 0) gains[at] = (u8)nearest_gain(gain);
    }
    __syncthreads();
    write_codes(records + row * row_stride + unit * record_bytes, [&](int token, int plane) { return codes[token * PLANES + plane]; });
}
