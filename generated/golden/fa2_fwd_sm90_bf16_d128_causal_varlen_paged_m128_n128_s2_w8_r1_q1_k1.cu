// fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm90/fwd.cu.j2; edit the template or the spec, not this file.
//   problem  fwd, head dim 128, bf16, causal mask, ragged batches, pages
//   tiling   128 query rows x 128 keys, 2 stages, 8 mma warps, 128-byte panels
//   launch   384 threads, 199512 bytes of dynamic shared memory
//   contents   28 Problem and tiling,   46 Shared memory,  111 Threads,  172 Arithmetic,  221 Shared memory,
//             264 Global memory,  325 mbarriers,  369 TMA,  395 Registers,  403 Registers of a warpgroup,  415 wgmma,
//             513 Entries,  583 A block's own table,  741 What is visible,  793 Online softmax,  970 Keys in parts,
//             989 Pipelines, 1028 Loads, 1169 Matrix products, 1196 Epilogue, 1220 Producer, 1316 Consumer,
//            1461 Kernel, 1463 Prepare, 1719 Launch
//
// O = softmax(scale * Q K^T) V for one (batch, head) and 128 query rows at a time (FlashAttention-2, Algorithm 1), on
// 2 mma warpgroups of 64 rows and one producer warp. Blocks stay on their SM and take tiles from a counter, so that the
// producer loads the next tile's Q and K under this tile's end. Blocks of K and V run from the last to the first through rings
// in shared memory; S and P never leave registers; the softmax of one block runs under the products of the next.

