// fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm90/bwd.cu.j2; edit the template or the spec, not this file.
//   problem  bwd, head dim 128, bf16, full mask, keys of an expression
//   tiling   64 query rows x 128 keys, 2 stages, 8 mma warps, 128-byte panels
//   launch   384 threads, 197856 bytes of dynamic shared memory
//   contents   33 Problem and tiling,   55 Shared memory,  127 Threads,  176 Arithmetic,  212 Shared memory,
//             245 Global memory,  304 mbarriers,  348 TMA,  390 Bulk copies,  412 Fences,  424 Fragments,
//             438 Registers,  446 Registers of a warpgroup,  458 wgmma,  635 What is visible,  681 Expressions,
//             696 What an expression hides,  761 Softmax and its gradient,  907 Pipelines,  956 Loads, 1005 Visits,
//            1034 Matrix products, 1072 Staging, 1135 Producer, 1216 Consumer, 1348 Kernels, 1511 Launch
//
// Gradients of O = softmax(scale * Q K^T) V (FlashAttention-2, Algorithm 2), in three kernels, one after the other. Blocks
// of the next one may start under the last of the one before (programmatic dependent launch); they wait for its end before they
// use what it wrote.
//   preprocess   dPsum = rowsum(dO * O) - dLSE and LSE in base 2 for every query, and dQ = 0, unless its first share is stored
//   main         dK and dV of 128 keys a block; dQ is the sum of what all blocks of keys add to it, in fp32
//   postprocess  dQ scaled, rounded and put into rows
// The main kernel computes S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T leave one product as the registers that the next
// one takes; only dS goes through shared memory, for dQ.
// Each mma warpgroup holds dK and dV of its own 64 keys.

namespace fa2gen::fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8 {

using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 128;
constexpr int kTileM = 64;  // queries
constexpr int kTileN = 128;  // keys
constexpr int kNumStages = 2;  // of Q
constexpr int kNumDoutStages = 2;
constexpr int kNumMmaWarps = 8;
constexpr int kNumMmaThreads = 256;
constexpr int kNumThreads = 384;  // the first warpgroup produces, the others multiply

// One thread's share of an mma warpgroup's tiles, in registers.
constexpr int kNumRowTiles = 1;  // of 16 keys, in each warp
constexpr int kNumAccS = 32;
constexpr int kNumAccDkv = 64;
constexpr int kNumAccDq = 32;
constexpr int kNumP = 16;

constexpr int kStepsHeadDim = 8;
constexpr int kStepsM = 4;
constexpr int kStepsN = 8;

// Shared memory: tiles are panels of 128 bytes a row, swizzled, as TMA writes them -------------------------------------------

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kNumPanels = 2;
constexpr int kStepsPerPanel = 4;
constexpr uint32_t kQPanelBytes = 8192;  // of dO too
constexpr uint32_t kKvPanelBytes = 16384;
constexpr uint32_t kDsPanelBytes = 8192;
constexpr uint32_t kQBytes = 16384;
constexpr uint32_t kQReadBytes = 16384;
constexpr uint32_t kKvBytes = 32768;
constexpr uint32_t kDsBytes = 16384;
constexpr uint32_t kStatisticsBytes = 256;

constexpr uint32_t kSmemK = 0;
constexpr uint32_t kSmemV = 32768;
constexpr uint32_t kSmemQ = 65536;
constexpr uint32_t kSmemDout = 98304;
constexpr uint32_t kSmemDs = 131072;
constexpr uint32_t kSmemDq = 163840;
constexpr uint32_t kSmemLse = 196608;
constexpr uint32_t kSmemDpsum = 197120;
constexpr uint32_t kSmemVisitSlots = 197632;
constexpr uint32_t kSmemBarriers = 197696;

// Matrix descriptors: swizzle and stride between groups of 8 rows; for tiles whose columns are the result's also the step to
// the next panel of columns.
constexpr uint32_t kDescHi = 0x40000040u;
constexpr uint32_t kDescLoQ = 0x02000000u;

// Global memory: the sums of dQ lie in register order, [batch][head][m_block][slice][register / 4][lane][register % 4]; a
// slice is what one warp holds, 16 columns of the head dim of a block of queries.
constexpr int kDqSliceFloats = 1024;
constexpr int kDqBlockFloats = 8192;
// Whether a share of dQ of a block of queries has sums: whoever comes first stores what others add to.
constexpr int kNoSums = 0;
constexpr int kAreStored = 1;  // by somebody who is not done
constexpr int kAreSums = 2;

// The kernel's scalar arguments; the order is the launcher's (KernelPlan.params).
struct Params {
    void const* o;
    void const* dout;
    float const* lse;
    float const* dlse;
    float* lse_log2;
    float* dpsum;
    float* dq_acc;
    int* dq_sums;
    int64_t o_batch_stride;
    int64_t o_row_stride;
    int64_t o_head_stride;
    int64_t dout_batch_stride;
    int64_t dout_row_stride;
    int64_t dout_head_stride;
    int seqlen_q;
    int seqlen_k;
    int num_heads;
    int num_heads_kv;
    int num_heads_per_kv;
    int num_m_blocks;
    int num_n_blocks;
    int num_batch_heads_kv;
    int heads_per_section;
    int stores_first;
    int number_0;
    int number_1;
    float softmax_scale;
    float softmax_scale_log2;
};

// Threads -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() {
    return static_cast<int>(threadIdx.x % 32);
}

// The same in every lane, and known to the compiler to be: addresses and branches that depend on it stay uniform.
__device__ __forceinline__ int warp_id() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
}

__device__ __forceinline__ float shfl_xor(float value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// A bit a lane.
__device__ __forceinline__ uint32_t ballot(bool holds) {
    return __ballot_sync(0xffffffffu, holds);
}

__device__ __forceinline__ void sync_warp() {
    __syncwarp();
}

__device__ __forceinline__ void sync_block() {
    __syncthreads();
}

// True in exactly one lane of a converged warp. Under it ptxas issues TMA without the vote loop that `lane == 0` costs.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(elected));
    return elected != 0;
}

__device__ __forceinline__ void named_barrier_sync(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(barrier), "r"(num_threads) : "memory");
}

// Waits until the grid before has ended and what it wrote is visible.
__device__ __forceinline__ void griddepcontrol_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the grid behind start when all blocks of this one have come here or ended. Promises nothing about memory.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;");
}

// Arithmetic ----------------------------------------------------------------------------------------------------------

// exp(x) is exp2(x * kLog2E).
constexpr float kLog2E = 1.44269504088896341f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The place of the lowest bit that is set; of 0, -1.
__device__ __forceinline__ int lowest_bit(uint32_t bits) {
    return __ffs(static_cast<int>(bits)) - 1;
}

// By 32 bits and more it gives 0, which C++'s << does not promise.
__device__ __forceinline__ uint32_t shift_left(uint32_t value, int bits) {
    uint32_t shifted;
    asm("shl.b32 %0, %1, %2;" : "=r"(shifted) : "r"(value), "r"(bits));
    return shifted;
}

// Two fp32 values rounded to bf16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The two bf16 numbers of one register, the lower half first.
__device__ __forceinline__ void unpack_bf16(float (&values)[2], uint32_t packed) {
    values[0] = __builtin_bit_cast(float, packed << 16);
    values[1] = __builtin_bit_cast(float, packed & 0xffff0000u);
}

