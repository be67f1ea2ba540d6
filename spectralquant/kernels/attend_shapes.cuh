// What the parts of attend.cu share: its definitions, sizes, arguments, shared memory and the state of a warp.
#include "unpack.cuh"

// Compile-time definitions; the host sets all of them (attention/cuda.py).
//   D          head size                                     SPLIT_BIAS    1: the mean's first chunk in twice the precision (large key biases)
//   CK, CV     chunks of 16 planes of K and V                FLOAT_QUERY   1: queries and output are float32
//   CB         chunks of 16 of the mean's rank, plain: 0     IS_BF16       1: exact tokens (and queries, unless float32) are bfloat16, else float16
//   RUN        tokens per anchored run (256), 0: plain       USE_SOFTCAP, USE_SINKS
//   COLUMNS    of a tile's 8 that a lane's queries stand in: 2, or 1 where an item has at most 4 rows (a lane's other column serves the next run)
//   TRANSFORM_IN_SHARED, TABLE_IN_SHARED  0: too large, read through the caches (D = 256)
//   USE_PREFIX   1: the first units stand in a store of their own, which several sequences may read
//   USE_PAGES    1: units stand in pages with their exact tokens, in any order; every sequence has one new token (paged/layout.py, paged/recent.py)

#if !defined(D) || !defined(CK) || !defined(CV) || !defined(CB) || !defined(RUN) || !defined(SPLIT_BIAS) || !defined(FLOAT_QUERY) || !defined(IS_BF16) || \
    !defined(USE_SOFTCAP) || !defined(USE_SINKS) || !defined(COLUMNS) || !defined(TRANSFORM_IN_SHARED) || !defined(TABLE_IN_SHARED) || !defined(USE_PREFIX) || \
    !defined(USE_PAGES)
#error "a definition is missing, see above"
#endif

#define WARPS 8
#define THREADS (WARPS * 32)
#define ROWS (4 * COLUMNS)      // queries of an item: those of a tile
#define RUNS_OF_TILE (RUN && COLUMNS == 1 ? 2 : 1)  // whose queries stand in one B fragment
#define TILE 32  // exact tokens in a step
#define DIM_CHUNKS (D / 16)
#define PV (CV * 16)
#define KEY_PART (CK * 512 + 128)
#define VALUE_PART (CV * 512 + 128)
#define RECORD (KEY_PART + VALUE_PART)
#define MEAN_CHUNKS (CB + SPLIT_BIAS)  // the last one, when split: low halves of the first
#define TRANSFORM_CHUNKS (CK + MEAN_CHUNKS)
#define TRANSFORM_BYTES (TRANSFORM_CHUNKS * DIM_CHUNKS * 512)
#define TABLE_BYTES (RUN / 16 * MEAN_CHUNKS * 512)
#define QUERY_STRIDE (D + 16)  // floats; the pad keeps rows on different banks
#define STATE (ROWS * (PV + D) + 3 * ROWS)  // floats a warp leaves: planes [PV][ROWS], dense [D][ROWS], then peak, packed mass and dense mass [ROWS] each
#define PARTIAL (2 * ROWS + ROWS * D)  // floats a block leaves: peak and mass of each row, then sums [ROWS][D]
#define PARTS_BYTES (4 * ROWS * THREADS * 4)  // of all slots: sums in as many parts as threads can make at once, see attend_join.cuh
#define LARGER(x, y) ((x) > (y) ? (x) : (y))
#define SLOT_BYTES (LARGER(LARGER(RECORD, STATE * 4), PARTS_BYTES / WARPS) + 15 & ~15)
#define NOTHING -1e30f
#define WEIGHT_SCALE_LOG2 12  // of the fp16 weights of packed values: their least normal number is 2^-14

