// Keys or values as a model makes them to whitened coordinates: turned into the frame of their run, mean taken off, times a matrix, in one pass over memory.
// Reference: LayerCodec.centre_units and centre_values, and the product in SideCodec.encode, of codec/codec.py.
//
// Definitions: D (head size, a multiple of 16), DTYPE of x (0: float32, 1: float16, 2: bfloat16), RUN (tokens per run of the anchored frame, a multiple of 128;
// 0: nothing turns), PAIRS of coordinates that turn, INTERLEAVED (pairs are (2i, 2i + 1), else (i, i + PAIRS)), TRAJECTORY (1: the mean turns with the offset in
// the run), BY_COORDINATE (1: u is [rows, units, D, 128], else [rows, units, 128, D]), SIZES (1: |x|^2 is wanted).
//
// A block of threads does 128 tokens times up to 128 columns of the product, in float32 with eight by eight sums a thread. The inner dimension comes in slices of
// eight pairs of coordinates, what turns together; while one slice is multiplied, the next is on its way from memory. Launch rows * units * COLUMN_TILES blocks,
// column tiles fastest: they share x. `whiten_token` does few tokens of any positions, a block of threads for a token and head.
#include "unpack.cuh"

#if !defined(D) || !defined(DTYPE) || !defined(RUN) || !defined(PAIRS) || !defined(INTERLEAVED) || !defined(TRAJECTORY) || !defined(BY_COORDINATE) || !defined(SIZES)
#error "define D, DTYPE, RUN, PAIRS, INTERLEAVED, TRAJECTORY, BY_COORDINATE and SIZES"
#endif

#define THREADS 256
#define WARPS (THREADS / 32)
#define SLICE_PAIRS 8
#define SLICE (2 * SLICE_PAIRS)
#define SLICES (D / SLICE)
#define COLUMN_TILES ((D + 127) / 128)
#define COLUMNS ((D / 16 + COLUMN_TILES - 1) / COLUMN_TILES)  // of a thread
#define TILE (16 * COLUMNS)                                   // of a block
#define VECTOR (COLUMNS % 4 == 0 ? 4 : COLUMNS % 2 == 0 ? 2 : 1)
#define TOKENS 8  // of a thread
#define LOADED (UNIT / 4 / WARPS)  // tokens of which a thread loads a pair
#define PADDED (UNIT + 4)  // rows start in different banks
#define HALF_TURNS 0.31830988618379067154  // of a radian: 1 / pi

static_assert(D % SLICE == 0 && RUN % UNIT == 0, "slices tile the head, and units the runs");

struct Shared {
    alignas(16) float x[2][SLICE][PADDED];
    alignas(16) float matrix[2][SLICE][TILE];
    float cos[D / 2], sin[D / 2];  // of the turn into the frame
};

struct alignas(4 * VECTOR) Vector { float of[VECTOR]; };

struct Coordinates { int low, high; };

// The coordinates of a pair; those that do not turn are paired with their neighbour.
__device__ __forceinline__ Coordinates coordinates_of(int pair) {
    return INTERLEAVED || pair >= PAIRS ? Coordinates{2 * pair, 2 * pair + 1} : Coordinates{pair, pair + PAIRS};
}

#if DTYPE == 0
typedef float Element;
__device__ __forceinline__ float value_of(Element x) { return x; }
#else
typedef u16 Element;
__device__ __forceinline__ float value_of(Element x) {
    float low, high;
    DTYPE == 1 ? unpack_f16(x, low, high) : unpack_bf16(x, low, high);
    return low;
}
#endif

struct Pair { float low, high; };

__device__ __forceinline__ Pair turned(Pair p, float cos, float sin) { return {p.low * cos - p.high * sin, p.high * cos + p.low * sin}; }

// Rows of the matrix [D, D] that belong to a slice, columns `first` on.
__device__ __forceinline__ void copy_rows(float (&to)[SLICE][TILE], const float* matrix, int slice, int first) {
    constexpr int PIECES = TILE / 4;  // 16 bytes each
#pragma unroll
    for (int n = 0; n < (SLICE * PIECES + THREADS - 1) / THREADS; n++) {
        const int i = n * THREADS + threadIdx.x, row = i / PIECES, column = i % PIECES * 4;
        if (SLICE * PIECES % THREADS && row >= SLICE) break;
        const Coordinates c = coordinates_of(slice * SLICE_PAIRS + row % SLICE_PAIRS);
        if (D % TILE == 0 || first + column < D)
            copy16_async(shared_address(&to[row][column]), matrix + (row < SLICE_PAIRS ? c.low : c.high) * D + first + column);
        else
            *(Float4*)&to[row][column] = {0.f, 0.f, 0.f, 0.f};
    }
    commit_copies();
}

