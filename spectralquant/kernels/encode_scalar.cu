#include "encode.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define PER_LANE ((D + 31) / 32)

// Scalar planes (see encode.cuh for what is written): one warp per token. u [rows, units * 128, D]; step, top (2^b - 1), scale [heads, D]; coordinate, shift
// [heads, PLANES]: what each plane holds.
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
    float width[PER_LANE], per_width[PER_LANE], most[PER_LANE], weight[PER_LANE];
    int kept = 0;
#pragma unroll
    for (int i = 0; i < PER_LANE; i++) {
        const int d = lane + 32 * i;
        const bool there = d < D;
        width[i] = there ? step[head * D + d] : 0.f, most[i] = there ? top[head * D + d] : 0.f, weight[i] = there ? scale[head * D + d] : 0.f;
        per_width[i] = 1.f / fmaxf(width[i], EPS);
        kept += width[i] > 0.f;
    }
    const float count = sum_over<32>((float)kept);
#pragma unroll 1
    for (int token = warp; token < UNIT; token += WARPS) {
        const i64 at = (row * units + unit) * UNIT + token;
        float x[PER_LANE], code[PER_LANE], square = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const int d = lane + 32 * i;
            x[i] = d < D ? u[at * D + d] : 0.f;
            if (width[i] > 0.f) square += x[i] * x[i];
        }
        // Codes and levels for a gain and its inverse; returns this lane's share of the error.
        auto quantize = [&](float gain, float per_gain, float (&level)[PER_LANE]) {
            float off = 0.f;
#pragma unroll
            for (int i = 0; i < PER_LANE; i++) {
                const float cell = floorf(fmaf(x[i] * per_gain, per_width[i], 0.5f * (most[i] + 1.f)));
                code[i] = fminf(fmaxf(cell, 0.f), most[i]);
                level[i] = fmaf(most[i], -0.5f, code[i]) * width[i];
                const float miss = (level[i] * gain - x[i]) * weight[i];
                off += miss * miss;
            }
            return off;
        };
        float level[PER_LANE];
        const float rms = fmaxf(sqrtf(sum_over<32>(square) / count), EPS);
        quantize(rms, 1.f / rms, level);
        float zz = 0.f, cross = 0.f, qq = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float q = level[i] * weight[i], z = width[i] > 0.f ? x[i] * weight[i] : 0.f;
            zz += z * z, cross += z * q, qq += q * q;
        }
        int best = nearest_gain(fitted_gain(sum_over<32>(zz), sum_over<32>(cross), sum_over<32>(qq)));
        float least;
#if GAIN == 2
        const int start = best;
        least = 3e38f;
#pragma unroll
        for (int k = 0; k < 3; k++) {
            const int tried = min(max(start + (k == 0 ? 0 : 2 * k - 3), 1), 255);
            const float off = sum_over<32>(quantize(gain_of(tried), gain_of(2 * GAIN_OFFSET - tried), level));
            if (off < least) least = off, best = tried;
        }
        quantize(gain_of(best), gain_of(2 * GAIN_OFFSET - best), level);
#else
        least = 0.f;
#pragma unroll
        for (int i = 0; i < PER_LANE; i++) {
            const float miss = (level[i] * gain_of(best) - x[i]) * weight[i];
            least += miss * miss;
        }
        least = sum_over<32>(least);
#endif
#pragma unroll
        for (int i = 0; i < PER_LANE; i++)
            if (lane + 32 * i < D) shared[token * D + lane + 32 * i] = (u8)(int)code[i];
        if (lane == 0) gains[at] = (u8)best, error[at] = least;
    }
    __syncthreads();
    const i64* place = coordinate + head * PLANES;
    const u8* digit = shift + head * PLANES;
    write_codes<THREADS>(records + row * row_stride + unit * record_bytes, [&](int token, int plane) {
        return shared[token * D + place[plane]] >> digit[plane] & 3;
    });
}
