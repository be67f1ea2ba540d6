// The one device-side reader of the packed layout: docs/format.md, section 1, and codec/layout.py are the specification.
//
// A unit is 128 tokens of one KV head, a plane 2 bits per token, a chunk 16 planes of a unit: 512 bytes, 16 per lane of a warp. With
// lane = 4 r + c, word = 2 a1 + a0 and sub-tile j of 16 tokens, the two codes (half = 0, 1) at bits 16 half + 2 j of a word are
//
//     K:  token = 16 j + 8 a0 + r              plane = 8 a1 + 2 c + half
//     V:  token = 16 j + 8 a1 + 2 c + half     plane = 8 a0 + r
//
// The four words of a lane are the four A registers of mma.m16n8k16, in order.
#include "ptx.cuh"

constexpr int UNIT = 128;
constexpr int SUB_TILES = 8;
constexpr int CHUNK_PLANES = 16;
constexpr int CHUNK_BYTES = 512;
constexpr int LANE_BYTES = 16;
constexpr int GAIN_OFFSET = 128;
constexpr float GAIN_STEPS = 8.0f;

// Byte offsets of the parts of a record. All are multiples of 16, and so is the size.
template <int P_K, int P_V>
struct RecordLayout {
    static_assert(P_K > 0 && P_V > 0 && P_K % CHUNK_PLANES == 0 && P_V % CHUNK_PLANES == 0, "planes come in chunks of 16");
    static constexpr int KEY_CODES = 0;
    static constexpr int KEY_GAINS = P_K / CHUNK_PLANES * CHUNK_BYTES;
    static constexpr int VALUE_CODES = KEY_GAINS + UNIT;
    static constexpr int VALUE_GAINS = VALUE_CODES + P_V / CHUNK_PLANES * CHUNK_BYTES;
    static constexpr int BYTES = VALUE_GAINS + UNIT;
};

// Place of a code's low bit in each half of what code_pair returns. Five sub-tiles fit the 10 bits of an fp16 mantissa; the other three are
// brought down by 10 bits.
__device__ __forceinline__ constexpr int pair_shift(int j) { return 2 * (j < 5 ? j : j - 5); }

// The two codes of sub-tile j of a word, code << pair_shift(j) in the low and the high 16 bits. Read as fp16x2 these are the subnormals
// code * 2^(pair_shift(j) - 24): tensor core operands as they are. With j known at compile time this is one AND (and a shift shared by
// j = 5..7).
__device__ __forceinline__ unsigned code_pair(unsigned word, int j) {
    const unsigned mask = 0x00030003u << pair_shift(j);
    return (j < 5 ? word : word >> 10) & mask;
}

// Token and plane (in its chunk) of the code that `half` of code_pair(word number `a` of `lane`, j) holds.
struct CodePlace {
    int token;
    int plane;
};

template <bool KEY>
__device__ __forceinline__ constexpr CodePlace code_place(int lane, int a, int j, int half) {
    const int row = 8 * (a % 2) + lane / 4;
    const int k = 8 * (a / 2) + 2 * (lane % 4) + half;
    return KEY ? CodePlace{16 * j + row, k} : CodePlace{16 * j + k, row};
}

// The other way round: the byte of a token's code of a plane in the codes of a unit, and its lower bit.
template <bool KEY>
__device__ __forceinline__ int code_byte(int token, int plane) {
    const int sub = token / 16, row = KEY ? token % 16 : plane % CHUNK_PLANES, k = KEY ? plane % CHUNK_PLANES : token % 16;
    const int lane = 4 * (row % 8) + k % 8 / 2, word = 2 * (k / 8) + row / 8;
    return plane / CHUNK_PLANES * CHUNK_BYTES + lane * LANE_BYTES + word * 4 + k % 2 * 2 + sub / 4;
}

__device__ __forceinline__ int code_shift(int token) { return token / 16 % 4 * 2; }

// Place of a token's byte in the 128 gains of one side: the 8 sub-tiles of a fragment row are adjacent.
__device__ __forceinline__ constexpr int gain_place(int token) { return 16 * (token % 8) + 8 * (token / 8 % 2) + token / 16; }

// 2^((code - 128) / 8); code 0 is a slot that does not count and gives 0.
__device__ __forceinline__ float gain_value(unsigned code) {
    return code == 0 ? 0.0f : exp2_approx((static_cast<int>(code) - GAIN_OFFSET) / GAIN_STEPS);
}

// log2 of the gain in byte i of a word, (code - 128) / 8, and a small integer; exact: 2^23 + code is a float, an eighth of it too.
__device__ __forceinline__ float log2_gain(u32 word, int i, int plus = 0) {
    const u32 as_float = __byte_perm(word, 0x4b000000u, 0x7650 | i) ;
    return fmaf(__uint_as_float(as_float), 0.125f, plus - 1048592.f);
}
