// fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm90/bwd.cu.j2; edit the template or the spec, not this file.
//   problem  bwd, head dim 256, bf16, full mask
//   tiling   64 query rows x 80 keys, 2 stages, 8 mma warps, 128-byte panels
//   launch   384 threads, 230224 bytes of dynamic shared memory
//   contents   33 Problem and tiling,   54 Shared memory,  121 Threads,  165 Arithmetic,  196 Shared memory,
//             211 Global memory,  245 mbarriers,  285 TMA,  322 Bulk copies,  331 Fences,  338 Fragments,
//             359 Registers,  368 Registers of a warpgroup,  380 wgmma,  549 What is visible,
//             597 Softmax and its gradient,  654 Parts,  763 Pipelines,  808 Loads,  857 Matrix products,
//             900 Staging,  964 Producer,  998 Consumers, 1231 Kernels, 1384 Launch
//
// Gradients of O = softmax(scale * Q K^T) V (FlashAttention-2, Algorithm 2), in four kernels, one after the other. Blocks
// of the next one may start under the last of the one before (programmatic dependent launch); they wait for its end before they
// use what it wrote.
//   preprocess   dPsum = rowsum(dO * O) - dLSE and LSE in base 2 for every query, and dQ = 0
//   main         dK and dV of 80 keys a block; dQ is the sum of what all blocks of keys add to it, in fp32
//   postprocess  dQ scaled, rounded and put into rows
//   groups       dK and dV of the last blocks of keys: sums of what 2 blocks, each of some queries, have summed
// In the main kernel one mma warpgroup makes S, P and dV, the other dP, dS and dK: dK and dV do not both fit one's registers.
// P and dS go through shared memory, dQ's columns are shared.

namespace fa2gen::fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2 {

using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 256;
constexpr int kTileM = 64;  // queries
constexpr int kTileN = 80;  // keys
constexpr int kNumStages = 2;  // of Q
constexpr int kNumDoutStages = 1;
constexpr int kNumMmaWarps = 8;
constexpr int kNumMmaThreads = 256;
constexpr int kNumThreads = 384;  // the first warpgroup produces, the others multiply

// One thread's share of an mma warpgroup's tiles, in registers.
constexpr int kNumAccS = 40;
constexpr int kNumAccDkv = 128;
constexpr int kNumAccPanel = 40;  // of a panel of dK^T or dV^T
constexpr int kNumP = 20;

constexpr int kStepsHeadDim = 16;
constexpr int kStepsM = 4;
constexpr int kStepsN = 5;

// Shared memory: tiles are panels of 128 bytes a row, swizzled, as TMA writes them -------------------------------------------

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kNumPanels = 4;
constexpr int kStepsPerPanel = 4;
constexpr uint32_t kQPanelBytes = 8192;  // of dO too
constexpr uint32_t kKvPanelBytes = 10240;
constexpr uint32_t kScorePanelBytes = 4096;  // of P or dS
constexpr uint32_t kScoreBytes = 12288;
constexpr int kScoreRowBytes = 64;
constexpr uint32_t kQBytes = 32768;
constexpr uint32_t kQReadBytes = 32768;
constexpr uint32_t kKvBytes = 40960;
constexpr uint32_t kStatisticsBytes = 256;

constexpr uint32_t kSmemK = 0;
constexpr uint32_t kSmemV = 40960;
constexpr uint32_t kSmemQ = 81920;
constexpr uint32_t kSmemDout = 147456;
constexpr uint32_t kSmemP = 180224;
constexpr uint32_t kSmemDs = 204800;
constexpr uint32_t kSmemLse = 229376;
constexpr uint32_t kSmemDpsum = 229888;
constexpr uint32_t kSmemBarriers = 230144;

// Matrix descriptors: swizzle and stride between groups of 8 rows; for tiles whose columns are the result's also the step to
// the next panel of columns.
constexpr uint32_t kDescHi = 0x40000040u;
constexpr uint32_t kDescHiScores = 0x80000020u;
constexpr uint32_t kDescLoScores = 0x01000000u;
constexpr uint32_t kDescLoK = 0x02800000u;

// Global memory: the sums of dQ lie in register order, [batch][head][m_block][slice][register / 4][lane][register % 4]; a
// slice is what one warp holds, 16 rows of a block of queries.
constexpr int kDqSliceFloats = 4096;
constexpr int kDqBlockFloats = 16384;
constexpr int kDqPanelFloats = 1024;  // of a slice

// The kernel's scalar arguments; the order is the launcher's (KernelPlan.params).
struct Params {
    void const* o;
    void const* dout;
    float const* lse;
    float const* dlse;
    float* lse_log2;
    float* dpsum;
    float* dq_acc;
    float* dkv_parts;
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
    int num_whole_blocks;
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

__device__ __forceinline__ float load_shared_float(uint32_t address) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
    return value;
}

// Global memory -------------------------------------------------------------------------------------------------------

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

// Adds four fp32 numbers to those at a multiple of 16 bytes; each addition is atomic.
__device__ __forceinline__ void reduce_add_global_float4(float* address, float r0, float r1, float r2, float r3) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "f"(r0), "f"(r1), "f"(r2), "f"(r3) : "memory");
}

