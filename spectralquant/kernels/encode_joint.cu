// The K-best search of codec/search.py and what it finds, packed (see encode.cuh for what is written): a thread searches for one token in one block of
// coordinates, with all eight paths in its registers.
//
// Further definitions: BLOCKS (of coordinates that are quantized jointly), SIDE (of them at the same time, a divisor of BLOCKS). A block of threads does a
// unit, 128 tokens times SIDE blocks of coordinates.
//
// With R the table of reach and c = s + 3/2 the codes, symbol p lies given the later ones at
//
//     c_p = b_p - sum_{q > p} R_pq c_q,      b_p = t_p + 3/2 + sum_{q > p} R_pq (t_q + 3/2)
//
// and b is the same for all paths: the coordinates times a matrix, and a constant. The sum has few values for two codes: one look-up in a table of sixteen,
// which a warp reads without conflicts. Metrics are compared as the upper 28 bits of a float, with the place of the candidate in the lower 4: no ties.
#include "encode.cuh"

#if !defined(BLOCKS) || !defined(SIDE)
#error "define BLOCKS and SIDE"
#endif

#define THREADS (UNIT * SIDE)
#define DB (D / BLOCKS)
#define PB (PLANES / BLOCKS)
#define PADDED ((DB + 3) / 4 * 4)
#define PAIRS (PB / 2)                     // of decided codes, at most
#define MOVES (PAIRS * PAIRS + PB % 2 * PAIRS)  // sum over the symbols of the pairs decided before
#define PATHS 8
#define GROWING 3  // symbols until there are eight paths
#define WORDS ((PB + 15) / 16)
#define ROUND 12582912.f  // 1.5 * 2^23: a small float plus this has the bits ROUND_BITS plus the nearest integer
#define ROUND_BITS 0x4b400000u

static_assert(PB > 1 && BLOCKS % SIDE == 0, "pairs of symbols, and all blocks alike");

// Constants of one block of one head, in the order of codec/encode_cuda.py. Symbols come in the order in which they are decided, the last plane first.
struct Tables {
    alignas(64) float moves[MOVES][16];  // - R_pq c_q - R_pr c_r; entry c_q + 4 c_r, q = p + 1 + 2j, r = q + 1 for pair j; symbol by symbol
    float filters[PB][PADDED];           // from coordinates of unit variance over rms to b
    float rows[PB][PADDED];              // codebook in units of the spectrum; in order of planes
    float steps[PB][2];                  // constant of b less 1/2, weight of a squared distance
    float scale[PADDED], kept[PADDED];   // standard deviations; the same, 0 for coordinates that the gain is not taken from
    float ridge[4];
};

// The codes that a path has decided, two bits each, the latest lowest.
struct alignas(WORDS % 4 == 0 ? 16 : WORDS % 2 == 0 ? 8 : 4) Codes { u32 words[WORDS]; };

struct Shared {
    Tables tables[SIDE];
    Codes paths[PATHS][THREADS];
    u32 codes[BLOCKS][WORDS][UNIT];
    float sums[3][SIDE][UNIT];
};

__device__ __forceinline__ Codes followed_by(const Codes& codes, u32 code) {
    Codes out;
#pragma unroll
    for (int w = WORDS - 1; w > 0; w--) out.words[w] = codes.words[w] << 2 | codes.words[w - 1] >> 30;
    out.words[0] = 4 * codes.words[0] + code;
    return out;
}

// One of the decided codes' sums of a symbol; `table` is the address in shared memory of its moves, a multiple of 64.
template <int PAIR>
__device__ __forceinline__ float move_of(const Codes& codes, u32 table) {
    const u32 word = codes.words[PAIR / 8];
    constexpr int SHIFT = 4 * (PAIR % 8) - 2;
    return load_shared((SHIFT < 0 ? word << 2 : word >> SHIFT) & 0x3c | table, 64 * PAIR);
}

// The two symbols nearest to where a path's codes put the next one: the smaller one's code plus ROUND_BITS, and the metrics that the path would have. `place` is b and the
// moves: 1/2 below the place in codes, so that it is rounded to the smaller code. What the ridge adds to distances is taken off: 2.25 - s^2 = c (3 - c), so that
// no metric falls.
struct Choice {
    u32 low;
    float metric[2];
};
__device__ __forceinline__ Choice nearest_two(float place, float metric, float weight, float ridge) {
    const float rounded = fminf(fmaxf(place, 0.f), 2.f) + ROUND, low = rounded - ROUND, off = low - place, near = off - 0.5f;
    const float first = fmaf(fmaf(-ridge, low, 3.f * ridge), low, fmaf(weight * near, near, metric));
    const float second = first + fmaf(2.f * weight, off, fmaf(-2.f * ridge, low, 2.f * ridge));
    return {__float_as_uint(rounded), {first, second}};
}

