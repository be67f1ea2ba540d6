// Packed units of 128 tokens, by one warp.
#include "attend_queries.cuh"
#include "attend_softmax.cuh"

__device__ __forceinline__ u32 word_of(const Quad32& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Every lane copies the 16 bytes of each chunk that it will read itself, so no barrier is needed.
template <int PART>
__device__ __forceinline__ void copy_part(u32 to, const u8* from, bool wanted) {
    const int lane = threadIdx.x & 31;
    if (wanted) {
#pragma unroll
        for (int c = 0; c < PART / 512; c++) copy16_async(to + c * 512 + lane * 16, from + c * 512 + lane * 16);
        if (lane < 8) copy16_async(to + PART / 512 * 512 + lane * 16, from + PART / 512 * 512 + lane * 16);
    }
    commit_copies();
}

// A fragment of the table of mean scores: one tile of 16 tokens, 16 of the rank.
__device__ __forceinline__ Quad32 table_fragment(const Arguments& a, const Shared& sm, int head, int fragment) {
    const int at = fragment * 32 + (threadIdx.x & 31);
#if TABLE_IN_SHARED
    return load_shared16(shared_address(sm.table) + at * 16);
#else
    return ((const Quad32*)a.table)[(i64)head * (TABLE_BYTES / 16) + at];
#endif
}

// Scores of the 128 tokens of a unit: scores[j][0] token 16 j + r, [1] token 16 j + r + 8. second: the unit's run is the second one of q.
__device__ __forceinline__ void packed_scores(
    const Arguments& a, const Shared& sm, const Mapped& q, int head, int unit, bool second, u32 keys, const float (&factor)[COLUMNS],
    const float (&mean)[COLUMNS], float (&scores)[8][2][COLUMNS]) {
    const int lane = threadIdx.x & 31, r = lane >> 2;
    float s[8][4];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[j][i] = -q.zero[i & 1] * ((float)(1 << pair_shift(j)) / 16777216.f);
#pragma unroll
    for (int c = 0; c < CK; c++) {
        const Quad32 v = load_shared16(keys + c * 512 + lane * 16);
#pragma unroll
        for (int j = 0; j < 8; j++)
            mma_f16(s[j], code_pair(v.x, j), code_pair(v.y, j), code_pair(v.z, j), code_pair(v.w, j), q.planes[c][0], q.planes[c][1]);
    }
    const Quad32 gains = load_shared16(keys + CK * 512 + r * 16);  // 8 of token row r, then 8 of row r + 8
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int unscaled = 24 - pair_shift(j);
        const float g0 = exp2_approx(log2_gain(word_of(gains, j >> 2), j & 3, unscaled)), g1 = exp2_approx(log2_gain(word_of(gains, 2 + (j >> 2)), j & 3, unscaled));
        s[j][0] *= g0, s[j][1] *= g0, s[j][2] *= g1, s[j][3] *= g1;
    }
#if RUN
    const int first_tile = unit % (RUN / 128) * 8;
#pragma unroll
    for (int c = 0; c < MEAN_CHUNKS; c++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const Quad32 t = table_fragment(a, sm, head, (first_tile + j) * MEAN_CHUNKS + c);
            const int of = c < CB ? c : 0;  // the low halves go with the first chunk of the queries
            mma_f16(s[j], t.x, t.y, t.z, t.w, q.mean[of][0], q.mean[of][1]);
            if (SPLIT_BIAS && c == 0) mma_f16(s[j], t.x, t.y, t.z, t.w, q.mean[CB][0], q.mean[CB][1]);
        }
#endif
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const u32 low = word_of(gains, j >> 2) >> (8 * (j & 3)) & 0xff, high = word_of(gains, 2 + (j >> 2)) >> (8 * (j & 3)) & 0xff;
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            const float s0 = RUNS_OF_TILE == 2 && second ? s[j][1] : s[j][i], s1 = RUNS_OF_TILE == 2 && second ? s[j][3] : s[j][2 + i];
            scores[j][0][i] = low ? capped(a, s0 * factor[i] + mean[i]) : NOTHING;  // gain code 0: the token is in the exact store, or padding
            scores[j][1][i] = high ? capped(a, s1 * factor[i] + mean[i]) : NOTHING;
        }
    }
}

#define CHAINS 5  // sums of values at a time, to hide the latency of the products

// Takes scores and values of a unit into the state.
__device__ __forceinline__ void add_packed(State& st, const float (&scores)[8][2][COLUMNS], u32 values) {
    const int lane = threadIdx.x & 31, r = lane >> 2;
    const Quad32 gains = load_shared16(values + CV * 512 + r * 16);
    float most[COLUMNS], most_gain = 0.f;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        most[i] = NOTHING;
#pragma unroll
        for (int j = 0; j < 8; j++) most[i] = fmaxf(most[i], fmaxf(scores[j][0][i], scores[j][1][i]));
    }