namespace fa2gen::fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1 {

using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 128;
constexpr int kTileM = 128;
constexpr int kTileN = 128;
constexpr int kNumStages = 2;
constexpr int kNumQStages = 2;
constexpr int kNumMmaWarps = 8;
constexpr int kNumThreads = 384;  // the first warpgroup produces, the others multiply

// One thread's share of an mma warpgroup's tiles, in registers.
constexpr int kNumAccS = 64;
constexpr int kNumAccO = 64;
constexpr int kNumP = 32;

constexpr int kStepsQk = 8;
constexpr int kStepsPv = 8;

// Shared memory: tiles are panels of 128 bytes a row, swizzled, as TMA writes them -----------------------------------------

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kNumPanels = 2;
constexpr int kStepsPerPanel = 4;
constexpr uint32_t kQPanelBytes = 16384;
constexpr uint32_t kKvPanelBytes = 16384;
constexpr uint32_t kQBytes = 32768;
constexpr uint32_t kQStageBytes = 32768;
constexpr uint32_t kKvReadBytes = 32768;
constexpr uint32_t kStageBytes = 32768;

constexpr uint32_t kSmemQ = 0;
constexpr uint32_t kSmemK = 65536;
constexpr uint32_t kSmemV = 131072;
constexpr uint32_t kSmemBarriers = 196608;
constexpr uint32_t kSmemTileSlots = 196704;
constexpr uint32_t kSmemOwnRows = 196768;
constexpr uint32_t kSmemOwnKeys = 198320;
constexpr uint32_t kSmemOwnOrder = 198720;
constexpr uint32_t kSmemFetched = 199504;

// Matrix descriptors: swizzle and stride between groups of 8 rows; for V also the step to the next panel of columns.
constexpr uint32_t kDescHi = 0x40000040u;
constexpr uint32_t kDescLoV = 0x04000000u;

// The kernel's scalar arguments; the order is the launcher's (KernelPlan.params).
struct Params {
    void* o;
    float* lse;
    int const* cu_seqlens_q;
    int const* cu_seqlens_k;
    int const* seqused_q;
    int const* seqused_k;
    int const* block_table;
    int* tile_counter;
    int* sequences;
    int* num_blocks;
    int* m_list;
    float* o_parts;
    float* lse_parts;
    int64_t o_batch_stride;
    int64_t o_row_stride;
    int64_t o_head_stride;
    int seqlen_q;
    int seqlen_k;
    int num_heads;
    int num_heads_per_kv;
    int group;
    int num_m_blocks;
    int box_rows;
    int tile_pages;
    int tile_rows;
    int key_parts;
    int num_sequences;
    int page_size;
    int table_step;
    int num_pages;
    float softmax_scale;
    float softmax_scale_log2;
    int k_page_stride;
    int v_page_stride;
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

__device__ __forceinline__ int shfl_from(int value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ bool any_lane(bool holds) {
    return __any_sync(0xffffffffu, holds) != 0;
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

// log(x) is log2(x) * kLn2.
constexpr float kLn2 = 0.693147180559945309f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ bool is_not_negative_zero(float x) {
    return __builtin_bit_cast(uint32_t, x) != 0x80000000u;
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

// Shared memory -------------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The address of the block's dynamic shared memory; the widest swizzle needs it on a 1024-byte boundary.
__device__ __forceinline__ uint32_t shared_memory_base() {
    return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

__device__ __forceinline__ void store_shared_int(uint32_t address, int value) {
    asm volatile("st.shared.s32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ int load_shared_int(uint32_t address) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

// Adds, atomically, and returns what was there before.
__device__ __forceinline__ int fetch_add_shared(uint32_t address, int value) {
    int before;
    asm volatile("atom.shared.add.s32 %0, [%1], %2;" : "=r"(before) : "r"(address), "r"(value) : "memory");
    return before;
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
__device__ __forceinline__ void store_shared_int2(uint32_t address, int r0, int r1) {
    asm volatile("st.shared.v2.s32 [%0], {%1, %2};" :: "r"(address), "r"(r0), "r"(r1) : "memory");
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

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load_global_int4(int (&r)[4], int const* address) {
    asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(address) : "memory");
}

__device__ __forceinline__ void store_global_int(int* address, int value) {
    *address = value;
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void store_global_int4(int* address, int r0, int r1, int r2, int r3) {
    asm volatile("st.global.v4.s32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

__device__ __forceinline__ void store_global_float(float* address, float value) {
    *address = value;
}

__device__ __forceinline__ float load_global_float(float const* address) {
    return *address;
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load_global_float4(float (&r)[4], float const* address) {
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "l"(address) : "memory");
}

// How many have come to the counter before this thread; the one that finds `last` there sets it to 0 again. What whoever came
// before did until then is done, for this thread and, behind a barrier, for its block.
__device__ __forceinline__ int arrive_global(int* counter, int last) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
    return static_cast<int>(before);
}

// 8 bytes; the address is a multiple of 8.
__device__ __forceinline__ void store_global_64(void* address, uint32_t r0, uint32_t r1) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(address), "r"(r0), "r"(r1) : "memory");
}

// 8 bytes; the address is a multiple of 8.
__device__ __forceinline__ void store_global_float2(float* address, float r0, float r1) {
    asm volatile("st.global.v2.f32 [%0], {%1, %2};" :: "l"(address), "f"(r0), "f"(r1) : "memory");
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

// A ragged batch's tensors have five coordinates: (column, row, head, kRaggedRows, batch). Rows end at kRaggedRows, where
// the last of a sequence is put; the fourth leads past all of them and round 2^64 bytes, the fifth from the tensor's
// beginning to the end of the sequence: the address is that of its row, and what lies behind the sequence gives zeros, or
// is dropped.
constexpr int kRaggedRows = 1 << 30;

__device__ __forceinline__ void tma_load_ragged(
    uint32_t destination, CUtensorMap const& map, uint32_t barrier, int column, int row, int head, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, { %3, %4, %5, %6, %7}], [%2];"
        :: "r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head),
           "r"(kRaggedRows), "r"(batch) : "memory");
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

// Barrier 0 is sync_block's.
enum NamedBarrier : int {
    kFirstMmaWarpgroup = 1,
    kProducer = kFirstMmaWarpgroup + kNumMmaWarps / 4,
};

// Entries: a ragged batch's sequences, then the gaps between them, from the lengths as they are given ----------------------

constexpr int kSequenceNumbers = 8;  // of the table, an entry

// The rows of one sequence in one tensor: as they are given, and within the tensor.
struct Rows {
    int begin;
    int end;
};

__device__ __forceinline__ Rows rows_of(int const* bounds, int const* used, int total, int num_sequences, int sequence) {
    int const even = total / num_sequences;  // without bounds all are as long
    int begin = sequence * even;
    int end = begin + even;
    int rows = total;
    if (bounds != nullptr) {
        begin = load_global_int(bounds + sequence);
        end = load_global_int(bounds + sequence + 1);
    }
    if (used != nullptr) {
        rows = load_global_int(used + sequence);
    }
    begin = min(max(begin, 0), total);
    end = min(max(end, begin), total);
    return {begin, min(end, begin + min(max(rows, 0), total - begin))};
}

// The keys of a sequence, which pages hold: as many as its bounds are apart, or as are used.
__device__ __forceinline__ Rows rows_in_pages(int const* bounds, int const* used, int capacity, int sequence) {
    int rows = capacity;
    if (bounds != nullptr) {
        rows = load_global_int(bounds + sequence + 1) - load_global_int(bounds + sequence);
    }
    if (used != nullptr) {
        rows = min(bounds == nullptr ? capacity : rows, load_global_int(used + sequence));
    }
    return {0, min(max(rows, 0), capacity)};
}

// The rows before sequence `gap` that no sequence has; `gap` num_sequences: those behind the last.
__device__ __forceinline__ Rows gap_of(int const* bounds, int const* used, int total, int num_sequences, int gap) {
    int const begin = gap > 0 ? rows_of(bounds, used, total, num_sequences, gap - 1).end : 0;
    int const end = gap < num_sequences ? rows_of(bounds, used, total, num_sequences, gap).begin : total;
    return {begin, max(begin, end)};
}

// The rows of an entry, of q and of k: a sequence's, or a gap's of one of them.
struct EntryRows {
    Rows q;
    Rows keys;
};

__device__ __forceinline__ EntryRows rows_of_entry(Params const& p, int entry) {
    Rows q = {0, 0};
    Rows keys = {0, 0};
    if (entry < p.num_sequences) {
        q = rows_of(p.cu_seqlens_q, p.seqused_q, p.seqlen_q / p.group, p.num_sequences, entry);
        keys = rows_in_pages(p.cu_seqlens_k, p.seqused_k, p.seqlen_k, entry);
    } else if (entry <= 2 * p.num_sequences) {
        q = gap_of(p.cu_seqlens_q, p.seqused_q, p.seqlen_q / p.group, p.num_sequences, entry - p.num_sequences);
    }
    q = {q.begin * p.group, q.end * p.group};  // rows of all heads that share K and V
    return {q, keys};
}

// Heads whose tiles are taken together, so that what they read of so many rows stays in L2.
__device__ __forceinline__ int heads_together(int rows_in_l2, int rows, int heads_of_a_read, int num_heads) {
    return min(max(rows_in_l2 / max(rows, 1), 1), num_heads / heads_of_a_read) * heads_of_a_read;
}

// A block's own table -----------------------------------------------------------------------------------------------------
//
// Of few sequences each block makes the table for itself, and the kernel that prepares is not launched. Entries have their
// places as in its list, the most blocks first; whose a place is, a warp finds, each lane of which looks at an entry.

constexpr int kOwnSequences = 48;

__device__ __forceinline__ bool has_own_table(Params const& p) {
    return p.num_sequences <= kOwnSequences;
}

// Of an entry: lengths of q and k, and their first rows.
__device__ __forceinline__ uint32_t own_row(int entry) {
    return shared_memory_base() + kSmemOwnRows + 16 * entry;
}

// Of an entry: its first place, and how many heads are taken together. Behind the last of them: how many places there are.
__device__ __forceinline__ uint32_t own_order(int entry) {
    return shared_memory_base() + kSmemOwnOrder + 8 * entry;
}

// Of an entry: its blocks, and behind them what ranks it among those of as many; no two have the same, and who has more comes
// first. Entries to the next multiple of 4 that there are not have 0: they are read 4 at a time.
__device__ __forceinline__ uint32_t own_key(int entry) {
    return shared_memory_base() + kSmemOwnKeys + 4 * entry;
}

constexpr int kRankBits = 7;  // 2 * kOwnSequences + 1 entries, and at most 2^25 blocks

__device__ __forceinline__ int own_blocks(int entry) {
    return (load_shared_int(own_row(entry)) + kTileM - 1) / kTileM;
}

__device__ __forceinline__ void measure_own_entry(Params const& p, int entry) {
    int const last = 2 * p.num_sequences;
    uint32_t key = 0;
    if (entry <= last) {
        EntryRows const rows = rows_of_entry(p, entry);
        int const num_rows = rows.q.end - rows.q.begin;
        store_shared_int4(own_row(entry), num_rows, rows.keys.end - rows.keys.begin, rows.q.begin, rows.keys.begin);
        key = static_cast<uint32_t>((num_rows + kTileM - 1) / kTileM) << kRankBits | static_cast<uint32_t>(last - entry);
    }
    if (entry <= (last | 3)) {
        store_shared_int(own_key(entry), static_cast<int>(key));
    }
}

// Bounds that do not rise make sequences overlap, and their blocks many: the sum still fits 32 bits without a sign (97 entries
// of 2^25 blocks), and no place behind those that there may be is visited.
__device__ __forceinline__ void place_own_entry(Params const& p, int entry) {
    int const last = 2 * p.num_sequences;
    if (entry <= last) {
        uint32_t const key = load_shared_int(own_key(entry));
        uint32_t place = 0;
        uint32_t all = 0;
        for (int first = 0; first <= last; first += 4) {
            int keys[4];
            load_shared_int4(keys, own_key(first));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t const other = keys[i];
                place += other > key ? other >> kRankBits : 0;
                all += other >> kRankBits;
            }
        }
        int const num_keys = load_shared_int(own_row(entry) + 4);
        int const together = heads_together(65536, num_keys, p.num_heads_per_kv, p.num_heads);
        store_shared_int2(own_order(entry), static_cast<int>(place), together);
        if (entry == last) {
            store_shared_int(own_order(last + 1), static_cast<int>(min(all, static_cast<uint32_t>(p.num_m_blocks))));
        }
    }
}

// Whose a place is, of those that there are; by a whole warp.
__device__ __forceinline__ int own_entry_at(Params const& p, int place) {
    int first_entry = 0;
    while (true) {
        int const entry = first_entry + lane_id();
        bool is_owner = false;
        if (entry <= 2 * p.num_sequences) {
            uint32_t const first = load_shared_int(own_order(entry));
            is_owner = first <= place && place < first + own_blocks(entry);
        }
        uint32_t const owners = ballot(is_owner);
        if (owners != 0) {
            return shfl_from_lane_0(first_entry + lowest_bit(owners));  // so that the compiler knows: uniform
        }
        first_entry += 32;
    }
}

// Of either table: an entry's lengths and first rows.
__device__ __forceinline__ void load_entry(int (&numbers)[4], Params const& p, int entry) {
    if (has_own_table(p)) {
        load_shared_int4(numbers, own_row(entry));
    } else {
        load_global_int4(numbers, p.sequences + kSequenceNumbers * entry);
    }
}

// And its place in the order of all.
struct Order {
    int place;
    int together;
};

__device__ __forceinline__ Order order_of(Params const& p, int entry) {
    if (has_own_table(p)) {
        return {load_shared_int(own_order(entry)), load_shared_int(own_order(entry) + 4)};
    }
    int numbers[4];
    load_global_int4(numbers, p.sequences + kSequenceNumbers * entry + 4);
    return {numbers[0], numbers[2]};
}

// By a warp whose block takes no more tiles: the last one of all leaves the counters at 0 for the next launch. That does not
// follow from a number of tiles: where lengths are written while blocks read them, which is wrong, theirs may differ.
__device__ __forceinline__ void leave_counter(Params const& p) {
    int const last = static_cast<int>(gridDim.x) - 1;
    if (lane_id() == 0 && arrive_global(p.tile_counter + 1, last) == last) {
        store_global_int(p.tile_counter, 0);
    }
}

// Sequences: a ragged batch's, each with its own lengths, one behind the other in the packed tensors. Entries behind the
// sequences are gaps, rows that no sequence has: of queries without keys, or of keys without queries.

struct Seqlen {
    int q;
    int k;
    int first_q;
    int first_k;
    int first_m_block;  // its place among all of a head: for gradients alone
};

__device__ __forceinline__ Seqlen seqlen_of(Params const& p, int bidb) {
    int places[4];
    load_entry(places, p, bidb);
    return {places[0], places[1], places[2], places[3], 0};
}

// Where TMA finds a row: coordinates behind kRaggedRows are clipped, which is where the sequence's last row is put; the batch
// coordinate then leads back to the sequence (see the launcher's tensor maps).
struct Box {
    int row;
    int batch;
};

// Where a sequence's rows of q (o, dout, dq) begin, and its rows of k (v, dk, dv), in elements.
__device__ __forceinline__ int64_t first_query(Seqlen const& s, int, int64_t, int64_t row_stride) {
    return s.first_q * row_stride;
}

__device__ __forceinline__ int64_t first_key(Seqlen const& s, int, int64_t, int64_t row_stride) {
    return s.first_k * row_stride;
}

// What is visible: causal, aligned to the bottom right: key j to row i iff j <= i + seqlen_k - seqlen_q -------------------

// Blocks [begin, end), of which [begin_full, end_full) need no mask.
struct BlockRange {
    int begin;
    int begin_full;
    int end_full;
    int end;
};

// Keys below this are visible to a query row; <= 0 where none is.
__device__ __forceinline__ int key_end(Params const& p, Seqlen const& s, int row) {
    return min(row / p.group + 1 + (s.k - s.q / p.group), s.k);
}

__device__ __forceinline__ BlockRange key_blocks(Params const& p, Seqlen const& s, int first_row, int num_rows) {
    if (first_row >= s.q) {
        return {0, 0, 0, 0};
    }
    int const of_first = max(key_end(p, s, first_row), 0);
    int const of_last = max(key_end(p, s, min(first_row + num_rows, s.q) - 1), 0);
    return {0, 0, of_first / kTileN, (of_last + kTileN - 1) / kTileN};
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

// Online softmax (FlashAttention-2, Algorithm 1, lines 8 to 10) -----------------------------------------------------------
// Exponents are base 2: exp(scale * s - max) = exp2(scale_log2 * s - scale_log2 * max), one fused multiply-add an element.

__device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, shfl_xor(value, 1));
    return fmaxf(value, shfl_xor(value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
    value += shfl_xor(value, 1);
    return value + shfl_xor(value, 2);
}

// Turns scores into unnormalised probabilities in place. row_sum is this thread's share; the quad is summed only at the end.
// `offset` is the scaled maximum of each row.
__device__ __forceinline__ void exponentiate(
    float (&acc_s)[kNumAccS], float const (&offset)[2], float (&row_sum)[2], float softmax_scale_log2) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float sum = row_sum[row];
#pragma unroll
        for (int i = 2 * row; i < kNumAccS; i += 4) {
            acc_s[i] = exp2_approx(fmaf(acc_s[i], softmax_scale_log2, -offset[row]));
            acc_s[i + 1] = exp2_approx(fmaf(acc_s[i + 1], softmax_scale_log2, -offset[row]));
            sum += acc_s[i] + acc_s[i + 1];
        }
        row_sum[row] = sum;
    }
}

// Scaled maxima beyond this are rounded by more than 2^-9, and far beyond it by so much that exp2 of it is 0 or infinite.
constexpr float kLargeOffset = 65536.0f;

__device__ __forceinline__ bool has_large(float const (&offset)[2]) {
    return fmaxf(fabsf(offset[0]), fabsf(offset[1])) > kLargeOffset;
}

// Where a scaled maximum of the warp is large, the maxima are taken off the scores themselves, which is exact near them. Others
// pay for the question: 4 instructions a block, 2 where the maximum is looked at anyway (353 to 355 of d = 128 causal).
__device__ __forceinline__ void take_off_large(float (&acc_s)[kNumAccS], float const (&base)[2], float (&offset)[2]) {
    if (any_lane(has_large(offset))) {
#pragma unroll
        for (int i = 0; i < kNumAccS; i += 4) {
            acc_s[i] -= base[0];
            acc_s[i + 1] -= base[0];
            acc_s[i + 2] -= base[1];
            acc_s[i + 3] -= base[1];
        }
        offset[0] = offset[1] = 0.0f;
    }
}

// The maximum of this thread's scores of a row, and `maximum`. Two chains: one alone waits for itself
// (d = 128 full 4k: 1.02, H200).
__device__ __forceinline__ float thread_max(float const (&acc_s)[kNumAccS], int row, float maximum) {
    float other = acc_s[2 * row + 1];
#pragma unroll
    for (int i = 2 * row; i < kNumAccS; i += 4) {
        maximum = fmaxf(maximum, acc_s[i]);
        other = fmaxf(other, acc_s[i + 1]);
    }
    return fmaxf(maximum, other);
}

constexpr float kMaxRise = 8.0f;  // log2, of maxima that are left as they are

// The softmax of a block: P in place of S, and whether the output accumulated so far must be multiplied with `correction`.
// A block in which every row sees at least one key. While no maximum of the warp rises by more than 2^8, the old ones serve as
// well: P is then at most 256, which bf16 and fp32 sums hold, and the final division takes the factor out again. Each thread
// looks at its own scores, so that the maximum of the quad is only made when one has risen (d = 80 full 4k: 1.04, H200).
__device__ __forceinline__ bool online_softmax(
    float (&acc_s)[kNumAccS], float (&row_max)[2], float (&row_sum)[2], float (&correction)[2], float softmax_scale_log2) {
    float const maxima[2] = {thread_max(acc_s, 0, row_max[0]), thread_max(acc_s, 1, row_max[1])};
    float offset[2] = {row_max[0] * softmax_scale_log2, row_max[1] * softmax_scale_log2};
    bool const risen = any_lane(((maxima[0] - row_max[0]) * softmax_scale_log2 > kMaxRise) |
                                ((maxima[1] - row_max[1]) * softmax_scale_log2 > kMaxRise) | has_large(offset));
    if (risen) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float const new_max = quad_max(maxima[row]);
            float const rise = (new_max - row_max[row]) * softmax_scale_log2;
            bool const keep = rise <= kMaxRise;
            correction[row] = keep ? 1.0f : exp2_approx(-rise);
            row_max[row] = keep ? row_max[row] : new_max;
            row_sum[row] *= correction[row];
            offset[row] = row_max[row] * softmax_scale_log2;
        }
        take_off_large(acc_s, row_max, offset);
    }
    exponentiate(acc_s, offset, row_sum, softmax_scale_log2);
    return risen;
}

// A block in which a row may have seen no key yet: its maximum is -inf, and (-inf) - (-inf) would be NaN.
__device__ __forceinline__ bool online_softmax_masked(
    float (&acc_s)[kNumAccS], float (&row_max)[2], float (&row_sum)[2], float (&correction)[2], float softmax_scale_log2) {
    float base[2];
    float offset[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float const new_max = quad_max(thread_max(acc_s, row, row_max[row]));
        base[row] = new_max == -kInfinity ? 0.0f : new_max;
        offset[row] = base[row] * softmax_scale_log2;
        correction[row] = exp2_approx((row_max[row] - base[row]) * softmax_scale_log2);
        row_max[row] = new_max;
        row_sum[row] *= correction[row];
    }
    take_off_large(acc_s, base, offset);
    exponentiate(acc_s, offset, row_sum, softmax_scale_log2);
    return any_lane(correction[0] != 1.0f || correction[1] != 1.0f);
}

__device__ __forceinline__ void rescale_o(float (&acc_o)[kNumAccO], float const (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kNumAccO; i += 4) {
        acc_o[i] *= factor[0];
        acc_o[i + 1] *= factor[0];
        acc_o[i + 2] *= factor[1];
        acc_o[i + 3] *= factor[1];
    }
}

// Rounds probabilities to bf16. The accumulator layout of one product is the A layout of the next: no shuffles.
__device__ __forceinline__ void pack_p(uint32_t (&p)[kNumP], float const (&acc_s)[kNumAccS]) {
#pragma unroll
    for (int i = 0; i < kNumP; ++i) {
        p[i] = pack_bf16(acc_s[2 * i], acc_s[2 * i + 1]);
    }
}

// The end of a row: 1 / sum, and the natural logarithm of sum(exp(scale * s)). A row that saw no key gives 0 and -inf.
__device__ __forceinline__ void finalize_softmax(
    float const (&row_max)[2], float const (&row_sum)[2], float (&inverse_sum)[2], float (&lse)[2], float softmax_scale) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float const sum = quad_sum(row_sum[row]);
        inverse_sum[row] = sum == 0.0f ? 0.0f : reciprocal_approx(sum);
        lse[row] = sum == 0.0f ? -kInfinity : fmaf(row_max[row], softmax_scale, log2_approx(sum) * kLn2);
    }
}

// Order of tiles: the longest sequence first; of a sequence the last blocks first, which see the most keys, round heads whose
// K and V fit in L2 together: its other blocks find K and V there (32 x 512 tokens, full, d = 128: 133 us against 186 with the
// same blocks of all sequences together, H100). The tail of the launch are the shortest sequences.
struct Tile {
    int m_block;
    int bidh;
    int bidb;
    int part;  // of its keys
};

__device__ __forceinline__ int num_tiles(Params const& p) {
    if (has_own_table(p)) {
        return load_shared_int(own_order(2 * p.num_sequences + 1)) * p.num_heads * p.key_parts;
    }
    return load_global_int(p.num_blocks) * p.num_heads * p.key_parts;
}

__device__ __forceinline__ Tile tile_at(Params const& p, int index) {
    int const part = index % p.key_parts;
    index /= p.key_parts;
    int const at = index / p.num_heads;
    int const bidb = has_own_table(p) ? own_entry_at(p, at) : load_global_int(p.m_list + at);
    int row[4];
    load_entry(row, p, bidb);
    auto const [place, together] = order_of(p, bidb);
    int const num_m_blocks = (row[0] + kTileM - 1) / kTileM;
    if (together == p.num_heads) {  // most tiles of short sequences: divisions are a part of their time
        return {num_m_blocks - 1 - (at - place), index - p.num_heads * at, bidb, part};
    }
    int const of_sequence = index - p.num_heads * place;
    int const first_head = of_sequence / (together * num_m_blocks) * together;
    int const width = min(together, p.num_heads - first_head);
    int const within = of_sequence % (together * num_m_blocks);
    return {num_m_blocks - 1 - within / width, first_head + within % width, bidb, part};
}

// Keys in parts ----------------------------------------------------------------------------------------------------------
//
// Of few queries over many keys each of p.key_parts blocks of threads has a part of a tile's blocks of keys, as many as the
// others or one less. What parts give is put together by a kernel that runs behind, in their order.

__device__ __forceinline__ BlockRange blocks_within(BlockRange const& blocks, BlockRange const& of_tile) {
    auto within = [&](int block) { return min(max(block, of_tile.begin), of_tile.end); };
    return {within(blocks.begin), within(blocks.begin_full), within(blocks.end_full), within(blocks.end)};
}

__device__ __forceinline__ BlockRange blocks_of_part(Params const& p, BlockRange const& blocks, int part) {
    int const count = blocks.end - blocks.begin;
    int const of_each = count / p.key_parts;
    int const with_more = count - of_each * p.key_parts;
    int const begin = blocks.begin + part * of_each + min(part, with_more);
    int const end = begin + of_each + (part < with_more ? 1 : 0);
    return blocks_within(blocks, {begin, begin, end, end});
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

    __device__ __forceinline__ uint32_t q_full(int stage) const { return base + 8 * stage; }
    __device__ __forceinline__ uint32_t q_empty(int stage) const { return base + 16 + 8 * stage; }
    __device__ __forceinline__ uint32_t k_full(int stage) const { return base + 32 + 8 * stage; }
    __device__ __forceinline__ uint32_t k_empty(int stage) const { return base + 48 + 8 * stage; }
    __device__ __forceinline__ uint32_t v_full(int stage) const { return base + 64 + 8 * stage; }
    __device__ __forceinline__ uint32_t v_empty(int stage) const { return base + 80 + 8 * stage; }

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < 2; ++stage) {
            mbarrier_init(q_full(stage), 1);
            mbarrier_init(q_empty(stage), kNumMmaWarps);
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(k_empty(stage), kNumMmaWarps);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(v_empty(stage), kNumMmaWarps);
        }
    }
};

// Loads ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void load_box(
    uint32_t destination, CUtensorMap const& map, uint32_t barrier, int column, Box const& box, int head) {
    tma_load_ragged(destination, map, barrier, column, box.row, head, box.batch);
}

