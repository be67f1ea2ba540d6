// Decode attention over packed records, exact tokens and the recent window, in one launch.
//
//   out_n = (sum_t p_nt v_t) / sum_t p_nt,   p_nt = exp(q_n . k_t),   v_t and k_t coded (docs/maths.md, section 7) or 16-bit
//
// Rows n are the queries that read one KV head: G query heads times Q positions, in groups of 8, the width of a tensor-core tile. Work is counted in
// STEPS of one warp: a packed unit of 128 tokens, or 32 exact ones. The steps of all heads form one line, in order of KV head, row group and sequence, and
// every block of threads takes an equal stretch of it, whatever the lengths, which are read from device memory. A stretch that covers a head only in part leaves
// a partial result; the last block of a head to arrive joins them in order of blocks, so results do not depend on who was last.
//
// Codes never become numbers: masking a word of a record gives two fp16 subnormals c 4^j 2^-24, which are exact operands for the tensor core. Scores have
// tokens as rows of A and the queries, mapped to the planes, as B. Sums of values have planes as rows and probabilities as B; they stay in plane space until the end.
// The zero point 1.5 of all codes is taken off as 1.5 sum_p q'_p for scores, and unit by unit for values, because tensor cores truncate their sums: what has no mean does not drift.
//
// Weights of V include the gain: p g = 2^(s + log2 g - m), and m is the running maximum of s and s + log2 g, so that fp16 can hold them whatever the gains.
#include "unpack.cuh"

// Compile-time definitions; the host sets all of them (attention/cuda.py).
//   D          head size                                     SPLIT_BIAS    1: mean scores in twice the precision (large key biases)
//   CK, CV     chunks of 16 planes of K and V                FLOAT_QUERY   1: queries and output are float32
//   CB         chunks of 16 of the mean scores' rank         IS_BF16       1: exact tokens (and queries, unless float32) are bfloat16, else float16
//   RUN        tokens per anchored run (256), 0: plain       USE_SOFTCAP, USE_SINKS
//   TRANSFORM_IN_SHARED  0: too large, read through the L2 (D = 256)

#if !defined(D) || !defined(CK) || !defined(CV) || !defined(CB) || !defined(RUN) || !defined(SPLIT_BIAS) || !defined(FLOAT_QUERY) || !defined(IS_BF16) || \
    !defined(USE_SOFTCAP) || !defined(USE_SINKS) || !defined(TRANSFORM_IN_SHARED)
#error "a definition is missing, see above"
#endif

#define WARPS 8
#define THREADS (WARPS * 32)
#define ROWS 8
#define TILE 32  // exact tokens in a step
#define DIM_CHUNKS (D / 16)
#define PV (CV * 16)
#define KEY_PART (CK * 512 + 128)
#define VALUE_PART (CV * 512 + 128)
#define RECORD (KEY_PART + VALUE_PART)
#define BIAS_COPIES (1 + SPLIT_BIAS)
#define TRANSFORM_CHUNKS (CK + CB * BIAS_COPIES)
#define TRANSFORM_BYTES (TRANSFORM_CHUNKS * DIM_CHUNKS * 512)
#define TABLE_TILES (RUN ? RUN / 16 : 1)
#define TABLE_BYTES (TABLE_TILES * CB * BIAS_COPIES * 512)
#define QUERY_STRIDE (D + 16)  // floats; the pad keeps rows on different banks
#define PARTIAL (ROWS * (PV + D) + 3 * ROWS)  // floats: planes [8][PV], dense [8][D], then peak, packed mass and dense mass [8] each
#define SLOT_BYTES ((RECORD > PARTIAL * 4 ? RECORD : PARTIAL * 4) + 15 & ~15)
#define NOTHING -1e30f
#define WEIGHT_SCALE 4096.f  // of the fp16 weights of packed values: their least normal number is 6e-5

struct Arguments {
    const void* query;         // [B, H G, Q, D]
    const u8* records;         // [B, H, *, RECORD]
    const u16* exact_keys;     // [B, H, E, D]
    const u16* exact_values;
    const int* exact_slots;    // [B, E], -1: unused
    const u16* raw_keys;       // [B, H, *, D]
    const u16* raw_values;
    const int* lengths;        // [B, 2]: packed units, raw tokens
    const i64* start;          // [B]: slots of left padding
    const Quad32* transform;   // [H, TRANSFORM_BYTES]: queries to planes and to the mean's rank
    const Quad32* table;       // [H, TABLE_BYTES]: mean scores by offset in the run
    const float* scales;       // [H, 2]: what scores are multiplied with; the mean's rank relative to that
    const Float4* anchors;     // [runs, D / 4]: cos, sin, cos, sin of two pairs at the first position of a run
    const Float4* turns;       // [RUN, D / 4]: the same at offsets within a run
    const float* value_rows;   // [H, PV, D]
    const float* value_mean;   // [H, D]
    const float* sinks;        // [H G]
    void* out;                 // [B, Q, H G, D]
    float* partials;           // [blocks, 2, PARTIAL]
    int* tickets;              // [H, row groups, B], zeros before and after
    i64 query_strides[3];      // of B, H G, Q, in elements
    int batch, heads, groups, positions;
    int units, exact, raw;     // rows that the stores have room for
    int rotary_pairs, interleaved;
    float scale, softcap;      // scale of the logits, times log2 e unless USE_SOFTCAP
};

