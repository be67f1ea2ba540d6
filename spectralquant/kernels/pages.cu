// How much of every sequence of a paged cache is read by its codes, and how many tokens follow that are exact, the new one last: what attend.cu reads as
// lengths. Reference: `PagedLayer.packed_units` (paged/layer.py).
#include "types.cuh"

#define THREADS 256

// pages [*, page_stride] bytes, the serial number of each at `serial`; before, after [B]: tokens before and after this step; read_pages, copies [B, 2]: the last
// page that was full before it and the one after, and their exact copies, -1: none; serials [*]: those of all copies. Writes lengths [B, 2], zeros for a
// sequence without a new token, and zeros to tickets.
extern "C" __global__ void __launch_bounds__(THREADS) count_units(
    const u8* __restrict__ pages,
    const i64* __restrict__ before,
    const i64* __restrict__ after,
    const i64* __restrict__ read_pages,
    const i64* __restrict__ copies,
    const i64* __restrict__ serials,
    int* lengths,
    int* tickets,
    i64 page_stride,
    i64 serial,
    i64 batch,
    i64 ticket_count) {
    const i64 first = (i64)blockIdx.x * THREADS + threadIdx.x, stride = (i64)gridDim.x * THREADS;
    for (i64 i = first; i < ticket_count; i += stride) tickets[i] = 0;
    for (i64 b = first; b < batch; b += stride) {
        bool missing[2];
        for (int i = 0; i < 2; i++) {
            const i64 page = read_pages[2 * b + i], copy = copies[2 * b + i];
            const i64 drawn = page >= 0 ? *(const i64*)(pages + page * page_stride + serial) : 0;
            missing[i] = page >= 0 && !(copy >= 0 && drawn > 0 && drawn == serials[copy]);
        }
        const i64 full = before[b] / 128;
        i64 units = missing[0] ? full : max(full - 1, (i64)0);
        if (missing[1]) units = full + 1;
        const bool there = after[b] > before[b];
        lengths[2 * b] = there ? (int)units : 0;
        lengths[2 * b + 1] = there ? (int)max(before[b] - 128 * units + 1, (i64)0) : 0;
    }
}
