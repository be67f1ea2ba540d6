// Exact tokens, 32 at a time, by one warp: those of the exact store or of pages, and the recent window.
#include "attend_schedule.cuh"
#include "attend_softmax.cuh"

#define NOWHERE 0x7fffffff  // slot that no query sees: of unused entries of the exact store, of those of tokens that are still in the window, of rows beyond a store

// One exact token of a head.
struct Row {
    const u16 *key, *value;
    int slot;
#if USE_PAGES
    float key_scale, value_scale;  // of one in 8 bits, whose bytes `key` and `value` point to
#endif
};

#if USE_PAGES
// 32 exact tokens: of pages, in 8 bits, all entries of a sequence's pages in order, or behind its units.
struct Tile {
    bool raw;
    int first, count;  // first row of the tile, rows of the sequence
};

__device__ __forceinline__ Tile tile_of(const Arguments& a, const Stretch& s, int step) {
    const int exact = exact_rows(a, s.units), exact_tiles = (exact + TILE - 1) / TILE, at = step - (s.units - s.skipped);
    if (at < exact_tiles) return {false, at * TILE, exact};
    return {true, (at - exact_tiles) * TILE, s.raw};
}

__device__ __forceinline__ Row row_behind_units(const Arguments& a, const Stretch& s, int i) {
    Row found = {};
    if (i == s.raw - 1) {  // the new token
        found.key = a.new_keys + s.place * a.key_strides[0] + s.head * a.key_strides[1];
        found.value = a.new_values + s.place * a.value_strides[0] + s.head * a.value_strides[1];
    } else {
        const i64 copy = a.copies[2 * s.batch + 1 + i / UNIT - (s.raw - 1) / UNIT], at = ((copy * UNIT + i % UNIT) * a.heads + s.head) * D;
        found.key = a.recent_keys + at, found.value = a.recent_values + at;
    }
    found.slot = s.units * UNIT + i;
    return found;
}

// 2^exponent
__device__ __forceinline__ float power_of_two(signed char exponent) { return __uint_as_float((u32)(exponent + 127) << 23); }

__device__ __forceinline__ Row row_of_page(const Arguments& a, const Stretch& s, int i) {
    const int unit = (u32)i / (u32)a.exact, entry = i - unit * a.exact, key = s.head * a.exact + entry, value = key + a.heads * a.exact;
    const u8* page = page_of(a, s, unit);
    const signed char* exponents = (const signed char*)(page + a.exponents);
    const int place = ((const signed char*)(page + a.places))[entry];
    return {(const u16*)(page + a.integers + key * D), (const u16*)(page + a.integers + value * D), place < 0 ? NOWHERE : unit * UNIT + place,
            power_of_two(exponents[key]), power_of_two(exponents[value])};
}

// Of rows beyond the last one, that one, but nowhere.
__device__ __forceinline__ Row row_of(const Arguments& a, const Stretch& s, const Tile& t, int row) {
    const int i = min(row, t.count - 1);
    Row found = t.raw ? row_behind_units(a, s, i) : row_of_page(a, s, i);
    if (row != i) found.slot = NOWHERE;
    return found;
}
#else
// 32 exact tokens: the exact store's, or the window's.
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
    t.first_slot = s.units * UNIT;
    return t;
}

__device__ __forceinline__ int slot_of(const Tile& t, int row) {
    if (row >= t.count) return NOWHERE;
    if (t.slots == nullptr) return t.first_slot + row;
    const int slot = t.slots[row];
    return slot < 0 || slot >= t.first_slot ? NOWHERE : slot;
}

// Of rows beyond the last one, that one, but nowhere.
__device__ __forceinline__ Row row_of(const Arguments&, const Stretch&, const Tile& t, int row) {
    const i64 at = (i64)min(row, t.count - 1) * D;
    return {t.keys + at, t.values + at, slot_of(t, row)};
}
#endif

// Four integers of 8 bits times a power of two; exact: 2^23 + 128 + x is a float.
__device__ __forceinline__ Pair32 from_8_bits(u32 word, float scale) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = fmaf(__uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7650 | i)), scale, -8388736.f * scale);
    return {pack_exact(x[0], x[1]), pack_exact(x[2], x[3])};
}