// A stretch of one head: steps first .. last - 1 of count, the packed ones before the dense ones.
struct Stretch {
    int head, row_group, batch, first, last, count;
    int units, raw;
};

__device__ __forceinline__ int dense_steps(const Arguments& a, int raw) {
    return (a.exact + TILE - 1) / TILE + (raw + TILE - 1) / TILE;
}

__device__ __forceinline__ int steps_of(const Arguments& a, int b, int& units, int& raw) {
    units = b < a.batch ? a.lengths[2 * b] : 0;
    raw = b < a.batch ? a.lengths[2 * b + 1] : 0;
    return units + raw ? units + dense_steps(a, raw) : 0;
}

__device__ __forceinline__ int warp_sum(int x) {
#pragma unroll
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}

// Steps of all sequences for one head and row group. By a whole warp.
__device__ __forceinline__ int steps_per_item(const Arguments& a) {
    int sum = 0, units, raw;
    for (int b = threadIdx.x & 31; b < a.batch; b += 32) sum += steps_of(a, b, units, raw);
    return warp_sum(sum);
}

// The head that step x of the whole line belongs to. By a whole warp.
__device__ Stretch locate(const Arguments& a, i64 x, int per_item, int row_groups) {
    Stretch s;
    const int lane = threadIdx.x & 31, item = (int)(x / per_item);
    int rest = (int)(x - (i64)item * per_item);
    s.head = item / row_groups;
    s.row_group = item - s.head * row_groups;
    for (int base = 0;; base += 32) {
        int units, raw;
        const int count = steps_of(a, base + lane, units, raw);
        int sum = count;
#pragma unroll
        for (int k = 1; k < 32; k <<= 1) {
            const int below = __shfl_up_sync(FULL_WARP, sum, k);
            if (lane >= k) sum += below;
        }
        const u32 beyond = __ballot_sync(FULL_WARP, sum > rest);
        if (beyond) {
            const int at = __ffs(beyond) - 1;
            s.batch = base + at;
            s.count = __shfl_sync(FULL_WARP, count, at);
            s.units = __shfl_sync(FULL_WARP, units, at);
            s.raw = __shfl_sync(FULL_WARP, raw, at);
            s.first = rest - __shfl_sync(FULL_WARP, sum - count, at);
            return s;
        }
        rest -= __shfl_sync(FULL_WARP, sum, 31);
    }
}

// Two neighbouring rotary pairs, as lower and upper coordinate each.
__device__ __forceinline__ void pair_dims(const Arguments& a, int pair, int& lower, int& upper) {
    const int beyond = pair - a.rotary_pairs;  // coordinates that do not turn are paired as they come
    if (beyond >= 0) {
        lower = 2 * (a.rotary_pairs + beyond);
        upper = lower + 1;
    } else {
        lower = a.interleaved ? 2 * pair : pair;
        upper = a.interleaved ? lower + 1 : pair + a.rotary_pairs;
    }
}

__device__ __forceinline__ float read_query(const Arguments& a, i64 at) {
#if FLOAT_QUERY
    return ((const float*)a.query)[at];
#else
    const u32 bits = ((const u16*)a.query)[at];
    float low, high;
#if IS_BF16
    unpack_bf16(bits, low, high);
#else
    unpack_f16(bits, low, high);
#endif
    return low;
#endif
}

__device__ __forceinline__ void turn(float& lower, float& upper, float c, float s) {
    const float x = lower * c - upper * s;
    upper = upper * c + lower * s;
    lower = x;
}

struct Shared {
    alignas(128) u8 transform[TRANSFORM_IN_SHARED ? TRANSFORM_BYTES : 16];
    u8 table[TABLE_BYTES];
    u8 slots[WARPS][SLOT_BYTES];             // a record in flight per warp; afterwards its partial result
    float pairs[ROWS][QUERY_STRIDE];         // queries without their start, as rotary pairs, divided by a power of two to at most 1
    u32 dense_query[DIM_CHUNKS][2][32][2];   // fragments of the queries as they came: high and low parts
    float norm[ROWS];                        // the powers of two
    float weight[WARPS][ROWS];
    float joined[PARTIAL];
    int last;
};

