// fa2_fwd_sm90_bf16_d128_x64652830_m192_n80_s2_w12_r1
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm90/fwd.cu.j2; edit the template or the spec, not this file.
//   problem  fwd, head dim 128, bf16, full mask, keys of an expression
//   tiling   192 query rows x 80 keys, 2 stages, 12 mma warps, 128-byte panels
//   launch   512 threads, 229792 bytes of dynamic shared memory
//   contents   28 Problem and tiling,   46 Shared memory,   93 Threads,  140 Arithmetic,  186 Shared memory,
//             213 Global memory,  227 mbarriers,  271 TMA,  313 Fences,  320 Fragments,  328 Registers,
//             336 Registers of a warpgroup,  348 wgmma,  476 What is visible,  505 Expressions,
//             520 What an expression hides,  670 Online softmax,  840 Pipelines,  885 Loads,  953 Visits,
//            1043 Matrix products, 1070 Epilogue, 1117 Producer, 1166 Consumer, 1373 Kernel, 1406 Launch
//
// O = softmax(scale * Q K^T) V for one (batch, head) and 192 query rows at a time (FlashAttention-2, Algorithm 1), on
// 3 mma warpgroups of 64 rows and one producer warp. Blocks stay on their SM and take tiles from a counter, so that the
// producer loads the next tile's Q and K under this tile's end. Blocks of K and V run from the last to the first through rings
// in shared memory; S and P never leave registers; the softmax of one block runs under the products of the next.