// mbarriers -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to TMA; a block-wide barrier must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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

// Fences --------------------------------------------------------------------------------------------------------------

// Publishes this thread's earlier shared-memory stores to TMA and wgmma (the async proxy).
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Fragments -----------------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 * (l % 4)
// and the next of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

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

// The same value, but nothing that derives from it is known from before: the compiler computes that again here instead of
// keeping it in registers, which the loop in between needs.
__device__ __forceinline__ uint32_t recompute(uint32_t value) {
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
__device__ __forceinline__ void wgmma_touch(float (&d)[40]) {
#pragma unroll
    for (int i = 0; i < 40; ++i) {
        asm volatile("" : "+f"(d[i])::"memory");
    }
}

// d[64 x 80] = a[64 x 16] b[16 x 80] + (accumulate ? d : 0); a and b in shared memory.
__device__ __forceinline__ void wgmma_m64n80k16_ss_kk(
    float (&d)[40], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39}, "
        "%40, %41, p, 1, 1, 0, 0;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
        : "l"(a), "l"(b), "r"(accumulate));
}

// d[64 x 80] = a[64 x 16] b[16 x 80] + (accumulate ? d : 0); a and b in shared memory.
__device__ __forceinline__ void wgmma_m64n80k16_ss_mm(
    float (&d)[40], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %42, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39}, "
        "%40, %41, p, 1, 1, 1, 1;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
        : "l"(a), "l"(b), "r"(accumulate));
}

// d[64 x 64] = a[64 x 16] b[16 x 64] + (accumulate ? d : 0); a and b in shared memory.
__device__ __forceinline__ void wgmma_m64n64k16_ss_km(
    float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 1;\n"
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
    kFirstMmaWarps = 2,
    kSecondMmaWarps = 3,
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

// Keys below this are visible to a query row.
__device__ __forceinline__ int key_end(Params const&, Seqlen const& s, int) {
    return s.k;
}

__device__ __forceinline__ BlockRange query_blocks(Params const& p, Seqlen const& s, int first_key) {
    int const end = num_query_blocks(p, s);
    return {0, first_key + kTileN <= s.k ? 0 : end, end, end};
}

// How many of a thread's registers of a row hold columns before this one, counted from the thread's first: the k-th holds
// k / 2 * 8 + k % 2.
__device__ __forceinline__ int registers_before(int column) {
    int const columns = max(column, 0);
    return columns / 8 * 2 + min(columns % 8, 2);
}

// Sets the scores of keys that a row does not see to -inf. What a thread sees of a row is a run of its registers, made into
// bits, so that one instruction moves 7 of them into predicates, and only in the blocks that need a mask
// (d = 128, 128 keys: 26 instructions of 589 fewer than with a comparison an element).
__device__ __forceinline__ void apply_mask(float (&acc_s)[kNumAccS], int const (&ends)[2], int first_key) {
    constexpr int kRegisters = kNumAccS / 2;  // of one row
    int const first_column = first_key + 2 * (lane_id() % 4);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        int const end = registers_before(ends[row] - first_column);
#pragma unroll
        for (int word = 0; word < kRegisters; word += 32) {
            uint32_t const visible = ~shift_left(0xffffffffu, max(end - word, 0));
#pragma unroll
            for (int k = word; k < min(word + 32, kRegisters); ++k) {
                int const i = k / 2 * 4 + 2 * row + k % 2;
                acc_s[i] = visible >> (k - word) & 1 ? acc_s[i] : -kInfinity;
            }
        }
    }
}

// Softmax and its gradient (FlashAttention-2, Algorithm 2, lines 11 to 14) ------------------------------------------------

// P = exp(scale * S - LSE), in base 2. A row that does not exist has LSE = +inf, so P = 0.
__device__ __forceinline__ void probabilities(float (&acc_s)[kNumAccS], uint32_t statistics, float softmax_scale_log2) {
    float const lse_log2[2] = {load_shared_float(statistics), load_shared_float(statistics + 8 * 4)};
#pragma unroll
    for (int i = 0; i < kNumAccS; ++i) {
        acc_s[i] = exp2_approx(fmaf(acc_s[i], softmax_scale_log2, -lse_log2[i / 2 % 2]));
    }
}

// Rounds to bf16.
__device__ __forceinline__ void pack(uint32_t (&packed)[kNumP], float const (&values)[kNumAccS]) {
#pragma unroll
    for (int i = 0; i < kNumP; ++i) {
        packed[i] = pack_bf16(values[2 * i], values[2 * i + 1]);
    }
}