// Queries of one head into shared memory. By the whole block; ends without a barrier.
__device__ void load_queries(const Arguments& a, const Stretch& s, Shared& sm) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int row = s.row_group * ROWS + warp, position = row / a.groups, group = row - position * a.groups;
    const bool used = row < a.groups * a.positions;
    const i64 base = s.batch * a.query_strides[0] + (s.head * a.groups + group) * a.query_strides[1] + position * a.query_strides[2];
    float largest = 0.f;
    for (int d = lane; d < D; d += 32) largest = fmaxf(largest, used ? fabsf(read_query(a, base + d)) : 0.f);
#pragma unroll
    for (int k = 16; k; k >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, k));
    const u32 exponent = __float_as_uint(largest) & 0x7f800000u;  // 2^floor(log2)
    const float norm = exponent < 0x7f000000u && exponent > 0x00800000u ? __uint_as_float(exponent + 0x00800000u) : 1.f, inverse = 1.f / norm;
    if (lane == 0) sm.norm[warp] = norm;
    const i64 start = RUN ? a.start[s.batch] : 0;
    for (int pair = lane; pair < D / 2; pair += 32) {
        int lower, upper;
        pair_dims(a, pair, lower, upper);
        float x = used ? read_query(a, base + lower) * inverse : 0.f, y = used ? read_query(a, base + upper) * inverse : 0.f;
#if RUN
        const float* coarse = (const float*)(a.anchors + (start / RUN) * (D / 4)) + 2 * pair;
        const float* fine = (const float*)(a.turns + (start % RUN) * (D / 4)) + 2 * pair;
        turn(x, y, coarse[0], coarse[1]);
        turn(x, y, fine[0], fine[1]);
#endif
        sm.pairs[warp][2 * pair] = x;
        sm.pairs[warp][2 * pair + 1] = y;
    }
    // Fragments: lane 4 r + c of chunk g holds dims 16 g + 4 c .. + 3 of row r, as k 2c, 2c + 1, 2c + 8, 2c + 9. Any order of k will do if keys are read alike.
    for (int i = lane; i < DIM_CHUNKS * 4; i += 32) {
        const int chunk = i >> 2, c = i & 3, to = 4 * warp + c;
        float x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = used ? read_query(a, base + chunk * 16 + 4 * c + k) : 0.f;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float low = x[2 * half], high = x[2 * half + 1];
#if FLOAT_QUERY
            low *= inverse;
            high *= inverse;
#endif
#if IS_BF16
            const u32 rounded = pack_bf16(low, high);
            float l, h;
            unpack_bf16(rounded, l, h);
            sm.dense_query[chunk][0][to][half] = rounded;
            sm.dense_query[chunk][1][to][half] = pack_bf16(low - l, high - h);
#else
            const u32 rounded = pack_f16(low, high);
            float l, h;
            unpack_f16(rounded, l, h);
            sm.dense_query[chunk][0][to][half] = rounded;
            sm.dense_query[chunk][1][to][half] = pack_f16(low - l, high - h);
#endif
        }
    }
}

// What one warp carries along. Lane 4 r + c owns the columns (queries) 2c and 2c + 1.
struct State {
    float peak[2], packed_mass[2], dense_mass[2];
    float planes[CV][4];
    float dense[DIM_CHUNKS][4];
};

__device__ __forceinline__ void start_state(State& st) {
#pragma unroll
    for (int i = 0; i < 2; i++) st.peak[i] = NOTHING, st.packed_mass[i] = st.dense_mass[i] = 0.f;
#pragma unroll
    for (int c = 0; c < CV; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) st.planes[c][i] = 0.f;
#pragma unroll
    for (int c = 0; c < DIM_CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) st.dense[c][i] = 0.f;
}

