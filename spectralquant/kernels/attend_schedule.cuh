// Which steps a block takes, computed from lengths in device memory. An item is a sequence for one row group of a head; items are in order of head, row
// group and sequence. There are two ways to share them out, and the one that should end first is taken:
//
//   parts   every item is cut into equal parts, and every block takes as many parts as any other: it starts few items, most often one
//   line    the steps of all items form one line, and every block takes an equal stretch of it: none idles, whatever the lengths
//
// Units of nothing but left padding are no steps: a short sequence beside long ones costs what it holds.
//
// What covers an item only in part leaves a partial result. Those of an item are left by blocks that follow each other. Numbers of steps have 32 bits: the host
// refuses more (attention/cuda.py).
#include "attend_shapes.cuh"

#define START_STEPS 32  // what it takes a block to start and to leave an item, in steps

// Steps first .. last - 1 of the `count` of an item, the packed ones before the dense ones.
struct Stretch {
    int head, row_group, batch, first, last, count;
    int place;  // of the sequence in the queries and in the output
    int units, raw, start, skipped;  // skipped: units before the first step
    int first_block, blocks;  // that share the item
};

struct Schedule {
    int steps, parts;  // of all sequences for one head and row group; parts 0: line
    int cut;           // parts for a head and row group that its sequences share
    u32 at, end;       // what this block has still to take, on the line or in the list of parts
    u32 share;         // what a block takes
};

__device__ __forceinline__ int skipped_units(i64 start, int units) { return (int)min(start / 128, (i64)units); }

#if USE_PAGES
__device__ __forceinline__ i64 start_of(const Arguments&, int) { return 0; }
__device__ __forceinline__ int place_of(const Arguments& a, int b) { return (int)a.tokens[b]; }
__device__ __forceinline__ int exact_rows(const Arguments& a, int units) { return units * a.exact; }

// The page of a unit of a sequence, or any other page where it has none.
__device__ __forceinline__ const u8* page_of(const Arguments& a, const Stretch& s, int unit) {
    return a.pages + a.page_table[s.batch * a.table_stride + max(min(unit, s.units - 1), 0)] * a.page_stride;
}
#else
__device__ __forceinline__ i64 start_of(const Arguments& a, int b) { return a.start[b]; }
__device__ __forceinline__ int place_of(const Arguments&, int b) { return b; }
__device__ __forceinline__ int exact_rows(const Arguments& a, int) { return a.exact; }
#endif

__device__ __forceinline__ int steps_of(const Arguments& a, int b, int& units, int& raw) {
    units = b < a.batch ? a.lengths[2 * b] : 0;
    raw = b < a.batch ? a.lengths[2 * b + 1] : 0;
    const i64 start = b < a.batch ? start_of(a, b) : 0;
    return units + raw ? units - skipped_units(start, units) + (exact_rows(a, units) + TILE - 1) / TILE + (raw + TILE - 1) / TILE : 0;
}

__device__ __forceinline__ int parts_of(int count, const Schedule& p) { return count == p.steps ? max(1, p.cut) : count ? max(1u, (u32)p.cut * count / p.steps) : 0; }

__device__ __forceinline__ int ceil_div(int x, int y) { return (x + y - 1) / y; }

// By a whole warp.
__device__ Schedule make_schedule(const Arguments& a) {
    Schedule p;
    const int lane = threadIdx.x & 31, blocks = gridDim.x;
    int units, raw, steps = 0, sequences = 0, longest = 0;
#pragma unroll 1
    for (int b = lane; b < a.batch; b += 32) {
        const int count = steps_of(a, b, units, raw);
        steps += count, sequences += count > 0, longest = max(longest, count);
    }
    p.steps = warp_sum(steps), p.parts = warp_sum(sequences), longest = warp_max(longest);
    const int lines = a.heads * a.row_groups, starts_of_one = p.parts;
    p.cut = min(a.blocks_per_line, p.steps);  // parts of no steps would all begin an item
    if (p.parts == 1) {
        if (p.cut > 1) p.parts = p.cut, longest = ceil_div(longest, p.cut);
    } else if (p.parts && p.cut > 1) {
        int parts = 0, part = 0;
#pragma unroll 1
        for (int b = lane; b < a.batch; b += 32) {
            const int count = steps_of(a, b, units, raw), n = parts_of(count, p);
            parts += n, part = max(part, n ? ceil_div(count, n) : 0);
        }
        parts = warp_sum(parts);
        if (parts <= p.cut) p.parts = parts, longest = warp_max(part);
    }
    if (p.parts == starts_of_one) p.cut = 0;  // whole items
    const u32 all = (u32)p.steps * lines, stretch = (all + blocks - 1) / blocks, per_block = ceil_div(p.parts * lines, blocks);
    const u32 starts = 2 + (p.steps ? stretch * starts_of_one / p.steps : 0);  // of a block on the line
    const bool line = per_block * (longest + START_STEPS) > stretch + starts * START_STEPS;
    p.share = line ? stretch : per_block;
    p.at = blockIdx.x * p.share, p.end = min(p.at + p.share, line ? all : (u32)p.parts * lines);
    if (line) p.parts = 0;
    return p;
}

// The next stretch of this block, if there is one. By a whole warp.
__device__ bool next_stretch(const Arguments& a, Schedule& p, Stretch& s) {
    if (p.at >= p.end) return false;
    const int lane = threadIdx.x & 31, per_item = p.parts ? p.parts : p.steps, item = p.at / (u32)per_item;
    int rest = p.at - item * per_item;
    s.head = item / a.row_groups, s.row_group = item - s.head * a.row_groups;
#pragma unroll 1
    for (int base = 0;; base += 32) {
        int units, raw;
        const int count = steps_of(a, base + lane, units, raw), own = p.parts ? parts_of(count, p) : count;
        int sum = own;
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
            rest -= __shfl_sync(FULL_WARP, sum - own, at);
            break;
        }
        rest -= __shfl_sync(FULL_WARP, sum, 31);
    }
    s.place = place_of(a, s.batch), s.start = (int)start_of(a, s.batch), s.skipped = skipped_units(s.start, s.units);
    if (p.parts) {
        s.blocks = parts_of(s.count, p), s.first_block = blockIdx.x - rest;
        s.first = (u32)s.count * rest / s.blocks, s.last = (u32)s.count * (rest + 1) / s.blocks;
        p.at++;
    } else {
        const u32 begin = p.at - rest;  // of the item on the line
        s.first_block = begin / p.share, s.blocks = (begin + s.count - 1) / p.share - s.first_block + 1;
        s.first = rest, s.last = min((u32)s.count, rest + p.end - p.at);
        p.at += s.last - s.first;
    }
    return true;
}