__device__ __forceinline__ void order(int& a, int& b) {
    const int least = min(a, b);
    b = max(a, b), a = least;
}

// Batcher's odd-even merge sort, ascending.
__device__ __forceinline__ void sort_eight(int (&k)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) order(k[i], k[i + 1]), order(k[i + 2], k[i + 3]), order(k[i], k[i + 2]), order(k[i + 1], k[i + 3]), order(k[i + 1], k[i + 2]);
#pragma unroll
    for (int i = 0; i < 4; i++) order(k[i], k[i + 4]);
    order(k[2], k[4]), order(k[3], k[5]);
    order(k[1], k[2]), order(k[3], k[4]), order(k[5], k[6]);
}

// A token's search in one block of coordinates.
struct Search {
    const Tables& tables;
    Codes (&shared)[PATHS][THREADS];
    float inverse_rms;
    float x[PADDED];  // coordinates of unit variance
    Codes codes[PATHS];
    float metrics[PATHS];

    // b of a symbol.
    __device__ __forceinline__ float target(int symbol) const {
        float sums[4] = {};
#pragma unroll
        for (int k = 0; k < PADDED; k += 4) {
            const Float4 f = *(const Float4*)&tables.filters[symbol][k];
            sums[0] = fmaf(x[k], f.x, sums[0]), sums[1] = fmaf(x[k + 1], f.y, sums[1]);
            sums[2] = fmaf(x[k + 2], f.z, sums[2]), sums[3] = fmaf(x[k + 3], f.w, sums[3]);
        }
        return fmaf((sums[0] + sums[1]) + (sums[2] + sums[3]), inverse_rms, tables.steps[symbol][0]);
    }

    template <int ALIVE, int PAIR>
    __device__ __forceinline__ void add_moves(float (&places)[PATHS], int symbol, u32 table) const {
        if constexpr (PAIR < PAIRS) {
            if (2 * PAIR >= symbol) return;
#pragma unroll
            for (int i = 0; i < ALIVE; i++) places[i] += move_of<PAIR>(codes[i], table);
            add_moves<ALIVE, PAIR + 1>(places, symbol, table);
        }
    }

    template <int ALIVE>
    __device__ __forceinline__ void choose(Choice (&choices)[PATHS], int symbol, u32 table) const {
        float places[PATHS];
        const float b = target(symbol), weight = tables.steps[symbol][1], ridge = tables.ridge[0];
#pragma unroll
        for (int i = 0; i < ALIVE; i++) places[i] = b;
        add_moves<ALIVE, 0>(places, symbol, table);
#pragma unroll
        for (int i = 0; i < ALIVE; i++) choices[i] = nearest_two(places[i], metrics[i], weight, ridge);
    }

    // The first symbols: every continuation stays.
    template <int SYMBOL>
    __device__ __forceinline__ u32 grow(u32 table) {
        if constexpr (SYMBOL < GROWING && SYMBOL < PB) {
            constexpr int ALIVE = 1 << SYMBOL;
            Choice choices[PATHS];
            choose<ALIVE>(choices, SYMBOL, table);
#pragma unroll
            for (int i = ALIVE - 1; i >= 0; i--)
#pragma unroll
                for (int k = 1; k >= 0; k--) codes[2 * i + k] = followed_by(codes[i], choices[i].low - ROUND_BITS + k), metrics[2 * i + k] = choices[i].metric[k];
            return grow<SYMBOL + 1>(table + 64 * ((SYMBOL + 1) / 2));
        }
        return table;
    }

    // A later symbol: the best eight of sixteen continuations. Of two sorted lists, one backwards, the smaller of every pair are the smallest of all. Which
    // paths go on is known at run time only, so codes go through shared memory.
    __device__ __forceinline__ void step(int symbol, u32 table) {
        Choice choices[PATHS];
        choose<PATHS>(choices, symbol, table);
        int keys[2][PATHS];
#pragma unroll
        for (int i = 0; i < PATHS; i++) {
#pragma unroll
            for (int k = 0; k < 2; k++) keys[k][i] = (int)(__float_as_uint(choices[i].metric[k]) & ~15u | 2 * i + k);
            shared[i][threadIdx.x] = followed_by(codes[i], choices[i].low);
        }
        sort_eight(keys[0]), sort_eight(keys[1]);
#pragma unroll
        for (int i = 0; i < PATHS; i++) {
            const int kept = min(keys[0][i], keys[1][PATHS - 1 - i]);
            codes[i] = shared[kept >> 1 & 7][threadIdx.x];
            codes[i].words[0] += (kept & 1) - ROUND_BITS;
            metrics[i] = __uint_as_float(kept);
        }
    }