#pragma unroll
    for (int j = 0; j < 8; j++) most_gain = fmaxf(most_gain, fmaxf(log2_gain(word_of(gains, j >> 2), j & 3), log2_gain(word_of(gains, 2 + (j >> 2)), j & 3)));
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) most[i] += most_gain;
    raise_peak<false>(st, most);
    u32 weights[8][2];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float gain = exp2_approx(log2_gain(word_of(gains, 2 * half + (j >> 2)), j & 3, WEIGHT_SCALE_LOG2 - pair_shift(j)));
            float w[2] = {0.f, 0.f};
#pragma unroll
            for (int i = 0; i < COLUMNS; i++) {
                const float p = exp2_approx(scores[j][half][i] - st.peak[i]);
                st.packed_mass[i] += p;
                w[i] = p * gain;
            }
            weights[j][half] = transposed(pack_f16(w[0], w[1]));
        }
    float offset[4] = {0.f, 0.f, 0.f, 0.f};  // minus twice the zero point: codes of -3 everywhere
#pragma unroll
    for (int c0 = 0; c0 < CV; c0 += CHAINS) {
        Quad32 v[CHAINS];
#pragma unroll
        for (int i = 0; i < CHAINS; i++)
            if (c0 + i < CV) v[i] = load_shared16(values + (c0 + i) * 512 + lane * 16);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 minus3 = 0x80008000u | (0x00030003u << pair_shift(j));
            if (c0 == 0) mma_f16(offset, minus3, minus3, minus3, minus3, weights[j][0], weights[j][1]);
#pragma unroll
            for (int i = 0; i < CHAINS; i++)
                if (c0 + i < CV)
                    mma_f16(st.planes[c0 + i], code_pair(v[i].x, j), code_pair(v[i].y, j), code_pair(v[i].z, j), code_pair(v[i].w, j),
                            weights[j][0], weights[j][1]);
        }
    }
#pragma unroll
    for (int c = 0; c < CV; c++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) st.planes[c][i] += 0.5f * offset[i], st.planes[c][2 + i] += 0.5f * offset[2 + i];
}

// The record of a step.
__device__ __forceinline__ const u8* record_of(const Arguments& a, const Stretch& s, int step) {
    int unit = s.skipped + step;
#if USE_PAGES
    return page_of(a, s, unit) + (i64)s.head * RECORD;
#else
#if USE_PREFIX
    if (unit < a.prefix_units) return a.prefix + (((i64)a.prefix_rows[s.batch] * a.heads + s.head) * a.prefix_room + unit) * RECORD;
    unit -= a.prefix_units;
#endif
    return a.records + (((i64)s.batch * a.heads + s.head) * a.units + unit) * RECORD;
#endif
}

// Record `first` on its way to the warp's slot, as two groups of copies, unless there is nothing up to `last`.
__device__ __forceinline__ void start_records(const Arguments& a, const Stretch& s, Shared& sm, int first, int last) {
    const u32 keys = shared_address(sm.slots[threadIdx.x >> 5]);
    const u8* from = record_of(a, s, first);
    copy_part<KEY_PART>(keys, from, first < last);
    copy_part<VALUE_PART>(keys + KEY_PART, from + KEY_PART, first < last);
}

// The same number for all packed tokens of a query moves their peak, and nothing else.
__device__ __forceinline__ void add_missing_mass(const Arguments& a, const Stretch& s, State& st) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        const int row = s.row_group * ROWS + own_row(i);
        if (row < a.groups * a.positions) st.peak[i] += a.missing_mass[s.head * a.groups + row % a.groups];
    }
}

// Packed steps first .. last - 1 of a head, by one warp, once `start_records` was called. The slot is refilled half by half, as soon as a half is used up.
__device__ void packed_part(const Arguments& a, const Stretch& s, Shared& sm, State& st, int first, int last) {
    const u32 keys = shared_address(sm.slots[threadIdx.x >> 5]), values = keys + KEY_PART;
    const float head_scale = a.scales[2 * s.head] * a.scale, mean_scale = a.scales[2 * s.head + 1];
    float factor[COLUMNS], mean[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) factor[i] = head_scale * sm.norm[own_row(i)], mean[i] = RUN ? 0.f : sm.mean[own_row(i)];
    Mapped q;
    int held = -1 - RUNS_OF_TILE;  // the first run in q; `next_held`: the following ones lie in shared memory
    bool next_held = false;
#pragma unroll 1
    for (int step = first; step < last; step++) {
        const int unit = s.skipped + step, run = RUN ? unit * 128 / (RUN ? RUN : 1) : 0;
        if (run >= held + RUNS_OF_TILE) {
            if (next_held) take_next(sm, q); else map_queries(a, sm, s.head, run, mean_scale, q);
            next_held = !next_held, held = run;
        }
        const u8* next = record_of(a, s, step + 1);  // early: the number of a page comes from memory
        float scores[8][2][COLUMNS];
        wait_copies<1>();
        __syncwarp();
        packed_scores(a, sm, q, s.head, unit, run != held, keys, factor, mean, scores);
        __syncwarp();
        copy_part<KEY_PART>(keys, next, step + 1 < last);
        wait_copies<1>();
        __syncwarp();
        add_packed(st, scores, values);
        __syncwarp();
        copy_part<VALUE_PART>(values, next + KEY_PART, step + 1 < last);
    }
    wait_copies<0>();
    add_missing_mass(a, s, st);
}