// Shared memory -------------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The address of the block's dynamic shared memory; the widest swizzle needs it on a 1024-byte boundary.
__device__ __forceinline__ uint32_t shared_memory_base() {
    return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void store_shared_int4(uint32_t address, int r0, int r1, int r2, int r3) {
    asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load_shared_int4(int (&r)[4], uint32_t address) {
    asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// 8 bytes; the address is a multiple of 8.
__device__ __forceinline__ void load_shared_float2(float (&r)[2], uint32_t address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(r[0]), "=f"(r[1]) : "r"(address) : "memory");
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void store_shared_float4(uint32_t address, float r0, float r1, float r2, float r3) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "f"(r0), "f"(r1), "f"(r2), "f"(r3) : "memory");
}

// Global memory -------------------------------------------------------------------------------------------------------

// What another thread of the block, or an earlier kernel, has written.
__device__ __forceinline__ int load_global_int(int const* address) {
    int value;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_global_int(int* address, int value) {
    *address = value;
}

__device__ __forceinline__ void store_global_float(float* address, float value) {
    *address = value;
}

// 16 bytes that no thread of the kernel writes; the address is a multiple of 16.
__device__ __forceinline__ void load_global_128(uint32_t (&r)[4], void const* address) {
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(address) : "memory");
}

__device__ __forceinline__ float load_global_float(float const* address) {
    return *address;
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load_global_float4(float (&r)[4], float const* address) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "l"(address) : "memory");
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void store_global_float4(float* address, float r0, float r1, float r2, float r3) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "f"(r0), "f"(r1), "f"(r2), "f"(r3) : "memory");
}

// Publishes what this thread knows to be done, and `value`.
__device__ __forceinline__ void store_global_release(int* address, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(address), "r"(value) : "memory");
}

// What came before the release of the number that is found has happened. An atomic that changes nothing: beside "ld.acquire"
// ptxas schedules other warps' products otherwise (gradients of head dim 64: 862 instructions for 855).
__device__ __forceinline__ int load_global_acquire(int* address) {
    int value;
    asm volatile("atom.acquire.gpu.global.or.b32 %0, [%1], 0;" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// From 0 to 1, by one thread alone; returns what was there, as load_global_acquire does.
__device__ __forceinline__ int claim_global(int* address) {
    int found;
    asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], 0, 1;" : "=r"(found) : "l"(address) : "memory");
    return found;
}

// mbarriers -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA; a block-wide barrier must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Arrives in the lanes where `arrives` holds, as a predicated instruction: a branch here would split the block around it, and
// ptxas then waits for all matrix products before the softmax (0.725 against 0.759 of peak, d = 128, 2k, H200).
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t barrier, bool arrives) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %1, 0;\n"
        "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
        "}"
        :: "r"(barrier), "r"(static_cast<int>(arrives)) : "memory");
}

// Arrives, and lets the phase complete only after `bytes` have been written by copies that name this barrier.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// Blocks until the phase of this parity has completed. A fresh barrier is in phase 0, so waiting for parity 1 passes.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait_%=;\n"
        "}"
        :: "r"(barrier), "r"(parity) : "memory");
}

// TMA -----------------------------------------------------------------------------------------------------------------
// Coordinates are (column, row, head, batch), innermost first. Reads outside the tensor give zeros, writes are dropped.

// A tensor map as the driver encodes it: opaque, 128 bytes, read by TMA only.
struct alignas(64) CUtensorMap {
    uint64_t opaque[16];
};

__device__ __forceinline__ void tma_prefetch_map(CUtensorMap const& map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}

// One box into shared memory; `barrier` gets all of the box's bytes, out-of-bounds ones included.
__device__ __forceinline__ void tma_load(
    uint32_t destination, CUtensorMap const& map, uint32_t barrier, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, { %3, %4, %5, %6}], [%2];"
        :: "r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch) : "memory");
}

// One box out of shared memory; what generic stores wrote there must have been published by fence_proxy_async.
__device__ __forceinline__ void tma_store(
    CUtensorMap const& map, uint32_t source, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, { %2, %3, %4, %5}], [%1];"
        :: "l"(&map), "r"(source), "r"(column), "r"(row), "r"(head), "r"(batch) : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until this thread's stores have read their shared memory, which may then be overwritten.
__device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Until this thread's stores are complete: a block must not exit before.
__device__ __forceinline__ void tma_store_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Bulk copies ---------------------------------------------------------------------------------------------------------
// Runs of bytes; both addresses and the size are multiples of 16.

// Into shared memory; `barrier` gets the bytes.
__device__ __forceinline__ void bulk_load(uint32_t destination, void const* source, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(destination), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}

// From shared memory.
__device__ __forceinline__ void bulk_store(float* destination, uint32_t source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 :: "l"(destination), "r"(source), "r"(bytes) : "memory");
}

// Adds fp32 numbers in shared memory to those in global memory, each addition atomic; what generic stores wrote there must have
// been published by fence_proxy_async.
__device__ __forceinline__ void bulk_reduce_add(float* destination, uint32_t source, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 :: "l"(destination), "r"(source), "r"(bytes) : "memory");
}

// Fences --------------------------------------------------------------------------------------------------------------

// Publishes this thread's earlier shared-memory stores to TMA and wgmma (the async proxy).
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders this thread's later bulk copies to global memory (the async proxy) after what it has waited for there.
__device__ __forceinline__ void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Fragments -----------------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// As stmatrix_x4, but each matrix is stored transposed: what a lane holds of row l / 4 goes to column l / 4.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// Registers -----------------------------------------------------------------------------------------------------------

// The same value, in a register from here on: a loop that uses it does not compute it again each time.
__device__ __forceinline__ int keep(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Registers of a warpgroup --------------------------------------------------------------------------------------------

// Gives this warpgroup's registers above 24 a thread back to the block.
__device__ __forceinline__ void setmaxnreg_dec_24() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
}

// Takes registers up to 240 a thread; waits until the block has them.
__device__ __forceinline__ void setmaxnreg_inc_240() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
}

// wgmma ---------------------------------------------------------------------------------------------------------------

// Before the first wgmma of a batch: orders earlier register accesses (accumulators, A) before it.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// A matrix descriptor: `hi` is constant in a kernel, `lo` holds the address and the leading byte offset.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t hi, uint32_t lo) {
    return (static_cast<uint64_t>(hi) << 32) | lo;
}

// Until at most 0 committed batches of this warpgroup are still running.
__device__ __forceinline__ void wgmma_wait_0() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Until at most 1 committed batches of this warpgroup are still running.
__device__ __forceinline__ void wgmma_wait_1() {
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
}

// Pins accumulators behind a wait: without it the compiler may read them before wgmma has written them.
__device__ __forceinline__ void wgmma_touch(float (&d)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

// Pins accumulators behind a wait: without it the compiler may read them before wgmma has written them.
__device__ __forceinline__ void wgmma_touch(float (&d)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

// Keeps A registers alive until the product that reads them has been waited for.
__device__ __forceinline__ void wgmma_touch_a(uint32_t (&a)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        asm volatile("" : "+r"(a[i])::"memory");
    }
}

// d[64 x 64] = a[64 x 16] b[16 x 64] + (accumulate ? d : 0); a and b in shared memory.
__device__ __forceinline__ void wgmma_m64n64k16_ss_kk(
    float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
}

// d[64 x 128] = a[64 x 16] b[16 x 128] + (accumulate ? d : 0); a in registers, b in shared memory.
__device__ __forceinline__ void wgmma_m64n128k16_rs_km(
    float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));
}

