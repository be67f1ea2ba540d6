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
    return a.table[(i64)head * (TABLE_BYTES / 16) + at];
#endif
}

// Scores of the 128 tokens of a unit: s[j][0..1] token 16 j + r, s[j][2..3] token 16 j + r + 8.
__device__ __forceinline__ void packed_scores(
    const Arguments& a, const Shared& sm, const Mapped& q, int head, int unit, u32 keys, const float (&factor)[2], float (&s)[8][4]) {
    const int lane = threadIdx.x & 31, r = lane >> 2;
#pragma unroll
    for (int j = 0; j < 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
#pragma unroll
    for (int c = 0; c < CK; c++) {
        const Quad32 v = load_shared16(keys + c * 512 + lane * 16);
#pragma unroll
        for (int j = 0; j < 8; j++)
            mma_f16(s[j], code_pair(v.x, j), code_pair(v.y, j), code_pair(v.z, j), code_pair(v.w, j), q.planes[0][c][0], q.planes[0][c][1]);
    }
    const Quad32 gains = load_shared16(keys + CK * 512 + r * 16);  // 8 of token row r, then 8 of row r + 8
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float unscaled = 16777216.f / (float)(1 << pair_shift(j));
        const float g0 = exp2_approx(log2_gain(word_of(gains, j >> 2), j & 3)), g1 = exp2_approx(log2_gain(word_of(gains, 2 + (j >> 2)), j & 3));
        s[j][0] = (s[j][0] * unscaled - q.zero[0][0]) * g0;
        s[j][1] = (s[j][1] * unscaled - q.zero[0][1]) * g0;
        s[j][2] = (s[j][2] * unscaled - q.zero[0][0]) * g1;
        s[j][3] = (s[j][3] * unscaled - q.zero[0][1]) * g1;
    }
    const int first_tile = RUN ? unit % (RUN / 128) * 8 : 0;
#pragma unroll
    for (int c = 0; c < CB; c++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int tile = RUN ? first_tile + j : 0;
            const Quad32 t = table_fragment(a, sm, head, tile * CB + c);
            mma_f16(s[j], t.x, t.y, t.z, t.w, q.mean[0][c][0][0], q.mean[0][c][0][1]);
#if SPLIT_BIAS
            mma_f16(s[j], t.x, t.y, t.z, t.w, q.mean[0][c][1][0], q.mean[0][c][1][1]);
            const Quad32 low = table_fragment(a, sm, head, (TABLE_TILES + tile) * CB + c);
            mma_f16(s[j], low.x, low.y, low.z, low.w, q.mean[0][c][0][0], q.mean[0][c][0][1]);
#endif
        }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const u32 low = word_of(gains, j >> 2) >> (8 * (j & 3)) & 0xff, high = word_of(gains, 2 + (j >> 2)) >> (8 * (j & 3)) & 0xff;
        s[j][0] = low ? capped(a, s[j][0] * factor[0]) : NOTHING;  // gain code 0: the token is in the exact store, or padding
        s[j][1] = low ? capped(a, s[j][1] * factor[1]) : NOTHING;
        s[j][2] = high ? capped(a, s[j][2] * factor[0]) : NOTHING;
        s[j][3] = high ? capped(a, s[j][3] * factor[1]) : NOTHING;
    }
}

// Takes scores and values of a unit into the state.
__device__ __forceinline__ void add_packed(State& st, float (&s)[8][4], u32 values) {
    const int lane = threadIdx.x & 31, r = lane >> 2;
    const Quad32 gains = load_shared16(values + CV * 512 + r * 16);
    float x0 = NOTHING, x1 = NOTHING;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float g0 = fmaxf(log2_gain(word_of(gains, j >> 2), j & 3), 0.f), g1 = fmaxf(log2_gain(word_of(gains, 2 + (j >> 2)), j & 3), 0.f);
        x0 = fmaxf(x0, fmaxf(s[j][0] + g0, s[j][2] + g1));
        x1 = fmaxf(x1, fmaxf(s[j][1] + g0, s[j][3] + g1));
    }
    raise_peak<false>(st, x0, x1);
    u32 weights[8][2];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const float scale = WEIGHT_SCALE / (float)(1 << pair_shift(j));
        const float p0 = exp2_approx(s[j][0] - st.peak[0]), p1 = exp2_approx(s[j][1] - st.peak[1]);
        const float p2 = exp2_approx(s[j][2] - st.peak[0]), p3 = exp2_approx(s[j][3] - st.peak[1]);
        st.packed_mass[0] += p0 + p2, st.packed_mass[1] += p1 + p3;
        const float g0 = exp2_approx(log2_gain(word_of(gains, j >> 2), j & 3)) * scale,
                    g1 = exp2_approx(log2_gain(word_of(gains, 2 + (j >> 2)), j & 3)) * scale;
        weights[j][0] = transposed(pack_f16(p0 * g0, p1 * g0));
        weights[j][1] = transposed(pack_f16(p2 * g1, p3 * g1));
    }
    float offset[4] = {0.f, 0.f, 0.f, 0.f};  // minus twice the zero point: codes of -3 everywhere
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const u32 minus3 = 0x80008000u | (0x00030003u << pair_shift(j));
        mma_f16(offset, minus3, minus3, minus3, minus3, weights[j][0], weights[j][1]);
    }