// How TMA sees the panels of a tensor. The last may be narrower: columns beyond the head dim would cost as much as others.
struct TileMaps {
    CUtensorMap const& panel;
    CUtensorMap const& last_panel;
};

// The tile travels with its Q, decoded, in a slot of 32 bytes, with its sequence. No tile: m_block < 0 and no copy.
__device__ __forceinline__ Tile load_tile_slot(uint32_t smem, int stage) {
    int slot[4];
    load_shared_int4(slot, smem + kSmemTileSlots + 32 * stage);
    return {slot[0], slot[1], slot[2], slot[3]};
}

// Rows of q and o are of all heads that share K and V, a query's side by side: `row` is a multiple of their number, which TMA
// has in place of a tensor's rows, and queries in the place of heads.
__device__ __forceinline__ Box packed_box(Seqlen const& s, int row, int group) {
    return {kRaggedRows - (s.q - row) / group, (s.first_q + s.q) / group};
}

// All but where its row statistics are, which gradients alone have.
__device__ __forceinline__ Seqlen load_sequence_slot(uint32_t smem, int stage) {
    int slot[4];
    load_shared_int4(slot, smem + kSmemTileSlots + 32 * stage + 16);
    return {slot[0], slot[1], slot[2], slot[3], 0};
}

__device__ __forceinline__ void load_q(
    CUtensorMap const& map_q, uint32_t smem, Barriers const& barriers, PipelineState& state, Seqlen const& s,
    Tile const& tile, int group) {
    uint32_t const full = barriers.q_full(state.stage);
    mbarrier_wait(barriers.q_empty(state.stage), state.phase ^ 1);
    if (elect_one()) {
        store_shared_int4(smem + kSmemTileSlots + 32 * state.stage, tile.m_block, tile.bidh, tile.bidb, tile.part);
        store_shared_int4(smem + kSmemTileSlots + 32 * state.stage + 16, s.q, s.k, s.first_q, s.first_k);
        if (tile.m_block >= 0) {
            mbarrier_arrive_expect_tx(full, kQBytes);
            Box const box = packed_box(s, tile.m_block * kTileM, group);
#pragma unroll
            for (int panel = 0; panel < kNumPanels; ++panel) {
                tma_load_ragged(smem + kSmemQ + state.stage * kQStageBytes + panel * kQPanelBytes, map_q, full,
                                panel * kPanelColumns, tile.bidh * group, box.row, box.batch);
            }
        } else {
            mbarrier_arrive(full);
        }
    }
    state.advance(kNumQStages);
}

