// Which of the tokens that were encoded stay exact, what that does to their records, and their copies: three launches, one block of threads for a unit of 128
// tokens or for a copied token. Reference: cache/exact.py.
//
// Definitions: D.
//
// A call has the 128 units slots after the first *before units of every sequence. Arrays by token are [sequences, 128 units] or [sequences, heads, 128 units],
// and start [sequences] is slots of left padding. `sinks` are the first tokens of every sequence.
#include "unpack.cuh"

#if !defined(D)
#error "define D"
#endif

#define WARPS (UNIT / 32)
#define NORM_FLOOR 1e-12f  // of profile.py

// Sinks among the slots before `position` of a sequence, which is counted from its start and may be negative.
__device__ __forceinline__ i64 sinks_before(i64 position, i64 sinks) { return max(min(position, sinks), (i64)0); }

// Over the block's warps: the sum of `mine` of those before this one, and of all.
struct Count { int before, all; };
__device__ __forceinline__ Count count_warps(int mine, int (&counts)[WARPS]) {
    Count count = {0, 0};
    if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = mine;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) count.before += w < threadIdx.x / 32 ? counts[w] : 0, count.all += counts[w];
    return count;
}

// Of a unit: the exact tokens that it would have, and those that may be exact after it.
struct UnitBound { i64 wanted, allowed; };

struct Choosing {
    float needs[UNIT];
    int counts[WARPS];
    i64 taken_before, taken;  // exact tokens besides sinks of the units before, and of this one
};

// need [sequences, 128 units]: of tokens that should stay exact, 0 of the others; wanted [sequences, units]: how many should. error and size
// [sequences, heads, 128 units], norm [heads]. below, per_error: factors of 1 / size and of the summed error, 0 where they do not count.
extern "C" __global__ void __launch_bounds__(UNIT) exact_need(
    const float* __restrict__ error,
    const float* __restrict__ size,
    const float* __restrict__ norm,
    const i64* __restrict__ start,
    const int* __restrict__ before,
    float* need,
    int* wanted,
    i64 heads,
    i64 units,
    i64 sinks,
    float below,
    float per_error) {
    extern __shared__ u8 shared[];
    int(&counts)[WARPS] = *(int(*)[WARPS])shared;
    const i64 row = blockIdx.x / units, unit = blockIdx.x % units, token = unit * UNIT + threadIdx.x;
    float errors = 0.f, sizes = 0.f;
    for (i64 h = 0; h < heads; h++) {
        const i64 at = (row * heads + h) * units * UNIT + token;
        errors += error[at], sizes += fmaxf(size[at], NORM_FLOOR) / norm[h];
    }
    const float asked = fmaxf(below / fmaxf(sizes / heads, 1e-12f), errors * per_error);
    const bool is_wanted = asked > 1.f && (i64)*before * UNIT + token - start[row] >= sinks;
    need[row * units * UNIT + token] = is_wanted ? asked : 0.f;
    const Count count = count_warps(__popc(__ballot_sync(FULL_WARP, is_wanted)), counts);
    if (threadIdx.x == 0) wanted[row * units + unit] = count.all;
}

