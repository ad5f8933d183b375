// fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm90/bwd.cu.j2; edit the template or the spec, not this file.
//   problem  bwd, head dim 64, bf16, full mask
//   tiling   128 query rows x 128 keys, 2 stages, 8 mma warps, 128-byte panels
//   launch   384 threads, 231648 bytes of dynamic shared memory
//   contents   33 Problem and tiling,   55 Shared memory,  127 Threads,  171 Arithmetic,  202 Shared memory,
//             235 Global memory,  298 mbarriers,  342 TMA,  389 Bulk copies,  411 Fences,  423 Fragments,
//             437 Registers,  445 Registers of a warpgroup,  457 wgmma,  634 What is visible,
//             680 Softmax and its gradient,  775 Pipelines,  826 Loads,  875 Matrix products,  912 Staging,
//             988 Producer, 1093 Consumer, 1298 Kernels, 1460 Launch
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

namespace fa2gen::fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1 {

using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 64;
constexpr int kTileM = 128;  // queries
constexpr int kTileN = 128;  // keys
constexpr int kNumStages = 2;  // of Q
constexpr int kNumDoutStages = 2;
constexpr int kNumKeyStages = 2;
constexpr int kNumMmaWarps = 8;
constexpr int kNumThreads = 384;  // the first warpgroup produces, the others multiply

// One thread's share of an mma warpgroup's tiles, in registers.
constexpr int kNumRowTiles = 1;  // of 16 keys, in each warp
constexpr int kNumAccS = 64;
constexpr int kNumAccDkv = 32;
constexpr int kNumAccDq = 32;
constexpr int kNumP = 32;

constexpr int kStepsHeadDim = 4;
constexpr int kStepsM = 8;
constexpr int kStepsN = 8;

// Shared memory: tiles are panels of 128 bytes a row, swizzled, as TMA writes them -------------------------------------------

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kNumPanels = 1;
constexpr int kStepsPerPanel = 4;
constexpr uint32_t kQPanelBytes = 16384;  // of dO too
constexpr uint32_t kKvPanelBytes = 16384;
constexpr uint32_t kDsPanelBytes = 16384;
constexpr uint32_t kQBytes = 16384;
constexpr uint32_t kQReadBytes = 16384;
constexpr uint32_t kKvBytes = 16384;
constexpr uint32_t kKeyStageBytes = 2 * kKvBytes;
constexpr uint32_t kDsBytes = 32768;
constexpr uint32_t kStatisticsBytes = 512;

constexpr uint32_t kSmemK = 0;
constexpr uint32_t kSmemV = 16384;
constexpr uint32_t kSmemQ = 65536;
constexpr uint32_t kSmemDout = 98304;
constexpr uint32_t kSmemDs = 131072;
constexpr uint32_t kSmemDq = 196608;
constexpr uint32_t kSmemLse = 229376;
constexpr uint32_t kSmemDpsum = 230400;
constexpr uint32_t kSmemBlockSlots = 231424;
constexpr uint32_t kSmemBarriers = 231456;

// Matrix descriptors: swizzle and stride between groups of 8 rows; for tiles whose columns are the result's also the step to
// the next panel of columns.
constexpr uint32_t kDescHi = 0x40000040u;
constexpr uint32_t kDescLoQ = 0x04000000u;
constexpr uint32_t kDescLoK = 0x04000000u;

// Global memory: the sums of dQ lie in register order, [batch][head][m_block][slice][register / 4][lane][register % 4]; a
// slice is what one warp holds, 16 rows of a block of queries.
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
    int* tile_counter;
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
    int stores_first;
    int num_key_blocks;
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

__device__ __forceinline__ int shfl_from_lane_0(int value) {
    return __shfl_sync(0xffffffffu, value, 0);
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

__device__ __forceinline__ int fetch_add_global(int* counter, int value) {
    return atomicAdd(counter, value);
}

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

// What goes to L2 with this policy leaves it last.
constexpr uint64_t kEvictLast = 0x14f0000000000000;

// One box into shared memory; `barrier` gets all of the box's bytes, out-of-bounds ones included.
__device__ __forceinline__ void tma_load(
    uint32_t destination, CUtensorMap const& map, uint32_t barrier, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, { %3, %4, %5, %6}], [%2], %7;"
        :: "r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(kEvictLast)
        : "memory");
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
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;"
                 :: "l"(destination), "r"(source), "r"(bytes), "l"(kEvictLast) : "memory");
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

