// Coded tokens to their pages: a block of threads for tokens that follow each other in a page. Reference: `write_tokens` of paged/store.py.
//
// Definitions: D (head size), PK, PV (planes of K and V), IS_BF16 (of the tokens, else float16).
#include "unpack.cuh"

#if !defined(D) || !defined(PK) || !defined(PV) || !defined(IS_BF16)
#error "define D, PK, PV and IS_BF16"
#endif

#define THREADS 256
#define WARPS (THREADS / 32)
#define NORM_FLOOR 1e-12f  // of codec/codec.py
#define LARGEST 127.f      // of paged/layout.py

typedef RecordLayout<PK, PV> Record;

__device__ __forceinline__ float value_of(u16 x) {
    float low, high;
    IS_BF16 ? unpack_bf16(x, low, high) : unpack_f16(x, low, high);
    return low;
}

// The code of a plane of a record, K's planes before V's, from one place to another. Each byte has four tokens of one plane, so a plane is one thread's.
__device__ __forceinline__ void move_code(const u8* from, int token, u8* to, int place, int plane) {
    const bool key = plane < PK;
    const int source = key ? code_byte<true>(token, plane) : Record::VALUE_CODES + code_byte<false>(token, plane - PK);
    const int target = key ? code_byte<true>(place, plane) : Record::VALUE_CODES + code_byte<false>(place, plane - PK);
    const int code = from[source] >> code_shift(token) & 3, shift = code_shift(place);
    to[target] = (u8)((to[target] & ~(3 << shift)) | code << shift);
}

// A vector [D] to integers of 8 bits and their exponent, by a warp: `to_8_bits` of paged/layout.py.
__device__ __forceinline__ void write_8_bits(const u16* x, signed char* integers, signed char* exponent) {
    const int lane = threadIdx.x % 32;
    float most = 0.f;
    for (int d = lane; d < D; d += 32) most = fmaxf(most, fabsf(value_of(x[d])));
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, k));
    const int e = (int)fminf(fmaxf(ceilf(log2f(fmaxf(most / LARGEST, 1.17549435e-38f))), -100.f), 100.f);
    const float scale = __uint_as_float((u32)(127 - e) << 23);  // 2^-e
    for (int d = lane; d < D; d += 32) integers[d] = (signed char)fminf(fmaxf(rintf(value_of(x[d]) * scale), -LARGEST), LARGEST);
    if (lane == 0) *exponent = (signed char)e;
}

// Tokens i of N: records [heads, units, Record::BYTES] have their codes one after another, gains, key_error and value_size [heads, units * 128] what belongs to them.
// keys, values [N, H, D] with strides in elements go to recent_keys and recent_values [*, H, D], rows [N]. `serial` and what follows are places in a page, see
// PageLayout. A token needs to stand apart whose mean size of V, relative to value_norm [heads], is below `below`, or the mean error of its key above `above`.
extern "C" __global__ void __launch_bounds__(THREADS) write_tokens(
    u8* pages,
    const i64* __restrict__ slots,
    const i64* __restrict__ positions,
    const i64* __restrict__ serials,
    const i64* __restrict__ rows,
    const u8* __restrict__ records,
    const u8* __restrict__ key_gains,
    const u8* __restrict__ value_gains,
    const float* __restrict__ key_error,
    const float* __restrict__ value_size,
    const float* __restrict__ value_norm,
    const u16* __restrict__ keys,
    const u16* __restrict__ values,
    u16* recent_keys,
    u16* recent_values,
    i64 tokens,
    i64 heads,
    i64 units,
    i64 page_stride,
    i64 key_token,
    i64 key_head,
    i64 value_token,
    i64 value_head,
    i64 exact,
    i64 integers,
    i64 serial,
    i64 exponents,
    i64 places,
    i64 sinks,
    float below,
    float above) {
    alignas(16) extern __shared__ u8 shared[];
    int *wanted = (int*)shared, *kept = wanted + UNIT;  // [128], [1]
    const i64 first = blockIdx.x, slot = slots[first], number = slot / UNIT, room = units * UNIT;
    if (slot < 0 || (first > 0 && slots[first - 1] >= 0 && slots[first - 1] / UNIT == number)) return;
    u8* page = pages + number * page_stride;
    signed char* held = (signed char*)(page + places);
    const int begin = slot % UNIT, warp = threadIdx.x / 32;
    int count = 1;
    while (first + count < tokens && slots[first + count] >= 0 && slots[first + count] / UNIT == number) count++;
    // What the page has from there on is of an earlier owner, or rejected.
    for (int i = threadIdx.x; i < (UNIT - begin) * 2 * heads; i += THREADS) {
        const int place = begin + i % (UNIT - begin), side = i / (UNIT - begin) % 2;
        page[i / (UNIT - begin) / 2 * Record::BYTES + (side ? Record::VALUE_GAINS : Record::KEY_GAINS) + gain_place(place)] = 0;
    }
    if (threadIdx.x == 0) {
        *kept = 0;
        for (int e = 0; e < exact; e++)
            if (held[e] >= 0 && held[e] < begin) ++*kept;
            else held[e] = -1;
        if (begin == 0) *(i64*)(page + serial) = serials[first];
    }
    for (int t = threadIdx.x; t < count; t += THREADS) {
        float size = 0.f, error = 0.f;
        for (i64 h = 0; h < heads; h++) {
            size += fmaxf(value_size[h * room + first + t], NORM_FLOOR) / value_norm[h];
            error += key_error[h * room + first + t];
        }
        wanted[t] = (below > 0.f && size / heads < below) || (above > 0.f && error / heads > above) || positions[first + t] < sinks;
    }
    __syncthreads();
    for (i64 i = threadIdx.x; i < heads * (PK + PV); i += THREADS) {
        const i64 h = i / (PK + PV);
        for (int t = 0; t < count; t++) {
            const i64 at = first + t;
            move_code(records + (h * units + at / UNIT) * Record::BYTES, at % UNIT, page + h * Record::BYTES, begin + t, i % (PK + PV));
        }
    }
    int entry = *kept;
    for (int t = 0; t < count; t++) {
        const i64 at = first + t;
        const bool apart = wanted[t] && entry < exact;
        for (i64 h = threadIdx.x; h < heads; h += THREADS) {
            u8* record = page + h * Record::BYTES;
            record[Record::KEY_GAINS + gain_place(begin + t)] = apart ? 0 : key_gains[h * room + at];
            record[Record::VALUE_GAINS + gain_place(begin + t)] = apart ? 0 : value_gains[h * room + at];
        }
        for (i64 i = threadIdx.x; i < heads * D; i += THREADS) {
            const i64 h = i / D, d = i % D, to = rows[at] * heads * D + i;
            recent_keys[to] = keys[at * key_token + h * key_head + d], recent_values[to] = values[at * value_token + h * value_head + d];
        }
        if (apart) {
            if (threadIdx.x == 0) held[entry] = (signed char)(begin + t);
            for (i64 i = warp; i < 2 * heads; i += WARPS) {
                const i64 h = i % heads, to = i * exact + entry;
                const u16* x = i < heads ? keys + at * key_token + h * key_head : values + at * value_token + h * value_head;
                write_8_bits(x, (signed char*)(page + integers) + to * D, (signed char*)(page + exponents) + to);
            }
            entry++;
        }
    }
}