struct Arguments {
    const void* query;         // [B, H G, Q, D]
#if USE_PAGES
    const u8* pages;           // [*, page_stride]: records of all heads, then tokens in 8 bits, see PageLayout in paged/layout.py
    const int* page_table;     // [B, table_stride]: the pages of a sequence
    const u16* recent_keys;    // [*, 128, H, D]: exact copies of pages
    const u16* recent_values;
    const i64* copies;         // [B, 2]: those of the last page that was full before the new token, and of the one after it
    const u16* new_keys;       // [N, H, D]
    const u16* new_values;
    const i64* tokens;         // [B]: the new token of a sequence, among N; its query and its output have the same place
#else
    const u8* records;         // [B, H, *, RECORD], units after those of the prefix
    const u8* prefix;          // [S, H, *, RECORD]
    const int* prefix_rows;    // [B]: which of S a sequence begins with
    const u16* exact_keys;     // [B, H, E, D]
    const u16* exact_values;
    const int* exact_slots;    // [B, E], -1: unused
    const u16* raw_keys;       // [B, H, *, D]
    const u16* raw_values;
    const i64* start;          // [B]: slots of left padding
#endif
    const int* lengths;        // [B, 2]: packed units, raw tokens
    const Quad32* transform;   // [H, TRANSFORM_BYTES]: queries to planes and to the mean's rank
    const void* table;         // [H, TABLE_BYTES]: mean scores by offset in the run; plain frame: the mean, [H, D] float32
    const float* scales;       // [H, 2]: what scores are multiplied with; the mean's rank relative to that
    const Float4* anchors;     // [runs, D / 4]: cos, sin, cos, sin of two pairs at the first position of a run
    const Float4* turns;       // [RUN, D / 4]: the same at offsets within a run
    const float* value_rows;   // [H, PV, D]
    const float* value_mean;   // [H, D]
    const float* missing_mass; // [H G], added to the scores of packed tokens, log2
    const float* sinks;        // [H G]
    void* out;                 // [B, Q, H G, D], or [N, H G, D] of pages
    float* partials;           // [blocks, 2, PARTIAL]
    int* tickets;              // [H, row groups, B], zeros before and after
    i64 query_strides[3];      // of B, H G, Q, in elements
#if USE_PAGES
    i64 page_stride, table_stride;        // in bytes, in entries
    i64 key_strides[2], value_strides[2]; // of N and H, in elements
#endif
    int batch, heads, groups, positions;
#if USE_PAGES
    int exact;                        // entries of a page: tokens in 8 bits
    int integers, exponents, places;  // where these begin in a page: [2, H, E, D], [2, H, E], [E]
#else
    int units, exact, raw;     // rows that the stores have room for
    int prefix_units, prefix_room;  // that count, and that the prefix has room for
#endif
    int row_groups, blocks_per_line;  // groups of ROWS rows of a head; blocks over heads times row groups, rounded down
    int rotary_pairs, interleaved;
    float scale, softcap;      // scale of the logits, times log2 e unless USE_SOFTCAP
};

struct Shared {
    alignas(128) u8 transform[TRANSFORM_IN_SHARED ? TRANSFORM_BYTES : 16];
    u8 table[TABLE_IN_SHARED ? LARGER(TABLE_BYTES, 16) : 16];
    u8 slots[WARPS][SLOT_BYTES];             // a record in flight per warp; afterwards its partial result
    float pairs[ROWS][QUERY_STRIDE];         // queries without their start, as rotary pairs, divided by a power of two to at most 1
    u32 dense_query[DIM_CHUNKS][2][32][2];   // fragments of the queries as they came: high and low parts
    float norm[ROWS];                        // the powers of two
    float mean[ROWS];                        // plain frame: scores of the mean
    alignas(16) float weight[WARPS][ROWS];
    union {
        Pair32 next[WARPS][TRANSFORM_CHUNKS + 1][32];  // mapped queries of every warp's next run: fragments, then zero points
        alignas(16) float joined[STATE];               // when the steps are done
    };
    int last;
};

// Pairs in the type of exact tokens.
__device__ __forceinline__ u32 pack_exact(float low, float high) { return IS_BF16 ? pack_bf16(low, high) : pack_f16(low, high); }

// The i-th query of a lane, a row of the item. In a tile it has column 2c + i.
__device__ __forceinline__ int own_row(int i) { return COLUMNS * (threadIdx.x & 3) + i; }

// What one warp carries along.
struct State {
    float peak[COLUMNS], packed_mass[COLUMNS], dense_mass[COLUMNS];
    float planes[CV][4];
    float dense[DIM_CHUNKS][4];
};

__device__ __forceinline__ void start_state(State& st) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) st.peak[i] = NOTHING, st.packed_mass[i] = st.dense_mass[i] = 0.f;
#pragma unroll
    for (int c = 0; c < CV; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) st.planes[c][i] = 0.f;
#pragma unroll
    for (int c = 0; c < DIM_CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) st.dense[c][i] = 0.f;
}