// Pages: where a key of a sequence lies. Entries of the table behind the last page that the sequence needs are not looked at.
struct PageRow {
    int entry;  // of the table; what is no page's number leads to some page
    int row;
};

// Asked where it is used: whoever looks an entry up does not wait for it.
__device__ __forceinline__ int page_of(PageRow const& at, int num_pages) {
    return min(max(at.entry, 0), num_pages - 1);
}

// An entry of the table: of a sequence's last page, if not so many are needed. Asked for here and now: left to the compiler
// it would be where a block's boxes wait for it.
__device__ __forceinline__ int page_entry(int const* table, int number, int last) {
    return load_global_int(table + max(min(number, last), 0));
}

// Of p.box_rows keys of a sequence, which lie in one page: its entry, and where in the table and in the page that is. The same
// of kTileN keys before takes no division.
struct BoxPlace {
    int entry;
    int row;
    int number;
    int last;  // of the sequence's

    __device__ __forceinline__ PageRow at() const {
        return {entry, row};
    }

    __device__ __forceinline__ void step_back(Params const& p, int const* table) {
        number -= p.tile_pages;
        row -= p.tile_rows;
        if (row < 0) {
            row += p.page_size;
            number -= 1;
        }
        entry = page_entry(table, number, last);
    }
};

__device__ __forceinline__ BoxPlace box_place(Params const& p, Seqlen const& s, int const* table, int key) {
    int const number = static_cast<int>(static_cast<unsigned>(key) / static_cast<unsigned>(p.page_size));
    int const last = static_cast<int>(static_cast<unsigned>(max(s.k - 1, 0)) / static_cast<unsigned>(p.page_size));
    return {page_entry(table, number, last), key - number * p.page_size, number, last};
}

