// Single PTX instructions as functions: the only inline assembly of the package.

// 2^x. Relative error at most 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