// Of every unit the neediest, so many that after it at most `early` and a share of all tokens so far are exact. gains, value_gains [sequences, heads, 128 units]
// go to the gains of records [sequences, heads, units] (heads row_stride and units unit_stride bytes apart), 0 for exact tokens and padding. tokens
// [sequences, 128 units]: first the exact ones, in order. secondary [sequences]: exact tokens besides sinks before this call; secondary_after: after it.
extern "C" __global__ void __launch_bounds__(UNIT) choose_exact(
    const float* __restrict__ need,
    const int* __restrict__ wanted,
    const i64* __restrict__ start,
    const int* __restrict__ before,
    const i64* __restrict__ secondary,
    const u8* __restrict__ gains,
    const u8* __restrict__ value_gains,
    u8* record_gains,
    u8* record_value_gains,
    i64* secondary_after,
    int* tokens,
    i64 heads,
    i64 units,
    i64 sinks,
    i64 row_stride,
    i64 unit_stride,
    i64 early,
    double share) {
    alignas(16) extern __shared__ u8 shared[];
    Choosing& sm = *(Choosing*)shared;
    UnitBound* bounds = (UnitBound*)(&sm + 1);  // [units]
    const i64 row = blockIdx.x / units, unit = blockIdx.x % units, token = unit * UNIT + threadIdx.x;
    const i64 first = (i64)*before * UNIT, from = first - start[row], position = from + token;
    for (i64 v = threadIdx.x; v <= unit; v += UNIT) {
        bounds[v] = {wanted[row * units + v], (i64)((double)(first + UNIT * (v + 1)) * share) + early};
    }
    const float mine = sm.needs[threadIdx.x] = need[row * units * UNIT + token];
    __syncthreads();
    if (threadIdx.x == 0) {
        i64 used = secondary[row], taken = 0, here = 0;
        for (i64 v = 0; v <= unit; v++) {
            const i64 after = min(used + bounds[v].wanted, bounds[v].allowed);
            taken += here, here = max(after - used, (i64)0), used = after;
        }
        sm.taken_before = taken, sm.taken = here;
        if (unit == units - 1) secondary_after[row] = secondary[row] + taken + here;
    }
    __syncthreads();
    int rank = 0;
    if (mine > 0.f)
        for (int t = 0; t < UNIT; t++) rank += sm.needs[t] > mine || (sm.needs[t] == mine && t < threadIdx.x);
    const bool is_exact = (position >= 0 && position < sinks) || (mine > 0.f && rank < sm.taken);
    const u32 exact = __ballot_sync(FULL_WARP, is_exact);
    const Count count = count_warps(__popc(exact), sm.counts);
    if (is_exact) {
        const i64 sinks_taken = sinks_before(from + unit * UNIT, sinks) - sinks_before(from, sinks);
        tokens[row * units * UNIT + sinks_taken + sm.taken_before + count.before + __popc(exact & (1u << threadIdx.x % 32) - 1)] = (int)token;
    }
    const bool is_masked = is_exact || position < 0;
    for (i64 h = 0; h < heads; h++) {
        const i64 at = (row * heads + h) * units * UNIT + token, to = (row * heads + h) * row_stride + unit * unit_stride + gain_place(threadIdx.x);
        record_gains[to] = is_masked ? 0 : gains[at];
        record_value_gains[to] = is_masked ? 0 : value_gains[at];
    }
}

// Copies the chosen of a call of `count` tokens behind the entries of the exact store that are used. keys and values [sequences, heads, *, D] of 16-bit
// elements with strides; slots [sequences, capacity], exact_keys, exact_values [sequences, heads, capacity, D]. No sequence has more than `most`: launch
// sequences * most blocks.
extern "C" __global__ void __launch_bounds__(UNIT) store_exact(
    const u16* __restrict__ keys,
    const u16* __restrict__ values,
    const int* __restrict__ tokens,
    const i64* __restrict__ secondary,
    const i64* __restrict__ secondary_after,
    const i64* __restrict__ start,
    const int* __restrict__ before,
    int* slots,
    u16* exact_keys,
    u16* exact_values,
    i64 heads,
    i64 count,
    i64 sinks,
    i64 most,
    i64 capacity,
    i64 key_sequence,
    i64 key_head,
    i64 key_token,
    i64 value_sequence,
    i64 value_head,
    i64 value_token) {
    const i64 row = blockIdx.x / most, entry = blockIdx.x % most, first = (i64)*before * UNIT, from = first - start[row];
    const i64 used = secondary[row] + sinks_before(from, sinks);
    if (entry >= secondary_after[row] + sinks_before(from + count, sinks) - used) return;
    const i64 token = tokens[row * count + entry], to = used + entry;
    if (threadIdx.x == 0) slots[row * capacity + to] = (int)(first + token);
    for (i64 i = threadIdx.x; i < heads * D; i += UNIT) {
        const i64 h = i / D, d = i % D, at = ((row * heads + h) * capacity + to) * D + d;
        exact_keys[at] = keys[row * key_sequence + h * key_head + token * key_token + d];
        exact_values[at] = values[row * value_sequence + h * value_head + token * value_token + d];
    }
}