// Keys or values of two rows. Lanes read 4 dims of a chunk, as k 2c, 2c + 1, 2c + 8, 2c + 9 of its fragment.
template <bool KEYS>
__device__ __forceinline__ void read_rows(const Tile& t, const Row (&rows)[2], Pair32 (&x)[2][DIM_CHUNKS]) {
    const int c = threadIdx.x & 3;
#if USE_PAGES
    if (!t.raw) {
        u32 words[2][DIM_CHUNKS];
#pragma unroll
        for (int g = 0; g < DIM_CHUNKS; g++)
#pragma unroll
            for (int i = 0; i < 2; i++) words[i][g] = ((const u32*)(KEYS ? rows[i].key : rows[i].value))[4 * g + c];
#pragma unroll
        for (int g = 0; g < DIM_CHUNKS; g++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                // Unused entries are of anything, and zero times infinity is no number. They are read in any case: which they are is still on its way.
                x[i][g] = from_8_bits(words[i][g], KEYS ? rows[i].key_scale : rows[i].value_scale);
                if (rows[i].slot == NOWHERE) x[i][g] = {0, 0};
            }
        return;
    }
#endif
#pragma unroll
    for (int g = 0; g < DIM_CHUNKS; g++)
#pragma unroll
        for (int i = 0; i < 2; i++) x[i][g] = *(const Pair32*)((KEYS ? rows[i].key : rows[i].value) + 16 * g + 4 * c);
}

__device__ __forceinline__ void mma_dense(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if IS_BF16
    mma_bf16(c, a0, a1, a2, a3, b0, b1);
#else
    mma_f16(c, a0, a1, a2, a3, b0, b1);
#endif
}

__device__ void dense_step(const Arguments& a, const Stretch& s, const Shared& sm, State& st, int step) {
    const int lane = threadIdx.x & 31, r = lane >> 2;
    const Tile t = tile_of(a, s, step);
    Row rows[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++) rows[i / 2][i % 2] = row_of(a, s, t, t.first + 8 * i + r);
#if USE_PAGES
    // Most pages of most layers have no token apart from their codes.
    bool used = false;
#pragma unroll
    for (int i = 0; i < 4; i++) used |= rows[i / 2][i % 2].slot != NOWHERE;
    if (!__any_sync(FULL_WARP, used)) return;
#endif
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
        const Row &low = rows[j][0], &high = rows[j][1];
        score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0.f;
        Pair32 k[2][DIM_CHUNKS];
        read_rows<true>(t, rows[j], k);
#pragma unroll
        for (int g = 0; g < DIM_CHUNKS; g++) {
            mma_dense(score[j], k[0][g].x, k[1][g].x, k[0][g].y, k[1][g].y, sm.dense_query[g][0][lane][0], sm.dense_query[g][0][lane][1]);
#if FLOAT_QUERY
            mma_dense(score[j], k[0][g].x, k[1][g].x, k[0][g].y, k[1][g].y, sm.dense_query[g][1][lane][0], sm.dense_query[g][1][lane][1]);
#endif
        }
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
            float &low_score = score[j][i], &high_score = score[j][2 + i];
            low_score = low.slot <= limit[i] && low.slot >= s.start ? capped(a, low_score * factor[i]) : NOTHING;
            high_score = high.slot <= limit[i] && high.slot >= s.start ? capped(a, high_score * factor[i]) : NOTHING;
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
        Pair32 v[2][DIM_CHUNKS];
        read_rows<false>(t, rows[j], v);
#pragma unroll
        for (int g = 0; g < DIM_CHUNKS; g++) {
            const u32 f0 = transposed(v[0][g].x), f1 = transposed(v[0][g].y), f2 = transposed(v[1][g].x), f3 = transposed(v[1][g].y);
            mma_dense(st.dense[g], f0, f1, f2, f3, b0, b1);
#if IS_BF16
            mma_dense(st.dense[g], f0, f1, f2, f3, rest0, rest1);
#endif
        }
    }
}
