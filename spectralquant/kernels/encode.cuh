// Whitened coordinates to packed codes, one side (K or V) per launch: what encode_scalar.cu and encode_joint.cu share. Reference: SideCodec.encode of
// codec/codec.py, pack_planes of codec/layout.py.
//
// Definitions: D (head size), PLANES (planes per token, a multiple of 16), IS_KEY (1: K's order in records, 0: V's), GAIN (0: least squares, 1: unbiased,
// 2: search).
//
// u are the whitened coordinates that whiten.cu makes, rows = sequences x KV heads. A block of threads does one unit: codes of its 128 tokens go to shared memory,
// then to `records`, which points to the side's first byte of the first unit; units are record_bytes apart, rows row_stride. gains [rows, units * 128] are bytes
// in token order, error [rows, units * 128] is |z - z^|^2 in the metric of the basis. Launch rows * units blocks of THREADS threads.
//
// Sums are in another order than the reference's, so a coordinate within a rounding of a cell's border, or two gains or paths whose errors agree to the last
// bits, may come out on the other side: equally good codes.
#include "unpack.cuh"

#if !defined(D) || !defined(PLANES) || !defined(IS_KEY) || !defined(GAIN)
#error "define D, PLANES, IS_KEY and GAIN"
#endif

#define EPS 1e-9f   // of codec/quantizer.py
#define TINY 1e-30f  // of codec/codec.py

// Sum over groups of LANES lanes.
template <int LANES>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
    for (int k = 1; k < LANES; k <<= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}

__device__ __forceinline__ int nearest_gain(float gain) { return (int)fminf(fmaxf(rintf(log2f(gain) * GAIN_STEPS) + GAIN_OFFSET, 1.f), 255.f); }

__device__ __forceinline__ float gain_of(int code) { return exp2f((code - GAIN_OFFSET) / GAIN_STEPS); }

// zz = <z, z>, cross = <z, q>, qq = <q, q> of a vector and its quantized shape.
__device__ __forceinline__ float fitted_gain(float zz, float cross, float qq) {
    const float safe = fmaxf(cross, TINY);
    return fmaxf(GAIN != 1 ? safe / fmaxf(qq, TINY) : cross > 0.f ? zz / safe : 0.f, EPS);
}

// Codes of a unit in shared memory to the order of records; `code(token, plane)` gives 0..3.
template <int THREADS, class Code>
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