// Where a lane's row of 16 bytes is, of the 16 queries of its warp and the 16 keys from 16 * step on: [query][key], panels of
// 32 keys, swizzled.
__device__ __forceinline__ uint32_t score_row(uint32_t tile, int warp, uint32_t lane, int step) {
    uint32_t const row = 16 * warp + lane % 16;
    uint32_t const chunk = step % 2 * 2 + lane / 16;
    return tile + step / 2 * kScorePanelBytes + row * kScoreRowBytes + ((chunk ^ row / 2 % 4) << 4);
}

// P or dS from registers to where the products read it.
__device__ __forceinline__ void stage_scores(uint32_t const (&packed)[kNumP], uint32_t tile, int warp) {
    uint32_t const lane = recompute(lane_id());
#pragma unroll
    for (int step = 0; step < kStepsN; ++step) {
        stmatrix_x4(score_row(tile, warp, lane, step), packed[4 * step], packed[4 * step + 1], packed[4 * step + 2],
                    packed[4 * step + 3]);
    }
}

// dS = P * (dP - dPsum), rounded. It lacks the factor softmax_scale, which dQ and dK get at their end. P is what stage_scores
// wrote: rounded, as dV sees it.
__device__ __forceinline__ void score_gradients(
    uint32_t (&ds)[kNumP], float const (&acc_dp)[kNumAccS], uint32_t p_tile, uint32_t statistics, int warp) {
    uint32_t const lane = recompute(lane_id());
    float const dpsum[2] = {load_shared_float(statistics), load_shared_float(statistics + 8 * 4)};
#pragma unroll
    for (int step = 0; step < kStepsN; ++step) {
        uint32_t packed[4];
        ldmatrix_x4(packed, score_row(p_tile, warp, lane, step));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float p[2];
            unpack_bf16(p, packed[i]);
            int const j = 8 * step + 2 * i;
            ds[4 * step + i] = pack_bf16(p[0] * (acc_dp[j] - dpsum[i % 2]), p[1] * (acc_dp[j + 1] - dpsum[i % 2]));
        }
    }
}

// Parts: a block of keys beyond the last full wave is summed by kParts blocks, each for as many blocks of queries -------------

constexpr int kParts = 2;
constexpr int kSumThreads = 128;  // that share dK, or dV, of a block
constexpr int kNumSums = 160;  // of each of them
constexpr int kDkFloats = 20480;  // of one part; dV's follow
constexpr int kPartFloats = 40960;

// Where the sums of block `index` begin for a thread, in register order: [register / 4][thread][register % 4].
__device__ __forceinline__ float* part_of_thread(Params const& p, int index, int thread) {
    return p.dkv_parts + static_cast<int64_t>(index - p.num_whole_blocks) * kPartFloats + 4 * thread;
}

// What a thread has summed of dK or dV, beside what other threads have: `part` is where its first four numbers lie.
__device__ __forceinline__ void leave_part(float* part, float const* acc, int count) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        store_global_float4(part + i * kSumThreads, acc[i], acc[i + 1], acc[i + 2], acc[i + 3]);
    }
}

// What all parts left in the same place, the first of them at `part`, always in their order.
__device__ __forceinline__ void sum_parts(float* acc, float const* part, int count) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        float sum[4];
        load_global_float4(sum, part + i * kSumThreads);
#pragma unroll
        for (int other = 1; other < kParts; ++other) {
            float r[4];
            load_global_float4(r, part + i * kSumThreads + other * kPartFloats);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                sum[j] += r[j];
            }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            acc[i + j] = sum[j];
        }
    }
}

// Whether this block of threads has a part of a block of keys.
__device__ __forceinline__ bool has_part(Params const& p) {
    return static_cast<int>(blockIdx.x) >= p.num_whole_blocks;
}

// Of the blocks of queries that see a block of keys, those of a part, or all.
__device__ __forceinline__ BlockRange blocks_of_part(BlockRange const& all, int part) {
    if (part < 0) {
        return all;
    }
    int const count = all.end - all.begin;
    return {all.begin + count * part / kParts, all.begin_full, all.end_full, all.begin + count * (part + 1) / kParts};
}

// Order of blocks: head by head, so that neighbours share Q, dO and dQ in L2.
struct KeyBlock {
    int n_block;
    int head_kv;
    int bidb;
    int part;  // of the queries; -1: all of them
};

__device__ __forceinline__ KeyBlock key_block_at(Params const& p, int index) {
    int const beyond = index - p.num_whole_blocks;
    int const part = beyond < 0 ? -1 : beyond % kParts;
    index = beyond < 0 ? index : p.num_whole_blocks + beyond / kParts;
    int const batch_head = index / p.num_n_blocks;
    return {index % p.num_n_blocks, batch_head % p.num_heads_kv, batch_head / p.num_heads_kv, part};
}