// Where TMA finds them: as in the room seqlen, what is behind the sequence's last key gives zeros. `page_stride` is from one
// page to the next, in rows.
__device__ __forceinline__ Box page_box(Params const& p, Seqlen const& s, PageRow const& at, int key, int page_stride) {
    int const num_keys = s.k - key;
    return {kRaggedRows - num_keys, page_of(at, p.num_pages) * page_stride + at.row + num_keys};
}

constexpr int kLoadParts = 2;

// A part's panels of a block of keys in boxes of p.box_rows rows, side by side from all lanes; `at` is the place of this lane's
// first. The first part arrives for both: bytes of the other may come before they are expected.
__device__ __forceinline__ void load_kv_pages(
    TileMaps const& maps, uint32_t tiles, uint32_t full, uint32_t empty, PipelineState& state, Params const& p,
    Seqlen const& s, int const* table, PageRow at, int first_key, int page_stride, int head, int part) {
    mbarrier_wait(empty, state.phase ^ 1);
    if (part == 0 && elect_one()) {
        mbarrier_arrive_expect_tx(full, kKvReadBytes);
    }
    sync_warp();
    uint32_t const tile = tiles + state.stage * kStageBytes;
    int row = lane_id() * p.box_rows;
    while (row < kTileN) {
        Box const box = page_box(p, s, at, first_key + row, page_stride);
#pragma unroll
        for (int panel = 0; panel < kNumPanels; ++panel) {
            if (panel % kLoadParts == part) {
                load_box(tile + row * kPanelRowBytes + panel * kKvPanelBytes,
                         panel + 1 < kNumPanels ? maps.panel : maps.last_panel, full, panel * kPanelColumns, box, head);
            }
        }
        row += 32 * p.box_rows;
        if (row < kTileN) {
            at = box_place(p, s, table, first_key + row).at();
        }
    }
    sync_warp();
    state.advance(kNumStages);
}

// Matrix products -----------------------------------------------------------------------------------------------------

constexpr uint32_t kDescUnit = 16;  // bytes

// S = Q K^T for 64 query rows and one block of keys. Steps of 16 along the head dim: 32 bytes inside a panel, then the next
// panel.
__device__ __forceinline__ void gemm_qk(float (&acc_s)[kNumAccS], uint32_t q_rows, uint32_t k_tile) {
#pragma unroll
    for (int step = 0; step < kStepsQk; ++step) {
        uint32_t const panel = step / kStepsPerPanel;
        uint32_t const within = step % kStepsPerPanel * 32;
        uint32_t const q = q_rows + (panel * kQPanelBytes + within) / kDescUnit;
        uint32_t const key = k_tile + (panel * kKvPanelBytes + within) / kDescUnit;
        wgmma_m64n128k16_ss_kk(acc_s, matrix_descriptor(kDescHi, q), matrix_descriptor(kDescHi, key), step != 0);
    }
}

// O += P V for 64 query rows and one block of keys. Steps of 16 keys: 16 rows of every panel.
__device__ __forceinline__ void gemm_pv(float (&acc_o)[kNumAccO], uint32_t const (&p)[kNumP], uint32_t v_tile) {
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
        uint32_t const v = v_tile + step * 16 * kPanelRowBytes / kDescUnit;
        wgmma_m64n128k16_rs_km(
            acc_o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], matrix_descriptor(kDescHi, v), 1);
    }
}

// Epilogue ------------------------------------------------------------------------------------------------------------

// A part's 16 rows of O, divided by its own sums, and their LSE: of all parts, rows in the order of a call's LSE.
__device__ __forceinline__ void store_part(
    Params const& p, Seqlen const& s, float const (&acc_o)[kNumAccO], float const (&lse)[2], int row, Tile const& tile) {
    int64_t const of_part = static_cast<int64_t>(tile.part) * p.num_heads * p.seqlen_q;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int const r = row + lane_id() / 4 + 8 * i;
        if (r < s.q) {
            int64_t const of_head = static_cast<int64_t>(tile.bidh * p.group + r % p.group) * (p.seqlen_q / p.group);
            int64_t const at = of_part + of_head + (s.first_q + r) / p.group;
            float* const o = p.o_parts + at * kHeadDim + lane_id() % 4 * 2;
#pragma unroll
            for (int j = 0; j < kNumAccO; j += 4) {  // 8 columns
                store_global_float2(o + 2 * j, acc_o[j + 2 * i], acc_o[j + 2 * i + 1]);
            }
            if (lane_id() % 4 == 0) {
                store_global_float(p.lse_parts + at, lse[i]);
            }
        }
    }
}

// Producer: 4 warps. Even ones load K, odd ones V, each through a ring of its own; the second loads Q, too -------------------

constexpr int kNumLoadWarps = 4;

// So many blocks before a tile's end the next one is fetched: the counter answers late.
constexpr int kFetchAhead = 4;