namespace fa2gen::fa2_fwd_sm90_bf16_d128_x64652830_m192_n80_s2_w12_r1 {

using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 128;
constexpr int kTileM = 192;
constexpr int kTileN = 80;
constexpr int kNumStages = 2;
constexpr int kNumQStages = 2;
constexpr int kNumMmaWarps = 12;
constexpr int kNumThreads = 512;  // the first warpgroup produces, the others multiply

// One thread's share of an mma warpgroup's tiles, in registers.
constexpr int kNumAccS = 40;
constexpr int kNumAccO = 64;
constexpr int kNumP = 20;

constexpr int kStepsQk = 8;
constexpr int kStepsPv = 5;

// Shared memory: tiles are panels of 128 bytes a row, swizzled, as TMA writes them -----------------------------------------

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kNumPanels = 2;
constexpr int kStepsPerPanel = 4;
constexpr int kSwizzleShift = 0;  // 16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask)
constexpr int kSwizzleMask = 7;
constexpr uint32_t kQPanelBytes = 24576;
constexpr uint32_t kOPanelBytes = 24576;
constexpr uint32_t kKvPanelBytes = 10240;
constexpr uint32_t kQBytes = 49152;
constexpr uint32_t kQStageBytes = 49152;
constexpr uint32_t kKvReadBytes = 20480;
constexpr uint32_t kStageBytes = 20480;

constexpr uint32_t kSmemQ = 0;
constexpr uint32_t kSmemK = 98304;
constexpr uint32_t kSmemV = 139264;
constexpr uint32_t kSmemO = 180224;
constexpr uint32_t kSmemBarriers = 229376;
constexpr uint32_t kSmemTileSlots = 229600;
constexpr uint32_t kSmemVisitSlots = 229632;
constexpr uint32_t kSmemMessages = 229664;

// Matrix descriptors: swizzle and stride between groups of 8 rows; for V also the step to the next panel of columns.
constexpr uint32_t kDescHi = 0x40000040u;
constexpr uint32_t kDescLoV = 0x02800000u;

// The kernel's scalar arguments; the order is the launcher's (KernelPlan.params).
struct Params {
    float* lse;
    int* tile_counter;
    int seqlen_q;
    int seqlen_k;
    int num_heads;
    int num_heads_per_kv;
    int num_m_blocks;
    int num_tiles;
    int num_batch_heads;
    int heads_per_section;
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

// Arithmetic ----------------------------------------------------------------------------------------------------------

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

__device__ __forceinline__ int load_shared_int(uint32_t address) {
    int value;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
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

// Global memory -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int fetch_add_global(int* counter, int value) {
    return atomicAdd(counter, value);
}

__device__ __forceinline__ void store_global_int(int* address, int value) {
    *address = value;
}

__device__ __forceinline__ void store_global_float(float* address, float value) {
    *address = value;
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

// Fences --------------------------------------------------------------------------------------------------------------

// Publishes this thread's earlier shared-memory stores to TMA and wgmma (the async proxy).
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Fragments -----------------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// Registers -----------------------------------------------------------------------------------------------------------

// The same value, in a register from here on: a loop that uses it does not compute it again each time.
__device__ __forceinline__ int keep(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Registers of a warpgroup --------------------------------------------------------------------------------------------

// Gives this warpgroup's registers above 32 a thread back to the block.
__device__ __forceinline__ void setmaxnreg_dec_32() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
}

// Takes registers up to 160 a thread; waits until the block has them.
__device__ __forceinline__ void setmaxnreg_inc_160() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
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
__device__ __forceinline__ void wgmma_touch(float (&d)[40]) {
#pragma unroll
    for (int i = 0; i < 40; ++i) {
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
__device__ __forceinline__ void wgmma_touch_a(uint32_t (&a)[20]) {
#pragma unroll
    for (int i = 0; i < 20; ++i) {
        asm volatile("" : "+r"(a[i])::"memory");
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

// Sequences: every batch entry has the same lengths.
struct Seqlen {
    int q;
    int k;
};

__device__ __forceinline__ Seqlen seqlen_of(Params const& p, int) {
    return {p.seqlen_q, p.seqlen_k};
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

__device__ __forceinline__ int64_t first_key(Seqlen const&, int bidb, int64_t batch_stride, int64_t) {
    return bidb * batch_stride;
}

__device__ __forceinline__ int64_t lse_of_head(Params const& p, Seqlen const& s, int bidh, int bidb) {
    return (static_cast<int64_t>(bidb) * p.num_heads + bidh) * s.q;
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

__device__ __forceinline__ BlockRange key_blocks(Params const&, Seqlen const& s, int first_row, int) {
    if (first_row >= s.q) {
        return {0, 0, 0, 0};
    }
    return {0, 0, s.k / kTileN, (s.k + kTileN - 1) / kTileN};
}

// How many of a thread's registers of a row hold columns before this one, counted from the thread's first: the k-th holds
// k / 2 * 8 + k % 2.
__device__ __forceinline__ int registers_before(int column) {
    int const columns = max(column, 0);
    return columns / 8 * 2 + min(columns % 8, 2);
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

// Queries of a tile that see the same of a block, for all that is asked of it: a warpgroup's, where each has its own.
constexpr int kSeenRows = 64;

// Of a block of keys, three bits for each kSeenRows queries of a tile.
constexpr uint32_t kSeesAny = 1;
constexpr uint32_t kAllAllowed = 2;  // as the expression says
constexpr uint32_t kUnmasked = 4;    // as the mask does
constexpr uint32_t kSeesAll = kSeesAny | kAllAllowed | kUnmasked;
constexpr uint32_t kMostBits = (1u << 3 * (kTileM / kSeenRows)) - 1;

__device__ __forceinline__ uint32_t seen_bits(Params const& p, Seqlen const& s, Head const& at, int first_row, int n_block) {
    uint32_t bits = 0;
#pragma unroll 1
    for (int part = 0; part < kTileM / kSeenRows; ++part) {
        int const row = first_row + kSeenRows * part;
        BlockRange const blocks = key_blocks(p, s, row, kSeenRows);
        Seen const seen = seen_of(p, at, row, kSeenRows, n_block * kTileN);
        bool const sees_any = seen.any & (n_block >= blocks.begin) & (n_block < blocks.end);
        bool const is_unmasked = (n_block >= blocks.begin_full) & (n_block < blocks.end_full);
        bits |= ((sees_any ? kSeesAny : 0) | (seen.all ? kAllAllowed : 0) | (is_unmasked ? kUnmasked : 0)) << 3 * part;
    }
    return bits;
}

// A block of keys that a tile visits, and its bits.
struct Visit {
    int n_block;
    uint32_t bits;
};

// The blocks of keys that some query of a tile may see, from the last to the first; bit n of `any` is of block ahead + 32 - n.
struct SeenBlocks {
    int ahead;      // the first that no warp has asked of yet
    uint32_t any;   // those that are still to visit
    uint32_t bits;  // of the block that this lane has asked of

    // The next of them, before `begin` if there is none. A warp calls it together.
    __device__ __forceinline__ Visit next(Params const& p, Seqlen const& s, Head const& at, int first_row, int begin) {
        while (any == 0 && ahead >= begin) {
            int const n_block = ahead - lane_id();
            bits = n_block >= begin ? seen_bits(p, s, at, first_row, n_block) : 0;
            uint32_t sees_any = 0;
#pragma unroll
            for (int part = 0; part < kTileM / kSeenRows; ++part) {
                sees_any |= bits >> 3 * part;
            }
            any = ballot((sees_any & kSeesAny) != 0);
            ahead -= 32;
        }
        if (any == 0) {
            return {begin - 1, 0};
        }
        int const lane = lowest_bit(any);
        any &= any - 1;
        return {ahead + 32 - lane, static_cast<uint32_t>(shfl_from(static_cast<int>(bits), lane))};
    }
};

// Which keys of a block each of a thread's two rows sees, a bit for each of the row's registers, in their order.
constexpr int kSeenWords = (kNumAccS / 2 + 31) / 32;

__device__ __forceinline__ void look_up(
    Params const& p, Head const& at, uint32_t (&seen)[2][kSeenWords], int row, int first_key) {
    int const column = first_key + 2 * (lane_id() % 4);
    float const float_row = static_cast<float>(row);
    float const float_column = static_cast<float>(column);
#pragma unroll
    for (int word = 0; word < kSeenWords; ++word) {
        seen[0][word] = seen[1][word] = 0;
#pragma unroll
        for (int n = 32 * word; n < min(32 * word + 32, kNumAccS / 2); ++n) {
            int const right = n / 2 * 8 + n % 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                bool const allowed = is_allowed(
                    p, at.b, at.h, at.hk, at.seqlen_q, at.seqlen_k, row + 8 * half, column + right,
                    float_row + static_cast<float>(8 * half), float_column + static_cast<float>(right));
                if (allowed) {
                    seen[half][word] |= 1u << n % 32;
                }
            }
        }
    }
}

__device__ __forceinline__ void see_all(uint32_t (&seen)[2][kSeenWords]) {
#pragma unroll
    for (int word = 0; word < kSeenWords; ++word) {
        seen[0][word] = seen[1][word] = 0xffffffffu;
    }
}

// Of these, those that the mask hides are not seen either.
__device__ __forceinline__ void see_less(
    uint32_t (&seen)[2][kSeenWords], int const (&ends)[2], int first_key) {
    int const first_column = first_key + 2 * (lane_id() % 4);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        int const end = registers_before(ends[row] - first_column);
#pragma unroll
        for (int word = 0; word < kSeenWords; ++word) {
            seen[row][word] &= ~shift_left(0xffffffffu, max(end - 32 * word, 0));
        }
    }
}

// Sets the scores of keys that a row does not see to -inf: of those that were looked up, or of all, asked of one by one.
__device__ __forceinline__ void hide_unseen(float (&acc_s)[kNumAccS], uint32_t const (&seen)[2][kSeenWords]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int n = 0; n < kNumAccS / 2; ++n) {
            int const i = n / 2 * 4 + 2 * row + n % 2;
            acc_s[i] = seen[row][n / 32] >> n % 32 & 1 ? acc_s[i] : -kInfinity;
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
// Of an expression's masks such blocks may be many: old maxima serve them as well.
__device__ __forceinline__ bool online_softmax_masked(
    float (&acc_s)[kNumAccS], float (&row_max)[2], float (&row_sum)[2], float (&correction)[2], float softmax_scale_log2) {
    float base[2] = {row_max[0], row_max[1]};
    float const maxima[2] = {thread_max(acc_s, 0, base[0]), thread_max(acc_s, 1, base[1])};
    float offset[2] = {base[0] * softmax_scale_log2, base[1] * softmax_scale_log2};  // -inf is large
    bool const risen = any_lane(((maxima[0] - base[0]) * softmax_scale_log2 > kMaxRise) |
                                ((maxima[1] - base[1]) * softmax_scale_log2 > kMaxRise) | has_large(offset));
    if (risen) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float const greatest = quad_max(maxima[row]);
            bool const keep = (greatest - row_max[row]) * softmax_scale_log2 <= kMaxRise;
            float const new_max = keep ? row_max[row] : greatest;
            base[row] = new_max == -kInfinity ? 0.0f : new_max;
            correction[row] = exp2_approx((row_max[row] - base[row]) * softmax_scale_log2);
            offset[row] = base[row] * softmax_scale_log2;
            row_max[row] = new_max;
            row_sum[row] *= correction[row];
        }
        take_off_large(acc_s, base, offset);
    }
    exponentiate(acc_s, offset, row_sum, softmax_scale_log2);
    return risen;
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

// Order of tiles: longest rows first, so that the last tiles to start are the short ones, within sections of heads whose K and
// V fit in L2 together (4k: 587 against 520 TFLOP/s head by head, d = 128, H200).
struct Tile {
    int m_block;
    int bidh;
    int bidb;
};

__device__ __forceinline__ int num_tiles(Params const& p) {
    return p.num_tiles;
}

__device__ __forceinline__ Tile tile_at(Params const& p, int index) {
    int const section_tiles = p.heads_per_section * p.num_m_blocks;
    int const first_batch_head = index / section_tiles * p.heads_per_section;
    int const width = min(p.heads_per_section, p.num_batch_heads - first_batch_head);
    int const within = index % section_tiles;
    int const batch_head = first_batch_head + within % width;
    return {p.num_m_blocks - 1 - within / width, batch_head % p.num_heads, batch_head / p.num_heads};
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

    __device__ __forceinline__ uint32_t message_full(int stage) const { return base + 8 * stage; }
    __device__ __forceinline__ uint32_t message_empty(int stage) const { return base + 64 + 8 * stage; }
    __device__ __forceinline__ uint32_t q_full(int stage) const { return base + 128 + 8 * stage; }
    __device__ __forceinline__ uint32_t q_empty(int stage) const { return base + 144 + 8 * stage; }
    __device__ __forceinline__ uint32_t k_full(int stage) const { return base + 160 + 8 * stage; }
    __device__ __forceinline__ uint32_t k_empty(int stage) const { return base + 176 + 8 * stage; }
    __device__ __forceinline__ uint32_t v_full(int stage) const { return base + 192 + 8 * stage; }
    __device__ __forceinline__ uint32_t v_empty(int stage) const { return base + 208 + 8 * stage; }

    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < 8; ++stage) {
            mbarrier_init(message_full(stage), 1);
            mbarrier_init(message_empty(stage), 1);
        }
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

// The tile travels with its Q, decoded, in a slot of 16 bytes. No tile: m_block < 0 and no copy.
__device__ __forceinline__ Tile load_tile_slot(uint32_t smem, int stage) {
    int slot[4];
    load_shared_int4(slot, smem + kSmemTileSlots + 16 * stage);
    return {slot[0], slot[1], slot[2]};
}

// And whether the tile visits any block of keys.
__device__ __forceinline__ bool has_keys(uint32_t smem, int stage) {
    return load_shared_int(smem + kSmemTileSlots + 16 * stage + 12) != 0;
}

__device__ __forceinline__ void load_q(
    CUtensorMap const& map_q, uint32_t smem, Barriers const& barriers, PipelineState& state, Seqlen const& s,
    Tile const& tile, bool has_keys) {
    uint32_t const full = barriers.q_full(state.stage);
    mbarrier_wait(barriers.q_empty(state.stage), state.phase ^ 1);
    if (elect_one()) {
        store_shared_int4(smem + kSmemTileSlots + 16 * state.stage, tile.m_block, tile.bidh, tile.bidb, has_keys ? 1 : 0);
        if (tile.m_block >= 0) {
            mbarrier_arrive_expect_tx(full, kQBytes);
            load_tile({map_q, map_q}, smem + kSmemQ + state.stage * kQStageBytes, kQPanelBytes, full,
                      query_box(s, tile.m_block * kTileM, tile.bidb), tile.bidh);
        } else {
            mbarrier_arrive(full);
        }
    }
    state.advance(kNumQStages);
}

__device__ __forceinline__ void load_kv_block(
    TileMaps const& maps, uint32_t tiles, uint32_t full, uint32_t empty, PipelineState& state, Box const& box,
    int head) {
    mbarrier_wait(empty, state.phase ^ 1);
    if (elect_one()) {
        mbarrier_arrive_expect_tx(full, kKvReadBytes);
        load_tile(maps, tiles + state.stage * kStageBytes, kKvPanelBytes, full, box, head);
    }
    state.advance(kNumStages);
}

// Visits: which blocks of keys a tile sees, found ahead of the loads ------------------------------------------------------
//
// A warp beside the producer takes tiles and looks their blocks up: what is asked of memory for that would hold up a tile's
// first copies (8 documents of 2k: 0.72 to 0.78 of a ragged batch's speed without, 0.80 to 0.86 with it; d = 128, H100).

constexpr int kNumMessages = 8;

// A message is a tile, after the last without a block of queries, or a block of keys that the tile visits, without bits after
// its last.
__device__ __forceinline__ void send(
    uint32_t smem, Barriers const& barriers, PipelineState& state, int first, int second, int third) {
    mbarrier_wait(barriers.message_empty(state.stage), state.phase ^ 1);
    if (elect_one()) {
        store_shared_int4(smem + kSmemMessages + 16 * state.stage, first, second, third, 0);
        mbarrier_arrive(barriers.message_full(state.stage));
    }
    state.advance(kNumMessages);
}

// The arrival depends on what was read: it can not overtake the load.
__device__ __forceinline__ void receive(
    int (&message)[4], uint32_t smem, Barriers const& barriers, PipelineState& state) {
    mbarrier_wait(barriers.message_full(state.stage), state.phase);
    load_shared_int4(message, smem + kSmemMessages + 16 * state.stage);
    sync_warp();
    mbarrier_arrive_if(barriers.message_empty(state.stage), lane_id() == 0 && message[3] == 0);
    state.advance(kNumMessages);
}

__device__ __forceinline__ Visit receive_visit(uint32_t smem, Barriers const& barriers, PipelineState& state) {
    int message[4];
    receive(message, smem, barriers, state);
    return {message[0], static_cast<uint32_t>(message[1])};
}

__device__ __forceinline__ void scout(Params const& p, uint32_t smem, Barriers const& barriers) {
    PipelineState state = {0, 0};
    int const tiles = num_tiles(p);
    int index = static_cast<int>(blockIdx.x);
    while (index < tiles) {
        Tile const tile = tile_at(p, index);
        send(smem, barriers, state, tile.m_block, tile.bidh, tile.bidb);
        Seqlen const s = seqlen_of(p, tile.bidb);
        int const first_row = tile.m_block * kTileM;
        BlockRange const blocks = key_blocks(p, s, first_row, kTileM);
        Head const at = head_of(p, s, tile.bidh, tile.bidb);
        SeenBlocks seen = {blocks.end - 1, 0, 0};
        Visit visit = {0, 0};
        do {
            visit = seen.next(p, s, at, first_row, blocks.begin);
            send(smem, barriers, state, visit.n_block, static_cast<int>(visit.bits), 0);
        } while (visit.bits != 0);
        // The next tile is taken when this one's last block has been sent. Taken a tile ahead, tiles wait for blocks that are
        // not free yet, as others end (8 documents in 8k: idle at the end 16 us of 249, and 7 of 217; d = 128, H100).
        // Every tile has exactly one fetch, so the fetch that returns num_tiles - 1 is the launch's last: it leaves the counter
        // at 0 for the next launch.
        int fetched = 0;
        if (lane_id() == 0) {
            fetched = fetch_add_global(p.tile_counter, 1);
            if (fetched == tiles - 1) {
                store_global_int(p.tile_counter, 0);
            }
        }
        index = shfl_from_lane_0(fetched) + static_cast<int>(gridDim.x);
    }
    send(smem, barriers, state, -1, 0, 0);
}

// A visit travels with its K, and the bits of the one that follows it: 0 if none does.
__device__ __forceinline__ void store_visit(
    uint32_t smem, uint32_t empty, PipelineState const& state, Visit const& visit, uint32_t following) {
    mbarrier_wait(empty, state.phase ^ 1);
    if (elect_one()) {
        store_shared_int4(smem + kSmemVisitSlots + 16 * state.stage, visit.n_block,
                          static_cast<int>(following), static_cast<int>(visit.bits), 0);
    }
}

__device__ __forceinline__ void load_visit(int& n_block, uint32_t& following, uint32_t smem, int stage) {
    int slot[4];
    load_shared_int4(slot, smem + kSmemVisitSlots + 16 * stage);
    n_block = slot[0];
    following = static_cast<uint32_t>(slot[1]);
}

// Those of a tile's first.
__device__ __forceinline__ uint32_t first_bits(uint32_t smem, int stage) {
    return static_cast<uint32_t>(load_shared_int(smem + kSmemVisitSlots + 16 * stage + 8));
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
        wgmma_m64n80k16_ss_kk(acc_s, matrix_descriptor(kDescHi, q), matrix_descriptor(kDescHi, key), step != 0);
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

__device__ __forceinline__ void stage_o(float const (&acc_o)[kNumAccO], uint32_t o_rows) {
    int const row = lane_id() % 16;
    int const row_swizzle = (row >> kSwizzleShift) & kSwizzleMask;
    uint32_t const row_address = o_rows + row * kPanelRowBytes;
    auto address = [&](int column) {  // of this lane's row in the 16 columns from `column` on
        int const chunk = column % kPanelColumns / 8 + lane_id() / 16;
        return row_address + column / kPanelColumns * kOPanelBytes + static_cast<uint32_t>((chunk ^ row_swizzle) << 4);
    };
    auto pair = [&](int i) { return pack_bf16(acc_o[i], acc_o[i + 1]); };
#pragma unroll
    for (int column = 0; column + 16 <= kHeadDim; column += 16) {
        int const i = column / 2;
        stmatrix_x4(address(column), pair(i), pair(i + 2), pair(i + 4), pair(i + 6));
    }
}

// The stores clip at seqlen_q and at the head dim.
__device__ __forceinline__ void store_o(
    CUtensorMap const& map_o, Seqlen const& s, uint32_t o_rows, int row, Tile const& tile) {
    Box const box = query_box(s, row, tile.bidb);
    fence_proxy_async();
    sync_warp();
    if (elect_one()) {
#pragma unroll
        for (int panel = 0; panel < kNumPanels; ++panel) {
            store_box(map_o, o_rows + panel * kOPanelBytes, panel * kPanelColumns, box, tile.bidh);
        }
        tma_store_commit();
    }
}

__device__ __forceinline__ void store_lse(
    Params const& p, Seqlen const& s, float const (&lse)[2], int row, Tile const& tile) {
    if (lane_id() % 4 == 0) {
        float* const of_head = p.lse + lse_of_head(p, s, tile.bidh, tile.bidb);
        int const first = row + lane_id() / 4;
        if (first < s.q) {
            store_global_float(of_head + first, lse[0]);
        }
        if (first + 8 < s.q) {
            store_global_float(of_head + first + 8, lse[1]);
        }
    }
}

// Producer: one warp, which loads what the scout tells it. V runs one block behind K, as the mma warps use them -------------

__device__ __forceinline__ void produce(
    CUtensorMap const& map_q, TileMaps const& maps_k, TileMaps const& maps_v, Params const& p, uint32_t smem,
    Barriers const& barriers) {
    PipelineState messages = {0, 0};
    PipelineState q_state = {0, 0};
    PipelineState k_state = {0, 0};
    PipelineState v_state = {0, 0};
    while (true) {
        int message[4];
        receive(message, smem, barriers, messages);
        Tile const tile = {message[0], message[1], message[2]};
        if (tile.m_block < 0) {
            break;
        }
        Seqlen const s = seqlen_of(p, tile.bidb);
        int const head_kv = tile.bidh / p.num_heads_per_kv;
        auto receive_next = [&]() { return receive_visit(smem, barriers, messages); };
        auto load_k = [&](Visit const& visit, Visit const& following) {
            store_visit(smem, barriers.k_empty(k_state.stage), k_state, visit, following.bits);
            load_kv_block(maps_k, smem + kSmemK, barriers.k_full(k_state.stage), barriers.k_empty(k_state.stage), k_state,
                          key_box(s, visit.n_block * kTileN, tile.bidb), head_kv);
        };

        // K first: where Q has one stage, the last tile still holds it.
        Visit visit = receive_next();
        Visit following = {0, 0};
        bool const has_keys = visit.bits != 0;
        if (has_keys) {
            following = receive_next();
            load_k(visit, following);
        }
        load_q(map_q, smem, barriers, q_state, s, tile, has_keys);
        while (visit.bits != 0) {
            Visit beyond = {0, 0};
            if (following.bits != 0) {
                beyond = receive_next();
                load_k(following, beyond);
            }
            load_kv_block(maps_v, smem + kSmemV, barriers.v_full(v_state.stage), barriers.v_empty(v_state.stage), v_state,
                          key_box(s, visit.n_block * kTileN, tile.bidb), head_kv);
            visit = following;
            following = beyond;
        }
    }
    load_q(map_q, smem, barriers, q_state, {}, {-1, 0, 0}, false);
}

// Consumer: one of the mma warpgroups, 64 query rows of each tile ------------------------------------------------------

__device__ __forceinline__ void consume(
    CUtensorMap const& map_o, Params const& p, uint32_t smem, Barriers const& barriers, int warpgroup, int warp) {
    int const warp_row = 64 * warpgroup + 16 * warp;  // of the tile
    uint32_t const q_tiles = (smem + kSmemQ + 64 * warpgroup * kPanelRowBytes) / kDescUnit;
    uint32_t const k_tiles = (smem + kSmemK) / kDescUnit;
    uint32_t const v_tiles = (smem + kSmemV) / kDescUnit + kDescLoV;
    uint32_t const o_rows = smem + kSmemO + warp_row * kPanelRowBytes;
    bool const leader = lane_id() == 0;  // arrives for its warp: a slow warp then holds the phase, and can not miss one
    PipelineState q_state = {0, 0};
    PipelineState k_state = {0, 0};
    PipelineState v_state = {0, 0};

    float acc_s[kNumAccS];
    float acc_o[kNumAccO];
    uint32_t p_tile[kNumP];

    uint32_t following = 0;
    auto release_k = [&](bool when) {
        when = when && following <= kMostBits;  // true, and behind its load
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
    };
    // As soon as the last block's S is there: the next Q comes under its softmax. The warp was together for that product, and
    // before: every lane has read the slot.
    auto release_q_after = [&](bool is_last) {
        mbarrier_arrive_if(barriers.q_empty(q_state.stage), leader && is_last);
    };

    while (true) {
        mbarrier_wait(barriers.q_full(q_state.stage), q_state.phase);
        Tile const tile = load_tile_slot(smem, q_state.stage);
        if (tile.m_block < 0) {
            break;
        }
        Seqlen const s = seqlen_of(p, tile.bidb);
        int const first_row = tile.m_block * kTileM;
        int const row = first_row + warp_row;  // this warp's first
        int const ends[2] = {key_end(p, s, row + lane_id() / 4), key_end(p, s, row + lane_id() / 4 + 8)};
        Head const at = head_of(p, s, tile.bidh, tile.bidb);
        // The block in hand, and what this warpgroup sees of it; of the one that follows the bits come with the first one's K.
        int n_block = 0;
        bool is_one = has_keys(smem, q_state.stage);
        if (is_one) {
            mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);
            following = first_bits(smem, k_state.stage);
        }
        auto bits_of_following = [&]() { return following >> 3 * warpgroup & kSeesAll; };
        uint32_t bits = bits_of_following();
        auto acquire_k = [&]() {
            mbarrier_wait(barriers.k_full(k_state.stage), k_state.phase);
            load_visit(n_block, following, smem, k_state.stage);
        };
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
        if (!is_one) {
            release_q();
        }
        // Runs of blocks that this warpgroup sees.
        bool is_begun = false;  // until then O is 0
        while (is_one) {
            if ((bits & kSeesAny) == 0) {
                acquire_k();
                skip(1);
                release_q_after(following == 0);
                bits = bits_of_following();
                is_one = following != 0;
                continue;
            }
            // The first block of one: no P yet.
            acquire_k();
            wgmma_fence();
            gemm_qk(acc_s, q_rows, k_tiles + k_state.stage * (kStageBytes / kDescUnit));
            wgmma_commit();
            // What is hidden is looked up under products, too.
            uint32_t visible[2][kSeenWords];
            auto look = [&]() {
                if ((bits & kAllAllowed) == 0) {
                    look_up(p, at, visible, row + lane_id() / 4, n_block * kTileN);
                } else {
                    see_all(visible);
                }
                if ((bits & kUnmasked) == 0) {
                    see_less(visible, ends, n_block * kTileN);
                }
            };
            look();
            wgmma_wait_0();
            wgmma_touch(acc_s);
            release_q_after(following == 0);
            release_k(leader);
            hide_unseen(acc_s, visible);
            if (online_softmax_masked(acc_s, row_max, row_sum, correction, p.softmax_scale_log2) && is_begun) {
                rescale_o(acc_o, correction);
            }
            is_begun = true;
            pack_p(p_tile, acc_s);

            uint32_t ahead = 0;  // this warpgroup's bits of the block that follows
            // S of this block and O += P V of the one before run together; the softmax runs under the second.
            auto multiply = [&](bool is_masked) {
                acquire_k();
                wgmma_fence();
                gemm_qk(acc_s, q_rows, k_tiles + k_state.stage * (kStageBytes / kDescUnit));
                wgmma_commit();
                mbarrier_wait(barriers.v_full(v_state.stage), v_state.phase);
                wgmma_fence();
                gemm_pv(acc_o, p_tile, v_tiles + v_state.stage * (kStageBytes / kDescUnit));
                wgmma_commit();
                if (is_masked) {
                    look();
                }
                wgmma_wait_1();
                wgmma_touch(acc_s);
                release_q_after(following == 0);
                ahead = static_cast<uint32_t>(keep(static_cast<int>(bits_of_following())));  // long before it is asked
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
            // Blocks that need a mask may lie between others. A row may have seen nothing before: its maximum is -inf then, and
            // rises where all see all.
            bits = bits_of_following();
            while (true) {
                while (bits == kSeesAll) {
                    multiply(false);
                    accumulate(online_softmax(acc_s, row_max, row_sum, correction, p.softmax_scale_log2));
                    bits = ahead;
                }
                if ((bits & kSeesAny) == 0) {
                    break;
                }
                multiply(true);
                hide_unseen(acc_s, visible);
                accumulate(online_softmax_masked(acc_s, row_max, row_sum, correction, p.softmax_scale_log2));
                bits = ahead;
            }
            is_one = following != 0;

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

        q_state.advance(kNumQStages);

        float inverse_sum[2];
        float lse[2];
        finalize_softmax(row_max, row_sum, inverse_sum, lse, p.softmax_scale);
        rescale_o(acc_o, inverse_sum);
        store_lse(p, s, lse, row, tile);

        // The previous tile's store must have read the rows that this one overwrites.
        tma_store_wait_read();
        sync_warp();
        stage_o(acc_o, o_rows);
        store_o(map_o, s, o_rows, row, tile);
    }
    tma_store_wait();
}

// Kernel --------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) fa2_fwd_sm90_bf16_d128_x64652830_m192_n80_s2_w12_r1(
    const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
    const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_o,
    const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    Barriers const barriers = {smem + kSmemBarriers};
    int const warp = warp_id();

    if (warp == 0 && elect_one()) {
        tma_prefetch_map(map_q);
        tma_prefetch_map(map_k);
        tma_prefetch_map(map_v);
        tma_prefetch_map(map_o);
        barriers.init();
        fence_mbarrier_init();
    }
    sync_block();

    if (warp < 4) {
        setmaxnreg_dec_32();
        if (warp == 0) {
            produce(map_q, {map_k, map_k}, {map_v, map_v}, p, smem, barriers);
        } else if (warp == 1) {
            scout(p, smem, barriers);
        }
    } else {
        setmaxnreg_inc_160();
        consume(map_o, p, smem, barriers, warp / 4 - 1, warp % 4);
    }
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_90a -cubin, or with NVRTC.
// `fa2gen render fa2_fwd_sm90_bf16_d128_x64652830_m192_n80_s2_w12_r1 --with-host` adds a launcher in C++.
//
// Kernel; it takes tensor maps, then Params, by value:
//   fa2_fwd_sm90_bf16_d128_x64652830_m192_n80_s2_w12_r1
//     grid (min(num_tiles, num_sms), 1, 1), 512 threads, 229792 bytes of dynamic shared memory
//     maps of q, k, v, o
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 229792
// Tensor maps: tiled, (head_dim, seqlen, heads, batch), 16-bit elements, zeros outside, on 64 bytes
//   q: box 64 x 192 x 1 x 1, swizzle 128 bytes
//   k, v: box 64 x 80 x 1 x 1, swizzle 128 bytes
//   o: box 64 x 16 x 1 x 1, swizzle 128 bytes
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q + 191) / 192
//   num_tiles = num_m_blocks * batch * num_heads
//   num_batch_heads = batch * num_heads
//   section_heads_kv = max(1, min(33554432 / (seqlen_k * 512), 32 / num_heads_per_kv))
//   heads_per_section = min(section_heads_kv * num_heads_per_kv, batch * num_heads)
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Device memory beside the tensors, in 4-byte numbers:
//   tile_counter: 1; all zeros before the first launch, and left so
// Options; limited(x, n) is n where x < 0, else min(x, n):
//   number_0: number of the expression
//   number_1: number of the expression
//   Params has number_0 = number_0
//   Params has number_1 = number_1

}  // namespace fa2gen::fa2_fwd_sm90_bf16_d128_x64652830_m192_n80_s2_w12_r1