// The steps of a block of keys: all query heads that share it, one after the other, and of each the blocks of queries that see
// it, from the first to the last.
struct QueryWalk {
    int m_block;
    int bidh;
    int query_block;  // over all heads: query_block_index
    int remaining;    // steps, this one included

    // Whether some query of the block does not see some of the keys.
    __device__ __forceinline__ bool needs_mask(BlockRange const& blocks) const {
        return m_block < blocks.begin_full;
    }

    // Returns how far the next block of queries lies behind this one.
    __device__ __forceinline__ int next(Params const& p, BlockRange const& blocks) {
        remaining -= 1;
        int skipped = 0;
        m_block += 1;
        if (m_block == blocks.end) {
            m_block = blocks.begin;
            bidh += 1;
            skipped = p.num_m_blocks - (blocks.end - blocks.begin);
        }
        query_block += skipped + 1;
        return skipped + 1;
    }
};

__device__ __forceinline__ QueryWalk start_walk(
    Params const& p, Seqlen const& s, KeyBlock const& block, BlockRange const& blocks) {
    int const m_block = blocks.begin;
    int const bidh = block.head_kv * p.num_heads_per_kv;
    return {m_block, bidh, query_block_index(p, s, block.bidb, bidh, m_block),
            (blocks.end - blocks.begin) * p.num_heads_per_kv};
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
    __device__ __forceinline__ uint32_t dout_empty(int stage) const { return base + 56 + 8 * stage; }
    __device__ __forceinline__ uint32_t p_full() const { return base + 64; }
    __device__ __forceinline__ uint32_t ds_full() const { return base + 72; }

    __device__ __forceinline__ void init() const {
        mbarrier_init(k_full(), 1);
        mbarrier_init(v_full(), 1);
        for (int stage = 0; stage < 2; ++stage) {
            mbarrier_init(q_full(stage), 1);
            mbarrier_init(q_empty(stage), kNumMmaWarps);
        }
        for (int stage = 0; stage < 1; ++stage) {
            mbarrier_init(dout_full(stage), 1);
            mbarrier_init(dout_empty(stage), kNumMmaWarps);
        }
        mbarrier_init(p_full(), kNumMmaWarps / 2);
        mbarrier_init(ds_full(), kNumMmaWarps / 2);
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

// Matrix products -----------------------------------------------------------------------------------------------------

constexpr uint32_t kDescUnit = 16;  // bytes

// S = Q K^T, or dP = dO V^T, for one block of queries and one of keys. Steps of 16 along the head dim: 32 bytes inside a panel,
// then the next panel.
__device__ __forceinline__ void gemm_s(float (&acc_s)[kNumAccS], uint32_t q_tile, uint32_t key_tile) {
#pragma unroll
    for (int step = 0; step < kStepsHeadDim; ++step) {
        uint32_t const panel = step / kStepsPerPanel;
        uint32_t const within = step % kStepsPerPanel * 32;
        uint32_t const q = q_tile + (panel * kQPanelBytes + within) / kDescUnit;
        uint32_t const key = key_tile + (panel * kKvPanelBytes + within) / kDescUnit;
        wgmma_m64n80k16_ss_kk(acc_s, matrix_descriptor(kDescHi, q), matrix_descriptor(kDescHi, key), step != 0);
    }
}

// dV^T += dO^T P, or dK^T += Q^T dS: 64 columns of the head dim a panel. Steps of 16 queries: 16 rows of the panel, and of P or
// dS. Columns past the head dim are zeros, whose gradients nobody keeps.
__device__ __forceinline__ void gemm_dkv(float (&acc)[kNumPanels][kNumAccPanel], uint32_t q_tile, uint32_t scores) {
#pragma unroll
    for (int panel = 0; panel < kNumPanels; ++panel) {
#pragma unroll
        for (int step = 0; step < kStepsM; ++step) {
            uint32_t const q = q_tile + (panel * kQPanelBytes + step * 16 * kPanelRowBytes) / kDescUnit;
            uint32_t const score = scores + kDescLoScores + step * 16 * kScoreRowBytes / kDescUnit;
            wgmma_m64n80k16_ss_mm(
                acc[panel], matrix_descriptor(kDescHi, q), matrix_descriptor(kDescHiScores, score), 1);
        }
    }
}

// dQ = dS K, 64 columns of it from the first of panel k_panel on. Steps of 16 keys: 32 bytes inside a panel of dS, then the
// next panel, and 16 rows of K.
__device__ __forceinline__ void gemm_dq(float (&acc_dq)[32], uint32_t ds_tile, uint32_t k_panel) {
#pragma unroll
    for (int step = 0; step < kStepsN; ++step) {
        uint32_t const ds = ds_tile + (step / 2 * kScorePanelBytes + step % 2 * 32) / kDescUnit;
        uint32_t const key = k_panel + kDescLoK + step * 16 * kPanelRowBytes / kDescUnit;
        wgmma_m64n64k16_ss_km(acc_dq, matrix_descriptor(kDescHiScores, ds), matrix_descriptor(kDescHi, key), step != 0);
    }
}

// Staging -------------------------------------------------------------------------------------------------------------

// Where a lane's 8 elements of the first 16 rows of a panel go, of which a warp has 16 columns, held transposed.
__device__ __forceinline__ uint32_t transposed_row(uint32_t panel, int warp) {
    int const row = lane_id() % 8;
    int const chunk = 2 * warp + lane_id() / 8 % 2;
    return panel + (row + lane_id() / 16 * 8) * kPanelRowBytes + static_cast<uint32_t>((chunk ^ row) << 4);
}

// 64 columns of the head dim of dK^T or dV^T, times `factor`, rounded and transposed into the rows of a panel; 16 of them are
// this warp's.
__device__ __forceinline__ void stage_transposed(float const (&acc)[kNumAccPanel], uint32_t panel, float factor, int warp) {
    uint32_t const first = transposed_row(panel, warp);
    auto pair = [&](int i) { return pack_bf16(acc[i] * factor, acc[i + 1] * factor); };
#pragma unroll
    for (int i = 0; i < kNumAccPanel; i += 8) {
        stmatrix_x4_trans(first + i / 8 * 16 * kPanelRowBytes, pair(i), pair(i + 2), pair(i + 4), pair(i + 6));
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

// Adds a warp's share of dQ to the sums in global memory, straight from registers: shared memory has no room for it. The
// registers from `count` on are columns past the head dim.
__device__ __forceinline__ void add_dq(float const (&acc_dq)[32], float* dq_acc, int count) {
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        if (i < count) {
            reduce_add_global_float4(
                dq_acc + i * 32, acc_dq[i], acc_dq[i + 1], acc_dq[i + 2], acc_dq[i + 3]);
        }
    }
}

// Producer: one warp. K and V once, then Q and dO of every block of queries, each with its row statistics --------------------

__device__ __forceinline__ void produce(
    TileMaps const& maps_q, CUtensorMap const& map_k, CUtensorMap const& map_v, TileMaps const& maps_dout,
    Params const& p, uint32_t smem, Barriers const& barriers) {
    KeyBlock const block = key_block_at(p, static_cast<int>(blockIdx.x));
    Seqlen const s = seqlen_of(p, block.bidb);
    BlockRange const blocks = blocks_of_part(query_blocks(p, s, block.n_block * kTileN), block.part);
    PipelineState q_state = {0, 0};
    PipelineState dout_state = {0, 0};
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
    }
}

// Consumers: the first makes S, P and dV, the second dP, dS and dK, and each its panels of dQ's columns ---------------------

// What a warp of either knows of its block.
struct Work {
    KeyBlock block;
    Seqlen s;
    BlockRange blocks;
};

__device__ __forceinline__ Work work_of_block(Params const& p, int index) {
    KeyBlock const block = key_block_at(p, index);
    Seqlen const s = seqlen_of(p, block.bidb);
    return {block, s, blocks_of_part(query_blocks(p, s, block.n_block * kTileN), block.part)};
}

__device__ __forceinline__ void clear(float (&acc)[kNumPanels][kNumAccPanel]) {
#pragma unroll
    for (int panel = 0; panel < kNumPanels; ++panel) {
#pragma unroll
        for (int i = 0; i < kNumAccPanel; ++i) {
            acc[panel][i] = 0.0f;
        }
    }
}

__device__ __forceinline__ void touch(float (&acc)[kNumPanels][kNumAccPanel]) {
#pragma unroll
    for (int panel = 0; panel < kNumPanels; ++panel) {
        wgmma_touch(acc[panel]);
    }
}

// dK or dV, to where K or V was: all warps must be done with them. `barrier` is the warpgroup's own.
__device__ __forceinline__ void finish(
    CUtensorMap const& map, float const (&acc)[kNumPanels][kNumAccPanel], uint32_t tile, float factor, Work const& work,
    int barrier, int warp) {
    named_barrier_sync(kAllMmaWarps, kNumMmaThreads);
#pragma unroll
    for (int panel = 0; panel < kNumPanels; ++panel) {
        stage_transposed(acc[panel], tile + panel * kKvPanelBytes, factor, warp);
    }
    fence_proxy_async();
    named_barrier_sync(barrier, kNumMmaThreads / 2);
    if (warp == 0) {
        store_rows(map, work.s, tile, work.block.n_block * kTileN, work.block);
        tma_store_wait();
    }
}

// S = Q K^T, P, and dV^T += dO^T P; of dQ the first 128 columns.
__device__ __forceinline__ void consume_dv(
    CUtensorMap const& map_dv, Params const& p, uint32_t smem, Barriers const& barriers, int warp) {
    Work const work = work_of_block(p, static_cast<int>(blockIdx.x));
    uint32_t const k_tile = (smem + kSmemK) / kDescUnit;
    bool const leader = lane_id() == 0;
    int const row = 16 * warp + lane_id() / 4;  // of the block of queries, and the eighth after it
    PipelineState q_state = {0, 0};
    PipelineState dout_state = {0, 0};
    uint32_t parity = 0;  // of the step: where P and dS are, the phase of their barriers, and of dQ's turns
    float acc_dv[kNumPanels][kNumAccPanel];
    clear(acc_dv);

    QueryWalk walk = start_walk(p, work.s, work.block, work.blocks);
    float* dq_acc = p.dq_acc + static_cast<int64_t>(walk.query_block) * kDqBlockFloats + warp * kDqSliceFloats +
                    4 * lane_id();
    if (walk.remaining > 0) {
        mbarrier_wait(barriers.k_full(), 0);
    }
    while (walk.remaining > 0) {
        float acc_s[kNumAccS];
        uint32_t p_tile[kNumP];
        mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);
        wgmma_fence();
        gemm_s(acc_s, (smem + kSmemQ + q_state.stage * kQBytes) / kDescUnit, k_tile);
        wgmma_commit();
        wgmma_wait_0();
        wgmma_touch(acc_s);
        if (walk.needs_mask(work.blocks)) {
            int const query = walk.m_block * kTileM + row;
            int const ends[2] = {key_end(p, work.s, query), key_end(p, work.s, query + 8)};
            apply_mask(acc_s, ends, work.block.n_block * kTileN);
        }
        probabilities(acc_s, smem + kSmemLse + q_state.stage * kStatisticsBytes + 4 * recompute(row), p.softmax_scale_log2);
        pack(p_tile, acc_s);

        // P to both warpgroups. Its place is free: dS of the step before says that the other has read the P of two steps
        // before, and came after all warps of this one had begun the step before.
        stage_scores(p_tile, smem + kSmemP + parity * kScoreBytes, warp);
        fence_proxy_async();
        sync_warp();
        mbarrier_arrive_if(barriers.p_full(), leader);

        // Q is released behind a product that needs P, so when LSE has arrived in registers. An arrival may overtake loads that
        // are still queued, behind the additions to dQ for long: dV was wrong at head dims 208 to 248 on an H200.
        mbarrier_wait(barriers.dout_full(dout_state.stage), dout_state.phase);
        mbarrier_wait(barriers.p_full(), parity);
        wgmma_fence();
        gemm_dkv(acc_dv, (smem + kSmemDout + dout_state.stage * kQBytes) / kDescUnit,
                 (smem + kSmemP + parity * kScoreBytes) / kDescUnit);
        wgmma_commit();
        mbarrier_arrive_if(barriers.q_empty(q_state.stage), leader);
        q_state.advance(kNumStages);

        mbarrier_wait(barriers.ds_full(), parity);
        uint32_t const ds_tile = (smem + kSmemDs + parity * kScoreBytes) / kDescUnit;
        float acc_dq[32];
        wgmma_fence();
        gemm_dq(acc_dq, ds_tile, k_tile + 0 * (kKvPanelBytes / kDescUnit));
        wgmma_commit();
        wgmma_wait_1();
        touch(acc_dv);
        mbarrier_arrive_if(barriers.dout_empty(dout_state.stage), leader);
        dout_state.advance(kNumDoutStages);
        wgmma_wait_0();
        wgmma_touch(acc_dq);
        add_dq(acc_dq, dq_acc + 0 * kDqPanelFloats, 32);
        wgmma_fence();
        gemm_dq(acc_dq, ds_tile, k_tile + 1 * (kKvPanelBytes / kDescUnit));
        wgmma_commit();
        wgmma_wait_0();
        wgmma_touch(acc_dq);
        add_dq(acc_dq, dq_acc + 1 * kDqPanelFloats, 32);
        parity ^= 1;
        dq_acc += static_cast<int64_t>(walk.next(p, work.blocks)) * kDqBlockFloats;
    }
    if (has_part(p)) {
        float* const part = part_of_thread(p, static_cast<int>(blockIdx.x), 32 * warp + lane_id());
        leave_part(part + kDkFloats, acc_dv[0], kNumSums);
        return;
    }
    finish(map_dv, acc_dv, smem + kSmemV, 1.0f, work, kFirstMmaWarps, warp);
}

// dP = dO V^T, dS, and dK^T += Q^T dS; of dQ the other 128 columns.
__device__ __forceinline__ void consume_dk(
    CUtensorMap const& map_dk, Params const& p, uint32_t smem, Barriers const& barriers, int warp) {
    Work const work = work_of_block(p, static_cast<int>(blockIdx.x));
    uint32_t const k_tile = (smem + kSmemK) / kDescUnit;
    uint32_t const v_tile = (smem + kSmemV) / kDescUnit;
    bool const leader = lane_id() == 0;
    int const row = 16 * warp + lane_id() / 4;
    PipelineState q_state = {0, 0};
    PipelineState dout_state = {0, 0};
    uint32_t parity = 0;
    float acc_dk[kNumPanels][kNumAccPanel];
    clear(acc_dk);

    QueryWalk walk = start_walk(p, work.s, work.block, work.blocks);
    float* dq_acc = p.dq_acc + static_cast<int64_t>(walk.query_block) * kDqBlockFloats + warp * kDqSliceFloats +
                    4 * lane_id();
    if (walk.remaining > 0) {
        mbarrier_wait(barriers.k_full(), 0);
        mbarrier_wait(barriers.v_full(), 0);
    }
    while (walk.remaining > 0) {
        float acc_dp[kNumAccS];
        uint32_t ds[kNumP];
        mbarrier_wait(barriers.dout_full(dout_state.stage), dout_state.phase);
        wgmma_fence();
        gemm_s(acc_dp, (smem + kSmemDout + dout_state.stage * kQBytes) / kDescUnit, v_tile);
        wgmma_commit();
        wgmma_wait_0();
        wgmma_touch(acc_dp);
        mbarrier_wait(barriers.p_full(), parity);
        score_gradients(ds, acc_dp, smem + kSmemP + parity * kScoreBytes,
                        smem + kSmemDpsum + dout_state.stage * kStatisticsBytes + 4 * recompute(row), warp);

        // dS to both warpgroups. Its place is free: this P came after dQ of the step before, which waited for all warps of this
        // warpgroup.
        stage_scores(ds, smem + kSmemDs + parity * kScoreBytes, warp);
        fence_proxy_async();
        sync_warp();
        mbarrier_arrive_if(barriers.ds_full(), leader);
        mbarrier_wait(barriers.ds_full(), parity);
        uint32_t const ds_tile = (smem + kSmemDs + parity * kScoreBytes) / kDescUnit;
        mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);
        float acc_dq[32];
        wgmma_fence();
        gemm_dq(acc_dq, ds_tile, k_tile + 2 * (kKvPanelBytes / kDescUnit));
        wgmma_commit();
        mbarrier_arrive_if(barriers.dout_empty(dout_state.stage), leader);  // behind a product that needs dPsum
        dout_state.advance(kNumDoutStages);
        gemm_dkv(acc_dk, (smem + kSmemQ + q_state.stage * kQBytes) / kDescUnit, ds_tile);
        wgmma_commit();
        wgmma_wait_1();
        wgmma_touch(acc_dq);
        add_dq(acc_dq, dq_acc + 2 * kDqPanelFloats, 32);
        wgmma_fence();
        gemm_dq(acc_dq, ds_tile, k_tile + 3 * (kKvPanelBytes / kDescUnit));
        wgmma_commit();
        wgmma_wait_0();
        wgmma_touch(acc_dq);
        add_dq(acc_dq, dq_acc + 3 * kDqPanelFloats, 32);
        wgmma_wait_0();
        touch(acc_dk);
        mbarrier_arrive_if(barriers.q_empty(q_state.stage), leader);
        q_state.advance(kNumStages);
        parity ^= 1;
        dq_acc += static_cast<int64_t>(walk.next(p, work.blocks)) * kDqBlockFloats;
    }
    if (has_part(p)) {
        leave_part(part_of_thread(p, static_cast<int>(blockIdx.x), 32 * warp + lane_id()), acc_dk[0], kNumSums);
        return;
    }
    finish(map_dk, acc_dk, smem + kSmemK, p.softmax_scale, work, kSecondMmaWarps, warp);
}