#pragma unroll
    for (int c = 0; c < CV; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) st.planes[c][i] += 0.5f * offset[i];
#pragma unroll
    for (int c0 = 0; c0 < CV; c0 += 2) {  // two chains of sums at a time
        Quad32 v[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (c0 + i < CV) v[i] = load_shared16(values + (c0 + i) * 512 + lane * 16);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                if (c0 + i < CV)
                    mma_f16(st.planes[c0 + i], code_pair(v[i].x, j), code_pair(v[i].y, j), code_pair(v[i].z, j), code_pair(v[i].w, j),
                            weights[j][0], weights[j][1]);
    }
}

__device__ __forceinline__ const u8* first_record(const Arguments& a, const Stretch& s) {
    return a.records + ((i64)s.batch * a.heads + s.head) * a.units * RECORD;
}

// Record `first` on its way to the warp's slot, as two groups of copies, unless there is nothing up to `last`.
__device__ __forceinline__ void start_records(const Arguments& a, const Stretch& s, Shared& sm, int first, int last) {
    const u32 keys = shared_address(sm.slots[threadIdx.x >> 5]);
    const u8* from = first_record(a, s) + (i64)first * RECORD;
    copy_part<KEY_PART>(keys, from, first < last);
    copy_part<VALUE_PART>(keys + KEY_PART, from + KEY_PART, first < last);
}

// The same number for all packed tokens of a query moves their peak, and nothing else.
__device__ __forceinline__ void add_missing_mass(const Arguments& a, const Stretch& s, State& st) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = s.row_group * ROWS + 2 * (threadIdx.x & 3) + i;
        if (row < a.groups * a.positions) st.peak[i] += a.missing_mass[s.head * a.groups + row % a.groups];
    }
}

// Packed steps first .. last - 1 of a head, by one warp, once `start_records` was called. The slot is refilled half by half, as soon as a half is used up.
__device__ void packed_part(const Arguments& a, const Stretch& s, Shared& sm, State& st, int first, int last) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, c = lane & 3;
    const u8* base = first_record(a, s);
    const u32 keys = shared_address(sm.slots[warp]), values = keys + KEY_PART;
    const float head_scale = a.scales[2 * s.head] * a.scale, mean_scale = a.scales[2 * s.head + 1];
    const float factor[2] = {head_scale * sm.norm[2 * c], head_scale * sm.norm[2 * c + 1]};
    Mapped q;
    int held = -1;  // the run in the front of q; `next_held`: the following one is behind it
    bool next_held = false;
    for (int unit = first; unit < last; unit++) {
        const int run = RUN ? unit * 128 / (RUN ? RUN : 1) : 0;
        if (run != held) {
            if (next_held) move_up(q); else map_queries(a, sm, s.head, run, mean_scale, q);
            next_held = !next_held, held = run;
        }
        float scores[8][4];
        wait_copies<1>();
        __syncwarp();
        packed_scores(a, sm, q, s.head, unit, keys, factor, scores);
        __syncwarp();
        copy_part<KEY_PART>(keys, base + (i64)(unit + 1) * RECORD, unit + 1 < last);
        wait_copies<1>();
        __syncwarp();
        add_packed(st, scores, values);
        __syncwarp();
        copy_part<VALUE_PART>(values, base + (i64)(unit + 1) * RECORD + KEY_PART, unit + 1 < last);
    }
    wait_copies<0>();
    add_missing_mass(a, s, st);
}