// Until at most 2 committed batches of this warpgroup are still running.
__device__ __forceinline__ void wgmma_wait_2() {
    asm volatile("wgmma.wait_group.sync.aligned 2;" ::: "memory");
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
__device__ __forceinline__ void wgmma_touch_a(uint32_t (&a)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        asm volatile("" : "+r"(a[i])::"memory");
    }
}

// d[64 x 128] = a[64 x 16] b[16 x 128] + (accumulate ? d : 0); a and b in shared memory.
__device__ __forceinline__ void wgmma_m64n128k16_ss_kk(
    float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(accumulate));
}

// d[64 x 64] = a[64 x 16] b[16 x 64] + (accumulate ? d : 0); a in registers, b in shared memory.
__device__ __forceinline__ void wgmma_m64n64k16_rs_km(
    float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, 1;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));
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

// Order of blocks: head by head, so that neighbours share Q, dO and dQ in L2.
struct KeyBlock {
    int n_block;
    int head_kv;
    int bidb;
};

__device__ __forceinline__ KeyBlock key_block_at(Params const& p, int index) {
    int const batch_head = index / p.num_n_blocks;
    return {index % p.num_n_blocks, batch_head % p.num_heads_kv, batch_head / p.num_heads_kv};
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

    __device__ __forceinline__ uint32_t k_full(int stage) const { return base + 8 * stage; }
    __device__ __forceinline__ uint32_t k_empty(int stage) const { return base + 16 + 8 * stage; }
    __device__ __forceinline__ uint32_t v_full(int stage) const { return base + 32 + 8 * stage; }
    __device__ __forceinline__ uint32_t q_full(int stage) const { return base + 48 + 8 * stage; }
    __device__ __forceinline__ uint32_t q_empty(int stage) const { return base + 64 + 8 * stage; }
    __device__ __forceinline__ uint32_t dout_full(int stage) const { return base + 80 + 8 * stage; }
    __device__ __forceinline__ uint32_t dout_empty(int stage) const { return base + 96 + 8 * stage; }
    __device__ __forceinline__ uint32_t dq_full(int stage) const { return base + 112 + 8 * stage; }
    __device__ __forceinline__ uint32_t dq_empty(int stage) const { return base + 128 + 8 * stage; }
    __device__ __forceinline__ uint32_t ds_full(int stage) const { return base + 144 + 8 * stage; }
    __device__ __forceinline__ uint32_t ds_empty(int stage) const { return base + 160 + 8 * stage; }
    __device__ __forceinline__ uint32_t first_has_dp(int stage) const { return base + 176 + 8 * stage; }

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < 2; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(k_empty(stage), kNumMmaWarps + 2);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(q_full(stage), 1);
            mbarrier_init(q_empty(stage), kNumMmaWarps);
            mbarrier_init(dout_full(stage), 1);
            mbarrier_init(dout_empty(stage), kNumMmaWarps);
            mbarrier_init(dq_full(stage), kNumMmaWarps / 2);
            mbarrier_init(dq_empty(stage), 1);
            mbarrier_init(ds_full(stage), kNumMmaWarps);
            mbarrier_init(ds_empty(stage), kNumMmaWarps);
            mbarrier_init(first_has_dp(stage), kNumMmaWarps / 2);
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
        wgmma_m64n128k16_ss_kk(acc_s, matrix_descriptor(kDescHi, key), matrix_descriptor(kDescHi, q), step != 0);
    }
}

// dV += P^T dO, or dK += dS^T Q, for 64 keys and one block of queries. Steps of 16 queries: 16 rows of every panel.
__device__ __forceinline__ void gemm_dkv(float (&acc)[kNumAccDkv], uint32_t const (&p)[kNumP], uint32_t q_tile) {
#pragma unroll
    for (int step = 0; step < kStepsM; ++step) {
        uint32_t const q = q_tile + kDescLoQ + step * 16 * kPanelRowBytes / kDescUnit;
        wgmma_m64n64k16_rs_km(
            acc, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], matrix_descriptor(kDescHi, q), 1);
    }
}