// Raises the running peaks to at least x (per lane: of its rows); what is held shrinks. Rarely taken after the first steps.
template <bool DENSE>
__device__ __forceinline__ void raise_peak(State& st, float x0, float x1) {
#pragma unroll
    for (int k = 4; k < 32; k <<= 1) {
        x0 = fmaxf(x0, __shfl_xor_sync(FULL_WARP, x0, k));
        x1 = fmaxf(x1, __shfl_xor_sync(FULL_WARP, x1, k));
    }
    if (!__any_sync(FULL_WARP, x0 > st.peak[0] || x1 > st.peak[1])) return;
    const float n0 = fmaxf(st.peak[0], x0), n1 = fmaxf(st.peak[1], x1);
    const float e0 = exp2_approx(st.peak[0] - n0), e1 = exp2_approx(st.peak[1] - n1);
    st.peak[0] = n0, st.peak[1] = n1;
    st.packed_mass[0] *= e0, st.packed_mass[1] *= e1;
#pragma unroll
    for (int c = 0; c < CV; c++) st.planes[c][0] *= e0, st.planes[c][1] *= e1, st.planes[c][2] *= e0, st.planes[c][3] *= e1;
    if (DENSE) {
        st.dense_mass[0] *= e0, st.dense_mass[1] *= e1;
#pragma unroll
        for (int c = 0; c < DIM_CHUNKS; c++) st.dense[c][0] *= e0, st.dense[c][1] *= e1, st.dense[c][2] *= e0, st.dense[c][3] *= e1;
    }
}

__device__ __forceinline__ float capped(const Arguments& a, float s) {
#if USE_SOFTCAP
    const float e = exp2_approx(2.885390082f * s / a.softcap);  // e^(2x): tanh x = 1 - 2 / (e^(2x) + 1), exact at both ends
    return a.softcap * 1.442695041f * (1.f - 2.f / (e + 1.f));
#else
    return s;
#endif
}

// log2 of the gain in byte i of a word, (code - 128) / 8; exact: 2^23 + code is a float, an eighth of it too.
__device__ __forceinline__ float log2_gain(u32 word, int i) {
    const u32 as_float = __byte_perm(word, 0x4b000000u, 0x7650 | i) ;
    return fmaf(__uint_as_float(as_float), 0.125f, -1048592.f);
}

__device__ __forceinline__ u32 word_of(const Quad32& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Queries of a run and of the next one, mapped to the planes of K and to the rank of its mean.
struct Mapped {
    u32 planes[2][CK][2];
    u32 mean[2][CB][BIAS_COPIES][2];
    float zero[2][2];  // 1.5 sum_p q'_p of the lane's two columns
};

// A fragment of queries in the frames of two runs (rows 0..7 and 8..15), chunk k of the pairs; residual: what fp16 leaves.
__device__ __forceinline__ void rotated_fragment(const Arguments& a, const Shared& sm, int run, int k, u32 (&out)[4], u32 (&residual)[4]) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
    const Float4 x = *(const Float4*)&sm.pairs[r][2 * (8 * k + 2 * c)];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#if RUN
        const Float4 t = a.anchors[(i64)(run + i) * (D / 4) + 4 * k + c];
        const float l0 = x.x * t.x + x.y * t.y, u0 = x.y * t.x - x.x * t.y, l1 = x.z * t.z + x.w * t.w, u1 = x.w * t.z - x.z * t.w;
#else
        const float l0 = x.x, u0 = x.y, l1 = x.z, u1 = x.w;
#endif
        out[i] = pack_f16(l0, l1);
        out[2 + i] = pack_f16(u0, u1);
        float l, h;
        unpack_f16(out[i], l, h);
        residual[i] = pack_f16(l0 - l, l1 - h);
        unpack_f16(out[2 + i], l, h);
        residual[2 + i] = pack_f16(u0 - l, u1 - h);
    }
}

// B fragments of two column tiles: the rows of chunk k of the pairs, the 16 columns of `chunk` of the transform.
__device__ __forceinline__ Quad32 transform_fragment(const Arguments& a, const Shared& sm, int head, int chunk, int k) {
    const int at = (chunk * DIM_CHUNKS + k) * 32 + (threadIdx.x & 31);
#if TRANSFORM_IN_SHARED
    return load_shared16(shared_address(sm.transform) + at * 16);
#else
    return a.transform[(i64)head * (TRANSFORM_BYTES / 16) + at];
#endif
}

__device__ void map_queries(const Arguments& a, const Shared& sm, int head, int run, float mean_scale, Mapped& q) {
    const int lane = threadIdx.x & 31, c4 = lane & 3;
    u32 f[DIM_CHUNKS][4], rest[4];
#pragma unroll
    for (int k = 0; k < DIM_CHUNKS; k++) rotated_fragment(a, sm, run, k, f[k], rest);
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int c = 0; c < CK; c++) {
        float y[4] = {0.f, 0.f, 0.f, 0.f}, z[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < DIM_CHUNKS; k++) {
            const Quad32 m = transform_fragment(a, sm, head, c, k);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], m.x, m.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], m.z, m.w);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            q.planes[i][c][0] = pack_f16(y[2 * i], y[2 * i + 1]);
            q.planes[i][c][1] = pack_f16(z[2 * i], z[2 * i + 1]);
            float l, h;  // the zero point of what is really multiplied
            unpack_f16(q.planes[i][c][0], l, h);
            sum[i] += l + h;
            unpack_f16(q.planes[i][c][1], l, h);
            sum[i] += l + h;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 1);
        sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], 2);
        sum[i] *= 1.5f;  // of row r; the lane needs those of rows 2c and 2c + 1
        q.zero[i][0] = __shfl_sync(FULL_WARP, sum[i], 8 * c4);
        q.zero[i][1] = __shfl_sync(FULL_WARP, sum[i], 8 * c4 + 4);
    }
