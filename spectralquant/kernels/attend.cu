// Decode attention over packed records, exact tokens and the recent window, in one launch.
//
//   out_n = (sum_t p_nt v_t) / sum_t p_nt,   p_nt = exp(q_n . k_t),   v_t and k_t coded (docs/maths.md, section 7) or 16-bit
//
// Rows n are the queries that read one KV head: G query heads times Q positions, in groups of 8, the width of a tensor-core tile. Work is counted in
// STEPS of one warp: a packed unit of 128 tokens, or 32 exact ones. Steps are shared out over blocks by lengths in device memory (attend_schedule.cuh). Where
// several blocks share a sequence, each leaves a partial result; the last one to arrive joins them in order of blocks, so results do not depend on who it was.
//
// Codes never become numbers: masking a word of a record gives two fp16 subnormals c 4^j 2^-24, which are exact operands for the tensor core. Scores
// have tokens as rows of A and the queries, mapped to the planes, as B. Sums of values have planes as rows and probabilities as B; they stay in plane
// space until the end. The zero point 1.5 of all codes is taken off as 1.5 sum_p q'_p for scores, and unit by unit for values, because tensor cores
// truncate their sums: what has no mean does not drift.
//
// Weights of V include the gain: p g = 2^(s + log2 g - m), and m is the running maximum of s and s + log2 g, so that fp16 can hold them whatever the
// gains.
#include "attend_exact.cuh"
#include "attend_join.cuh"
#include "attend_packed.cuh"

// Transform and table of a head on their way to shared memory. By the whole block.
__device__ __forceinline__ void load_constants(const Arguments& a, int head, Shared& sm) {
#if TRANSFORM_IN_SHARED
    const Quad32* transform = a.transform + (i64)head * (TRANSFORM_BYTES / 16);
    for (int i = threadIdx.x; i < TRANSFORM_BYTES / 16; i += THREADS) copy16_async(shared_address(sm.transform) + i * 16, transform + i);
#endif
#if TABLE_IN_SHARED
    const Quad32* table = (const Quad32*)a.table + (i64)head * (TABLE_BYTES / 16);
    for (int i = threadIdx.x; i < TABLE_BYTES / 16; i += THREADS) copy16_async(shared_address(sm.table) + i * 16, table + i);
#endif
    commit_copies();
}

#if !USE_PAGES
// Sequences of no tokens get zeros.
__device__ void clear_empty(const Arguments& a) {
    const i64 size = (i64)a.positions * a.heads * a.groups * D;
#pragma unroll 1
    for (int b = blockIdx.x; b < a.batch; b += gridDim.x)
        if (a.lengths[2 * b] + a.lengths[2 * b + 1] == 0)
#pragma unroll 1
            for (i64 i = threadIdx.x; i < size; i += THREADS) write_out(a, b * size + i, 0.f);
}
#endif

__device__ void attend_stretches(const Arguments& a, Shared& sm) {
    const int warp = threadIdx.x >> 5;
    Schedule schedule = make_schedule(a);
    Stretch s;
    int loaded = -1;
    while (next_stretch(a, schedule, s)) {
        const int steps = s.last - s.first, from = s.first + steps * warp / WARPS, to = s.first + steps * (warp + 1) / WARPS;
        const int packed = s.units - s.skipped, end_packed = min(to, packed);
        if (s.head != loaded) load_constants(a, loaded = s.head, sm);
        start_records(a, s, sm, from, end_packed);
        load_queries(a, s, sm);
        wait_copies<2>();
        __syncthreads();
        State st;
        start_state(st);
        if (from < end_packed) packed_part(a, s, sm, st, from, end_packed);
        for (int step = max(from, packed); step < to; step++) dense_step(a, s, sm, st, step);
        __syncwarp();
        write_state(st, (float*)sm.slots[warp]);
        __syncthreads();
        leave(a, s, sm);
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(
    const void* query,
#if USE_PAGES
    const u8* pages,
    const int* page_table,
    const u16* recent_keys,
    const u16* recent_values,
    const i64* copies,
    const u16* new_keys,
    const u16* new_values,
    const i64* tokens,
#else
    const u8* records,
    const u8* prefix,
    const int* prefix_rows,
    const u16* exact_keys,
    const u16* exact_values,
    const int* exact_slots,
    const u16* raw_keys,
    const u16* raw_values,
    const i64* start,
#endif
    const int* lengths,
    const Quad32* transform,
    const void* table,
    const float* scales,
    const Float4* anchors,
    const Float4* turns,
    const float* value_rows,
    const float* value_mean,
    const float* missing_mass,
    const float* sinks,
    void* out,
    float* partials,
    int* tickets,
    i64 query_stride_batch,
    i64 query_stride_head,
    i64 query_stride_position,
#if USE_PAGES
    i64 page_stride,
    i64 table_stride,
    i64 key_stride_token,
    i64 key_stride_head,
    i64 value_stride_token,
    i64 value_stride_head,
#endif
    int batch,
    int heads,
    int groups,
    int positions,
#if USE_PAGES
    int exact,
    int integers,
    int exponents,
    int places,
#else
    int units,
    int exact,
    int raw,
    int prefix_units,
    int prefix_room,
#endif
    int row_groups,
    int blocks_per_line,
    int rotary_pairs,
    int interleaved,
    float scale,
    float softcap) {
    extern __shared__ u8 shared[];
#if USE_PAGES
    const Arguments a = {query, pages, page_table, recent_keys, recent_values, copies, new_keys, new_values, tokens, lengths, transform, table, scales,
                         anchors, turns, value_rows, value_mean, missing_mass, sinks, out, partials, tickets,
                         {query_stride_batch, query_stride_head, query_stride_position}, page_stride, table_stride, {key_stride_token, key_stride_head},
                         {value_stride_token, value_stride_head}, batch, heads, groups, positions, exact, integers, exponents, places,
                         row_groups, blocks_per_line, rotary_pairs, interleaved, scale, softcap};
#else
    const Arguments a = {query, records, prefix, prefix_rows, exact_keys, exact_values, exact_slots, raw_keys, raw_values, start, lengths, transform, table,
                         scales, anchors, turns, value_rows, value_mean, missing_mass, sinks, out, partials, tickets,
                         {query_stride_batch, query_stride_head, query_stride_position}, batch, heads, groups, positions, units, exact, raw,
                         prefix_units, prefix_room, row_groups, blocks_per_line, rotary_pairs, interleaved, scale, softcap};
    clear_empty(a);
#endif
    attend_stretches(a, *(Shared*)shared);
}