    __device__ __forceinline__ Codes run() {
        codes[0] = {}, metrics[0] = 0.f;
        u32 table = grow<0>(shared_address(tables.moves));
#pragma unroll 1  // code must fit the instruction cache
        for (int symbol = GROWING; symbol < PB; symbol++) {
            step(symbol, table);
            table += 64 * ((symbol + 1) / 2);
        }
        Codes best = codes[0];
        float least = metrics[0];
#pragma unroll
        for (int i = 1; i < (PB < GROWING ? 1 << PB : PATHS); i++)
            if (metrics[i] < least) best = codes[i], least = metrics[i];
        return best;
    }
};

// <z, z>, <z, q> and <q, q> of a vector and its quantized shape.
struct Sums { float zz, cross, qq; };

__device__ __forceinline__ void add_sums(Sums& to, const float (&x)[PADDED], Codes codes, const Tables& tables) {
    float q[PADDED] = {};
#pragma unroll 1
    for (int p = 0; p < PB; p++) {
        const float symbol = (float)(codes.words[0] & 3) - 1.5f;
#pragma unroll
        for (int w = 0; w < WORDS; w++) codes.words[w] = codes.words[w] >> 2 | (w + 1 < WORDS ? codes.words[w + 1] << 30 : 0);
#pragma unroll
        for (int k = 0; k < PADDED; k += 4) {
            const Float4 row = *(const Float4*)&tables.rows[p][k];
            q[k] = fmaf(symbol, row.x, q[k]), q[k + 1] = fmaf(symbol, row.y, q[k + 1]);
            q[k + 2] = fmaf(symbol, row.z, q[k + 2]), q[k + 3] = fmaf(symbol, row.w, q[k + 3]);
        }
    }
#pragma unroll
    for (int k = 0; k < PADDED; k++) {
        const float z = x[k] * tables.kept[k];
        to.zz += z * z, to.cross += z * q[k], to.qq += q[k] * q[k];
    }
}

// u [rows, units, D, 128]; index [BLOCKS, DB]: coordinates of the blocks; kept [heads, D]; tables [heads, BLOCKS].
extern "C" __global__ void __launch_bounds__(THREADS) encode_joint(
    const float* __restrict__ u,
    const i64* __restrict__ index,
    const u8* __restrict__ kept,
    const Tables* __restrict__ tables,
    u8* records,
    u8* gains,
    i64 units,
    i64 row_stride,
    i64 record_bytes,
    i64 heads) {
    alignas(64) extern __shared__ u8 shared[];
    Shared& sm = *(Shared*)shared;
    const int side = threadIdx.x / UNIT, token = threadIdx.x % UNIT;
    const i64 row = blockIdx.x / units, unit = blockIdx.x % units, head = row % heads;
    u += (row * units + unit) * UNIT * D + token, kept += head * D, tables += head * BLOCKS;
    float square = 0.f, count = 0.f;
#pragma unroll 8
    for (int i = 0; i < D / SIDE; i++) {
        const int d = side * (D / SIDE) + i;
        const float x = u[d * UNIT], counts = kept[d];
        square = fmaf(counts * x, x, square), count += counts;
    }
    sm.sums[0][side][token] = square, sm.sums[1][side][token] = count;
    __syncthreads();
    square = count = 0.f;
#pragma unroll
    for (int i = 0; i < SIDE; i++) square += sm.sums[0][i][token], count += sm.sums[1][i][token];
    Search search{sm.tables[side], sm.paths, 1.f / fmaxf(sqrtf(square / count), EPS)};
    Sums sums = {};
#pragma unroll 1
    for (int first = 0; first < BLOCKS; first += SIDE) {
        const int block = first + side;
        __syncthreads();
        for (int i = token; i < sizeof(Tables) / 16; i += UNIT) copy16_async(shared_address((Quad32*)&sm.tables[side] + i), (const Quad32*)&tables[block] + i);
        commit_copies();
#pragma unroll
        for (int k = 0; k < PADDED; k++) search.x[k] = k < DB ? u[index[block * DB + k] * UNIT] : 0.f;
        wait_copies<0>();
        __syncthreads();
        const Codes found = search.run();
        add_sums(sums, search.x, found, sm.tables[side]);
#pragma unroll
        for (int w = 0; w < WORDS; w++) sm.codes[block][w][token] = found.words[w];
    }
    __syncthreads();
    sm.sums[0][side][token] = sums.zz, sm.sums[1][side][token] = sums.cross, sm.sums[2][side][token] = sums.qq;
    __syncthreads();
    if (side == 0) {
        Sums all = {};
#pragma unroll
        for (int i = 0; i < SIDE; i++) all.zz += sm.sums[0][i][token], all.cross += sm.sums[1][i][token], all.qq += sm.sums[2][i][token];
        gains[(row * units + unit) * UNIT + token] = (u8)nearest_gain(fitted_gain(all.zz, all.cross, all.qq));
    }
    write_codes<THREADS>(records + row * row_stride + unit * record_bytes, [&](int token, int plane) {
        const int p = plane % PB;
        return sm.codes[plane / PB][p / 16][token] >> 2 * (p % 16) & 3;
    });
}