// d[64 x 64] = a[64 x 16] b[16 x 64] + (accumulate ? d : 0); a and b in shared memory.
__device__ __forceinline__ void wgmma_m64n64k16_ss_mk(
    float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 1, 0;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
}

// Barrier 0 is sync_block's.
enum NamedBarrier : int {
    kAllMmaWarps = 1,
};

// Sequences: every batch entry has the same lengths.
struct Seqlen {
    int q;
    int k;
};

__device__ __forceinline__ Seqlen seqlen_of(Params const& p, int) {
    return {p.seqlen_q, p.seqlen_k};
}

__device__ __forceinline__ int num_query_blocks(Params const& p, Seqlen const&) {
    return p.num_m_blocks;
}

// Where TMA finds a row, beside its head and columns.
struct Box {
    int row;
    int batch;
};

__device__ __forceinline__ Box query_box(Seqlen const&, int row, int bidb) {
    return {row, bidb};
}

__device__ __forceinline__ Box key_box(Seqlen const&, int row, int bidb) {
    return {row, bidb};
}

// Where the rows of q (o, dout, dq) begin, and those of k (v, dk, dv), in elements; and a head's rows of LSE.
__device__ __forceinline__ int64_t first_query(Seqlen const&, int bidb, int64_t batch_stride, int64_t) {
    return bidb * batch_stride;
}

__device__ __forceinline__ int64_t first_key(Seqlen const&, int bidb, int64_t batch_stride, int64_t) {
    return bidb * batch_stride;
}

__device__ __forceinline__ int64_t lse_of_head(Params const& p, Seqlen const& s, int bidh, int bidb) {
    return (static_cast<int64_t>(bidb) * p.num_heads + bidh) * s.q;
}

// A block of queries of one head; `index` is where it has its row statistics and its sums of dQ, one after the other of
// all heads.
struct QueryBlock {
    int m_block;
    int bidh;
    int bidb;
    int index;
};

__device__ __forceinline__ int query_block_index(Params const& p, Seqlen const&, int bidb, int bidh, int m_block) {
    return (bidb * p.num_heads + bidh) * p.num_m_blocks + m_block;
}

__device__ __forceinline__ QueryBlock query_block_at(Params const& p, int block_index) {
    int const batch_head = block_index / p.num_m_blocks;
    return {block_index % p.num_m_blocks, batch_head % p.num_heads, batch_head / p.num_heads, block_index};
}

// What is visible: full -----------------------------------------------------------------------------------------------

// Blocks [begin, end), of which [begin_full, end_full) need no mask.
struct BlockRange {
    int begin;
    int begin_full;
    int end_full;
    int end;
};

constexpr int kNoQuery = 0x7fffffff;  // after all of them

// Query rows from this on see a key; none sees a key that does not exist.
__device__ __forceinline__ int query_begin(Params const&, Seqlen const& s, int key) {
    return key < s.k ? 0 : kNoQuery;
}

__device__ __forceinline__ BlockRange query_blocks(Params const& p, Seqlen const& s, int first_key) {
    int const end = num_query_blocks(p, s);
    return {0, first_key + kTileN <= s.k ? 0 : end, end, end};
}

// How many of a thread's registers of a key hold queries before this one, counted from the thread's first: the r-th holds
// r / 2 * 8 + r % 2.
__device__ __forceinline__ int registers_before(int query) {
    int const queries = max(query, 0);
    return queries / 8 * 2 + min(queries % 8, 2);
}

// Sets the scores of queries that do not see a key to -inf. What a thread sees of a key is a run of its registers, made into
// bits, so that one instruction moves 7 of them into predicates (d = 64, 128 queries: 30 instructions of 714 fewer than with a
// comparison an element).
__device__ __forceinline__ void apply_mask(float (&acc_s)[kNumAccS], int const (&begins)[2], int first_row) {
    constexpr int kRegisters = kNumAccS / 2;  // of one key
    int const first_query = first_row + 2 * (lane_id() % 4);
#pragma unroll
    for (int key = 0; key < 2; ++key) {
        uint32_t const visible = shift_left(0xffffffffu, registers_before(begins[key] - first_query));
#pragma unroll
        for (int r = 0; r < kRegisters; ++r) {
            int const i = r / 2 * 4 + 2 * key + r % 2;
            acc_s[i] = visible >> r & 1 ? acc_s[i] : -kInfinity;
        }
    }
}

// Expressions ---------------------------------------------------------------------------------------------------------

// What an expression may ask of an element's place beside its positions.
struct Head {
    int b;
    int h;
    int hk;
    int seqlen_q;
    int seqlen_k;
};

__device__ __forceinline__ Head head_of(Params const& p, Seqlen const& s, int bidh, int bidb) {
    return {bidb, bidh, bidh / p.num_heads_per_kv, s.q, s.k};
}

// What an expression hides --------------------------------------------------------------------------------------------
//
// allow = j <= i and (i - j < number_0 or j < number_1)

// Whether query i sees key j.
__device__ __forceinline__ bool is_allowed(
    Params const& p, int b, int h, int hk, int seqlen_q, int seqlen_k, int i, int j, float float_i, float float_j) {
    int const row_0 = -p.number_0 + i;
    bool const column_0 = j < p.number_1;
    return static_cast<bool>((j <= i) & ((row_0 < j) | column_0));
}

// Of a tile: whether some query may see some key, and whether all see all.
struct Seen {
    bool any;
    bool all;
};

// Of queries i0 to i1 and keys j0 to j1.
__device__ __forceinline__ Seen seen_between(
    Params const& p, int b, int h, int hk, int seqlen_q, int seqlen_k, int i0, int i1, int j0, int j1) {
    bool const any = static_cast<bool>((j0 - i1 <= 0) & ((i0 - j1 < p.number_0) | (j0 < p.number_1)));
    bool const all = static_cast<bool>((j1 - i0 <= 0) & ((i1 - j0 < p.number_0) | (j1 < p.number_1)));
    return {any, all};
}

// Of the queries from first_row on and a block of keys, as far as there are so many.
__device__ __forceinline__ Seen seen_of(Params const& p, Head const& at, int first_row, int num_rows, int first_key) {
    return seen_between(p, at.b, at.h, at.hk, at.seqlen_q, at.seqlen_k, first_row,
                        min(first_row + num_rows, at.seqlen_q) - 1, first_key, min(first_key + kTileN, at.seqlen_k) - 1);
}

// Which queries of a block see each of a thread's two keys, a bit for each of the key's registers, in their order.
__device__ __forceinline__ void look_up(Params const& p, Head const& at, uint32_t (&seen)[2], int key, int first_query) {
    int const column = first_query + 2 * (lane_id() % 4);
    float const float_key = static_cast<float>(key);
    float const float_column = static_cast<float>(column);
    seen[0] = seen[1] = 0;
#pragma unroll
    for (int n = 0; n < kNumAccS / 2; ++n) {
        int const right = n / 2 * 8 + n % 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool const allowed = is_allowed(
                p, at.b, at.h, at.hk, at.seqlen_q, at.seqlen_k, column + right, key + 8 * half,
                float_column + static_cast<float>(right), float_key + static_cast<float>(8 * half));
            if (allowed) {
                seen[half] |= 1u << n;
            }
        }
    }
}

// The same as hide, of what look_up has found.
__device__ __forceinline__ void hide_unseen(float (&acc_s)[kNumAccS], uint32_t const (&seen)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kNumAccS / 2; ++n) {
            int const i = n / 2 * 4 + 2 * half + n % 2;
            acc_s[i] = seen[half] >> n & 1 ? acc_s[i] : -kInfinity;
        }
    }
}

