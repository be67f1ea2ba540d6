// Names of sizes, and what is loaded at once.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define FULL_WARP 0xffffffffu

struct alignas(8) Pair32 { u32 x, y; };
struct alignas(8) Pairf { float x, y; };
struct alignas(16) Quad32 { u32 x, y, z, w; };
struct alignas(16) Float4 { float x, y, z, w; };
