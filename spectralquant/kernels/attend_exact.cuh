// Exact tokens, 32 at a time, by one warp: those of the exact store and the recent window.
#include "attend_schedule.cuh"
#include "attend_softmax.cuh"

// 32 exact tokens of a head: the exact store's, or the window's. Lanes read 8 bytes of a row, 4 dims, as k 2c, 2c + 1, 2c + 8, 2c + 9 of a fragment.
struct Tile {
    const u16 *keys, *values;  // first row of the store
    const int* slots;          // of the exact store, or null: row i stands in slot first_slot + i
    int first, count;          // first row of the tile, rows of the store
    int first_slot;            // of the window: the end of the packed store
};

__device__ __forceinline__ Tile tile_of(const Arguments& a, const Stretch& s, int step) {
    const int exact_tiles = (a.exact + TILE - 1) / TILE, at = step - (s.units - s.skipped);
    Tile t;
    if (at < exact_tiles) {
        const i64 base = ((i64)s.batch * a.heads + s.head) * a.exact * D;
        t.keys = a.exact_keys + base, t.values = a.exact_values + base;
        t.slots = a.exact_slots + (i64)s.batch * a.exact;
        t.first = at * TILE, t.count = a.exact;
    } else {
        const i64 base = ((i64)s.batch * a.heads + s.head) * a.raw * D;
        t.keys = a.raw_keys + base, t.values = a.raw_values + base;
        t.slots = nullptr;
        t.first = (at - exact_tiles) * TILE, t.count = s.raw;
    }
    t.first_slot = s.units * 128;
    return t;
}

// Slot of row i of a tile, or a slot that nobody sees: unused entries of the exact store, and those of tokens that are still in the window.
__device__ __forceinline__ int slot_of(const Tile& t, int row) {
    const int none = 0x7fffffff;
    if (row >= t.count) return none;
    if (t.slots == nullptr) return t.first_slot + row;
    const int slot = t.slots[row];
    return slot < 0 || slot >= t.first_slot ? none : slot;
}

__device__ __forceinline__ void mma_dense(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if IS_BF16
    mma_bf16(c, a0, a1, a2, a3, b0, b1);
#else
    mma_f16(c, a0, a1, a2, a3, b0, b1);
#endif
}

__device__ void dense_step(const Arguments& a, const Stretch& s, const Shared& sm, State& st, int step) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
    const Tile t = tile_of(a, s, step);
    float factor[COLUMNS], most[COLUMNS], score[2][4];
    int limit[COLUMNS];  // the last slot that the lane's queries see
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        const int row = s.row_group * ROWS + own_row(i);
        limit[i] = s.units * 128 + s.raw - a.positions + row / a.groups;
        factor[i] = FLOAT_QUERY ? a.scale * sm.norm[own_row(i)] : a.scale;
        most[i] = NOTHING;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int low = t.first + 16 * j + r, high = low + 8;
        const u16 *k0 = t.keys + (i64)min(low, t.count - 1) * D + 4 * c, *k1 = t.keys + (i64)min(high, t.count - 1) * D + 4 * c;
        score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0.f;
        Pair32 v0[DIM_CHUNKS], v1[DIM_CHUNKS];
#pragma unroll
        for (int g = 0; g < DIM_CHUNKS; g++) v0[g] = *(const Pair32*)(k0 + 16 * g), v1[g] = *(const Pair32*)(k1 + 16 * g);
#pragma unroll
        for (int g = 0; g < DIM_CHUNKS; g++) {
            mma_dense(score[j], v0[g].x, v1[g].x, v0[g].y, v1[g].y, sm.dense_query[g][0][lane][0], sm.dense_query[g][0][lane][1]);
#if FLOAT_QUERY
            mma_dense(score[j], v0[g].x, v1[g].x, v0[g].y, v1[g].y, sm.dense_query[g][1][lane][0], sm.dense_query[g][1][lane][1]);
#endif
        }
        const int slot0 = slot_of(t, low), slot1 = slot_of(t, high);
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            float &low_score = score[j][i], &high_score = score[j][2 + i];
            low_score = slot0 <= limit[i] && slot0 >= s.start ? capped(a, low_score * factor[i]) : NOTHING;
            high_score = slot1 <= limit[i] && slot1 >= s.start ? capped(a, high_score * factor[i]) : NOTHING;
            most[i] = fmaxf(most[i], fmaxf(low_score, high_score));
        }
    }
    raise_peak<true>(st, most);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float p[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            p[i] = score[j][i] > 0.5f * NOTHING ? exp2_approx(score[j][i] - st.peak[i]) : 0.f;
            p[2 + i] = score[j][2 + i] > 0.5f * NOTHING ? exp2_approx(score[j][2 + i] - st.peak[i]) : 0.f;
            st.dense_mass[i] += p[i] + p[2 + i];
        }
#if IS_BF16
        // Eight bits are few for a weight: what they leave is added by a second product.
        const u32 w0 = pack_bf16(p[0], p[1]), w1 = pack_bf16(p[2], p[3]);
        float l0, h0, l1, h1;
        unpack_bf16(w0, l0, h0), unpack_bf16(w1, l1, h1);
        const u32 rest0 = transposed(pack_bf16(p[0] - l0, p[1] - h0)), rest1 = transposed(pack_bf16(p[2] - l1, p[3] - h1));
        const u32 b0 = transposed(w0), b1 = transposed(w1);
#else
        const u32 b0 = transposed(pack_f16(p[0], p[1])), b1 = transposed(pack_f16(p[2], p[3]));
#endif
        const int low = t.first + 16 * j + r, high = low + 8;
        const u16 *v0 = t.values + (i64)min(low, t.count - 1) * D + 4 * c, *v1 = t.values + (i64)min(high, t.count - 1) * D + 4 * c;
#pragma unroll
        for (int g = 0; g < DIM_CHUNKS; g++) {
            const Pair32 x = *(const Pair32*)(v0 + 16 * g), y = *(const Pair32*)(v1 + 16 * g);
            const u32 f0 = transposed(x.x), f1 = transposed(x.y), f2 = transposed(y.x), f3 = transposed(y.y);
            mma_dense(st.dense[g], f0, f1, f2, f3, b0, b1);
#if IS_BF16
            mma_dense(st.dense[g], f0, f1, f2, f3, rest0, rest1);
#endif
        }
    }
}
