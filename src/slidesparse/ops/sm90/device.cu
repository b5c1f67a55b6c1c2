// What the product for compute capability 9.0 is made of: sizes from its constants (gemm.cu names them), barriers, copies, and the sums' ways.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap { u64 words[16]; };
// Steps of a tile, features << 16 | tokens; how many clusters have left sums of it, or -1: this one leaves its own.
struct alignas(16) Item { u32 tile; int first, count, parts; };

constexpr int WARPGROUPS = 2, FEATURES = 64 * WARPGROUPS, CLUSTER = CLUSTER_FEATURES * CLUSTER_TOKENS;
constexpr int SIZE = TYPE < 2 ? 1 : 2;                        // bytes of a value
constexpr bool SCALED = TYPE < 2;
constexpr int DEPTH = 128, COLUMNS = DEPTH / SIZE;            // bytes of k' a stage
constexpr int VALUES = SPARSE ? 64 * DEPTH / 2 : 64 * DEPTH;  // bytes of values of 64 features a stage
constexpr int WORDS = 2 / SIZE;                               // of metadata, a thread and stage; one of 16-bit values is for two instructions
constexpr int BLOCK = SPARSE ? VALUES + 512 * WORDS : VALUES;
constexpr int X_BYTES = TOKENS * DEPTH, W_BYTES = WARPGROUPS * BLOCK, STAGE = X_BYTES + W_BYTES;
constexpr int CHUNK = 32, CHUNKS = TOKENS / CHUNK;            // tokens written at once
// Chunks of a warpgroup in shared memory. A tile begins with the first one again: their number divides that of a tile's chunks.
constexpr int BUFFERS = CHUNKS < 4 ? CHUNKS : SPARSE ? 4 : 2;
constexpr int CHUNK_BYTES = CHUNK * 128, OUT_BYTES = WARPGROUPS * BUFFERS * CHUNK_BYTES;
constexpr int INSTRUCTIONS = SPARSE ? 2 : 4;                  // a stage
constexpr int THREADS = 128 * (WARPGROUPS + 1);
constexpr int PART = 128 * TOKENS / 2 * 4;                    // bytes of the sums of a warpgroup
constexpr u64 KEEP_FIRST_OUT = 0x12F0000000000000ull;         // cache hint: evict first

#if TYPE == 0
typedef int Sum;
#define SUM "r"
#else
typedef float Sum;
#define SUM "f"
#endif

// Kernels that were launched to overlap with this one may be placed, and wait; and this one waits for the end of the kernel before it.
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// In another block of the cluster. A scope qualifier would make ptxas add a fence of the whole device.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile("{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}" ::"r"(barrier), "r"(rank)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred p;\nL%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D%=;\nbra L%=;\nD%=:\n}" ::"r"(barrier), "r"(phase)
      : "memory");
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 this_cluster() {  // read again where it is wanted: kept, it would take a register of the sums
  u32 found;
  if (CLUSTER > 1) asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(found));
  else asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(found));
  return found;
}
__device__ __forceinline__ void warpgroup_sync(int warpgroup) { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory"); }

// A matrix of rows of 128 bytes by a tensor copy, or a run of bytes, into this block or into all of `mask`.
__device__ __forceinline__ void copy_rows(u32 to, const TensorMap* map, int column, int row, u32 barrier, u16 mask) {
  if (mask == 0)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(
            to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
        : "memory");
}
__device__ __forceinline__ void copy_bytes(u32 to, const u8* from, u32 bytes, u32 barrier, u16 mask) {
  if (mask == 0)
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
                 "r"(barrier)
                 : "memory");
  else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
                 : "memory");
}

__device__ __forceinline__ u32 load_shared(u32 address) {
  u32 value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Not through the read-only cache: the kernel before may have been writing there when this one began.
__device__ __forceinline__ float load_global(const float* from) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}

// Matrix descriptors of wgmma: 8 rows `stride` bytes apart, swizzled in 128 bytes (1) or 64 (2).
__device__ __forceinline__ u64 descriptor(u32 address, u32 stride, u32 swizzle) {
  return (u64)((address & 0x3ffff) >> 4) | ((u64)1 << 16) | ((u64)(stride >> 4) << 32) | ((u64)swizzle << 62);
}
// Without this the compiler may read sums that are still being added to.
__device__ __forceinline__ void settle(Sum (&sums)[TOKENS / 2]) {
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+" SUM(sums[i])::"memory");
}
// Sums of a part of a tile, 16 bytes of each thread side by side.
__device__ __forceinline__ void leave(const Sum (&sums)[TOKENS / 2], u8* to) {
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to + j * 2048), SUM(sums[4 * j]), SUM(sums[4 * j + 1]), SUM(sums[4 * j + 2]),
                 SUM(sums[4 * j + 3])
                 : "memory");
}
__device__ __forceinline__ void add(Sum (&sums)[TOKENS / 2], const u8* from) {
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++) {
    Sum a, b, c, d;
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];" : "=" SUM(a), "=" SUM(b), "=" SUM(c), "=" SUM(d) : "l"(from + j * 2048) : "memory");
    sums[4 * j] += a;
    sums[4 * j + 1] += b;
    sums[4 * j + 2] += c;
    sums[4 * j + 3] += d;
    if (j % 8 == 7) __syncwarp();  // or ptxas loads more ahead than it has registers for
  }
}
__device__ __forceinline__ void raise(u8* flag, u64 launch) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(launch) : "memory");
}
__device__ __forceinline__ void take(u8* flag, u64 launch) {
  u64 found;
  do asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
  while (found != launch);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(0ull) : "memory");
}
// Two such loads are not merged: what the first gave need not be kept in registers.
__device__ __forceinline__ Item item_at(const Item* at) {
  Item found;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(found.tile), "=r"(found.first), "=r"(found.count), "=r"(found.parts) : "l"(at));
  return found;
}
__device__ __forceinline__ void delay() {
#if DELAY
  __nanosleep((clock() * 2654435761u >> 20) & 2047);
#endif
}
template <int LEFT> __device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ float scaled(Sum sum, float w_scale, float x_scale, float bias) {
  float y = (float)sum;
  if (SCALED) y = __fmul_rn(__fmul_rn(y, w_scale), x_scale);  // the order of slidesparse.reference.scaled
  return BIAS ? __fadd_rn(y, bias) : y;
}
__device__ __forceinline__ u32 rounded(float low, float high) {
  u32 pair;
#if OUT == 0
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}
__device__ __forceinline__ float bias_at(const void* bias, int row, int n) {
  if (!BIAS || row >= n) return 0.f;
  if (BIAS == 3) return __ldg((const float*)bias + row);
  u16 bits = __ldg((const u16*)bias + row);
  float value;
  if (BIAS == 1) return __uint_as_float((u32)bits << 16);
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