// Softmax and its gradient (FlashAttention-2, Algorithm 2, lines 11 to 14) ------------------------------------------------

// P = exp(scale * S - LSE), in base 2. A row that does not exist has LSE = +inf, so P = 0.
__device__ __forceinline__ void probabilities(float (*acc_s)[kNumAccS], uint32_t lse_log2, float softmax_scale_log2) {
    uint32_t const first = lse_log2 + 8 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < kNumAccS; i += 4) {
        float offset[2];
        load_shared_float2(offset, first + 8 * i);
#pragma unroll
        for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
            for (int j = i; j < i + 4; ++j) {
                acc_s[tile][j] = exp2_approx(fmaf(acc_s[tile][j], softmax_scale_log2, -offset[j % 2]));
            }
        }
    }
}

// dS = P * (dP - dPsum), in the place of dP. It lacks the factor softmax_scale, which dQ and dK get at their end.
__device__ __forceinline__ void score_gradients(float (*acc_dp)[kNumAccS], float const (*p)[kNumAccS], uint32_t dpsum) {
    uint32_t const first = dpsum + 8 * (lane_id() % 4);
#pragma unroll
    for (int i = 0; i < kNumAccS; i += 4) {
        float offset[2];
        load_shared_float2(offset, first + 8 * i);
#pragma unroll
        for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
            for (int j = i; j < i + 4; ++j) {
                acc_dp[tile][j] = p[tile][j] * (acc_dp[tile][j] - offset[j % 2]);
            }
        }
    }
}

// Rounds to bf16. The accumulator layout of one product is the A layout of the next: no shuffles.
__device__ __forceinline__ void pack(uint32_t (*packed)[kNumP], float const (*values)[kNumAccS]) {
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumP; ++i) {
            packed[tile][i] = pack_bf16(values[tile][2 * i], values[tile][2 * i + 1]);
        }
    }
}

// Order of blocks: the first keys, which most queries see, first, so that the last blocks to start are the short ones; within
// sections of heads whose Q, dO and dQ fit in L2 together.
struct KeyBlock {
    int n_block;
    int head_kv;
    int bidb;
};

__device__ __forceinline__ KeyBlock key_block_at(Params const& p, int index) {
    int const section_blocks = p.heads_per_section * p.num_n_blocks;
    int const first_batch_head = index / section_blocks * p.heads_per_section;
    int const width = min(p.heads_per_section, p.num_batch_heads_kv - first_batch_head);
    int const within = index % section_blocks;
    int const batch_head = first_batch_head + within % width;
    return {within / width, batch_head % p.num_heads_kv, batch_head / p.num_heads_kv};
}

// The steps of a block of keys: all query heads that share it, one after the other, and of each the blocks of queries that see
// it and may be let see it, from the first to the last.
struct QueryWalk {
    int m_block;
    int bidh;
    int query_block;  // over all heads: query_block_index
    int remaining;    // steps, this one included, and those that are passed by
    int n_block;
    int bidb;
    int known;     // blocks of the head, this one included, that the words are of: bit 0 is this one
    uint32_t any;  // whether some query sees some key
    uint32_t all;  // whether all see all

    // Asks of 32 blocks, of which the head may not have as many.
    __device__ __forceinline__ void look(Params const& p, BlockRange const& blocks) {
        Head const at = head_of(p, seqlen_of(p, bidb), bidh, bidb);
        known = min(blocks.end - m_block, 32);
        bool const is_one = lane_id() < known;
        int const block = m_block + (is_one ? lane_id() : 0);
        Seen const seen = seen_of(p, at, block * kTileM, kTileM, n_block * kTileN);
        any = ballot(is_one && seen.any);
        all = ballot(is_one && seen.all);
    }

    // Whether an expression hides some of the block's keys from some of its queries.
    __device__ __forceinline__ bool is_partly_hidden() const {
        return (all & 1) == 0;
    }

    // Whether some query of the block does not see some of the keys.
    __device__ __forceinline__ bool needs_mask(BlockRange const& blocks) const {
        return m_block < blocks.begin_full;
    }

    // Returns how far the next block of queries that is visited lies behind this one. A warp calls it together.
    __device__ __forceinline__ int next(Params const& p, BlockRange const& blocks) {
        return go_on(p, blocks, 1);
    }

    // So many blocks, or none, and on to one that is visited.
    __device__ __forceinline__ int go_on(Params const& p, BlockRange const& blocks, int steps) {
        int passed = 0;
        do {
            passed += step(p, blocks, steps);
            known -= steps;
            any = steps < 32 ? any >> steps : 0;
            all = steps < 32 ? all >> steps : 0;
            if (known == 0 && remaining > 0) {
                look(p, blocks);
            }
            steps = any != 0 ? lowest_bit(any) : known;
        } while (steps > 0);
        return passed;
    }

    // So many blocks on, at most to the first of the next head.
    __device__ __forceinline__ int step(Params const& p, BlockRange const& blocks, int steps) {
        remaining -= steps;
        int skipped = 0;
        m_block += steps;
        if (m_block == blocks.end) {
            m_block = blocks.begin;
            bidh += 1;
            skipped = p.num_m_blocks - (blocks.end - blocks.begin);
        }
        query_block += skipped + steps;
        return skipped + steps;
    }
};

__device__ __forceinline__ QueryWalk start_walk(
    Params const& p, Seqlen const& s, KeyBlock const& block, BlockRange const& blocks) {
    int const m_block = blocks.begin;
    int const bidh = block.head_kv * p.num_heads_per_kv;
    QueryWalk walk = {m_block, bidh, query_block_index(p, s, block.bidb, bidh, m_block),
                      (blocks.end - blocks.begin) * p.num_heads_per_kv, block.n_block, block.bidb, 0, 0, 0};
    if (walk.remaining > 0) {
        walk.go_on(p, blocks, 0);
    }
    return walk;
}

// Pipelines -----------------------------------------------------------------------------------------------------------

// Where a role stands in a ring: its stage, and the parity of the barrier phase that it waits for there.
struct PipelineState {
    int stage;
    uint32_t phase;