__device__ __forceinline__ void produce(
    CUtensorMap const& map_q, TileMaps const& maps_k, TileMaps const& maps_v, Params const& p, uint32_t smem,
    Barriers const& barriers, int warp) {
    bool const is_v = warp % 2 != 0;
    int const part = warp / 2;
    PipelineState q_state = {0, 0};
    PipelineState state = {0, 0};
    int const tiles = num_tiles(p);
    int index = static_cast<int>(blockIdx.x);
    uint32_t slot = smem + kSmemFetched;
    // Two slots in turn: one is written again when all have read it.
    int fetched = 0;
    auto fetch = [&]() {
        if (warp == 0 && lane_id() == 0) {
            fetched = fetch_add_global(p.tile_counter, 1);
        }
    };
    auto take_fetched = [&]() {
        if (warp == 0 && lane_id() == 0) {
            store_shared_int(slot, fetched);
        }
        named_barrier_sync(kProducer, 32 * kNumLoadWarps);
        index = load_shared_int(slot) + static_cast<int>(gridDim.x);
        slot ^= 4;
    };
    while (index < tiles) {
        Tile const tile = tile_at(p, index);
        Seqlen const s = seqlen_of(p, tile.bidb);
        int const head_kv = tile.bidh / p.num_heads_per_kv;
        BlockRange const blocks = blocks_of_part(p, key_blocks(p, s, tile.m_block * kTileM, kTileM), tile.part);
        int const* const table = p.block_table + static_cast<int64_t>(tile.bidb) * p.table_step;
        // Where this lane's keys of a block are is looked up a block ahead, under the loads of the one before: asked for when
        // they are wanted, entries of the table hold up every block (1.35 times packed keys' time, H100).
        BoxPlace ahead = {0, 0, 0, 0};
        auto look_up = [&](int n_block) {
            ahead = box_place(p, s, table, n_block * kTileN + lane_id() * p.box_rows);
        };
        if (blocks.begin < blocks.end) {  // rows that no sequence has are of no row of the table
            look_up(blocks.end - 1);
        }
        auto load = [&](int n_block) {
            PageRow const at = ahead.at();
            ahead.step_back(p, table);
            uint32_t const full = is_v ? barriers.v_full(state.stage) : barriers.k_full(state.stage);
            uint32_t const empty = is_v ? barriers.v_empty(state.stage) : barriers.k_empty(state.stage);
            if (is_v) {
                load_kv_pages(maps_v, smem + kSmemV, full, empty, state, p, s, table, at, n_block * kTileN, p.v_page_stride,
                              head_kv, part);
            } else {
                load_kv_pages(maps_k, smem + kSmemK, full, empty, state, p, s, table, at, n_block * kTileN, p.k_page_stride,
                              head_kv, part);
            }
        };

        // Warps of V run a block behind those of K, as the mma warps use them: all meet where none waits for another's block.
        int const meeting = min(blocks.begin + (is_v ? 1 : 0), blocks.end - 1);
        int const fetching = min(blocks.begin + kFetchAhead, blocks.end - 1);
        auto load_next = [&](int n_block) {
            if (n_block == fetching) {
                fetch();
            }
            if (n_block == meeting) {
                take_fetched();
            }
            load(n_block);
        };
        // Not by a warp of K: where Q has one stage, the last tile still holds it, and K is not to wait behind it (by one of K
        // 1.002 to 1.015 of the time; head dim 128, H100).
        if (warp == 1) {
            load_q(map_q, smem, barriers, q_state, s, tile, p.group);
        }
        if (blocks.begin < blocks.end) {
            load_next(blocks.end - 1);
        } else {
            fetch();
            take_fetched();
        }
        for (int n_block = blocks.end - 2; n_block >= blocks.begin; --n_block) {
            load_next(n_block);
        }
    }
    if (warp == 0) {
        leave_counter(p);
    }
    if (warp == 1) {
        load_q(map_q, smem, barriers, q_state, {}, {-1, 0, 0, 0}, p.group);
    }
}

// Consumer: one of the mma warpgroups, 64 query rows of each tile ------------------------------------------------------

__device__ __forceinline__ void consume(
    Params const& p, uint32_t smem, Barriers const& barriers, int warpgroup, int warp) {
    int const warp_row = 64 * warpgroup + 16 * warp;  // of the tile
    uint32_t const q_tiles = (smem + kSmemQ + 64 * warpgroup * kPanelRowBytes) / kDescUnit;
    uint32_t const k_tiles = (smem + kSmemK) / kDescUnit;
    uint32_t const v_tiles = (smem + kSmemV) / kDescUnit + kDescLoV;
    bool const leader = lane_id() == 0;  // arrives for its warp: a slow warp then holds the phase, and can not miss one
    PipelineState q_state = {0, 0};
    PipelineState k_state = {0, 0};
    PipelineState v_state = {0, 0};

    float acc_s[kNumAccS];
    float acc_o[kNumAccO];
    uint32_t p_tile[kNumP];

    auto release_k = [&](bool when) {
        mbarrier_arrive_if(barriers.k_empty(k_state.stage), when);
        k_state.advance(kNumStages);
    };
    auto release_v = [&]() {
        mbarrier_arrive_if(barriers.v_empty(v_state.stage), leader);
        v_state.advance(kNumStages);
    };
    auto release_q = [&]() {
        sync_warp();  // every lane has read the slot; where O lies over Q, its store has read it
        mbarrier_arrive_if(barriers.q_empty(q_state.stage), leader);
        q_state.advance(kNumQStages);
    };

    while (true) {
        mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);
        Tile const tile = load_tile_slot(smem, q_state.stage);
        if (tile.m_block < 0) {
            break;
        }
        Seqlen const s = load_sequence_slot(smem, q_state.stage);
        int const first_row = tile.m_block * kTileM;
        int const row = first_row + warp_row;  // this warp's first
        int const ends[2] = {key_end(p, s, row + lane_id() / 4), key_end(p, s, row + lane_id() / 4 + 8)};
        BlockRange const in_tile = blocks_of_part(p, key_blocks(p, s, first_row, kTileM), tile.part);
        BlockRange const blocks = blocks_within(key_blocks(p, s, first_row + 64 * warpgroup, 64), in_tile);
        uint32_t const q_rows = q_tiles + q_state.stage * (kQStageBytes / kDescUnit);

        float row_max[2] = {-kInfinity, -kInfinity};
        float row_sum[2] = {0.0f, 0.0f};
        float correction[2];
#pragma unroll
        for (int i = 0; i < kNumAccO; ++i) {
            acc_o[i] = 0.0f;
        }

        // Blocks that other warpgroups see and this one does not. Only a stage that has been filled may be released: an arrival
        // before that could complete the phase of the block that held the stage before. And only by a warp that has come
        // together: no wgmma holds it here, and a lane left behind could miss a phase and wait for ever.
        auto skip = [&](int num_blocks) {
            for (; num_blocks > 0; --num_blocks) {
                mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);
                mbarrier_wait(barriers.v_full(v_state.stage), v_state.phase);
                sync_warp();
                release_k(leader);
                release_v();
            }
        };
        skip(in_tile.end - blocks.end);

        if (blocks.begin < blocks.end) {
            int n_block = blocks.end - 1;

            // The first block: no P yet.
            mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);
            wgmma_fence();
            gemm_qk(acc_s, q_rows, k_tiles + k_state.stage * (kStageBytes / kDescUnit));
            wgmma_commit();
            wgmma_wait_0();
            wgmma_touch(acc_s);
            release_k(leader);
            if (n_block >= blocks.end_full) {
                apply_mask(acc_s, ends, n_block * kTileN);
            }
            online_softmax_masked(acc_s, row_max, row_sum, correction, p.softmax_scale_log2);
            pack_p(p_tile, acc_s);
            --n_block;

            // S of this block and O += P V of the one before run together; the softmax runs under the second.
            auto multiply = [&]() {
                mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);
                wgmma_fence();
                gemm_qk(acc_s, q_rows, k_tiles + k_state.stage * (kStageBytes / kDescUnit));
                wgmma_commit();
                mbarrier_wait(barriers.v_full(v_state.stage), v_state.phase);
                wgmma_fence();
                gemm_pv(acc_o, p_tile, v_tiles + v_state.stage * (kStageBytes / kDescUnit));
                wgmma_commit();
                wgmma_wait_1();
                wgmma_touch(acc_s);
            };
            // K is released by an arrival that depends on the row sums (which are never -0, nor any NaN of that pattern): it
            // can not be issued before the exponentials, and the wait behind it neither. Left to itself ptxas waits for P V
            // right after the row maximum, and the softmax runs under nothing (d = 64 causal: 438 against 417 TFLOP/s, H200).
            auto accumulate = [&](bool rescale) {
                release_k(leader && is_not_negative_zero(row_sum[0]) && is_not_negative_zero(row_sum[1]));
                wgmma_wait_0();
                wgmma_touch(acc_o);
                wgmma_touch_a(p_tile);
                release_v();
                if (rescale) {
                    rescale_o(acc_o, correction);
                }
                pack_p(p_tile, acc_s);
            };
            for (; n_block >= blocks.end_full; --n_block) {
                multiply();
                apply_mask(acc_s, ends, n_block * kTileN);
                accumulate(online_softmax_masked(acc_s, row_max, row_sum, correction, p.softmax_scale_log2));
            }
            for (; n_block >= blocks.begin_full; --n_block) {
                multiply();
                accumulate(online_softmax(acc_s, row_max, row_sum, correction, p.softmax_scale_log2));
            }
            release_q();

            // The last block's P.
            mbarrier_wait(barriers.v_full(v_state.stage), v_state.phase);
            wgmma_fence();
            gemm_pv(acc_o, p_tile, v_tiles + v_state.stage * (kStageBytes / kDescUnit));
            wgmma_commit();
            wgmma_wait_0();
            wgmma_touch(acc_o);
            wgmma_touch_a(p_tile);
            release_v();
        }
        else {
            release_q();
        }

        float inverse_sum[2];
        float lse[2];
        finalize_softmax(row_max, row_sum, inverse_sum, lse, p.softmax_scale);
        rescale_o(acc_o, inverse_sum);
        store_part(p, s, acc_o, lse, row, tile);
    }
}