#pragma unroll
    for (int c = 0; c < CB; c++) {
        float y[4] = {0.f, 0.f, 0.f, 0.f}, z[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < DIM_CHUNKS; k++) {
            const Quad32 m = transform_fragment(a, sm, head, CK + c, k);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], m.x, m.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], m.z, m.w);
#if SPLIT_BIAS
            u32 again[4];
            rotated_fragment(a, sm, run, k, again, rest);
            mma_f16(y, rest[0], rest[1], rest[2], rest[3], m.x, m.y);
            mma_f16(z, rest[0], rest[1], rest[2], rest[3], m.z, m.w);
            const Quad32 low = transform_fragment(a, sm, head, CK + CB + c, k);
            mma_f16(y, f[k][0], f[k][1], f[k][2], f[k][3], low.x, low.y);
            mma_f16(z, f[k][0], f[k][1], f[k][2], f[k][3], low.z, low.w);
#endif
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float low = (half ? z : y)[2 * i] * mean_scale, high = (half ? z : y)[2 * i + 1] * mean_scale;
                q.mean[i][c][0][half] = pack_f16(low, high);
#if SPLIT_BIAS
                float l, h;
                unpack_f16(q.mean[i][c][0][half], l, h);
                q.mean[i][c][1][half] = pack_f16(low - l, high - h);
#endif
            }
    }
}

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

// Scores of the 128 tokens of a unit: s[j][0..1] token 16 j + r, s[j][2..3] token 16 j + r + 8.
__device__ __forceinline__ void packed_scores(
    const Arguments& a, const Shared& sm, const Mapped& q, int unit, u32 keys, const float (&factor)[2], float (&s)[8][4]) {
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
    const u32 table = shared_address(sm.table) + lane * 16;
    const int first_tile = RUN ? unit % (RUN / 128) * 8 : 0;
#pragma unroll
    for (int c = 0; c < CB; c++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int tile = RUN ? first_tile + j : 0;
            const Quad32 t = load_shared16(table + (tile * CB + c) * 512);
            mma_f16(s[j], t.x, t.y, t.z, t.w, q.mean[0][c][0][0], q.mean[0][c][0][1]);
#if SPLIT_BIAS
            mma_f16(s[j], t.x, t.y, t.z, t.w, q.mean[0][c][1][0], q.mean[0][c][1][1]);
            const Quad32 low = load_shared16(table + ((TABLE_TILES + tile) * CB + c) * 512);
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
        const float g0 = exp2_approx(log2_gain(word_of(gains, j >> 2), j & 3)) * scale, g1 = exp2_approx(log2_gain(word_of(gains, 2 + (j >> 2)), j & 3)) * scale;
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

// The second run to the front: registers can't be indexed.
__device__ __forceinline__ void move_up(Mapped& q) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        q.zero[0][i] = q.zero[1][i];
#pragma unroll
        for (int c = 0; c < CK; c++) q.planes[0][c][i] = q.planes[1][c][i];
#pragma unroll
        for (int c = 0; c < CB; c++)
#pragma unroll
            for (int k = 0; k < BIAS_COPIES; k++) q.mean[0][c][k][i] = q.mean[1][c][k][i];
    }
}

// Packed steps first .. last - 1 of a head, by one warp. The record's slot is refilled half by half, as soon as a half is used up.
__device__ void packed_part(const Arguments& a, const Stretch& s, Shared& sm, State& st, int first, int last) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, c = lane & 3;
    const u8* base = a.records + ((i64)s.batch * a.heads + s.head) * a.units * RECORD;
    const u32 keys = shared_address(sm.slots[warp]), values = keys + KEY_PART;
    copy_part<KEY_PART>(keys, base + (i64)first * RECORD, first < last);
    copy_part<VALUE_PART>(values, base + (i64)first * RECORD + KEY_PART, first < last);
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
        packed_scores(a, sm, q, unit, keys, factor, scores);
        __syncwarp();
        copy_part<KEY_PART>(keys, base + (i64)(unit + 1) * RECORD, unit + 1 < last);
        wait_copies<1>();
        __syncwarp();
        add_packed(st, scores, values);
        __syncwarp();
        copy_part<VALUE_PART>(values, base + (i64)(unit + 1) * RECORD + KEY_PART, unit + 1 < last);
    }
    wait_copies<0>();
}