// sums[i][j] += x of the thread's token i times the matrix's column j, over a slice.
__device__ __forceinline__ void multiply(float (&sums)[TOKENS][COLUMNS], const float (&x)[SLICE][PADDED], const float (&matrix)[SLICE][TILE], int tokens, int columns) {
#pragma unroll 2  // more costs registers
    for (int k = 0; k < SLICE; k++) {
        const Float4 a = *(const Float4*)&x[k][4 * tokens], b = *(const Float4*)&x[k][UNIT / 2 + 4 * tokens];
        const float mine[TOKENS] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int j = 0; j < COLUMNS / VECTOR; j++) {
            const Vector m = *(const Vector*)&matrix[k][VECTOR * (columns + 16 * j)];
#pragma unroll
            for (int i = 0; i < TOKENS; i++)
#pragma unroll
                for (int v = 0; v < VECTOR; v++) sums[i][VECTOR * j + v] = fmaf(mine[i], m.of[v], sums[i][VECTOR * j + v]);
        }
    }
}

// x [rows = sequences * heads, units * 128, D] with strides in elements; matrix [heads, D, D]; mean [heads, D]; rates [PAIRS], radians per token; turns
// [2 D, RUN], cos and sin of coordinates at the offsets of a run; start [sequences], slots of left padding; *before units are in front of these.
// size [rows, units * 128].
extern "C" __global__ void __launch_bounds__(THREADS, 2) whiten(
    const Element* __restrict__ x,
    const float* __restrict__ matrix,
    const float* __restrict__ mean,
    const double* __restrict__ rates,
    const float* __restrict__ turns,
    const i64* __restrict__ start,
    const int* __restrict__ before,
    float* u,
    float* size,
    i64 sequence_stride,
    i64 head_stride,
    i64 token_stride,
    i64 heads,
    i64 units) {
    alignas(16) extern __shared__ u8 shared[];
    Shared& sm = *(Shared*)shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x % COLUMN_TILES * TILE;
    const i64 at = blockIdx.x / COLUMN_TILES, row = at / units, unit = at % units, head = row % heads;
    const int in_slice = lane % SLICE_PAIRS, token = 4 * warp + lane / SLICE_PAIRS;  // what this thread loads: a pair of the tokens token + 32 i
    x += row / heads * sequence_stride + head * head_stride + (unit * UNIT + token) * token_stride;
    matrix += head * D * D, mean += head * D;
    copy_rows(sm.matrix[0], matrix, 0, tile);
#if RUN
    const i64 slot = (*before + unit) * UNIT, anchor = slot / RUN * RUN - start[row / heads];
    turns += slot % RUN + token;
    for (int pair = threadIdx.x; pair < D / 2; pair += THREADS) {
        double sin = 0., cos = 1.;
        if (pair < PAIRS) sincospi(-(double)anchor * rates[pair] * HALF_TURNS, &sin, &cos);
        sm.cos[pair] = (float)cos, sm.sin[pair] = (float)sin;
    }
#endif
    Pair loaded[LOADED];
    float squares[LOADED] = {};
    auto load = [&](int slice) {
        const Coordinates c = coordinates_of(slice * SLICE_PAIRS + in_slice);
#pragma unroll
        for (int i = 0; i < LOADED; i++) {
            const Element* from = x + 4 * WARPS * i * token_stride;
            loaded[i] = {value_of(from[c.low]), value_of(from[c.high])};
        }
    };
    auto centre = [&](int slice, float (&to)[SLICE][PADDED]) {
        const int pair = slice * SLICE_PAIRS + in_slice;
        const Coordinates c = coordinates_of(pair);
        const Pair middle = {mean[c.low], mean[c.high]};
#pragma unroll
        for (int i = 0; i < LOADED; i++) {
            Pair p = loaded[i], m = middle;
            if (SIZES) squares[i] += p.low * p.low + p.high * p.high;
#if RUN
            p = turned(p, sm.cos[pair], sm.sin[pair]);
            if (TRAJECTORY) {
                const float* turn = turns + c.low * RUN + 4 * WARPS * i;
                m = turned(m, turn[0], turn[D * RUN]);
            }
#endif
            float* column = &to[in_slice][token + 4 * WARPS * i];
            column[0] = p.low - m.low, column[SLICE_PAIRS * PADDED] = p.high - m.high;
        }
    };
    load(0);
    __syncthreads();  // cos and sin
    const int tokens = warp % 4 * 4 + lane / 8, columns = warp / 4 * 8 + lane % 8;  // of 16 groups each
    float sums[TOKENS][COLUMNS] = {};
#pragma unroll 1
    for (int slice = 0; slice < SLICES; slice++) {
        const int now = slice % 2;
        centre(slice, sm.x[now]);
        wait_copies<0>();
        __syncthreads();  // this slice is there, and nobody reads the one before
        if (slice + 1 < SLICES) copy_rows(sm.matrix[1 - now], matrix, slice + 1, tile), load(slice + 1);
        multiply(sums, sm.x[now], sm.matrix[now], tokens, columns);
    }
    u += at * UNIT * D;
#pragma unroll
    for (int j = 0; j < COLUMNS / VECTOR; j++) {
        const int column = tile + VECTOR * (columns + 16 * j);
        if (D % TILE && column >= D) continue;
#if BY_COORDINATE
#pragma unroll
        for (int v = 0; v < VECTOR; v++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = 4 * half, c = VECTOR * j + v;
                *(Float4*)&u[(column + v) * UNIT + UNIT / 2 * half + 4 * tokens] = {sums[i][c], sums[i + 1][c], sums[i + 2][c], sums[i + 3][c]};
            }
#else
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            Vector out;
#pragma unroll
            for (int v = 0; v < VECTOR; v++) out.of[v] = sums[i][VECTOR * j + v];
            *(Vector*)&u[(UNIT / 2 * (i / 4) + 4 * tokens + i % 4) * D + column] = out;
        }
#endif
    }
    if (SIZES && tile == 0) {
#pragma unroll
        for (int i = 0; i < LOADED; i++) {
#pragma unroll
            for (int k = 1; k < SLICE_PAIRS; k <<= 1) squares[i] += __shfl_xor_sync(FULL_WARP, squares[i], k);
            if (in_slice == 0) size[at * UNIT + token + 4 * WARPS * i] = squares[i];
        }
    }
}

