// Softmax over steps: running peaks, and the soft-cap.
#include "attend_shapes.cuh"

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