    __device__ __forceinline__ void advance(int num_stages) {
        stage += 1;
        if (stage == num_stages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// Barrier addresses. Consumers start with parity 0; the producer waits on empty barriers with parity 1, which passes at first.
struct Barriers {
    uint32_t base;

    __device__ __forceinline__ uint32_t k_full() const { return base; }
    __device__ __forceinline__ uint32_t v_full() const { return base + 8; }
    __device__ __forceinline__ uint32_t q_full(int stage) const { return base + 16 + 8 * stage; }
    __device__ __forceinline__ uint32_t q_empty(int stage) const { return base + 32 + 8 * stage; }
    __device__ __forceinline__ uint32_t dout_full(int stage) const { return base + 48 + 8 * stage; }
    __device__ __forceinline__ uint32_t dout_empty(int stage) const { return base + 64 + 8 * stage; }
    __device__ __forceinline__ uint32_t dq_full() const { return base + 80; }
    __device__ __forceinline__ uint32_t dq_empty() const { return base + 88; }
    __device__ __forceinline__ uint32_t visit_full(int stage) const { return base + 96 + 8 * stage; }
    __device__ __forceinline__ uint32_t visit_empty(int stage) const { return base + 128 + 8 * stage; }

    __device__ __forceinline__ void init() const {
        mbarrier_init(k_full(), 1);
        mbarrier_init(v_full(), 1);
        for (int stage = 0; stage < 2; ++stage) {
            mbarrier_init(q_full(stage), 1);
            mbarrier_init(q_empty(stage), kNumMmaWarps);
            mbarrier_init(dout_full(stage), 1);
            mbarrier_init(dout_empty(stage), kNumMmaWarps);
        }
        mbarrier_init(dq_full(), 8);
        mbarrier_init(dq_empty(), 1);
        for (int stage = 0; stage < 4; ++stage) {
            mbarrier_init(visit_full(stage), 1);
            mbarrier_init(visit_empty(stage), 1);
        }
    }
};

// Loads ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_box(
    uint32_t destination, CUtensorMap const& map, uint32_t barrier, int column, Box const& box, int head) {
    tma_load(destination, map, barrier, column, box.row, head, box.batch);
}

__device__ __forceinline__ void store_box(
    CUtensorMap const& map, uint32_t source, int column, Box const& box, int head) {
    tma_store(map, source, column, box.row, head, box.batch);
}

// How TMA sees the panels of a tensor. The last may be narrower: columns beyond the head dim would cost as much as others.
struct TileMaps {
    CUtensorMap const& panel;
    CUtensorMap const& last_panel;
};

__device__ __forceinline__ void load_tile(
    TileMaps const& maps, uint32_t destination, uint32_t panel_bytes, uint32_t barrier, Box const& box, int head) {
#pragma unroll
    for (int panel = 0; panel < kNumPanels; ++panel) {
        load_box(destination + panel * panel_bytes, panel + 1 < kNumPanels ? maps.panel : maps.last_panel, barrier,
                 panel * kPanelColumns, box, head);
    }
}

__device__ __forceinline__ void load_key_block(CUtensorMap const& map, uint32_t tile, uint32_t full, Seqlen const& s,
                                               KeyBlock const& block) {
    if (elect_one()) {
        mbarrier_arrive_expect_tx(full, kKvBytes);
        Box const box = key_box(s, block.n_block * kTileN, block.bidb);
        load_tile({map, map}, tile, kKvPanelBytes, full, box, block.head_kv);
    }
}

// A block of Q or dO and one number for each of its rows, when the stage is free.
__device__ __forceinline__ void load_query_block(
    TileMaps const& maps, uint32_t tile, float const* statistics, uint32_t rows, uint32_t full, uint32_t empty,
    PipelineState& state, int num_stages, Box const& box, int head) {
    mbarrier_wait(empty, state.phase ^ 1);
    if (elect_one()) {
        mbarrier_arrive_expect_tx(full, kQReadBytes + kStatisticsBytes);
        load_tile(maps, tile, kQPanelBytes, full, box, head);
        bulk_load(rows, statistics, kStatisticsBytes, full);
    }
    state.advance(num_stages);
}

// Visits: the blocks of queries that are walked, from the producer, which looks them up, to those who add dQ ----------

constexpr int kNumVisits = 4;

struct QueryVisit {
    int query_block;  // over all heads; behind the last -1
    int m_block;
};

__device__ __forceinline__ void send_query_visit(
    uint32_t smem, Barriers const& barriers, PipelineState& state, int query_block, int m_block) {
    mbarrier_wait(barriers.visit_empty(state.stage), state.phase ^ 1);
    if (elect_one()) {
        store_shared_int4(smem + kSmemVisitSlots + 16 * state.stage, query_block, m_block, 0, 0);
        mbarrier_arrive(barriers.visit_full(state.stage));
    }
    state.advance(kNumVisits);
}

// The arrival depends on what was read: it can not overtake the load.
__device__ __forceinline__ QueryVisit receive_query_visit(uint32_t smem, Barriers const& barriers, PipelineState& state) {
    mbarrier_wait(barriers.visit_full(state.stage), state.phase);
    int slot[4];
    load_shared_int4(slot, smem + kSmemVisitSlots + 16 * state.stage);
    mbarrier_arrive_if(barriers.visit_empty(state.stage), slot[2] == 0);
    state.advance(kNumVisits);
    return {slot[0], slot[1]};
}

// Matrix products -----------------------------------------------------------------------------------------------------

constexpr uint32_t kDescUnit = 16;  // bytes

// S^T = K Q^T, or dP^T = V dO^T, for 64 keys and one block of queries. Steps of 16 along the head dim: 32 bytes inside a panel,
// then the next panel.
__device__ __forceinline__ void gemm_s(float (&acc_s)[kNumAccS], uint32_t key_rows, uint32_t q_tile) {
#pragma unroll
    for (int step = 0; step < kStepsHeadDim; ++step) {
        uint32_t const panel = step / kStepsPerPanel;
        uint32_t const within = step % kStepsPerPanel * 32;
        uint32_t const key = key_rows + (panel * kKvPanelBytes + within) / kDescUnit;
        uint32_t const q = q_tile + (panel * kQPanelBytes + within) / kDescUnit;
        wgmma_m64n64k16_ss_kk(acc_s, matrix_descriptor(kDescHi, key), matrix_descriptor(kDescHi, q), step != 0);
    }
}

// dV += P^T dO, or dK += dS^T Q, for 64 keys and one block of queries. Steps of 16 queries: 16 rows of every panel.
__device__ __forceinline__ void gemm_dkv(float (&acc)[kNumAccDkv], uint32_t const (&p)[kNumP], uint32_t q_tile) {
#pragma unroll
    for (int step = 0; step < kStepsM; ++step) {
        uint32_t const q = q_tile + kDescLoQ + step * 16 * kPanelRowBytes / kDescUnit;
        wgmma_m64n128k16_rs_km(
            acc, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], matrix_descriptor(kDescHi, q), 1);
    }
}

// dQ^T = K^T dS^T for 64 columns of the head dim and one block of queries. Steps of 16 keys: 16 rows of K, and 32 bytes inside
// a panel of dS, then the next panel.
__device__ __forceinline__ void gemm_dq(float (&acc_dq)[kNumAccDq], uint32_t ds_tile, uint32_t k_panel) {
#pragma unroll
    for (int step = 0; step < kStepsN; ++step) {
        uint32_t const key = k_panel + step * 16 * kPanelRowBytes / kDescUnit;
        uint32_t const ds = ds_tile + (step / kStepsPerPanel * kDsPanelBytes + step % kStepsPerPanel * 32) / kDescUnit;
        wgmma_m64n64k16_ss_mk(acc_dq, matrix_descriptor(kDescHi, key), matrix_descriptor(kDescHi, ds), step != 0);
    }
}

// Staging -------------------------------------------------------------------------------------------------------------

// Where a lane's 8 elements of the first 16 rows of a panel go, of which a warp has 16 columns, held transposed.
__device__ __forceinline__ uint32_t transposed_row(uint32_t panel, int warp) {
    int const row = lane_id() % 8;
    int const chunk = 2 * warp + lane_id() / 8 % 2;
    return panel + (row + lane_id() / 16 * 8) * kPanelRowBytes + static_cast<uint32_t>((chunk ^ row) << 4);
}

// dS^T of 16 keys, transposed into [query][key] rows. `ds_panel` holds the warpgroup's 64 keys, `warp` is the warp in it.
__device__ __forceinline__ void stage_ds(uint32_t const (&ds)[kNumP], uint32_t ds_panel, int warp) {
    uint32_t const first = transposed_row(ds_panel, warp);
#pragma unroll
    for (int i = 0; i < kNumP; i += 4) {
        stmatrix_x4_trans(first + i / 4 * 16 * kPanelRowBytes, ds[i], ds[i + 1], ds[i + 2], ds[i + 3]);
    }
}

// 16 rows of dK, dV or dQ, times `factor`, rounded into the rows of a tile whose panels are panel_bytes apart.
__device__ __forceinline__ void stage_rows(
    float const (&acc)[kNumAccDkv], uint32_t rows, uint32_t panel_bytes, float factor) {
    int const row = lane_id() % 16;
    uint32_t const row_address = rows + row * kPanelRowBytes;
    auto address = [&](int column) {  // of this lane's row in the 16 columns from `column` on
        int const chunk = column % kPanelColumns / 8 + lane_id() / 16;
        return row_address + column / kPanelColumns * panel_bytes + static_cast<uint32_t>((chunk ^ row % 8) << 4);
    };
    auto pair = [&](int i) { return pack_bf16(acc[i] * factor, acc[i + 1] * factor); };
#pragma unroll
    for (int column = 0; column + 16 <= kHeadDim; column += 16) {
        int const i = column / 2;
        stmatrix_x4(address(column), pair(i), pair(i + 2), pair(i + 4), pair(i + 6));
    }
}

// What stage_rows wrote, to global memory; clips at seqlen_k and at the head dim.
__device__ __forceinline__ void store_rows(
    CUtensorMap const& map, Seqlen const& s, uint32_t rows, int row, KeyBlock const& block) {
    Box const box = key_box(s, row, block.bidb);
    fence_proxy_async();
    sync_warp();
    if (elect_one()) {
#pragma unroll
        for (int panel = 0; panel < kNumPanels; ++panel) {
            store_box(map, rows + panel * kKvPanelBytes, panel * kPanelColumns, box, block.head_kv);
        }
        tma_store_commit();
    }
}

// Leaves a warp's share of dQ in shared memory for write_dq, when the share before has left it.
__device__ __forceinline__ void hand_over_dq(
    float const (&acc_dq)[kNumAccDq], uint32_t dq_slice, uint32_t full, uint32_t empty, uint32_t phase) {
    mbarrier_wait(empty, phase ^ 1);
#pragma unroll
    for (int i = 0; i < kNumAccDq; i += 4) {
        store_shared_float4(dq_slice + (i * 32 + lane_id() * 4) * 4, acc_dq[i], acc_dq[i + 1], acc_dq[i + 2], acc_dq[i + 3]);
    }
    fence_proxy_async();
    sync_warp();
    mbarrier_arrive_if(full, lane_id() == 0);
}

// Producer: one warp. K and V once, then Q and dO of every block of queries, each with its row statistics --------------------

__device__ __forceinline__ void produce(
    TileMaps const& maps_q, CUtensorMap const& map_k, CUtensorMap const& map_v, TileMaps const& maps_dout,
    Params const& p, uint32_t smem, Barriers const& barriers) {
    KeyBlock const block = key_block_at(p, static_cast<int>(blockIdx.x));
    Seqlen const s = seqlen_of(p, block.bidb);
    BlockRange const blocks = query_blocks(p, s, block.n_block * kTileN);
    PipelineState q_state = {0, 0};
    PipelineState dout_state = {0, 0};
    PipelineState visits = {0, 0};
    bool has_kv = false;
    for (QueryWalk walk = start_walk(p, s, block, blocks); walk.remaining > 0; walk.next(p, blocks)) {
        auto load = [&](TileMaps const& maps, uint32_t tiles, float const* statistics, uint32_t rows, uint32_t full,
                        uint32_t empty, PipelineState& state, int num_stages) {
            load_query_block(maps, smem + tiles + state.stage * kQBytes,
                             statistics + static_cast<int64_t>(walk.query_block) * kTileM,
                             smem + rows + state.stage * kStatisticsBytes, full, empty, state, num_stages,
                             query_box(s, walk.m_block * kTileM, block.bidb), walk.bidh);
        };
        if (!has_kv) {
            load_key_block(map_k, smem + kSmemK, barriers.k_full(), s, block);
            griddepcontrol_wait();  // the preprocess kernel writes what comes with Q and dO
        }
        load(maps_q, kSmemQ, p.lse_log2, kSmemLse, barriers.q_full(q_state.stage), barriers.q_empty(q_state.stage), q_state,
             kNumStages);
        if (!has_kv) {
            load_key_block(map_v, smem + kSmemV, barriers.v_full(), s, block);
            has_kv = true;
        }
        load(maps_dout, kSmemDout, p.dpsum, kSmemDpsum, barriers.dout_full(dout_state.stage),
             barriers.dout_empty(dout_state.stage), dout_state, kNumDoutStages);
        send_query_visit(smem, barriers, visits, walk.query_block, walk.m_block);
    }
    send_query_visit(smem, barriers, visits, -1, 0);
}

// Adds dQ of one block of queries after the other to the sums in global memory. Under the
// next block's products: they need shared memory's copy gone, and not yet the sums complete.
__device__ __forceinline__ void write_dq(
    Params const& p, uint32_t smem, Barriers const& barriers) {
    uint32_t phase = 0;
    PipelineState visits = {0, 0};
    while (true) {
        QueryVisit const walk = receive_query_visit(smem, barriers, visits);
        if (walk.query_block < 0) {
            break;
        }
        int* const sums = p.dq_sums + walk.query_block;
        int found = p.stores_first ? load_global_acquire(sums) : kAreSums;  // while dQ is made
        mbarrier_wait(barriers.dq_full(), phase);
        float* const destination = p.dq_acc + static_cast<int64_t>(walk.query_block) * kDqBlockFloats;
        uint32_t const source = smem + kSmemDq;
        int const bytes = kDqBlockFloats * 4;
        if (found != kAreSums) {
            found = claim_global(sums);
        }
        bool const is_first = found == kNoSums;
        if (is_first) {
            bulk_store(destination, source, bytes);
        } else {
            while (found == kAreStored) {  // by a thread that waits for nobody
                found = claim_global(sums);
            }
            if (p.stores_first) {
                fence_proxy_async_global();
            }
            bulk_reduce_add(destination, source, bytes);
        }
        tma_store_commit();
        tma_store_wait_read();
        mbarrier_arrive(barriers.dq_empty());
        if (is_first) {
            tma_store_wait();
            store_global_release(sums, kAreSums);
        }
        phase ^= 1;
    }
    tma_store_wait();
}

// Consumer: one of the mma warpgroups, 64 keys of the block --------------------------------------------------------------

// 16 rows of dK or dV, through the tile where K or V was.
__device__ __forceinline__ void finish(
    CUtensorMap const& map, float const (&acc)[kNumAccDkv], uint32_t tile, float factor, Seqlen const& s,
    KeyBlock const& block, int warp_key) {
    uint32_t const rows = tile + warp_key * kPanelRowBytes;
    stage_rows(acc, rows, kKvPanelBytes, factor);
    store_rows(map, s, rows, block.n_block * kTileN + warp_key, block);
}

__device__ __forceinline__ void consume(
    CUtensorMap const& map_dk, CUtensorMap const& map_dv, Params const& p, uint32_t smem, Barriers const& barriers,
    int warpgroup, int warp) {
    KeyBlock const block = key_block_at(p, static_cast<int>(blockIdx.x));
    Seqlen const s = seqlen_of(p, block.bidb);
    BlockRange const blocks = query_blocks(p, s, block.n_block * kTileN);
    int const warp_key = 64 * warpgroup + 16 * warp;  // of the block
    int const key = block.n_block * kTileN + warp_key + lane_id() / 4;
    int const begins[2] = {keep(query_begin(p, s, key)), keep(query_begin(p, s, key + 8))};
    uint32_t const k_rows = (smem + kSmemK + 64 * warpgroup * kPanelRowBytes) / kDescUnit;
    uint32_t const v_rows = (smem + kSmemV + 64 * warpgroup * kPanelRowBytes) / kDescUnit;
    uint32_t const q_tiles = (smem + kSmemQ) / kDescUnit;
    uint32_t const dout_tiles = (smem + kSmemDout) / kDescUnit;
    uint32_t const ds_panel = smem + kSmemDs + warpgroup * kDsPanelBytes;
    uint32_t const k_panel = (smem + kSmemK + warpgroup * kKvPanelBytes) / kDescUnit;
    uint32_t const ds_operand = (smem + kSmemDs) / kDescUnit;
    int const slice = 4 * warpgroup + warp;  // of dQ
    uint32_t const dq_slice = smem + kSmemDq + slice * (kDqSliceFloats * 4);
    bool const leader = lane_id() == 0;
    PipelineState q_state = {0, 0};
    PipelineState dout_state = {0, 0};
    int ds_stage = 0;

    float acc_dk[kNumAccDkv];
    float acc_dv[kNumAccDkv];
    uint32_t dq_phase = 0;
#pragma unroll
    for (int i = 0; i < kNumAccDkv; ++i) {
        acc_dk[i] = 0.0f;
        acc_dv[i] = 0.0f;
    }

    QueryWalk walk = start_walk(p, s, block, blocks);
    if (walk.remaining > 0) {
        mbarrier_wait(barriers.k_full(), 0);
        mbarrier_wait(barriers.v_full(), 0);
    }
    while (walk.remaining > 0) {
        uint32_t const q_tile = q_tiles + q_state.stage * (kQBytes / kDescUnit);
        uint32_t const dout_tile = dout_tiles + dout_state.stage * (kQBytes / kDescUnit);
        float acc_s[kNumAccS];
        float acc_dp[kNumAccS];
        uint32_t p_tile[kNumP];
        uint32_t ds_tile[kNumP];

        mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);
        wgmma_fence();
        gemm_s(acc_s, k_rows, q_tile);
        wgmma_commit();
        // What is hidden is looked up under S, before dP takes its registers (d = 64, 128 queries: else 4 to 12 spill).
        uint32_t visible[2];
        if (walk.is_partly_hidden()) {
            look_up(p, head_of(p, s, walk.bidh, block.bidb), visible, key, walk.m_block * kTileM);
        }
        mbarrier_wait(barriers.dout_full(dout_state.stage), dout_state.phase);
        wgmma_fence();
        gemm_s(acc_dp, v_rows, dout_tile);
        wgmma_commit();

        // P under dP.
        wgmma_wait_1();
        wgmma_touch(acc_s);
        if (walk.needs_mask(blocks)) {
            apply_mask(acc_s, begins, walk.m_block * kTileM);
        }
        if (walk.is_partly_hidden()) {
            hide_unseen(acc_s, visible);
        }
        probabilities(&acc_s, smem + kSmemLse + q_state.stage * kStatisticsBytes, p.softmax_scale_log2);
        pack(&p_tile, &acc_s);
        wgmma_wait_0();
        wgmma_touch(acc_dp);
        score_gradients(&acc_dp, &acc_s, smem + kSmemDpsum + dout_state.stage * kStatisticsBytes);
        pack(&ds_tile, &acc_dp);

        // dS to all warpgroups under dV. Two stages: who writes one has passed the barrier that followed its last use.
        stage_ds(ds_tile, ds_panel + ds_stage * kDsBytes, warp);
        wgmma_fence();
        gemm_dkv(acc_dv, p_tile, dout_tile);
        wgmma_commit();
        fence_proxy_async();
        auto release_dout = [&]() {
            wgmma_touch(acc_dv);
            wgmma_touch_a(p_tile);
            mbarrier_arrive_if(barriers.dout_empty(dout_state.stage), leader);
            dout_state.advance(kNumDoutStages);
        };
        named_barrier_sync(kAllMmaWarps, kNumMmaThreads);

        float acc_dq[kNumAccDq];
        uint32_t const ds_rows = ds_operand + ds_stage * (kDsBytes / kDescUnit);
        wgmma_fence();
        gemm_dq(acc_dq, ds_rows, k_panel);
        wgmma_commit();
        wgmma_wait_1();
        release_dout();

        // dQ to shared memory under dK: each warp its own registers, in their order.
        wgmma_fence();
        gemm_dkv(acc_dk, ds_tile, q_tile);
        wgmma_commit();
        wgmma_wait_1();
        wgmma_touch(acc_dq);
        hand_over_dq(acc_dq, dq_slice, barriers.dq_full(), barriers.dq_empty(), dq_phase);
        dq_phase ^= 1;
        wgmma_wait_0();
        wgmma_touch(acc_dk);
        wgmma_touch_a(ds_tile);
        mbarrier_arrive_if(barriers.q_empty(q_state.stage), leader);
        q_state.advance(kNumStages);

        ds_stage ^= 1;
        walk.next(p, blocks);
    }

