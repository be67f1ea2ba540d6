// Packed records to dense keys or values, one side (K or V) per launch. Reference: `LayerCodec.decode_keys` and `decode_values`.
//
// Definitions: D (head size, a multiple of 16), KEY_PLANES, VALUE_PLANES (planes per token of a record, multiples of 16), IS_KEY (1: K, 0: V),
// OUT (0: float32, 1: float16, 2: bfloat16), PAIRS (coordinate pairs that turn; 0: the plain frame, or V), INTERLEAVED (pairs are 2 i, 2 i + 1),
// RUN (tokens of a run whose mean turns with the offset; 0: the mean is constant). P is the side's planes.
//
//     x = gain (sum_p c_p W_p - 1.5 sum_p W_p) + mean R(j),     out = x R(t0)        j: offset in the run, t0: position of the run's first token
//
// A warp makes 16 coordinates, 8 pairs, of one unit: tensor cores multiply codes, as fp16 subnormals, with W in two fp16 numbers each, scaled
// so that the largest of a column fills fp16. That is as precise as float32. No constants are prepared, nothing is shared; W is small and stays in the L1.
#include "unpack.cuh"

#if !defined(D) || !defined(KEY_PLANES) || !defined(VALUE_PLANES) || !defined(IS_KEY) || !defined(OUT) || !defined(PAIRS) || !defined(INTERLEAVED) || !defined(RUN)
#error "define D, KEY_PLANES, VALUE_PLANES, IS_KEY, OUT, PAIRS, INTERLEAVED and RUN"
#endif

using Record = RecordLayout<KEY_PLANES, VALUE_PLANES>;
constexpr int P = IS_KEY ? KEY_PLANES : VALUE_PLANES;
constexpr int CHUNKS = P / CHUNK_PLANES;
constexpr int CODES = IS_KEY ? Record::KEY_CODES : Record::VALUE_CODES;
constexpr int GAINS = IS_KEY ? Record::KEY_GAINS : Record::VALUE_GAINS;
constexpr int SLICES = D / 16;
constexpr float OFFSET = 1.5f;
constexpr float FULL = 16384.0f;  // of fp16's 65,504

#if OUT == 0
typedef float Out;
#else
typedef u16 Out;
#endif

__device__ __forceinline__ Out rounded(float x) {
#if OUT == 0
    return x;
#elif OUT == 1
    return static_cast<u16>(pack_f16(x, 0.0f));
#else
    return static_cast<u16>(pack_bf16(x, 0.0f));
#endif
}

// The two coordinates of a pair. Those that do not turn are paired in order.
__device__ __forceinline__ int lower(int pair) { return INTERLEAVED || pair >= PAIRS ? 2 * pair : pair; }
__device__ __forceinline__ int upper(int pair) { return INTERLEAVED || pair >= PAIRS ? 2 * pair + 1 : pair + PAIRS; }

__device__ __forceinline__ void turn(float& low, float& high, float cos, float sin) {
    const float x = low;
    low = x * cos - high * sin;
    high = high * cos + x * sin;
}

// One column of W [P, D] in the order of a B fragment: the lane has planes 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of every chunk.
struct Column {
    const float* top;
    float scale;  // to fp16
    float unit;   // back, 1 / scale
    float sum;    // over all planes

    __device__ __forceinline__ float at(int chunk, int c, int i) const {
        return top[static_cast<i64>(CHUNK_PLANES * chunk + 2 * c + i % 2 + 8 * (i / 2)) * D];
    }

    __device__ __forceinline__ void measure(int c) {
        float largest = 0.0f;
        sum = 0.0f;
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float w = at(chunk, c, i);
                largest = fmaxf(largest, fabsf(w));
                sum += w;
            }
        }
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {  // the four lanes of a column
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
            sum += __shfl_xor_sync(FULL_WARP, sum, step);
        }
        unit = largest > 0.0f ? largest / FULL : 1.0f;
        scale = 1.0f / unit;
    }

    // B registers of a chunk: high[2] and what rounding to fp16 left, low[2].
    __device__ __forceinline__ void load(int chunk, int c, u32 (&high)[2], u32 (&low)[2]) const {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const float x = at(chunk, c, 2 * k) * scale, y = at(chunk, c, 2 * k + 1) * scale;
            float x_high, y_high;
            high[k] = pack_f16(x, y);
            unpack_f16(high[k], x_high, y_high);
            low[k] = pack_f16(x - x_high, y - y_high);
        }
    }
};

// The 16 bytes of a lane of a chunk as the A registers of all sub-tiles, rows tokens and k planes, as K has them. V has planes and tokens the
// other way around.
__device__ __forceinline__ void load_codes(const u8* chunk, int lane, u32 (&words)[4]) {
    const Quad32 loaded = *reinterpret_cast<const Quad32*>(chunk + lane * LANE_BYTES);
    words[0] = IS_KEY ? loaded.x : transposed(loaded.x);
    words[1] = IS_KEY ? loaded.y : transposed(loaded.z);
    words[2] = IS_KEY ? loaded.z : transposed(loaded.y);
    words[3] = IS_KEY ? loaded.w : transposed(loaded.w);
}

// What the columns of the C fragments need: pair e = 0, 1 of the lane is pair 8 slice + 2 c + e.
struct Place {
    int coordinate[2][2];               // [low or high][e]
    float unit[2][2], offset[2][2], mean[2][2];
    float cos[2], sin[2];               // of t0

