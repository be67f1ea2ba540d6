// Packed records to plain arrays, one side (K or V) per launch. Reference: unpack_planes, unpack_gains and gain_values of codec/layout.py.
//
// Definitions: KEY_PLANES, VALUE_PLANES (planes per token of a record, multiples of 16), IS_KEY (1: K, 0: V). P is the side's planes.
//
// Both kernels read records [rows, units, record bytes]: the records of a row are adjacent, rows are row_stride bytes apart, so the used part
// of a larger store can be read. records and row_stride must be multiples of 16. Any one-dimensional launch with enough threads will do.
#include "unpack.cuh"

#if !defined(KEY_PLANES) || !defined(VALUE_PLANES) || !defined(IS_KEY)
#error "define KEY_PLANES, VALUE_PLANES and IS_KEY"
#endif

using Record = RecordLayout<KEY_PLANES, VALUE_PLANES>;
constexpr int P = IS_KEY ? KEY_PLANES : VALUE_PLANES;
constexpr int CHUNKS = P / CHUNK_PLANES;
constexpr int CODES = IS_KEY ? Record::KEY_CODES : Record::VALUE_CODES;
constexpr int GAINS = IS_KEY ? Record::KEY_GAINS : Record::VALUE_GAINS;

__device__ __forceinline__ long long thread_index() { return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ __forceinline__ const unsigned char* record_of(const unsigned char* records, long long unit, long long units, long long row_stride) {
    return records + unit / units * row_stride + unit % units * Record::BYTES;
}

// planes [rows, units * 128, P]: codes 0..3 in token order. One thread per lane of a chunk: rows * units * CHUNKS * 32 threads.
extern "C" __global__ void decode_planes(const unsigned char* __restrict__ records, unsigned char* __restrict__ planes, long long rows, long long units,
                                         long long row_stride) {
    const long long i = thread_index();
    if (i >= rows * units * CHUNKS * 32) return;
    const int lane = static_cast<int>(i % 32);
    const int chunk = static_cast<int>(i / 32 % CHUNKS);
    const long long unit = i / (32 * CHUNKS);  // among all rows

    // [16] bytes of one lane
    const unsigned char* source = record_of(records, unit, units, row_stride) + CODES + chunk * CHUNK_BYTES + lane * LANE_BYTES;
    const uint4 loaded = *reinterpret_cast<const uint4*>(source);
    const unsigned words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};

    unsigned char* out = planes + unit * UNIT * P + chunk * CHUNK_PLANES;  // [128, 16] with stride P
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int j = 0; j < SUB_TILES; ++j) {
            const unsigned pair = code_pair(words[a], j) >> pair_shift(j);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const CodePlace place = code_place<IS_KEY>(lane, a, j, half);
                out[place.token * P + place.plane] = static_cast<unsigned char>(pair >> 16 * half);
            }
        }
    }
}

// gains [rows, units * 128] float32 in token order, 0 where the slot does not count. One thread per token: rows * units * 128 threads.
extern "C" __global__ void decode_gains(const unsigned char* __restrict__ records, float* __restrict__ gains, long long rows, long long units,
                                        long long row_stride) {
    const long long i = thread_index();
    if (i >= rows * units * UNIT) return;
    // [128] bytes of one side of a record
    const unsigned char* codes = record_of(records, i / UNIT, units, row_stride) + GAINS;
    gains[i] = gain_value(codes[gain_place(static_cast<int>(i % UNIT))]);
}
