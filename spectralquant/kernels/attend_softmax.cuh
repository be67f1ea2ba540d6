// Softmax over steps: running peaks, and the soft-cap.
#include "attend_shapes.cuh"

// Raises the running peaks to at least x (per lane: of its rows); what is held shrinks. Rarely taken after the first steps.
template <bool DENSE>
__device__ __forceinline__ void raise_peak(State& st, float (&x)[COLUMNS]) {
    bool higher = false;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
        for (int k = 4; k < 32; k <<= 1) x[i] = fmaxf(x[i], __shfl_xor_sync(FULL_WARP, x[i], k));
        higher |= x[i] > st.peak[i];
    }
    if (!__any_sync(FULL_WARP, higher)) return;
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
        const float peak = fmaxf(st.peak[i], x[i]), shrink = exp2_approx(st.peak[i] - peak);
        st.peak[i] = peak, st.packed_mass[i] *= shrink;
#pragma unroll
        for (int c = 0; c < CV; c++) st.planes[c][i] *= shrink, st.planes[c][2 + i] *= shrink;
        if (DENSE) {
            st.dense_mass[i] *= shrink;
#pragma unroll
            for (int c = 0; c < DIM_CHUNKS; c++) st.dense[c][i] *= shrink, st.dense[c][2 + i] *= shrink;
        }
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