    named_barrier_sync(kAllMmaWarps, kNumMmaThreads);  // all warps are done with K and V
    finish(map_dv, acc_dv, smem + kSmemV, 1.0f, s, block, warp_key);
    finish(map_dk, acc_dk, smem + kSmemK, p.softmax_scale, s, block, warp_key);
    tma_store_wait();
}

// Kernels -------------------------------------------------------------------------------------------------------------

// Which block of queries a block of threads takes, before the main kernel and after it: the last one first. That one begins
// with the first heads, of which L2 then has what was written last, and leaves the last sums in L2.
__device__ __forceinline__ int query_block_number() {
    return static_cast<int>(gridDim.x - 1 - blockIdx.x);
}

// Row statistics of one block of queries, and whether there are sums of its dQ. 16 lanes share a row, 16 bytes each.
extern "C" __global__ void __launch_bounds__(128) fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8_preprocess(
    const __grid_constant__ Params p) {
    griddepcontrol_launch_dependents();  // acts when all blocks have started: the main kernel's take no place of theirs
    constexpr int kThreads = 128;
    constexpr int kLanesPerRow = 16;
    QueryBlock const block = query_block_at(p, query_block_number());
    int const m_block = block.m_block;
    int const bidh = block.bidh;
    int const bidb = block.bidb;
    Seqlen const s = seqlen_of(p, bidb);
    int const thread = static_cast<int>(threadIdx.x);
    int const chunk = thread % kLanesPerRow;
    int64_t const of_head = lse_of_head(p, s, bidh, bidb);
    int64_t const padded = static_cast<int64_t>(block.index) * kTileM;
    // 16-bit numbers as bytes: the pointers have no type.
    int64_t const first_o = first_query(s, bidb, p.o_batch_stride, p.o_row_stride) + bidh * p.o_head_stride;
    int64_t const first_dout = first_query(s, bidb, p.dout_batch_stride, p.dout_row_stride) + bidh * p.dout_head_stride;
    char const* const o = static_cast<char const*>(p.o) + 2 * (first_o + 8 * chunk);
    char const* const dout = static_cast<char const*>(p.dout) + 2 * (first_dout + 8 * chunk);

    for (int first = 0; first < kTileM; first += kThreads / kLanesPerRow) {
        int const row_of_block = first + thread / kLanesPerRow;
        int const row = m_block * kTileM + row_of_block;
        bool const exists = row_of_block < kTileM && row < s.q;
        float sum = 0.0f;
        if (exists && chunk < 16) {
            uint32_t o_chunk[4];
            uint32_t dout_chunk[4];
            load_global_128(o_chunk, o + 2 * row * p.o_row_stride);
            load_global_128(dout_chunk, dout + 2 * row * p.dout_row_stride);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float a[2];
                float b[2];
                unpack_bf16(a, o_chunk[i]);
                unpack_bf16(b, dout_chunk[i]);
                sum = fmaf(a[1], b[1], fmaf(a[0], b[0], sum));
            }
        }
#pragma unroll
        for (int lanes = 1; lanes < kLanesPerRow; lanes *= 2) {
            sum += shfl_xor(sum, lanes);
        }
        if (chunk == 0 && row_of_block < kTileM) {
            // A row that does not exist has P = 0. One that sees no key has LSE = -inf, and masked scores: any number does.
            float lse_log2 = kInfinity;
            if (exists) {
                float const lse = load_global_float(p.lse + of_head + row);
                bool const sees_keys = lse != -kInfinity;
                lse_log2 = sees_keys ? lse * kLog2E : 0.0f;
                if (p.dlse != nullptr) {
                    sum -= load_global_float(p.dlse + of_head + row);
                }
                sum = sees_keys ? sum : 0.0f;
            }
            store_global_float(p.lse_log2 + padded + row_of_block, lse_log2);
            store_global_float(p.dpsum + padded + row_of_block, sum);
        }
    }

    if (thread < 1) {
        store_global_int(p.dq_sums + block.index + thread, p.stores_first ? kNoSums : kAreSums);
    }
    int const end = p.stores_first ? 0 : kDqBlockFloats;
    float* const dq_acc = p.dq_acc + static_cast<int64_t>(block.index) * kDqBlockFloats;
    for (int i = 4 * thread; i < end; i += 4 * kThreads) {
        store_global_float4(dq_acc + i, 0.0f, 0.0f, 0.0f, 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8(
    const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
    const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_dout,
    const __grid_constant__ CUtensorMap map_dk, const __grid_constant__ CUtensorMap map_dv,
    const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    Barriers const barriers = {smem + kSmemBarriers};
    int const warp = warp_id();

    if (warp == 0 && elect_one()) {
        tma_prefetch_map(map_q);
        tma_prefetch_map(map_k);
        tma_prefetch_map(map_v);
        tma_prefetch_map(map_dout);
        tma_prefetch_map(map_dk);
        tma_prefetch_map(map_dv);
        barriers.init();
        fence_mbarrier_init();
    }
    sync_block();

    if (warp < 4) {
        setmaxnreg_dec_24();
        if (warp == 0) {
            produce({map_q, map_q}, map_k, map_v, {map_dout, map_dout}, p, smem, barriers);
            griddepcontrol_launch_dependents();  // takes effect when the last blocks have issued their loads
        }
        if (warp == 1 && elect_one()) {
            griddepcontrol_wait();
            write_dq(p, smem, barriers);
        }
    } else {
        setmaxnreg_inc_240();
        griddepcontrol_wait();  // here in every block: the postprocess kernel waits for this grid alone
        consume(map_dk, map_dv, p, smem, barriers, warp / 4 - 1, warp % 4);
    }
}

// One block of queries of dQ: from sums in register order to rows, through shared memory.
extern "C" __global__ void __launch_bounds__(256) fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8_postprocess(
    const __grid_constant__ CUtensorMap map_dq, const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    QueryBlock const block = query_block_at(p, query_block_number());
    int const warp = warp_id();
    float const* const slice =
        p.dq_acc + static_cast<int64_t>(block.index) * kDqBlockFloats + warp * kDqSliceFloats + lane_id() * 4;
    griddepcontrol_wait();
    // Of queries that see no key nothing was stored.
    int const sums = load_global_int(p.dq_sums + block.index);
    auto load = [&](float (&r)[4], float const* address) {
        load_global_float4(r, address);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            r[i] = sums == kAreSums ? r[i] : 0.0f;
        }
    };
    int const row = lane_id() % 8;
    int const chunk = warp % 4 * 2 + lane_id() / 8 % 2;
    uint32_t const first = smem + warp / 4 * kQPanelBytes + (row + lane_id() / 16 * 8) * kPanelRowBytes +
                           static_cast<uint32_t>((chunk ^ row) << 4);
#pragma unroll
    for (int i = 0; i < kTileM / 8; i += 2) {
        float low[4];
        float high[4];
        load(low, slice + i * 128);
        load(high, slice + (i + 1) * 128);
        auto pair = [&](float const (&r)[4], int j) {
            return pack_bf16(r[j] * p.softmax_scale, r[j + 1] * p.softmax_scale);
        };
        stmatrix_x4_trans(first + i * 8 * kPanelRowBytes, pair(low, 0), pair(low, 2), pair(high, 0), pair(high, 2));
    }
    fence_proxy_async();
    sync_block();
    if (warp == 0 && elect_one()) {
        Box const box = query_box(seqlen_of(p, block.bidb), block.m_block * kTileM, block.bidb);
#pragma unroll
        for (int panel = 0; panel < kNumPanels; ++panel) {
            store_box(map_dq, smem + panel * kQPanelBytes, panel * kPanelColumns, box, block.bidh);
        }
        tma_store_commit();
        tma_store_wait();
    }
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_90a -cubin, or with NVRTC.
// `fa2gen render fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8 --with-host` adds a launcher in C++.
//
// Kernels, one after the other on one stream; each takes tensor maps, then Params, by value:
//   fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8_preprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 128 threads, 0 bytes of dynamic shared memory
//   fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8
//     grid (num_n_blocks * num_heads_kv * batch, 1, 1), 384 threads, 197856 bytes of dynamic shared memory
//     maps of q, k, v, dout, dk, dv
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 197856
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1: it then starts early
//   fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8_postprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 256 threads, 16384 bytes of dynamic shared memory
//     maps of dq
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1: it then starts early
// Tensor maps: tiled, (head_dim, seqlen, heads, batch), 16-bit elements, zeros outside, on 64 bytes
//   q, dout, dq: box 64 x 64 x 1 x 1, swizzle 128 bytes
//   k, v: box 64 x 128 x 1 x 1, swizzle 128 bytes
//   dk, dv: box 64 x 16 x 1 x 1, swizzle 128 bytes
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q + 63) / 64
//   num_n_blocks = (seqlen_k + 127) / 128
//   num_batch_heads_kv = batch * num_heads_kv
//   section_bytes = 33554432 * min(num_heads_per_kv, 2)
//   heads_per_section = min(max(1, section_bytes / (num_heads_per_kv * seqlen_q * 1024)), min(batch * num_heads_kv, 16))
//   stores_first = min(512 / max(seqlen_q, 1), 1)
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Device memory beside the tensors, in 4-byte numbers:
//   lse_log2: num_m_blocks * num_heads * batch * 64
//   dpsum: num_m_blocks * num_heads * batch * 64
//   dq_acc: num_m_blocks * num_heads * batch * 8192
//   dq_sums: num_m_blocks * num_heads * batch
// Options; limited(x, n) is n where x < 0, else min(x, n):
//   number_0: number of the expression
//   number_1: number of the expression
//   Params has number_0 = number_0
//   Params has number_1 = number_1

}  // namespace fa2gen::fa2_bwd_sm90_bf16_d128_x64652830_m64_n128_s2_w8
