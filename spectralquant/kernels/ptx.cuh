// Single PTX instructions as functions: the only inline assembly of the package.
#include "types.cuh"

// 2^x. Relative error at most 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Fragments of mma.m16n8k16 (A 16 x 16, B 16 x 8, C 16 x 8), lane = 4 r + c with r in 0..7 and c in 0..3:
//   A  register 0: row r,     k 2c, 2c + 1        B  register 0: k 2c, 2c + 1,         column r      C  0, 1: row r,     columns 2c, 2c + 1
//      register 1: row r + 8, k 2c, 2c + 1           register 1: k 2c + 8, 2c + 9,     column r         2, 3: row r + 8, columns 2c, 2c + 1
//      register 2: row r,     k 2c + 8, 2c + 9
//      register 3: row r + 8, k 2c + 8, 2c + 9
__device__ __forceinline__ void mma_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of half words, row r in lanes 4 r .. 4 r + 3, becomes its transpose.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(y) : "r"(x));
    return y;
}

// Two floats as a pair of half words, `low` in the low one.
__device__ __forceinline__ u32 pack_f16(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

__device__ __forceinline__ void unpack_f16(u32 x, float& low, float& high) {
    asm("{.reg .b16 l,h; mov.b32 {l,h},%2; cvt.f32.f16 %0,l; cvt.f32.f16 %1,h;}" : "=f"(low), "=f"(high) : "r"(x));
}

__device__ __forceinline__ void unpack_bf16(u32 x, float& low, float& high) {
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xffff0000u);
}

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void copy16_async(u32 to_shared, const void* from_global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(to_shared), "l"(from_global) : "memory");
}

__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `PENDING` of the groups committed last are still in flight.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ Quad32 load_shared16(u32 address) {
    Quad32 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
    return v;
}

__device__ __forceinline__ int warp_sum(int x) {
    int y;
    asm volatile("redux.sync.add.s32 %0,%1,0xffffffff;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ int warp_max(int x) {
    int y;
    asm volatile("redux.sync.max.s32 %0,%1,0xffffffff;" : "=r"(y) : "r"(x));
    return y;
}

// The float at `address + offset` in shared memory; the offset is known at compile time.
__device__ __forceinline__ float load_shared(u32 address, int offset) {
    float v;
    asm volatile("ld.shared.f32 %0,[%1];" : "=f"(v) : "r"(address + offset));
    return v;
}

// Reads and writes that other blocks take part in: through the L2, past the L1.
__device__ __forceinline__ float load_global(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0,[%1];" : "=f"(v) : "l"(p));
    return v;
}

__device__ __forceinline__ Float4 load_global16(const float* p) {
    Float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3},[%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ void store_global(float* p, float v) {
    asm volatile("st.global.cg.f32 [%0],%1;" ::"l"(p), "f"(v) : "memory");
}

__device__ __forceinline__ void store_global16(float* p, const Float4& v) {
    asm volatile("st.global.cg.v4.f32 [%0],{%1,%2,%3,%4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// Adds to a number that all blocks see, and returns what was there. What the thread wrote or had seen before is seen after it, on both sides.
__device__ __forceinline__ int atomic_add_ordered(int* p, int x) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0,[%1],%2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}