// 32 exact tokens of a head: the exact store's, or the window's. Lanes read 8 bytes of a row, 4 dims, as k 2c, 2c + 1, 2c + 8, 2c + 9 of a fragment.
struct Tile {
    const u16 *keys, *values;  // first row of the store
    const int* slots;          // of the exact store, or null: row i stands in slot first_slot + i
    int first, count;          // first row of the tile, rows of the store
    int first_slot;
};

__device__ __forceinline__ Tile tile_of(const Arguments& a, const Stretch& s, int step) {
    const int exact_tiles = (a.exact + TILE - 1) / TILE, at = step - s.units;
    Tile t;
    if (at < exact_tiles) {
        const i64 base = ((i64)s.batch * a.heads + s.head) * a.exact * D;
        t.keys = a.exact_keys + base, t.values = a.exact_values + base;
        t.slots = a.exact_slots + (i64)s.batch * a.exact;
        t.first = at * TILE, t.count = a.exact, t.first_slot = 0;
    } else {
        const i64 base = ((i64)s.batch * a.heads + s.head) * a.raw * D;
        t.keys = a.raw_keys + base, t.values = a.raw_values + base;
        t.slots = nullptr;
        t.first = (at - exact_tiles) * TILE, t.count = s.raw, t.first_slot = s.units * 128;
    }
    return t;
}

// Slot of row i of a tile, or a slot that nobody sees.
__device__ __forceinline__ int slot_of(const Tile& t, int row) {
    const int none = 0x7fffffff;
    if (row >= t.count) return none;
    if (t.slots == nullptr) return t.first_slot + row;
    const int slot = t.slots[row];
    return slot < 0 ? none : slot;
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
    float factor[2];
    int limit[2];  // the last slot that the lane's two queries see
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = s.row_group * ROWS + 2 * c + i;
        limit[i] = s.units * 128 + s.raw - a.positions + row / a.groups;
        factor[i] = FLOAT_QUERY ? a.scale * sm.norm[2 * c + i] : a.scale;
    }
    const int start = (int)a.start[s.batch];
    float x0 = NOTHING, x1 = NOTHING, score[2][4];
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
        for (int i = 0; i < 4; i++) {
            const int slot = i < 2 ? slot0 : slot1;
            score[j][i] = slot <= limit[i & 1] && slot >= start ? capped(a, score[j][i] * factor[i & 1]) : NOTHING;
        }
        x0 = fmaxf(x0, fmaxf(score[j][0], score[j][2]));
        x1 = fmaxf(x1, fmaxf(score[j][1], score[j][3]));
    }
    raise_peak<true>(st, x0, x1);
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; i++) p[i] = score[j][i] > 0.5f * NOTHING ? exp2_approx(score[j][i] - st.peak[i & 1]) : 0.f;
        st.dense_mass[0] += p[0] + p[2], st.dense_mass[1] += p[1] + p[3];
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

// The dim of row r of chunk g of the dense sums (upper: of row r + 8), as `transposed` leaves them.
__device__ __forceinline__ int dense_dim(int g, int r, int upper) { return 16 * g + 4 * (r >> 1) + (r & 1) + 2 * upper; }

// A warp's state into its slot of shared memory, in the order of a partial result.
__device__ void write_state(State& st, float* to) {
    const int lane = threadIdx.x & 31, r = lane >> 2, c = lane & 3;
#pragma unroll
    for (int k = 4; k < 32; k <<= 1)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            st.packed_mass[i] += __shfl_xor_sync(FULL_WARP, st.packed_mass[i], k);
            st.dense_mass[i] += __shfl_xor_sync(FULL_WARP, st.dense_mass[i], k);
        }
    const float unscaled = 16777216.f / WEIGHT_SCALE;
#pragma unroll
    for (int k = 0; k < CV; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[(2 * c + (i & 1)) * PV + 16 * k + r + 8 * (i >> 1)] = st.planes[k][i] * unscaled;
    float* dense = to + ROWS * PV;
#pragma unroll
    for (int g = 0; g < DIM_CHUNKS; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) dense[(2 * c + (i & 1)) * D + dense_dim(g, r, i >> 1)] = st.dense[g][i];
    if (r == 0) {
        float* rows = dense + ROWS * D;
#pragma unroll
        for (int i = 0; i < 2; i++) rows[2 * c + i] = st.peak[i], rows[ROWS + 2 * c + i] = st.packed_mass[i], rows[2 * ROWS + 2 * c + i] = st.dense_mass[i];
    }
}