__device__ __forceinline__ void consume(
    CUtensorMap const& map_dk, CUtensorMap const& map_dv, Params const& p, uint32_t smem, Barriers const& barriers,
    int warpgroup, int warp) {
    if (warpgroup == 0) {
        consume_dv(map_dv, p, smem, barriers, warp);
    } else {
        consume_dk(map_dk, p, smem, barriers, warp);
    }
}

// dK and dV of the block of keys of all parts, the first of which was block `index`.
__device__ __forceinline__ void finish_parts(
    CUtensorMap const& map_dk, CUtensorMap const& map_dv, Params const& p, uint32_t smem, int index, int warpgroup, int warp) {
    Work const work = work_of_block(p, index);
    float const* const part = part_of_thread(p, index, 32 * warp + lane_id());
    if (warpgroup == 0) {
        float acc_dv[kNumPanels][kNumAccPanel];
        sum_parts(acc_dv[0], part + kDkFloats, kNumSums);
        finish(map_dv, acc_dv, smem + kSmemV, 1.0f, work, kFirstMmaWarps, warp);
    } else {
        float acc_dk[kNumPanels][kNumAccPanel];
        sum_parts(acc_dk[0], part, kNumSums);
        finish(map_dk, acc_dk, smem + kSmemK, p.softmax_scale, work, kSecondMmaWarps, warp);
    }
}