// dQ = dS K for 64 queries and one block of keys, 64 columns of it from the first panel of k_panel on.
__device__ __forceinline__ void gemm_dq(float (&acc_dq)[kNumAccDq], uint32_t ds_rows, uint32_t k_panel) {
#pragma unroll
    for (int step = 0; step < kStepsN; ++step) {
        uint32_t const ds = ds_rows + (step / kStepsPerPanel * kDsPanelBytes + step % kStepsPerPanel * 32) / kDescUnit;
        uint32_t const key = k_panel + kDescLoK + step * 16 * kPanelRowBytes / kDescUnit;
        wgmma_m64n64k16_ss_km(acc_dq, matrix_descriptor(kDescHi, ds), matrix_descriptor(kDescHi, key), step != 0);
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

constexpr uint32_t kStoredPanelBytes = 16 * kPanelRowBytes;  // of a warp's rows

// What stage_rows wrote, to global memory; clips at seqlen_k and at the head dim.
__device__ __forceinline__ void store_rows(
    CUtensorMap const& map, Seqlen const& s, uint32_t rows, int row, KeyBlock const& block) {
    Box const box = key_box(s, row, block.bidb);
    fence_proxy_async();
    sync_warp();
    if (elect_one()) {
#pragma unroll
        for (int panel = 0; panel < kNumPanels; ++panel) {
            store_box(map, rows + panel * kStoredPanelBytes, panel * kPanelColumns, box, block.head_kv);
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

// Which block of keys it is comes with its K, in a slot of 16 bytes; none: n_block < 0, and no copy.
__device__ __forceinline__ KeyBlock load_block_slot(uint32_t smem, int stage) {
    int slot[4];
    load_shared_int4(slot, smem + kSmemBlockSlots + 16 * stage);
    return {slot[0], slot[1], slot[2]};
}

__device__ __forceinline__ void store_block_slot(uint32_t smem, int stage, KeyBlock const& block) {
    store_shared_int4(smem + kSmemBlockSlots + 16 * stage, block.n_block, block.head_kv, block.bidb, 0);
}

// Producer: one warp. Of each block of keys K and V, then of each block of queries Q and dO, with their row statistics -----

__device__ __forceinline__ void produce(
    TileMaps const& maps_q, CUtensorMap const& map_k, CUtensorMap const& map_v, TileMaps const& maps_dout,
    Params const& p, uint32_t smem, Barriers const& barriers) {
    PipelineState k_state = {0, 0};
    PipelineState q_state = {0, 0};
    PipelineState dout_state = {0, 0};
    int index = static_cast<int>(blockIdx.x);
    while (index < p.num_key_blocks) {
        KeyBlock const block = key_block_at(p, index);
        Seqlen const s = seqlen_of(p, block.bidb);
        BlockRange const blocks = query_blocks(p, s, block.n_block * kTileN);
        mbarrier_wait(barriers.k_empty(k_state.stage), k_state.phase ^ 1);
        if (elect_one()) {
            store_block_slot(smem, k_state.stage, block);
        }
        load_key_block(map_k, smem + kSmemK + k_state.stage * kKeyStageBytes, barriers.k_full(k_state.stage), s, block);
        load_key_block(map_v, smem + kSmemV + k_state.stage * kKeyStageBytes, barriers.v_full(k_state.stage), s, block);
        k_state.advance(kNumKeyStages);
        griddepcontrol_wait();  // the preprocess kernel writes what comes with Q and dO
        for (QueryWalk walk = start_walk(p, s, block, blocks); walk.remaining > 0; walk.next(p, blocks)) {
            auto load = [&](TileMaps const& maps, uint32_t tiles, float const* statistics, uint32_t rows, uint32_t full,
                            uint32_t empty, PipelineState& state, int num_stages) {
                load_query_block(maps, smem + tiles + state.stage * kQBytes,
                                 statistics + static_cast<int64_t>(walk.query_block) * kTileM,
                                 smem + rows + state.stage * kStatisticsBytes, full, empty, state, num_stages,
                                 query_box(s, walk.m_block * kTileM, block.bidb), walk.bidh);
            };
            load(maps_q, kSmemQ, p.lse_log2, kSmemLse, barriers.q_full(q_state.stage), barriers.q_empty(q_state.stage), q_state,
                 kNumStages);
            load(maps_dout, kSmemDout, p.dpsum, kSmemDpsum, barriers.dout_full(dout_state.stage),
                 barriers.dout_empty(dout_state.stage), dout_state, kNumDoutStages);
        }

        int const fetched = lane_id() == 0 ? fetch_add_global(p.tile_counter, 1) : 0;
        index = static_cast<int>(gridDim.x) + shfl_from_lane_0(fetched);
    }
    mbarrier_wait(barriers.k_empty(k_state.stage), k_state.phase ^ 1);
    if (elect_one()) {
        store_block_slot(smem, k_state.stage, {-1, 0, 0});
        mbarrier_arrive(barriers.k_full(k_state.stage));
    }
}

// Adds dQ of one block of queries after the other to the sums in global memory. Under the
// next block's products: they need shared memory's copy gone, and not yet the sums complete.
// Of what one mma warpgroup makes: they are not in step.
__device__ __forceinline__ void write_dq(
    Params const& p, uint32_t smem, Barriers const& barriers, int warpgroup) {
    PipelineState k_state = {0, 0};
    QueryWalk walk = {};
    BlockRange blocks = {};
    auto begin = [&]() {
        do {
            mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);
            KeyBlock const block = load_block_slot(smem, k_state.stage);
            if (block.n_block < 0) {
                return;
            }
            mbarrier_arrive(barriers.k_empty(k_state.stage));  // which the slot's number says, so it can not overtake that
            k_state.advance(kNumKeyStages);
            Seqlen const s = seqlen_of(p, block.bidb);
            blocks = query_blocks(p, s, block.n_block * kTileN);
            walk = start_walk(p, s, block, blocks);
        } while (walk.remaining == 0);
    };
    uint32_t phase = 0;
    for (begin(); walk.remaining > 0; begin())
    for (; walk.remaining > 0; walk.next(p, blocks)) {
        int* const sums = p.dq_sums + 2 * walk.query_block + warpgroup;
        int found = p.stores_first ? load_global_acquire(sums) : kAreSums;  // while dQ is made
        mbarrier_wait(barriers.dq_full(warpgroup), phase);
        constexpr int kShareFloats = 4 * kDqSliceFloats;
        float* const destination =
            p.dq_acc + static_cast<int64_t>(walk.query_block) * kDqBlockFloats + warpgroup * kShareFloats;
        uint32_t const source = smem + kSmemDq + warpgroup * kShareFloats * 4;
        int const bytes = kShareFloats * 4;
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
        mbarrier_arrive(barriers.dq_empty(warpgroup));
        if (is_first) {
            tma_store_wait();
            store_global_release(sums, kAreSums);
        }
        phase ^= 1;
    }
    tma_store_wait();
}

// Consumer: one of the mma warpgroups, 64 keys of the block --------------------------------------------------------------

__device__ __forceinline__ void consume(
    CUtensorMap const& map_dk, CUtensorMap const& map_dv, Params const& p, uint32_t smem, Barriers const& barriers,
    int warpgroup, int warp) {
    int const warp_key = 64 * warpgroup + 16 * warp;  // of the block
    uint32_t const q_tiles = (smem + kSmemQ) / kDescUnit;
    uint32_t const dout_tiles = (smem + kSmemDout) / kDescUnit;
    uint32_t const ds_panel = smem + kSmemDs + warpgroup * kDsPanelBytes;
    uint32_t const ds_operand = (smem + kSmemDs + 64 * warpgroup * kPanelRowBytes) / kDescUnit;
    int const slice = 4 * warpgroup + warp;  // of dQ
    uint32_t const dq_slice = smem + kSmemDq + slice * (kDqSliceFloats * 4);
    bool const leader = lane_id() == 0;
    PipelineState q_state = {0, 0};
    PipelineState dout_state = {0, 0};
    int step = 0;

    float acc_dk[kNumAccDkv];
    float acc_dv[kNumAccDkv];
    uint32_t dq_phase = 0;
    // Of the block of keys in hand, which begin fills in.
    PipelineState k_state = {0, 0};
    BlockRange blocks = {};
    QueryWalk walk = {};
    int begins[2] = {0, 0};
    uint32_t k_rows = 0;
    uint32_t k_panel = 0;
    uint32_t v_rows = 0;
    // The step before, whose dQ is to be made, if there is one: K of that, and the step that has none before it.
    uint32_t k_before = 0;
    int first_step = 0;

    auto clear = [&]() {
#pragma unroll
        for (int i = 0; i < kNumAccDkv; ++i) {
            acc_dk[i] = 0.0f;
            acc_dv[i] = 0.0f;
        }
    };
    // When the last dQ of the block of keys before is in registers: its K may go, and where its dK and dV were staged is free.
    auto release_before = [&]() {
        mbarrier_arrive_if(barriers.k_empty(k_state.stage ^ 1), leader);
        tma_store_wait_read();
        sync_warp();
    };
    // Leaves a warp's share of the dQ of the step before to write_dq.
    auto hand_over = [&](float const (&acc_dq)[kNumAccDq]) {
        hand_over_dq(acc_dq, dq_slice, barriers.dq_full(warpgroup), barriers.dq_empty(warpgroup), dq_phase);
        dq_phase ^= 1;
    };
    // dQ of the step before, where no step follows.
    auto flush = [&]() {
        if (step == first_step) {
            return;
        }
        int const last = step - 1;
        float acc_dq[kNumAccDq];
        mbarrier_wait(barriers.ds_full(last % 2), last / 2 & 1);
        wgmma_fence();
        gemm_dq(acc_dq, ds_operand + last % 2 * (kDsBytes / kDescUnit), k_before);
        wgmma_commit();
        wgmma_wait_0();
        wgmma_touch(acc_dq);
        mbarrier_arrive_if(barriers.ds_empty(last % 2), leader);
        release_before();
        hand_over(acc_dq);
        first_step = step;
    };
    // Rows of dV and dK leave by way of the place of this warp's share of dQ, once the last share has left that.
    auto finish_block = [&]() {
        KeyBlock const block = load_block_slot(smem, k_state.stage);
        Seqlen const s = seqlen_of(p, block.bidb);
        int const row = block.n_block * kTileN + warp_key;
        mbarrier_wait(barriers.dq_empty(warpgroup), dq_phase ^ 1);
        stage_rows(acc_dv, dq_slice, kStoredPanelBytes, 1.0f);
        store_rows(map_dv, s, dq_slice, row, block);
        uint32_t const dk_rows = dq_slice + kNumPanels * kStoredPanelBytes;
        stage_rows(acc_dk, dk_rows, kStoredPanelBytes, p.softmax_scale);
        store_rows(map_dk, s, dk_rows, row, block);
        k_state.advance(kNumKeyStages);
        clear();
    };
    // The next block of keys that some query sees, if there is one. Those before it, which none sees, have dK = dV = 0.
    auto begin = [&]() {
        while (true) {
            mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);
            KeyBlock const block = load_block_slot(smem, k_state.stage);
            if (block.n_block < 0) {
                walk.remaining = 0;
                return;
            }
            Seqlen const s = seqlen_of(p, block.bidb);
            int const key = block.n_block * kTileN + warp_key + lane_id() / 4;
            uint32_t const k_tile = (smem + kSmemK + k_state.stage * kKeyStageBytes) / kDescUnit;
            blocks = query_blocks(p, s, block.n_block * kTileN);
            walk = start_walk(p, s, block, blocks);
            begins[0] = keep(query_begin(p, s, key));
            begins[1] = keep(query_begin(p, s, key + 8));
            k_rows = k_tile + 64 * warpgroup * kPanelRowBytes / kDescUnit;
            k_panel = k_tile;
            mbarrier_wait(barriers.v_full(k_state.stage), k_state.phase);
            v_rows = k_rows + (kSmemV - kSmemK) / kDescUnit;
            if (walk.remaining > 0) {
                k_before = step > first_step ? k_before : k_panel;
                return;
            }
            flush();  // the producer waits for K of before
            finish_block();
            tma_store_wait_read();
            sync_warp();
            mbarrier_arrive_if(barriers.k_empty(k_state.stage ^ 1), leader);
        }
    };
    clear();
    for (begin(); walk.remaining > 0; finish_block(), begin())
    while (walk.remaining > 0) {
        uint32_t const q_tile = q_tiles + q_state.stage * (kQBytes / kDescUnit);
        uint32_t const dout_tile = dout_tiles + dout_state.stage * (kQBytes / kDescUnit);
        float acc_s[kNumAccS];
        float acc_dp[kNumAccS];
        uint32_t p_tile[kNumP];
        uint32_t ds_tile[kNumP];

        if (warpgroup == 1) {  // out of step with the first, half a step behind
            mbarrier_wait(barriers.first_has_dp(step % 2), step / 2 & 1);
        }
        mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);
        wgmma_fence();
        gemm_s(acc_s, k_rows, q_tile);
        wgmma_commit();
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
        probabilities(&acc_s, smem + kSmemLse + q_state.stage * kStatisticsBytes, p.softmax_scale_log2);
        pack(&p_tile, &acc_s);
        wgmma_wait_0();
        wgmma_touch(acc_dp);
        mbarrier_arrive_if(barriers.first_has_dp(step % 2), leader && warpgroup == 0);
        score_gradients(&acc_dp, &acc_s, smem + kSmemDpsum + dout_state.stage * kStatisticsBytes);
        pack(&ds_tile, &acc_dp);

        // dV under dS's way to shared memory: its P is in registers.
        wgmma_fence();
        gemm_dkv(acc_dv, p_tile, dout_tile);
        wgmma_commit();

        // dS to all warpgroups. Who writes a stage waits until their products of two steps ago have read it.
        int const ds_stage = step % 2;
        mbarrier_wait(barriers.ds_empty(ds_stage), (step / 2 & 1) ^ 1);
        stage_ds(ds_tile, ds_panel + ds_stage * kDsBytes, warp);
        fence_proxy_async();
        sync_warp();
        mbarrier_arrive_if(barriers.ds_full(ds_stage), leader);

        float acc_dq[kNumAccDq];
        uint32_t ds_before = k_panel;
        if (step > first_step) {
            mbarrier_wait(barriers.ds_full(ds_stage ^ 1), (step - 1) / 2 & 1);
            ds_before = ds_operand + (ds_stage ^ 1) * (kDsBytes / kDescUnit);
        }
        wgmma_fence();
        gemm_dq(acc_dq, ds_before, k_before);
        wgmma_commit();
        wgmma_fence();
        gemm_dkv(acc_dk, ds_tile, q_tile);
        wgmma_commit();

        wgmma_wait_2();
        wgmma_touch(acc_dv);
        wgmma_touch_a(p_tile);
        mbarrier_arrive_if(barriers.dout_empty(dout_state.stage), leader);
        dout_state.advance(kNumDoutStages);
        // dQ to shared memory under dK: each warp its own registers, in their order.
        wgmma_wait_1();
        wgmma_touch(acc_dq);
        if (step > first_step) {
            mbarrier_arrive_if(barriers.ds_empty(ds_stage ^ 1), leader);
            if (k_before != k_panel) {
                release_before();
            }
            hand_over(acc_dq);
        }
        wgmma_wait_0();
        wgmma_touch(acc_dk);
        wgmma_touch_a(ds_tile);
        mbarrier_arrive_if(barriers.q_empty(q_state.stage), leader);
        q_state.advance(kNumStages);

        step += 1;
        k_before = k_panel;
        walk.next(p, blocks);
    }

    flush();
    tma_store_wait();
}

// Kernels -------------------------------------------------------------------------------------------------------------

// Which block of queries a block of threads takes, before the main kernel and after it: the last one first. That one begins
// with the first heads, of which L2 then has what was written last, and leaves the last sums in L2.
__device__ __forceinline__ int query_block_number() {
    return static_cast<int>(gridDim.x - 1 - blockIdx.x);
}

// Row statistics of one block of queries, and whether there are sums of its dQ. 8 lanes share a row, 16 bytes each.
extern "C" __global__ void __launch_bounds__(128) fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1_preprocess(
    const __grid_constant__ Params p) {
    griddepcontrol_launch_dependents();  // acts when all blocks have started: the main kernel's take no place of theirs
    constexpr int kThreads = 128;
    constexpr int kLanesPerRow = 8;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        store_global_int(p.tile_counter, 0);
    }
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
        if (exists && chunk < 8) {
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

    if (thread < 2) {
        store_global_int(p.dq_sums + 2 * block.index + thread, p.stores_first ? kNoSums : kAreSums);
    }
    int const end = p.stores_first ? 0 : kDqBlockFloats;
    float* const dq_acc = p.dq_acc + static_cast<int64_t>(block.index) * kDqBlockFloats;
    for (int i = 4 * thread; i < end; i += 4 * kThreads) {
        store_global_float4(dq_acc + i, 0.0f, 0.0f, 0.0f, 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1(
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
        if ((warp == 1 || warp == 2) && elect_one()) {
            griddepcontrol_wait();
            write_dq(p, smem, barriers, warp - 1);
        }
    } else {
        setmaxnreg_inc_240();
        griddepcontrol_wait();  // here in every block: the postprocess kernel waits for this grid alone
        consume(map_dk, map_dv, p, smem, barriers, warp / 4 - 1, warp % 4);
    }
}

// One block of queries of dQ: from sums in register order to rows, through shared memory.
extern "C" __global__ void __launch_bounds__(256) fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1_postprocess(
    const __grid_constant__ CUtensorMap map_dq, const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    QueryBlock const block = query_block_at(p, query_block_number());
    int const warp = warp_id();
    float const* const slice =
        p.dq_acc + static_cast<int64_t>(block.index) * kDqBlockFloats + warp * kDqSliceFloats + lane_id() * 4;
    griddepcontrol_wait();
    // Of queries that see no key nothing was stored.
    int const sums = load_global_int(p.dq_sums + 2 * block.index + warp / 4);
    auto load = [&](float (&r)[4], float const* address) {
        load_global_float4(r, address);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            r[i] = sums == kAreSums ? r[i] : 0.0f;
        }
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

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_90a -cubin, or with NVRTC.
// `fa2gen render fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1 --with-host` adds a launcher in C++.
//
// Kernels, one after the other on one stream; each takes tensor maps, then Params, by value:
//   fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1_preprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 128 threads, 0 bytes of dynamic shared memory
//   fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1
//     grid (min(num_key_blocks, num_sms), 1, 1), 384 threads, 231648 bytes of dynamic shared memory
//     maps of q, k, v, dout, dk, dv
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 231648
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1: it then starts early
//   fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1_postprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 256 threads, 16384 bytes of dynamic shared memory
//     maps of dq
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1: it then starts early
// Tensor maps: tiled, (head_dim, seqlen, heads, batch), 16-bit elements, zeros outside, on 64 bytes
//   q, k, v, dout, dq: box 64 x 128 x 1 x 1, swizzle 128 bytes
//   dk, dv: box 64 x 16 x 1 x 1, swizzle 128 bytes
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q + 127) / 128
//   num_n_blocks = (seqlen_k + 127) / 128
//   num_key_blocks = num_n_blocks * batch * num_heads_kv
//   stores_first = min(512 / max(seqlen_q, 1), 1)
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Device memory beside the tensors, in 4-byte numbers:
//   lse_log2: num_m_blocks * num_heads * batch * 128
//   dpsum: num_m_blocks * num_heads * batch * 128
//   dq_acc: num_m_blocks * num_heads * batch * 8192
//   dq_sums: num_m_blocks * num_heads * batch * 2
//   tile_counter: 1

}  // namespace fa2gen::fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1