#define PEAKS (ROWS * (PV + D))

// Joins partial results into sm.joined: `read(k, i)` is number i of the k-th of `count`. By the whole block.
template <typename Read>
__device__ __forceinline__ void join(Shared& sm, int count, float* weights, Read read) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float peak = NOTHING;  // warp w joins the peaks of row w
    for (int k = lane; k < count; k += 32) peak = fmaxf(peak, read(k, PEAKS + warp));
#pragma unroll
    for (int k = 16; k; k >>= 1) peak = fmaxf(peak, __shfl_xor_sync(FULL_WARP, peak, k));
    for (int k = lane; k < count; k += 32) weights[k * ROWS + warp] = exp2_approx(read(k, PEAKS + warp) - peak);
    if (lane == 0) sm.joined[PEAKS + warp] = peak;
    __syncthreads();
    for (int i = threadIdx.x; i < PEAKS + 2 * ROWS; i += THREADS) {
        const int row = i < ROWS * PV ? i / PV : i < PEAKS ? (i - ROWS * PV) / D : (i - PEAKS) % ROWS;
        const int at = i < PEAKS ? i : i + ROWS;  // past the peaks: the masses
        float sum = 0.f;
        for (int k = 0; k < count; k++) sum += weights[k * ROWS + row] * read(k, at);
        sm.joined[at] = sum;
    }
    __syncthreads();
}

__device__ __forceinline__ void write_out(const Arguments& a, i64 at, float x) {
#if FLOAT_QUERY
    ((float*)a.out)[at] = x;
#elif IS_BF16
    ((u16*)a.out)[at] = (u16)pack_bf16(x, 0.f);
#else
    ((u16*)a.out)[at] = (u16)pack_f16(x, 0.f);
#endif
}