// Kernel --------------------------------------------------------------------------------------------------------------

// Prepare: from the lengths of sequences to a table of them, and a list of the entries that blocks are of ---------------------
//
// The entry with the most blocks comes first in the list, as often as it has blocks. Which of them a place stands for, and of
// which head, is for the order of tiles to say: the blocks of an entry, round as many heads as L2 holds what they read of.

constexpr int kPrepareThreads = 1024;
constexpr int kListedTile = kTileM;  // blocks of queries are listed
constexpr int kNumLengths = 1024;  // kinds of entries, by how many blocks they have

// In shared memory, an int for each kind: how many blocks its entries have, then where the next of them is listed.
struct Kinds {
    uint32_t places;
    int count;
    int shift;  // of a number of blocks to its kind: only where there are more lengths than kinds, it is not 0
};

__device__ __forceinline__ Kinds kinds_in(uint32_t smem, int most_blocks) {
    int shift = 0;
    while (((most_blocks - 1) >> shift) >= kNumLengths) {
        ++shift;
    }
    return {smem, ((most_blocks - 1) >> shift) + 1, shift};
}

// The sum of the values of a warp's lanes up to this one.
__device__ __forceinline__ int sum_of_lanes(int value) {
    int const lane = lane_id();
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int const before = shfl_from(value, lane - step);
        value += lane >= step ? before : 0;
    }
    return value;
}

// Counts the blocks of a warp's entries, one a lane. Bounds that do not rise make sequences overlap: where the list has no
// places left, rows become none.
__device__ __forceinline__ void count_blocks(Rows& rows, int capacity, uint32_t taken, Kinds const& kinds) {
    int const num_blocks = min((rows.end - rows.begin + kListedTile - 1) / kListedTile, capacity + 1);
    int const up_to_here = sum_of_lanes(num_blocks);
    int const of_warp = min(shfl_from(up_to_here, 31), capacity + 1);
    int before = 0;
    if (lane_id() == 0 && of_warp > 0) {
        before = load_shared_int(taken);
        if (before <= capacity) {  // no more, or the sum would leave 32 bits
            before = fetch_add_shared(taken, of_warp);
        }
    }
    if (shfl_from_lane_0(before) + up_to_here > capacity) {
        rows.end = rows.begin;
    } else if (num_blocks > 0) {
        fetch_add_shared(kinds.places + 4 * ((num_blocks - 1) >> kinds.shift), num_blocks);
    }
}

// From counts to places, by one warp; returns how many blocks there are. Each lane has some kinds in a row, the longest those
// of lane 0; an odd number, so that no two lanes read one bank.
__device__ __forceinline__ int place_kinds(Kinds const& kinds) {
    int const width = (kinds.count + 31) / 32 | 1;
    int const first = kinds.count - 1 - lane_id() * width;
    int const end = max(first - width, -1);
    int blocks = 0;
    for (int kind = first; kind > end; --kind) {
        blocks += load_shared_int(kinds.places + 4 * kind);
    }
    int const up_to_here = sum_of_lanes(blocks);
    int place = up_to_here - blocks;
    for (int kind = first; kind > end; --kind) {
        int const here = load_shared_int(kinds.places + 4 * kind);
        store_shared_int(kinds.places + 4 * kind, place);
        place += here;
    }
    return shfl_from(up_to_here, 31);
}

// Takes places in a list for the blocks of this lane's entry. Returns the first.
__device__ __forceinline__ int place_blocks(int num_blocks, Kinds const& kinds) {
    return num_blocks > 0 ? fetch_add_shared(kinds.places + 4 * ((num_blocks - 1) >> kinds.shift), num_blocks) : 0;
}