// Kernels -------------------------------------------------------------------------------------------------------------

// Which block of queries a block of threads takes, before the main kernel and after it: the last one first. That one begins
// with the first heads, of which L2 then has what was written last, and leaves the last sums in L2.
__device__ __forceinline__ int query_block_number() {
    return static_cast<int>(gridDim.x - 1 - blockIdx.x);
}

// Row statistics of one block of queries, and zeros for its dQ. 32 lanes share a row, 16 bytes each.
extern "C" __global__ void __launch_bounds__(128) fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2_preprocess(
    const __grid_constant__ Params p) {
    griddepcontrol_launch_dependents();  // acts when all blocks have started: the main kernel's take no place of theirs
    constexpr int kThreads = 128;
    constexpr int kLanesPerRow = 32;
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
        if (exists && chunk < 32) {
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

    float* const dq_acc = p.dq_acc + static_cast<int64_t>(block.index) * kDqBlockFloats;
    for (int i = 4 * thread; i < kDqBlockFloats; i += 4 * kThreads) {
        store_global_float4(dq_acc + i, 0.0f, 0.0f, 0.0f, 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2(
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
    } else {
        setmaxnreg_inc_240();
        griddepcontrol_wait();  // here in every block: the postprocess kernel waits for this grid alone
        consume(map_dk, map_dv, p, smem, barriers, warp / 4 - 1, warp % 4);
    }
}

// One block of queries of dQ: from sums in register order to rows, through shared memory.
extern "C" __global__ void __launch_bounds__(128) fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2_postprocess(
    const __grid_constant__ CUtensorMap map_dq, const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    QueryBlock const block = query_block_at(p, query_block_number());
    int const warp = warp_id();
    float const* const slice =
        p.dq_acc + static_cast<int64_t>(block.index) * kDqBlockFloats + warp * kDqSliceFloats + lane_id() * 4;
    griddepcontrol_wait();
    auto load = [&](float (&r)[4], float const* address) {
        load_global_float4(r, address);
    };
    float acc_dq[kNumAccDkv];
#pragma unroll
    for (int i = 0; i < kNumAccDkv; i += 4) {
        float r[4];
        load(r, slice + i * 32);
        acc_dq[i] = r[0];
        acc_dq[i + 1] = r[1];
        acc_dq[i + 2] = r[2];
        acc_dq[i + 3] = r[3];
    }
    stage_rows(acc_dq, smem + warp * 16 * kPanelRowBytes, kQPanelBytes, p.softmax_scale);
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

// One block of keys of dK and dV: from what each part has summed to rows.
extern "C" __global__ void __launch_bounds__(kNumMmaThreads) fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2_groups(
    const __grid_constant__ CUtensorMap map_dk, const __grid_constant__ CUtensorMap map_dv, const __grid_constant__ Params p) {
    griddepcontrol_wait();
    int const index = p.num_whole_blocks + kParts * static_cast<int>(blockIdx.x);
    finish_parts(map_dk, map_dv, p, shared_memory_base(), index, warp_id() / 4, warp_id() % 4);
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_90a -cubin, or with NVRTC.
// `fa2gen render fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2 --with-host` adds a launcher in C++.
//
// Kernels, one after the other on one stream; each takes tensor maps, then Params, by value:
//   fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2_preprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 128 threads, 0 bytes of dynamic shared memory
//   fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2
//     grid (num_whole_blocks + num_tail_blocks * 2, 1, 1), 384 threads, 230224 bytes of dynamic shared memory
//     maps of q, k, v, dout, dk, dv
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 230224
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1: it then starts early
//   fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2_postprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 128 threads, 32768 bytes of dynamic shared memory
//     maps of dq
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1: it then starts early
//   fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2_groups
//     grid (num_tail_blocks, 1, 1), 256 threads, 81920 bytes of dynamic shared memory
//     maps of dk, dv
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 81920
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1: it then starts early
// Tensor maps: tiled, (head_dim, seqlen, heads, batch), 16-bit elements, zeros outside, on 64 bytes
//   q, dout, dq: box 64 x 64 x 1 x 1, swizzle 128 bytes
//   k, v, dk, dv: box 64 x 80 x 1 x 1, swizzle 128 bytes
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q + 63) / 64
//   num_n_blocks = (seqlen_k + 79) / 80
//   num_key_blocks = num_n_blocks * batch * num_heads_kv
//   num_whole_blocks = max(num_key_blocks - 1, 0) / num_sms * num_sms
//   num_tail_blocks = num_key_blocks - num_whole_blocks
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Device memory beside the tensors, in 4-byte numbers:
//   lse_log2: num_m_blocks * num_heads * batch * 64
//   dpsum: num_m_blocks * num_heads * batch * 64
//   dq_acc: num_m_blocks * num_heads * batch * 16384
//   dkv_parts: num_tail_blocks * 81920

}  // namespace fa2gen::fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2