// The joined sums of a head to its output: back from plane space, mean added, divided by the mass. By the whole block.
__device__ void finish(const Arguments& a, const Stretch& s, const Shared& sm) {
    const float* rows = a.value_rows + (i64)s.head * PV * D;
    for (int i = threadIdx.x; i < 2 * D; i += THREADS) {
        const int d = i % D, half = i / D;
        float x[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
        for (int p = 0; p < PV; p++) {
            const float w = rows[p * D + d];
#pragma unroll
            for (int k = 0; k < 4; k++) x[k] += sm.joined[(4 * half + k) * PV + p] * w;
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int n = 4 * half + k, row = s.row_group * ROWS + n, position = row / a.groups, head = s.head * a.groups + row - position * a.groups;
            if (row >= a.groups * a.positions) break;
            const float packed = sm.joined[PEAKS + ROWS + n];
            float mass = packed + sm.joined[PEAKS + 2 * ROWS + n], sum = x[k] + a.value_mean[s.head * D + d] * packed + sm.joined[ROWS * PV + n * D + d];
#if USE_SINKS
            const float peak = sm.joined[PEAKS + n], sink = a.sinks[head] * 1.442695041f, top = fmaxf(peak, sink), shrink = exp2_approx(peak - top);
            mass = mass * shrink + exp2_approx(sink - top), sum *= shrink;
#endif
            const i64 at = (((i64)s.batch * a.positions + position) * (a.heads * a.groups) + head) * D + d;
            write_out(a, at, sm.joined[PEAKS + n] > 0.5f * NOTHING ? sum / mass : 0.f);  // a row that sees nothing is zero
        }
    }
}

// A block's stretch of one head is done: the warps' states are joined. A whole head is finished; a part of one is left for the last block to come.
__device__ void leave(const Arguments& a, const Stretch& s, Shared& sm, i64 line, int share, int row_groups) {
    join(sm, WARPS, &sm.weight[0][0], [&](int k, int i) { return ((const float*)sm.slots[k])[i]; });
    if (s.last - s.first < s.count) {
        // A block has at most two parts: of the head that it goes on with, and of the head that it begins and does not finish.
        float* mine = a.partials + (2 * (i64)blockIdx.x + (s.first == 0)) * PARTIAL;
        for (int i = threadIdx.x; i < PARTIAL; i += THREADS) store_global(mine + i, sm.joined[i]);
        __threadfence();
        __syncthreads();
        const i64 begin = line - s.first;  // of the head's steps on the line
        const int first_block = (int)(begin / share), parts = (int)((begin + s.count - 1) / share) - first_block + 1;
        if (threadIdx.x == 0) {
            int* ticket = a.tickets + ((i64)s.head * row_groups + s.row_group) * a.batch + s.batch;
            sm.last = atomicAdd(ticket, 1) == parts - 1;
            if (sm.last) *ticket = 0;
            __threadfence();
        }
        __syncthreads();
        if (!sm.last) return;
        // In order of blocks: which one comes last must not change the sum.
        const float* first = a.partials + 2 * (i64)first_block * PARTIAL;
        join(sm, parts, (float*)sm.slots, [&](int k, int i) { return load_global(first + (2 * (i64)k + (k == 0)) * PARTIAL + i); });
    }
    finish(a, s, sm);
}

// Transform and table of a head on their way to shared memory. By the whole block.
__device__ __forceinline__ void load_constants(const Arguments& a, int head, Shared& sm) {
#if TRANSFORM_IN_SHARED
    const Quad32* transform = a.transform + (i64)head * (TRANSFORM_BYTES / 16);
    for (int i = threadIdx.x; i < TRANSFORM_BYTES / 16; i += THREADS) copy16_async(shared_address(sm.transform) + i * 16, transform + i);
#endif
    const Quad32* table = a.table + (i64)head * (TABLE_BYTES / 16);
    for (int i = threadIdx.x; i < TABLE_BYTES / 16; i += THREADS) copy16_async(shared_address(sm.table) + i * 16, table + i);
    commit_copies();
}

// Sequences of no tokens get zeros.
__device__ void clear_empty(const Arguments& a) {
    const i64 size = (i64)a.positions * a.heads * a.groups * D;
    for (int b = blockIdx.x; b < a.batch; b += gridDim.x)
        if (a.lengths[2 * b] + a.lengths[2 * b + 1] == 0)
            for (i64 i = threadIdx.x; i < size; i += THREADS) write_out(a, b * size + i, 0.f);
}

__device__ void attend_stretches(const Arguments& a, Shared& sm) {
    const int warp = threadIdx.x >> 5;
    const int row_groups = (a.groups * a.positions + ROWS - 1) / ROWS, per_item = steps_per_item(a);
    const i64 total = (i64)per_item * a.heads * row_groups;
    const int share = (int)((total + gridDim.x - 1) / gridDim.x);
    const i64 end = min((i64)(blockIdx.x + 1) * share, total);
    int loaded = -1;
    for (i64 line = (i64)blockIdx.x * share; line < end;) {
        Stretch s = locate(a, line, per_item, row_groups);
        s.last = s.first + (int)min(end - line, (i64)(s.count - s.first));
        if (s.head != loaded) load_constants(a, loaded = s.head, sm);
        load_queries(a, s, sm);
        wait_copies<0>();
        __syncthreads();
        State st;
        start_state(st);
        const int steps = s.last - s.first, from = s.first + steps * warp / WARPS, to = s.first + steps * (warp + 1) / WARPS;
        if (from < min(to, s.units)) packed_part(a, s, sm, st, from, min(to, s.units));
        for (int step = max(from, s.units); step < to; step++) dense_step(a, s, sm, st, step);
        __syncwarp();
        write_state(st, (float*)sm.slots[warp]);
        __syncthreads();
        leave(a, s, sm, line, share, row_groups);
        __syncthreads();
        line += steps;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend(
    const void* query,
    const u8* records,
    const u16* exact_keys,
    const u16* exact_values,
    const int* exact_slots,
    const u16* raw_keys,
    const u16* raw_values,
    const int* lengths,
    const i64* start,
    const Quad32* transform,
    const Quad32* table,
    const float* scales,
    const Float4* anchors,
    const Float4* turns,
    const float* value_rows,
    const float* value_mean,
    const float* sinks,
    void* out,
    float* partials,
    int* tickets,
    i64 query_stride_batch,
    i64 query_stride_head,
    i64 query_stride_position,
    int batch,
    int heads,
    int groups,
    int positions,
    int units,
    int exact,
    int raw,
    int rotary_pairs,
    int interleaved,
    float scale,
    float softcap) {
    extern __shared__ u8 shared[];
    const Arguments a = {query, records, exact_keys, exact_values, exact_slots, raw_keys, raw_values, lengths, start, transform, table, scales, anchors, turns,
                         value_rows, value_mean, sinks, out, partials, tickets, {query_stride_batch, query_stride_head, query_stride_position},
                         batch, heads, groups, positions, units, exact, raw, rotary_pairs, interleaved, scale, softcap};
    clear_empty(a);
    attend_stretches(a, *(Shared*)shared);
}