// Lists the blocks of a warp's entries, one entry a lane: as often as it has blocks, from its first place on, the entry.
__device__ __forceinline__ void list_blocks(
    int entry, int num_blocks, int place, int* list) {
    int const up_to_here = sum_of_lanes(num_blocks);
    int const of_warp = shfl_from(up_to_here, 31);
    for (int first = 0; first < of_warp; first += 32) {
        int const index = first + lane_id();
        int owner = 0;  // the lane whose entry has this block: as many lanes have all of theirs before it
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            owner += shfl_from(up_to_here, owner + step - 1) <= index ? step : 0;
        }
        int const to_place = shfl_from(place - (up_to_here - num_blocks), owner);
        int const listed = shfl_from(entry, owner);
        if (index < of_warp) {
            store_global_int(list + to_place + index, listed);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kPrepareThreads)
fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1_prepare(const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    int const thread = static_cast<int>(threadIdx.x);
    uint32_t const taken = smem;  // places of the list
    Kinds const kinds = kinds_in(smem + 16, p.seqlen_q / kListedTile + 1);
    int const num_entries = 2 * p.num_sequences + 1;
    griddepcontrol_launch_dependents();
    if (thread < 2) {
        store_shared_int(taken + 4 * thread, 0);
    }
    for (int kind = thread; kind < kinds.count; kind += kPrepareThreads) {
        store_shared_int(kinds.places + 4 * kind, 0);
    }
    sync_block();

    // A warp takes 32 entries at a time, and whole warps go on: lanes without an entry have no rows.
    for (int first = 32 * warp_id(); first < num_entries; first += kPrepareThreads) {
        int const entry = first + lane_id();
        EntryRows rows = rows_of_entry(p, entry);
        count_blocks(rows.q, p.num_m_blocks, taken, kinds);
        if (entry < num_entries) {
            int* const row = p.sequences + kSequenceNumbers * entry;
            store_global_int4(row, rows.q.end - rows.q.begin, rows.keys.end - rows.keys.begin, rows.q.begin, rows.keys.begin);
        }
    }
    sync_block();

    if (warp_id() == 0) {
        int const num_blocks = place_kinds(kinds);
        if (lane_id() == 0) {
            store_global_int(p.num_blocks, num_blocks);
        }
    }
    sync_block();

    for (int first = 32 * warp_id(); first < num_entries; first += kPrepareThreads) {
        int const entry = first + lane_id();
        int* const row = p.sequences + kSequenceNumbers * entry;
        int lengths[4] = {0, 0, 0, 0};
        if (entry < num_entries) {
            load_global_int4(lengths, row);
        }
        int const num_blocks = (lengths[0] + kListedTile - 1) / kListedTile;
        int const place = place_blocks(num_blocks, kinds);
        list_blocks(entry, num_blocks, place, p.m_list);
        int const together = heads_together(65536, lengths[1], p.num_heads_per_kv, p.num_heads);
        if (entry < num_entries) {
            store_global_int4(row + 4, place, 0, together, 0);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1)
fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1(
    const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
    const __grid_constant__ CUtensorMap map_v,
    const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    Barriers const barriers = {smem + kSmemBarriers};
    int const warp = warp_id();

    if (warp == 0 && elect_one()) {
        tma_prefetch_map(map_q);
        tma_prefetch_map(map_k);
        tma_prefetch_map(map_v);
        barriers.init();
        fence_mbarrier_init();
    }
    if (has_own_table(p)) {
        int const thread = static_cast<int>(threadIdx.x);
        measure_own_entry(p, thread);
        sync_block();
        place_own_entry(p, thread);
    }
    sync_block();

    if (warp < 4) {
        setmaxnreg_dec_24();
        if (warp < kNumLoadWarps) {
            griddepcontrol_wait();  // for the table and the list
            produce(map_q, {map_k, map_k}, {map_v, map_v}, p, smem, barriers, warp);
        }
    } else {
        setmaxnreg_inc_240();
        consume(p, smem, barriers, warp / 4 - 1, warp % 4);
    }
}

constexpr int kMergeWarps = 8;
constexpr int kRowQuads = kHeadDim / 4;  // groups of four columns
constexpr int kQuadsAtOnce = (kRowQuads + 31) / 32;

// O and LSE of all keys, from those of their parts, in the order of these, whoever was first: each O times exp(its LSE - LSE).
extern "C" __global__ void __launch_bounds__(32 * kMergeWarps)
fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1_merge(const __grid_constant__ Params p) {
    griddepcontrol_wait();
    int const lane = lane_id();
    int const num_rows = p.num_heads * p.seqlen_q;
    int const row = static_cast<int>(blockIdx.x) * kMergeWarps + warp_id();
    if (row >= num_rows) {
        return;
    }
    float const* const lse_at = p.lse_parts + static_cast<int64_t>(lane) * num_rows + row;
    float const lse = lane < p.key_parts ? load_global_float(lse_at) : -kInfinity;
    float max = lse;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        max = fmaxf(max, shfl_xor(max, step));
    }
    float const share = max == -kInfinity ? 0.0f : exp2_approx((lse - max) * kLog2E);
    float sum = share;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        sum += shfl_xor(sum, step);
    }
    float const weight = sum == 0.0f ? 0.0f : share * reciprocal_approx(sum);

    float o[kQuadsAtOnce][4];
#pragma unroll
    for (int i = 0; i < kQuadsAtOnce; ++i) {
        o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    }
    float const* from = p.o_parts + static_cast<int64_t>(row) * kHeadDim + 4 * lane;
#pragma unroll 4
    for (int part = 0; part < p.key_parts; ++part) {
        float const of_part = __builtin_bit_cast(float, shfl_from(__builtin_bit_cast(int, weight), part));
#pragma unroll
        for (int i = 0; i < kQuadsAtOnce; ++i) {
            if (lane + 32 * i < kRowQuads) {
                float columns[4];
                load_global_float4(columns, from + 128 * i);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    o[i][c] = fmaf(columns[c], of_part, o[i][c]);
                }
            }
        }
        from += static_cast<int64_t>(num_rows) * kHeadDim;
    }
    int const queries = p.seqlen_q / p.group;
    int const head = row / queries;
    Seqlen const at_row = {1, 0, row - head * queries, 0, 0};  // as if it were a sequence
    int64_t const to = first_query(at_row, 0, p.o_batch_stride, p.o_row_stride) + head * p.o_head_stride;
#pragma unroll
    for (int i = 0; i < kQuadsAtOnce; ++i) {
        if (lane + 32 * i < kRowQuads) {
            store_global_64(static_cast<unsigned char*>(p.o) + 2 * (to + 4 * (lane + 32 * i)),
                            pack_bf16(o[i][0], o[i][1]), pack_bf16(o[i][2], o[i][3]));
        }
    }
    if (lane == 0) {
        store_global_float(p.lse + row, sum == 0.0f ? -kInfinity : fmaf(log2_approx(sum), kLn2, max));
    }
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_90a -cubin, or with NVRTC.
//
// Kernels, one after the other on one stream; each takes tensor maps, then Params, by value:
//   fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1_prepare
//     grid (tables, 1, 1), 1024 threads, 4112 bytes of dynamic shared memory
//   fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1
//     grid (min(num_tiles, num_sms), 1, 1), 384 threads, 199512 bytes of dynamic shared memory
//     maps of q, k, v
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 199512
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1 behind another of these: it then starts early
//   fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1_merge
//     grid ((num_rows + 7) / 8, 1, 1), 256 threads, 0 bytes of dynamic shared memory
//     may have CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION = 1 behind another of these: it then starts early
// Tensor maps: tiled, (head_dim, 2^30, heads, 2^31, 2^31), 16-bit elements, zeros outside, on 64 bytes
//   steps in bytes: of a row, of a head, 2^34 - that of a row, of a row
//   q: box 64 x min(group, 128) x 128 / min(group, 128) x 1 x 1, swizzle 128 bytes
//   k, v: box 64 x box_rows x 1 x 1, swizzle 128 bytes
// Of a call over pages, beside batch, seqlen_q (of all sequences) and heads:
//   seqlen_k: the most keys that a sequence can have, those of all pages of a table's row
//   page_size, entries: rows of a page, and pages; table_stride: numbers from one row to the next
//   key_parts: of each tile's keys, 1 to 32
//   Params has k_page_stride, the rows from one page of k to the next; and v_page_stride
// Rows of q and o are of all heads that share K and V, group = num_heads / num_heads_kv of the tensors:
//   seqlen_q is group times theirs here, num_heads their num_heads_kv; their maps have heads before rows
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = seqlen_q / 128 + 2 * batch + 1
//   num_tiles = num_m_blocks * num_heads * key_parts
//   num_rows = seqlen_q * num_heads
//   num_sequences = batch
//   tables = min(batch / 49, 1)
//   box_rows = gcd(page_size, 128)
//   tile_pages = 128 / page_size
//   tile_rows = 128 - tile_pages * page_size
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Device memory beside the tensors, in 4-byte numbers:
//   tile_counter: 2; all zeros before the first launch, and left so
//   sequences: tables * (8 * (3 * batch + 2))
//   num_blocks: tables * (1)
//   m_list: tables * (num_m_blocks)
//   o_parts: key_parts * num_rows * 128
//   lse_parts: key_parts * num_rows

}  // namespace fa2gen::fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1