// x [tokens, heads, D] with strides in elements, at positions [tokens], one after another in `units` units of u and size; the rest as of `whiten`. Launch
// tokens * heads blocks with 6 D bytes of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) whiten_token(
    const Element* __restrict__ x,
    const float* __restrict__ matrix,
    const float* __restrict__ mean,
    const double* __restrict__ rates,
    const float* __restrict__ turns,
    const i64* __restrict__ positions,
    float* u,
    float* size,
    i64 token_stride,
    i64 head_stride,
    i64 heads,
    i64 units) {
    alignas(16) extern __shared__ u8 shared[];
    float *centred = (float*)shared, *squares = centred + D;  // [D], [D / 2]
    const i64 token = blockIdx.x / heads, head = blockIdx.x % heads;
    x += token * token_stride + head * head_stride, matrix += head * D * D, mean += head * D;
    for (int pair = threadIdx.x; pair < D / 2; pair += THREADS) {
        const Coordinates c = coordinates_of(pair);
        Pair p = {value_of(x[c.low]), value_of(x[c.high])}, m = {mean[c.low], mean[c.high]};
        squares[pair] = p.low * p.low + p.high * p.high;
#if RUN
        const i64 offset = positions[token] % RUN;
        double sin = 0., cos = 1.;
        if (pair < PAIRS) sincospi(-(double)(positions[token] - offset) * rates[pair] * HALF_TURNS, &sin, &cos);
        p = turned(p, (float)cos, (float)sin);
        if (TRAJECTORY) m = turned(m, turns[c.low * RUN + offset], turns[(D + c.low) * RUN + offset]);
#endif
        centred[c.low] = p.low - m.low, centred[c.high] = p.high - m.high;
    }
    __syncthreads();
    const i64 unit = token / UNIT, place = token % UNIT;
    for (int column = threadIdx.x; column < D; column += THREADS) {
        float sum = 0.f;
#pragma unroll 16
        for (int k = 0; k < D; k++) sum = fmaf(centred[k], matrix[k * D + column], sum);
        u[BY_COORDINATE ? ((head * units + unit) * D + column) * UNIT + place : ((head * units + unit) * UNIT + place) * D + column] = sum;
    }
    if (SIZES && threadIdx.x < 32) {
        float sum = 0.f;
        for (int pair = threadIdx.x; pair < D / 2; pair += 32) sum += squares[pair];
#pragma unroll
        for (int k = 1; k < 32; k <<= 1) sum += __shfl_xor_sync(FULL_WARP, sum, k);
        if (threadIdx.x == 0) size[(head * units + unit) * UNIT + place] = sum;
    }
}
