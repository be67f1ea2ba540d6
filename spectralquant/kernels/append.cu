// One more token of every sequence behind those in its window: one block of threads for a sequence. Reference: `Segment.append` (cache/segment.py).
//
// Definitions: D.
#include "unpack.cuh"

#if !defined(D)
#error "define D"
#endif

// keys and values [sequences, heads, 1, D] of 16-bit elements with strides go to window_keys and window_values [sequences, heads, capacity, D], to the place
// that lengths [sequences, 2] (units packed, tokens in the window) gives, which then counts one token more.
extern "C" __global__ void __launch_bounds__(UNIT) append_token(
    const u16* __restrict__ keys,
    const u16* __restrict__ values,
    u16* window_keys,
    u16* window_values,
    int* lengths,
    i64 heads,
    i64 capacity,
    i64 key_sequence,
    i64 key_head,
    i64 value_sequence,
    i64 value_head) {
    const i64 row = blockIdx.x, place = lengths[2 * row + 1];
    for (i64 i = threadIdx.x; i < heads * D; i += UNIT) {
        const i64 h = i / D, d = i % D, to = ((row * heads + h) * capacity + place) * D + d;
        window_keys[to] = keys[row * key_sequence + h * key_head + d];
        window_values[to] = values[row * value_sequence + h * value_head + d];
    }
    __syncthreads();
    if (threadIdx.x == 0) lengths[2 * row + 1] = (int)place + 1;
}