    __device__ __forceinline__ void fill(int slice, int c, const Column (&column)[2], const float* means, const float* cosines, const float* sines) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int pair = 8 * slice + 2 * c + e;
            coordinate[0][e] = lower(pair);
            coordinate[1][e] = upper(pair);
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int owner = 4 * (2 * c + e);  // a lane whose B fragment has this column
                unit[side][e] = __shfl_sync(FULL_WARP, column[side].unit, owner);
                offset[side][e] = OFFSET * __shfl_sync(FULL_WARP, column[side].sum, owner);
                mean[side][e] = means[coordinate[side][e]];
            }
            cos[e] = pair < PAIRS ? cosines[coordinate[0][e]] : 1.0f;
            sin[e] = pair < PAIRS ? sines[coordinate[0][e]] : 0.0f;
        }
    }
};

// out[b, row, h, :] for b < batch, h < heads, all units' tokens; row is the token, or rows[b, token] where rows is there; -1 is left out.
//   records: [batch * heads, units, record bytes], rows of units `row_stride` bytes apart; units begin with number `first` of the sequence
//   weight, mean: [heads, P, D], [heads, D]
//   turns: [2 D, RUN], cos then sin of every coordinate at every offset of a run
//   cosines, sines: [batch, units, 2 PAIRS], at the run's first position
//   batch_stride, token_stride, head_stride: of out, in elements
// A warp per slice of 16 coordinates of a unit: batch * heads * units * D / 16 warps, in a one-dimensional launch.
extern "C" __global__ void decode_units(const u8* __restrict__ records, const float* __restrict__ weight, const float* __restrict__ mean,
                                        const float* __restrict__ turns, const float* __restrict__ cosines, const float* __restrict__ sines,
                                        const int* __restrict__ rows, Out* __restrict__ out, i64 batch, i64 heads, i64 units, i64 first, i64 row_stride,
                                        i64 batch_stride, i64 token_stride, i64 head_stride) {
    const i64 item = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (item >= batch * heads * units * SLICES) return;  // a whole warp
    const int lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    const int slice = static_cast<int>(item % SLICES);
    const i64 unit = item / SLICES % units, row = item / SLICES / units, b = row / heads, h = row % heads;

    Column column[2];  // lower and upper coordinate of pair 8 slice + r
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        column[side].top = weight + h * P * D + (side ? upper(8 * slice + r) : lower(8 * slice + r));
        column[side].measure(c);
    }

    const u8* record = records + row * row_stride + unit * Record::BYTES;
    float sums[2][SUB_TILES][4] = {};
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        u32 words[4], high[2][2], low[2][2];
        load_codes(record + CODES + chunk * CHUNK_BYTES, lane, words);
#pragma unroll
        for (int side = 0; side < 2; ++side) column[side].load(chunk, c, high[side], low[side]);
#pragma unroll
        for (int j = 0; j < SUB_TILES; ++j) {
            const u32 a[4] = {code_pair(words[0], j), code_pair(words[1], j), code_pair(words[2], j), code_pair(words[3], j)};
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                mma_f16(sums[side][j], a[0], a[1], a[2], a[3], high[side][0], high[side][1]);
                mma_f16(sums[side][j], a[0], a[1], a[2], a[3], low[side][0], low[side][1]);
            }
        }
    }

    Place place;
    const i64 turned = (b * units + unit) * 2 * PAIRS;
    place.fill(slice, c, column, mean + h * D, cosines + turned, sines + turned);
    // [16] gains of tokens r + 8 half + 16 j, byte 8 half + j
    const Quad32 gains = *reinterpret_cast<const Quad32*>(record + GAINS + gain_place(r));
    const u32 gain_words[4] = {gains.x, gains.y, gains.z, gains.w};
    const int run_offset = RUN ? static_cast<int>((first + unit) * UNIT % (RUN ? RUN : 1)) : 0;

#pragma unroll
    for (int j = 0; j < SUB_TILES; ++j) {
        const float subnormal = exp2_approx(static_cast<float>(24 - pair_shift(j)));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = 16 * j + 8 * half + r;
            const i64 to = rows ? rows[(b * units + unit) * UNIT + token] : unit * UNIT + token;
            if (to < 0) continue;
            const float gain = gain_value(gain_words[2 * half + j / 4] >> 8 * (j % 4) & 0xff);
            Out* target = out + b * batch_stride + to * token_stride + h * head_stride;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float mean_low = place.mean[0][e], mean_high = place.mean[1][e];
                if (RUN && 8 * slice + 2 * c + e < PAIRS) {
                    const float* at = turns + static_cast<i64>(place.coordinate[0][e]) * RUN + run_offset + token;
                    turn(mean_low, mean_high, at[0], at[static_cast<i64>(D) * RUN]);
                }
                float x = fmaf(fmaf(sums[0][j][2 * half + e], subnormal * place.unit[0][e], -place.offset[0][e]), gain, mean_low);
                float y = fmaf(fmaf(sums[1][j][2 * half + e], subnormal * place.unit[1][e], -place.offset[1][e]), gain, mean_high);
                turn(x, y, place.cos[e], place.sin[e]);
                target[place.coordinate[0][e]] = rounded(x);
                target[place.coordinate[1][e]] = rounded(y);
            }
        }
    }
}
