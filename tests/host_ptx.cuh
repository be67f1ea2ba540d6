// ptx.cuh on the host, instruction by instruction (see host_device.hpp).
#include "types.cuh"

static float exp2_approx(float x) { return exp2f(x); }
static float half_value(u16 bits) { _Float16 h; std::memcpy(&h, &bits, 2); return (float)h; }
static float bf16_value(u16 bits) { return __uint_as_float((u32)bits << 16); }
static u16 half_bits(float x) { const _Float16 h = (_Float16)x; u16 bits; std::memcpy(&bits, &h, 2); return bits; }
static u16 bf16_bits(float x) { const u32 b = __float_as_uint(x); return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16); }
static u32 pack_f16(float low, float high) { return half_bits(low) | (u32)half_bits(high) << 16; }
static u32 pack_bf16(float low, float high) { return bf16_bits(low) | (u32)bf16_bits(high) << 16; }
static void unpack_f16(u32 x, float& low, float& high) { low = half_value((u16)x), high = half_value((u16)(x >> 16)); }
static void unpack_bf16(u32 x, float& low, float& high) { low = bf16_value((u16)x), high = bf16_value((u16)(x >> 16)); }

struct Operands { u32 a[4], b[2]; };

static void multiply(float (&c)[4], const Operands& mine, float (*value)(u16)) {
    const auto box = exchange(mine);
    const unsigned lane = threadIdx.x % 32, r = lane / 4, col = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const unsigned row = r + 8 * (i >> 1), column = 2 * col + (i & 1);
        float sum = 0;
        for (unsigned k = 0; k < 16; ++k) {
            const u32 a = from<Operands>(box, 4 * (row % 8) + k % 8 / 2).a[row / 8 + 2 * (k / 8)];
            const u32 b = from<Operands>(box, 4 * column + k % 8 / 2).b[k / 8];
            sum += value((u16)(a >> 16 * (k & 1))) * value((u16)(b >> 16 * (k & 1)));
        }
        c[i] += sum;
    }
    release();
}
static void mma_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { multiply(c, {{a0, a1, a2, a3}, {b0, b1}}, half_value); }
static void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { multiply(c, {{a0, a1, a2, a3}, {b0, b1}}, bf16_value); }

static u32 transposed(u32 x) {
    const auto box = exchange(x);
    const unsigned lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
    u32 out = 0;
    for (unsigned half = 0; half < 2; ++half) out |= (from<u32>(box, 4 * (2 * c + half) + r / 2) >> 16 * (r & 1) & 0xffff) << 16 * half;
    release();
    return out;
}

static u32 shared_address(const void* p) { return (u32)((const u8*)p - shared); }
static void copy16_async(u32 to, const void* from_global) { std::memcpy(shared + to, from_global, 16); }
static void commit_copies() {}
template <int PENDING> static void wait_copies() {}
static Quad32 load_shared16(u32 address) { Quad32 v; std::memcpy(&v, shared + address, 16); return v; }
static float load_shared(u32 address, int offset) { float v; std::memcpy(&v, shared + address + offset, 4); return v; }
static float load_global(const float* p) { return *p; }
static Float4 load_global16(const float* p) { return *(const Float4*)p; }
static int warp_sum(int x) {
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(FULL_WARP, x, k);
    return x;
}
static int warp_max(int x) {
    for (int k = 16; k; k >>= 1) x = max(x, __shfl_xor_sync(FULL_WARP, x, k));
    return x;
}
static void store_global16(float* p, const Float4& v) { *(Float4*)p = v; }
static void store_global(float* p, float v) { *p = v; }
static int atomic_add_ordered(int* p, int x) { const int before = *p; *p += x; return before; }
