// fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from decode/decode.cu.j2; edit the template or the spec, not this file.
//   problem  decode, head dim 128, bf16, full mask, e4m3 caches, pages
//   tiling   16 query rows x 32 keys, 3 stages, 8 mma warps, 128-byte panels
//   launch   256 threads, 208944 bytes of dynamic shared memory
//   contents   27 Problem and tiling,  163 Threads,  194 Arithmetic,  272 Shared memory,  319 Global memory,
//             395 cp.async,  420 Fragments,  435 Registers,  450 mma,  479 What is visible,  533 Online softmax,
//             968 Loads, 1139 Matrix products, 1250 Putting together, 1662 Append, 1797 Widen, 1875 Kernel,
//            1919 Launch
//
// O = softmax(scale * Q K^T) V for a few queries of each sequence, over a cache of its keys. Reading K and V is what takes
// the time: the heads of a group are rows of one tile, so that they are read once, and all blocks read about as much (see
// the order of work). Every warp has tiles of 32 keys of its own, which cp.async brings into a ring of its own, from the
// first of its block's to the last: warps meet only where a part of an item ends, and the next one's keys are on their
// way then.

namespace fa2gen::fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8 {

using uint32_t = unsigned int;
using int64_t = long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 128;
constexpr int kTileM = 16;  // rows of an item: queries times heads of a group
constexpr int kTileN = 32;  // keys of a warp's tile
constexpr int kNumStages = 3;
constexpr int kNumWarps = 8;
constexpr int kNumThreads = 256;
constexpr int kNumRowTiles = 1;  // of 16 rows
constexpr int kElementBytes = 2;
constexpr int kCacheBytes = 1;  // of a number of K or V

// One thread's share of 16 rows, in registers.
constexpr int kNumAccS = 16;
constexpr int kNumAccO = 64;
constexpr int kNumP = 8;

constexpr int kStepsQk = 8;
constexpr int kStepsPv = 2;

// Shared memory: tiles are panels of 128 bytes a row, swizzled

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kPanelChunks = 8;  // of 16 bytes
constexpr int kNumPanels = 2;
constexpr int kStepsPerPanel = 4;
constexpr int kSwizzleShift = 0;  // 16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask)
constexpr int kSwizzleMask = 7;
constexpr int kKvPanelRowBytes = 64;  // of K and V, which have half the bytes of Q in as many columns
constexpr int kKvSwizzleShift = 1;
constexpr int kKvSwizzleMask = 3;
constexpr int kKvPanelChunks = 4;
constexpr int kChunkColumns = 16;  // of K or V
constexpr int kCopyRows = 8;  // that a warp copies at once
constexpr uint32_t kQPanelBytes = 2048;
constexpr uint32_t kKvPanelBytes = 2048;
constexpr uint32_t kKvBytes = 4096;
constexpr uint32_t kStageBytes = 8320;
constexpr int kRowQuads = 32;  // of four columns
constexpr int kTileRowChunks = 16;  // of 16 bytes
constexpr int kQueryChunks = 1;  // of Q's tile, that a thread copies
constexpr uint32_t kNoShare = 0xffffffffu;
constexpr int kLayoutEntries = 1024;

constexpr uint32_t kSmemQ = 0;
constexpr uint32_t kSmemStages = 4096;
constexpr uint32_t kSmemRowSums = 203776;
constexpr uint32_t kSmemShares = 204800;
constexpr uint32_t kSmemLayout = 204832;
constexpr uint32_t kSmemArrived = 208940;
constexpr uint32_t kStageEntries = 8192;

// The kernel's scalar arguments; the order is the launcher's (KernelPlan.params).
struct Params {
    void* q;
    void* k;
    void* v;
    void* o;
    void const* k_new;
    void const* v_new;
    void const* q_given;
    float* lse;
    int const* cache_seqlens;
    int const* cache_leftpad;
    int const* cache_batch_idx;
    void const* rotary_cos;
    void const* rotary_sin;
    int const* block_table;
    float const* k_descale;
    float const* v_descale;
    void* k_wide;
    void* v_wide;
    float* parts;
    float* part_sums;
    int* counters;
    int64_t q_batch_stride;
    int64_t q_row_stride;
    int64_t q_head_stride;
    int64_t k_batch_stride;
    int64_t k_row_stride;
    int64_t k_head_stride;
    int64_t v_batch_stride;
    int64_t v_row_stride;
    int64_t v_head_stride;
    int64_t o_batch_stride;
    int64_t o_row_stride;
    int64_t o_head_stride;
    int64_t k_new_batch_stride;
    int64_t k_new_row_stride;
    int64_t k_new_head_stride;
    int64_t v_new_batch_stride;
    int64_t v_new_row_stride;
    int64_t v_new_head_stride;
    int64_t q_given_batch_stride;
    int64_t q_given_row_stride;
    int64_t q_given_head_stride;
    int seqlen_q;
    int seqlen_k;
    int seqlen_new;
    int num_sequences;
    int cache_entries;
    int num_heads;
    int num_heads_kv;
    int num_heads_per_kv;
    int unit_shift;
    int least_units;
    int item_units;
    int item_runs;
    int fixed_parts;
    int entry_sequences;
    int num_entries;
    int num_runs;
    int run_reciprocal;
    int rows_at_once;
    int row_rounds;
    int round_reciprocal;
    int rotary_dim;
    int rotary_rows;
    int rotary_interleaved;
    int rotary_steps;
    int page_size;
    int page_reciprocal;
    int table_rows;
    int table_step;
    int k_scale_batch;
    int k_scale_head;
    int v_scale_batch;
    int v_scale_head;
    int seqlen_wide;
    int num_wide_blocks;
    float softmax_scale;
    float softmax_scale_log2;
    float inverse_group;
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

__device__ __forceinline__ int shfl_from(int value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ bool any_lane(bool holds) {
    return __any_sync(0xffffffffu, holds) != 0;
}

__device__ __forceinline__ void sync_warp() {
    __syncwarp();
}

__device__ __forceinline__ void sync_block() {
    __syncthreads();
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

// Two fp32 values rounded to fp16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The two bf16 numbers of one register, the lower half first.
__device__ __forceinline__ void unpack_bf16(float (&values)[2], uint32_t packed) {
    values[0] = __builtin_bit_cast(float, packed << 16);
    values[1] = __builtin_bit_cast(float, packed & 0xffff0000u);
}

// The two fp16 numbers of one register, the lower half first.
__device__ __forceinline__ void unpack_fp16(float (&values)[2], uint32_t packed) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(values[0]), "=f"(values[1]) : "r"(packed));
}

// Four of the eight bytes of `low` and `high`, as the digits of `selector` number them, the last one first; of a digit with 8
// added 8 times the byte's sign.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
}

// The four e4m3 numbers of a register as pairs in fp16, which holds them all.
__device__ __forceinline__ void unpack_e4m3(uint32_t (&pairs)[2], uint32_t packed) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; cvt.rn.f16x2.e4m3x2 %1, high; }"
        : "=r"(pairs[0]), "=r"(pairs[1]) : "r"(packed));
}

// Two fp32 values rounded to e4m3, at most 448 from 0, in the lower half of a register, `low` in its lower byte.
__device__ __forceinline__ uint32_t pack_e4m3(float low, float high) {
    uint32_t packed;
    asm("{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, %1, %2; cvt.u32.u16 %0, pair; }"
        : "=r"(packed) : "f"(high), "f"(low));
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

// 8 bytes; the address is a multiple of 8.
__device__ __forceinline__ void store_shared_int2(uint32_t address, int r0, int r1) {
    asm volatile("st.shared.v2.s32 [%0], {%1, %2};" :: "r"(address), "r"(r0), "r"(r1) : "memory");
}

// 8 bytes; the address is a multiple of 8.
__device__ __forceinline__ void store_shared_float2(uint32_t address, float r0, float r1) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(address), "f"(r0), "f"(r1) : "memory");
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load_shared_float4(float (&r)[4], uint32_t address) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3]) : "r"(address) : "memory");
}

// Global memory -------------------------------------------------------------------------------------------------------

// What another thread of the block, or an earlier kernel, has written.
__device__ __forceinline__ int load_global_int(int const* address) {
    int value;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// Asks for what lies there, which a load is to find in L1 later on.
__device__ __forceinline__ void prefetch_global(void const* address) {
    asm volatile("prefetch.global.L1 [%0];" :: "l"(address) : "memory");
}

__device__ __forceinline__ void store_global_float(float* address, float value) {
    *address = value;
}

// 16 bytes that no thread of the kernel writes; the address is a multiple of 16.
__device__ __forceinline__ void load_global_128(uint32_t (&r)[4], void const* address) {
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(address) : "memory");
}

// 8 bytes that no thread of the kernel writes; the address is a multiple of 8.
__device__ __forceinline__ void load_global_64(uint32_t (&r)[2], void const* address) {
    asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "l"(address) : "memory");
}

__device__ __forceinline__ float load_global_float(float const* address) {
    return *address;
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void store_global_128(void* address, uint32_t const (&r)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
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

// 8 bytes; the address is a multiple of 8.
__device__ __forceinline__ void load_global_float2(float (&r)[2], float const* address) {
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];"
                 : "=f"(r[0]), "=f"(r[1]) : "l"(address) : "memory");
}

// cp.async ------------------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, past L1; both addresses are multiples of 16. Reads the first `source_bytes` (0 or 16)
// of them and fills the rest with zeros: with 0 the source is not touched.
__device__ __forceinline__ void cp_async_16(uint32_t destination, void const* source, int source_bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(destination), "l"(source), "r"(source_bytes) : "memory");
}

// The same of 4 bytes, by way of L1; both addresses are multiples of 4.
__device__ __forceinline__ void cp_async_4(uint32_t destination, void const* source, int source_bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
                 :: "r"(destination), "l"(source), "r"(source_bytes) : "memory");
}

// Ends a group of this thread's copies; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most 2 of this thread's groups are still running; a block-wide barrier then publishes what they wrote.
__device__ __forceinline__ void cp_async_wait_2() {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
}

// Fragments -----------------------------------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 * (l % 4)
// and the next of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// As ldmatrix_x4, but each matrix is transposed: a lane gets rows 2 * (l % 4) and the next of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Registers -----------------------------------------------------------------------------------------------------------

// The same value, but nothing that derives from it is known from before: the compiler computes that again here instead of
// keeping it in registers, which the loop in between needs.
__device__ __forceinline__ uint32_t recompute(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Likewise, in two of them.
__device__ __forceinline__ int64_t keep_wide(int64_t value) {
    asm volatile("" : "+l"(value));
    return value;
}

// mma -----------------------------------------------------------------------------------------------------------------

// mma.sync: d[16 x 8] += a[16 x 16] b[16 x 8]. A lane holds, with g = lane / 4, t = lane % 4, two elements a register of a, b:
//   a  (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)     b  (k = 2t, n = g), (k = 2t + 8, n = g)
//   d  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
__device__ __forceinline__ void mma_m16n8k16(float* d, uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sequences: so many queries of each, over the keys in its cache. Row 0 of the sequence is row `first_k` of its place there.
struct Seqlen {
    int q;
    int k;
    int first_k;
};

// What the caller's numbers may say is kept within the cache. Keys that the call itself brings count.
__device__ __forceinline__ Seqlen seqlen_of(Params const& p, int bidb) {
    int end = p.seqlen_k;
    if (p.cache_seqlens != nullptr) {
        end = min(min(max(load_global_int(p.cache_seqlens + bidb), 0), p.seqlen_k) + p.seqlen_new, p.seqlen_k);
    }
    int const first = p.cache_leftpad == nullptr ? 0 : max(load_global_int(p.cache_leftpad + bidb), 0);
    return {p.seqlen_q, max(end - first, 0), min(first, end)};
}

// What is visible: full -----------------------------------------------------------------------------------------------

// Blocks [begin, end), of which [begin_full, end_full) need no mask.
struct BlockRange {
    int begin;
    int begin_full;
    int end_full;
    int end;
};

__device__ __forceinline__ int key_begin(Params const&, Seqlen const&, int) {
    return 0;
}

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

__device__ __forceinline__ void rescale_o(float (&acc_o)[kNumAccO], float const (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kNumAccO; i += 4) {
        acc_o[i] *= factor[0];
        acc_o[i + 1] *= factor[0];
        acc_o[i + 2] *= factor[1];
        acc_o[i + 3] *= factor[1];
    }
}

// Rounds probabilities to fp16. The accumulator layout of one product is the A layout of the next: no shuffles.
__device__ __forceinline__ void pack_p(uint32_t (&p)[kNumP], float const (&acc_s)[kNumAccS]) {
#pragma unroll
    for (int i = 0; i < kNumP; ++i) {
        p[i] = pack_fp16(acc_s[2 * i], acc_s[2 * i + 1]);
    }
}

// Tiles with one branch for what is rare. With a branch for each, that of the last tile keeps P V from beginning under
// the exponentials: 301 instructions from Q K^T to P V at d = 64 instead of 196 (sm_90).
constexpr int kSoftmaxTiles = kNumRowTiles;

// Whether a scaled maximum is large, or -inf. A quad's maximum is that of one of its threads.
__device__ __forceinline__ bool has_extreme(float const (&maxima)[kSoftmaxTiles][2], float softmax_scale_log2) {
    float largest = fmaxf(fabsf(maxima[0][0]), fabsf(maxima[0][1]));
#pragma unroll
    for (int i = 1; i < kSoftmaxTiles; ++i) {
        largest = fmaxf(largest, fmaxf(fabsf(maxima[i][0]), fabsf(maxima[i][1])));
    }
    return !(largest * softmax_scale_log2 <= kLargeOffset);
}

// The softmax of a block: P in place of S, and the `correction` that the output accumulated so far must be multiplied
// with. It is taken from the difference of the maxima, so that it is exactly 1 where the maximum stays: from their
// rounded products it would be off by 1e-7 in each block, always the same way. Each thread asks for its own maxima
// whether they are extreme, so that the answer comes while the quads make theirs.
__device__ __forceinline__ void online_softmax_tiles(
    float (&acc_s)[kNumRowTiles][kNumAccS], float (&row_max)[kNumRowTiles][2], float (&row_sum)[kNumRowTiles][2],
    float (&correction)[kNumRowTiles][2], float softmax_scale_log2, int first) {
    float maxima[kSoftmaxTiles][2];
    float offset[kSoftmaxTiles][2];
#pragma unroll
    for (int i = 0; i < kSoftmaxTiles; ++i) {
        int const tile = first + i;
        maxima[i][0] = thread_max(acc_s[tile], 0, row_max[tile][0]);
        maxima[i][1] = thread_max(acc_s[tile], 1, row_max[tile][1]);
    }
    bool const extreme = any_lane(has_extreme(maxima, softmax_scale_log2));
#pragma unroll
    for (int i = 0; i < kSoftmaxTiles; ++i) {
        int const tile = first + i;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float const new_max = quad_max(maxima[i][row]);
            offset[i][row] = new_max * softmax_scale_log2;
            correction[tile][row] = exp2_approx((row_max[tile][row] - new_max) * softmax_scale_log2);
            row_max[tile][row] = new_max;
        }
    }
    if (extreme) {
        // The maxima are taken off the scores themselves, which is exact near them. A row that has seen no key has
        // nothing to take off and nothing to correct: (-inf) - (-inf) would be NaN.
#pragma unroll
        for (int i = 0; i < kSoftmaxTiles; ++i) {
            int const tile = first + i;
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                bool const no_key = row_max[tile][row] == -kInfinity;
                float const base = no_key ? 0.0f : row_max[tile][row];
                correction[tile][row] = no_key ? 1.0f : correction[tile][row];
                offset[i][row] = 0.0f;
#pragma unroll
                for (int j = 2 * row; j < kNumAccS; j += 4) {
                    acc_s[tile][j] -= base;
                    acc_s[tile][j + 1] -= base;
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < kSoftmaxTiles; ++i) {
        int const tile = first + i;
        row_sum[tile][0] *= correction[tile][0];
        row_sum[tile][1] *= correction[tile][1];
        exponentiate(acc_s[tile], offset[i], row_sum[tile], softmax_scale_log2);
    }
}

// a / b, for which the host gives (2^31 - 1) / b: a fifth of the instructions of a division, which a short call waits for.
__device__ __forceinline__ int quotient(int a, int b, int reciprocal) {
    int const near = static_cast<int>(static_cast<int64_t>(a) * reciprocal >> 31);  // or 1 less
    return near + (a - near * b >= b);
}

// Order of work: all items lie one behind the other, in units of 2^p.unit_shift tiles of keys, and each block takes as long
// a run of units as the others. An item is one head of K and V of one sequence, with kTileM of its rows; one that several
// blocks share is in parts, which the last to finish puts together. Where there are more items than blocks, each has
// p.item_units behind its keys, for what its end takes (32 sequences of 200 to 32k keys: 239 us, 246 without, H100). They
// lie head by head, in each sequence by sequence; and if nearly all blocks are as many for each head, p.item_runs, none has
// keys of two heads, and those of all heads of a row are read at about the same time (1 x 64k: 104 us, 108 where items are
// cut anywhere; 16 x 8k: 191.5 us, 194.7 sequence by sequence; H100).
//
// With p.fixed_parts each unit is a part, wherever it is computed: what a sequence gives depends on nothing but itself and on
// the length of units.

// Of one head and kTileM rows of a sequence, its end with them; at least 1, as somebody must write what no key gives.
__device__ __forceinline__ int num_units(Params const& p, int bidb) {
    Seqlen const s = seqlen_of(p, bidb);
    BlockRange const tiles = key_blocks(p, s, 0, s.q);
    return max(((tiles.end - 1) >> p.unit_shift) + 1 - (tiles.begin >> p.unit_shift) + p.item_units, 1);
}

// Shared memory has where sequences begin, in units of one head and tile of rows, and where the last one ends, or the blocks
// that these have; beyond kLayoutEntries of them, p.entry_sequences share one entry. `Work` lies behind them.
constexpr int kWorkAt = kLayoutEntries + 1;

__device__ __forceinline__ int heads_and_tiles(Params const& p) {
    return p.num_heads_kv * p.row_rounds;
}

// Where a sequence has more than kTileM rows, p.rows_at_once blocks take the same run of units, for a tile of rows each: who
// comes first reads memory, the others L2 (16 queries of 4 heads, 16 x 8k: 379 us where all read memory, H100).
struct Run {
    int number;
    int row_tile;
};

__device__ __forceinline__ Run run_of_block(Params const& p) {
    int const block = static_cast<int>(blockIdx.x);
    int const row_tile = quotient(block, p.num_runs, p.run_reciprocal);
    return {block - row_tile * p.num_runs, row_tile};
}

// By one warp.
__device__ __forceinline__ void lay_out(Params const& p, uint32_t layout, int lane) {
    int before = 0;
#pragma unroll 1
    for (int first = 0; first < p.num_entries; first += 32) {
        int const entry = first + lane;
        int const bidb = entry * p.entry_sequences;
        int units = 0;
#pragma unroll 1
        for (int i = bidb; i < min(bidb + p.entry_sequences, p.num_sequences); ++i) {
            units += num_units(p, i);
        }
#pragma unroll 1
        for (int step = 1; step < min(p.num_entries, 32); step *= 2) {
            int const of_before = shfl_from(units, max(lane - step, 0));
            units += lane >= step ? of_before : 0;
        }
        int end = before + units;
        if (entry + 1 == p.num_entries) {
            int per_block = 0;
            if (p.item_runs > 0) {
                per_block = max((end + p.item_runs - 1) / p.item_runs, p.least_units);
                end = (end + per_block - 1) / per_block * per_block;
            } else {
                int const total = end * heads_and_tiles(p) + p.num_runs - 1;
                per_block = max(quotient(total, p.num_runs, p.run_reciprocal), p.least_units);
            }
            store_shared_int(layout + 4 * kWorkAt, end * heads_and_tiles(p));
            store_shared_int(layout + 4 * kWorkAt + 4, per_block);
        }
        store_shared_int(layout + 4 * (entry + 1), end);
        before += shfl_from(units, 31);
    }
    if (lane == 0) {
        store_shared_int(layout, 0);
    }
}

// The units of all items, and how many a block takes.
struct Work {
    int total;
    int per_block;
};

__device__ __forceinline__ Work work_of(uint32_t layout) {
    return {load_shared_int(layout + 4 * kWorkAt), load_shared_int(layout + 4 * kWorkAt + 4)};
}

// This block's first unit, and the end of them. Blocks that are left over have none.
__device__ __forceinline__ int begin_of_block(Params const& p, Work const& work) {
    Run const run = run_of_block(p);
    return run.row_tile < p.rows_at_once ? run.number * work.per_block : work.total;
}

__device__ __forceinline__ int end_of_block(Params const& p, Work const& work) {
    return min((run_of_block(p).number + 1) * work.per_block, work.total);
}

struct Item {
    int bidb;
    int head_kv;
    int m_block;
    int start;  // its units are [start, start + units)
    int units;
};

__device__ __forceinline__ Item item_at(Params const& p, uint32_t layout, int unit) {
    int const of_each = load_shared_int(layout + 4 * p.num_entries);
    int const index = unit / of_each;
    int const begin = index * of_each;
    int const within = unit - begin;
    int low = 0;
    int high = p.num_entries - 1;
    while (low < high) {
        int const middle = (low + high + 1) / 2;
        if (load_shared_int(layout + 4 * middle) <= within) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    int bidb = low * p.entry_sequences;
    int first = load_shared_int(layout + 4 * low);
    int units = load_shared_int(layout + 4 * low + 4) - first;
    if (p.entry_sequences > 1) {
        for (units = num_units(p, bidb); first + units <= within; units = num_units(p, bidb)) {
            first += units;
            ++bidb;
        }
    }
    int const head_kv = quotient(index, p.row_rounds, p.round_reciprocal);
    int const m_block = (index - head_kv * p.row_rounds) * p.rows_at_once + run_of_block(p).row_tile;
    return {bidb, head_kv, m_block, begin + first, units};
}

// A part of an item: units [begin, end).
struct Part {
    int begin;
    int end;
};

__device__ __forceinline__ Part part_at(Params const& p, Item const& item, Work const& work, int unit) {
    int const of_block = (run_of_block(p).number + 1) * work.per_block;
    return {unit, p.fixed_parts ? unit + 1 : min(item.start + item.units, of_block)};
}

// Which part that is: number `index` of `count`. Part 0 leaves what it has at `first_slot`, part i at slots + i: of a block
// the first part has one place, and that of an item that begins in it another, as many behind as there are blocks: of those
// only the last is cut. A counter has the number of `slots`.
struct Share {
    int index;
    int count;
    int first_slot;
    int slots;
};

__device__ __forceinline__ Share share_of(Params const& p, Item const& item, Part const& part, Work const& work) {
    Run const run = run_of_block(p);
    if (p.fixed_parts) {
        int const slots = run.row_tile * work.total + item.start;
        return {part.begin - item.start, item.units, slots, slots};
    }
    int const first_run = item.start / work.per_block;
    int const last_run = (item.start + item.units - 1) / work.per_block;
    int const slots = static_cast<int>(blockIdx.x) - (run.number - first_run);
    int const behind = item.start > first_run * work.per_block ? static_cast<int>(gridDim.x) : 0;
    return {run.number - first_run, last_run - first_run + 1, slots + behind, slots};
}

__device__ __forceinline__ int slot_of(Share const& share, int index) {
    return index == 0 ? share.first_slot : share.slots + index;
}

// Behind a stage of a warp's ring, by their byte offsets.
__device__ __forceinline__ uint32_t next_stage(uint32_t stage) {
    return stage == (kNumStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
}

// Where keys are: in pages of p.page_size rows, which the sequence's row of the table names. Entries behind the last page
// that it needs are not looked at, and what is no page's number leads to some page: its rows are hidden, or nobody's.
struct Keys {
    int const* table;
    int first_row;
};

__device__ __forceinline__ Keys keys_of(Params const& p, Seqlen const& s, int bidb) {
    int const asked = p.cache_batch_idx == nullptr ? bidb : load_global_int(p.cache_batch_idx + bidb);
    return {p.block_table + static_cast<int64_t>(min(max(asked, 0), p.table_rows - 1)) * p.table_step, s.first_k};
}

// The number of a key's page in its sequence.
__device__ __forceinline__ int page_number(Params const& p, int row) {
    return quotient(row, p.page_size, p.page_reciprocal);
}

// The table's entry of a key that there is.
__device__ __forceinline__ int const* entry_of_key(Params const& p, Keys const& keys, int key) {
    return keys.table + page_number(p, keys.first_row + key);
}

// Of the sequences' rows of the table a line a thread, so that they come into L2 while the lengths do that say which entries
// a block needs: its first keys then wait for memory once, not twice.
__device__ __forceinline__ void ask_tables(Params const& p, int thread) {
    constexpr int kLine = 32;  // entries
    int const row_entries = page_number(p, p.seqlen_k);
    int const row_lines = (row_entries + kLine - 1) / kLine;
    int const line = static_cast<int>(blockIdx.x) * (kNumThreads - 32) + thread;
    int const row = line / row_lines;
    if (row < p.num_sequences) {
        prefetch_global(p.block_table + static_cast<int64_t>(row) * p.table_step + kLine * (line - row * row_lines));
    }
}

// What the table has for each key of a tile lies behind the stage that the tile is loaded to, a key a lane. Memory answers in
// turn, behind the keys that were asked for before: so it is asked for as many tiles ahead as there are stages (128 x 4k in
// pages of 16, of dense: 1.01; 1.04 one tile ahead, H100).
__device__ __forceinline__ void ask_first_keys(
    Params const& p, Seqlen const& s, Keys const& keys, int tile, uint32_t stages, uint32_t stage, int lane) {
    int entries[kNumStages];
#pragma unroll
    for (int i = 0; i < kNumStages; ++i) {
        int const key = (tile + i * kNumWarps) * kTileN + lane % kTileN;
        entries[i] = key < s.k ? load_global_int(entry_of_key(p, keys, key)) : 0;
    }
#pragma unroll
    for (int i = 0; i < kNumStages; ++i) {
        store_shared_int(stages + stage + kStageEntries + 4 * lane, entries[i]);
        stage = next_stage(stage);
    }
}

__device__ __forceinline__ void ask_keys(
    Params const& p, Seqlen const& s, Keys const& keys, int tile, int end, uint32_t stage, int lane) {
    int const key = tile * kTileN + lane % kTileN;
    bool const exists = key < s.k;
    if (tile < end) {  // else the next part's are stored there
        cp_async_4(stage + kStageEntries + 4 * lane, entry_of_key(p, keys, exists ? key : 0), exists ? 4 : 0);
    }
}

// Where a row is in the caches, in elements.
struct Offsets {
    int64_t k;
    int64_t v;
};

// Of this lane's key: key lane % kTileN of the tile.
using TileKeys = Offsets;

__device__ __forceinline__ TileKeys tile_keys(Params const& p, Keys const& keys, int tile, uint32_t stage, int lane) {
    int const entry = load_shared_int(stage + kStageEntries + 4 * lane);
    int64_t const page = min(max(entry, 0), p.cache_entries - 1);
    int const key = keys.first_row + tile * kTileN + lane % kTileN;
    int64_t const row = key - page_number(p, key) * p.page_size;
    return {page * p.k_batch_stride + row * p.k_row_stride, page * p.v_batch_stride + row * p.v_row_stride};
}

// Of the rows of a tile that a lane copies, as each is in another lane's mind.
struct LaneRows {
    TileKeys tile;
    int lane_row;
};

__device__ __forceinline__ LaneRows rows_of_lane(Params const&, Keys const&, TileKeys const& tile, int lane_row) {
    return {tile, lane_row};
}

__device__ __forceinline__ int64_t wide_from(int64_t value, int lane) {
    int const low = shfl_from(static_cast<int>(value), lane);
    int const high = shfl_from(static_cast<int>(value >> 32), lane);
    return static_cast<int64_t>(high) << 32 | static_cast<uint32_t>(low);
}

__device__ __forceinline__ Offsets offsets_of(Params const&, LaneRows const& rows, int first) {
    int const lane = first + rows.lane_row;
    return {wide_from(rows.tile.k, lane), wide_from(rows.tile.v, lane)};
}

struct Place {
    int entry;
    int row;
};

__device__ __forceinline__ Place place_of_row(Params const& p, int bidb, int row) {
    int const asked = p.cache_batch_idx == nullptr ? bidb : load_global_int(p.cache_batch_idx + bidb);
    if (asked < 0 || asked >= p.table_rows) {
        return {-1, row};
    }
    int const number = row / p.page_size;
    int const page = load_global_int(p.block_table + static_cast<int64_t>(asked) * p.table_step + number);
    return {page < p.cache_entries ? page : -1, row - number * p.page_size};
}

__device__ __forceinline__ int row_swizzle(int row) {
    return (row >> kSwizzleShift) & kSwizzleMask;
}

// Loads ---------------------------------------------------------------------------------------------------------------

// What numbers of K and of V of a head are to be multiplied with.
__device__ __forceinline__ float k_scale(Params const& p, int bidb, int head_kv) {
    return p.k_descale == nullptr ? 1.0f : load_global_float(p.k_descale + bidb * p.k_scale_batch + head_kv * p.k_scale_head);
}

__device__ __forceinline__ float v_scale(Params const& p, int bidb, int head_kv) {
    return p.v_descale == nullptr ? 1.0f : load_global_float(p.v_descale + bidb * p.v_scale_batch + head_kv * p.v_scale_head);
}

// A pair of Q in fp16. What that does not hold becomes NaN, so that it shows.
__device__ __forceinline__ int as_fp16(uint32_t pair) {
    constexpr float kLargest = 65504.0f;
    float x[2];
    unpack_bf16(x, pair);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        x[i] = fabsf(x[i]) <= kLargest ? x[i] : __builtin_bit_cast(float, 0x7fffffffu);
    }
    return static_cast<int>(pack_fp16(x[0], x[1]));
}

// The chunk's place in a tile of panels.
__device__ __forceinline__ uint32_t chunk_offset(int row, int panel, int chunk, uint32_t panel_bytes) {
    return static_cast<uint32_t>(row * kPanelRowBytes + ((chunk ^ row_swizzle(row)) << 4)) + panel * panel_bytes;
}

// And of K or V.
__device__ __forceinline__ uint32_t kv_chunk_offset(int row, int panel, int chunk) {
    int const turned = chunk ^ ((row >> kKvSwizzleShift) & kKvSwizzleMask);
    return static_cast<uint32_t>(row * kKvPanelRowBytes + (turned << 4)) + panel * kKvPanelBytes;
}

// Row r of an item: query r / num_heads_per_kv of the sequence, by head r % num_heads_per_kv of the group.
struct Row {
    int query;
    int head;
    bool exists;
};

__device__ __forceinline__ Row row_at(Params const& p, Item const& item, int row) {
    int const r = item.m_block * kTileM + row;
    int const query = static_cast<int>((static_cast<float>(r) + 0.5f) * p.inverse_group);  // r / num_heads_per_kv, below 2^22
    return {query, item.head_kv * p.num_heads_per_kv + r - query * p.num_heads_per_kv, query < p.seqlen_q};
}

// Q of an item, by all threads: asked for, and then put into shared memory in fp16, the pairs of 16 columns as those of K
// come: a register of four keeps its numbers together, where two products of pairs take the first ones and the last ones.
struct QueryChunks {
    uint32_t words[kQueryChunks][4];

    __device__ __forceinline__ void ask(Params const& p, Item const& item, int thread) {
        unsigned char const* const q = static_cast<unsigned char const*>(p.q);
#pragma unroll
        for (int i = 0; i < kQueryChunks; ++i) {
            int const number = thread + i * kNumThreads;
            int const column = 8 * (number % kTileRowChunks);
            Row const row = row_at(p, item, number / kTileRowChunks);
            int64_t const at = item.bidb * p.q_batch_stride + row.query * p.q_row_stride + row.head * p.q_head_stride + column;
            words[i][0] = words[i][1] = words[i][2] = words[i][3] = 0;
            if (row.exists && column < kHeadDim && number < kTileM * kTileRowChunks) {
                load_global_128(words[i], q + kElementBytes * at);
            }
        }
    }

    __device__ __forceinline__ void store(uint32_t smem, int thread) {
#pragma unroll
        for (int i = 0; i < kQueryChunks; ++i) {
            int const number = thread + i * kNumThreads;
            int const chunk = number % kTileRowChunks;
            int const row = number / kTileRowChunks;
            int const of_panel = chunk % kPanelChunks / 2 * 2;
            uint32_t const first = chunk_offset(row, chunk / kPanelChunks, of_panel, kQPanelBytes);
            uint32_t const second = chunk_offset(row, chunk / kPanelChunks, of_panel + 1, kQPanelBytes);
            if (number < kTileM * kTileRowChunks) {
                uint32_t const half = chunk % 2 * 8;
                store_shared_int2(smem + kSmemQ + first + half, as_fp16(words[i][0]), as_fp16(words[i][2]));
                store_shared_int2(smem + kSmemQ + second + half, as_fp16(words[i][1]), as_fp16(words[i][3]));
            }
        }
    }
};

// The tiles of a part of an item, as far as a row of the item sees one of their keys; behind end_full, and before begin_full,
// not every row sees every key.
__device__ __forceinline__ BlockRange tiles_of_part(Params const& p, Seqlen const& s, Item const& item, Part const& part) {
    int const first_query = row_at(p, item, 0).query;
    int const num_queries = min(row_at(p, item, kTileM - 1).query + 1, s.q) - first_query;
    BlockRange tiles = key_blocks(p, s, first_query, num_queries);
    int const first_unit = (key_blocks(p, s, 0, s.q).begin >> p.unit_shift) - item.start;
    tiles.begin = max((first_unit + part.begin) << p.unit_shift, tiles.begin);
    tiles.end = min((first_unit + part.end) << p.unit_shift, tiles.end);
    return tiles;
}

// The first of a warp's tiles from `begin` on: tile n is warp n % kNumWarps's, whatever the part.
__device__ __forceinline__ int first_of_warp(int begin, int warp) {
    return begin + (warp + kNumWarps - begin % kNumWarps) % kNumWarps;
}

// A warp's own tiles of K and V, in a ring of kNumStages stages, in the order of its block's work: while one part ends the
// tiles of the next are on their way. No other warp has a part in it.
struct WarpTiles {
    uint32_t stages;  // address of stage 0
    uint32_t stage;   // byte offset of the stage in turn
    int missing;      // so many stages, that one first, are to be loaded
    int unit;         // the block's first unit behind the part that is being loaded
    int next;         // the part's tile to load next, and the end of the part's tiles
    int end;
    Seqlen s;
    Keys keys;
    int head_kv;
    int begin_key;

    __device__ __forceinline__ void take(
        Params const& p, Seqlen const& of_item, Item const& item, Part const& part, BlockRange const& tiles, int warp,
        int lane) {
        s = of_item;
        keys = keys_of(p, s, item.bidb);
        unit = part.end;
        next = first_of_warp(tiles.begin, warp);
        end = tiles.end;
        ask_first_keys(p, s, keys, next, stages, stage, lane);
        head_kv = item.head_kv;
        begin_key = key_begin(p, s, row_at(p, item, 0).query);
    }

    // Loads the next tile into the stage in turn, if there is one; its group is committed. What is asked of all lanes is
    // the same in each: where ptxas does not see that, it calls a function for shuffles (sm_80).
    __device__ __forceinline__ void load(Params const& p, uint32_t layout, int warp, int lane) {
        while (any_lane(next >= end && unit < end_of_block(p, work_of(layout)))) {
            Work const work = work_of(layout);
            Item const item = item_at(p, layout, unit);
            Part const part = part_at(p, item, work, unit);
            Seqlen const of_item = seqlen_of(p, item.bidb);
            take(p, of_item, item, part, tiles_of_part(p, of_item, item, part), warp, lane);
            sync_warp();
        }
        int const lane_row = lane / kKvPanelChunks;
        int const chunk = lane % kKvPanelChunks;
        if (any_lane(next < end)) {
            LaneRows const rows = rows_of_lane(p, keys, tile_keys(p, keys, next, stages + stage, lane), lane_row);
            unsigned char const* const k_head =
                static_cast<unsigned char const*>(p.k) + kCacheBytes * (head_kv * p.k_head_stride + kChunkColumns * chunk);
            unsigned char const* const v_head =
                static_cast<unsigned char const*>(p.v) + kCacheBytes * (head_kv * p.v_head_stride + kChunkColumns * chunk);
#pragma unroll
            for (int first = 0; first < kTileN; first += kCopyRows) {
                int const row = first + lane_row;
                int const key = next * kTileN + row;
                Offsets const at = offsets_of(p, rows, first);
                int const bytes = key >= begin_key && key < s.k ? 16 : 0;
#pragma unroll
                for (int panel = 0; panel < kNumPanels; ++panel) {
                    uint32_t const to = stages + stage + kv_chunk_offset(row, panel, chunk);
                    int const of_head = panel * kPanelColumns + kChunkColumns * chunk < kHeadDim ? bytes : 0;
                    int const of_panel = panel * kPanelColumns * kCacheBytes;
                    cp_async_16(to, k_head + kCacheBytes * at.k + of_panel, of_head);
                    cp_async_16(to + kKvBytes, v_head + kCacheBytes * at.v + of_panel, of_head);
                }
            }
            ask_keys(p, s, keys, next + kNumStages * kNumWarps, end, stages + stage, lane);
        }
        cp_async_commit();
        next += kNumWarps;
        stage = next_stage(stage);
    }
};

// Matrix products -----------------------------------------------------------------------------------------------------

// This lane's address in a 16 x 16 tile as the A operand, or as B stored [k][n]: matrices (0, 0), (8, 0), (0, 8), (8, 8)
// of (row, column).
__device__ __forceinline__ uint32_t lane_offset_row_major(int lane) {
    int const row = lane % 16;
    return static_cast<uint32_t>(row * kPanelRowBytes + ((lane / 16 ^ row_swizzle(row)) << 4));
}

// The same lane's address `step` * 16 columns further on.
__device__ __forceinline__ uint32_t column_step(uint32_t lane_address, int step, uint32_t panel_bytes) {
    return (lane_address ^ static_cast<uint32_t>(step % kStepsPerPanel * 32)) + step / kStepsPerPanel * panel_bytes;
}

__device__ __forceinline__ void load_q_fragments(uint32_t (&q)[kStepsQk][kNumRowTiles][4], uint32_t q_lane) {
#pragma unroll
    for (int step = 0; step < kStepsQk; ++step) {
#pragma unroll
        for (int tile = 0; tile < kNumRowTiles; ++tile) {
            ldmatrix_x4(q[step][tile], column_step(q_lane, step, kQPanelBytes) + tile * 16 * kPanelRowBytes);
        }
    }
}

// A lane's address in the first 32 columns of 16 keys: matrices of 8 keys and 16 columns, by keys first, as V is read, and by
// columns first, as K is.
__device__ __forceinline__ uint32_t kv_lane_offset_row_major(int lane) {
    return kv_chunk_offset(lane % 16, 0, lane / 16);
}

__device__ __forceinline__ uint32_t kv_lane_offset_column_major(int lane) {
    return kv_chunk_offset(lane % 8 + lane / 16 * 8, 0, lane / 8 % 2);
}

// The same lane's address `step` * 32 columns further on.
__device__ __forceinline__ uint32_t kv_column_step(uint32_t lane_address, int step) {
    constexpr int kStepsOfPanel = kPanelColumns / 32;
    return (lane_address ^ static_cast<uint32_t>(step % kStepsOfPanel * 32)) + step / kStepsOfPanel * kKvPanelBytes;
}

// The four numbers of a register as pairs in fp16.
__device__ __forceinline__ void widened(uint32_t (&pairs)[2], uint32_t packed) {
    unpack_e4m3(pairs, packed);
}

// S = Q K^T: two steps of 16 columns of the head dim after the other.
__device__ __forceinline__ void gemm_qk(
    float (&acc_s)[kNumRowTiles][kNumAccS], uint32_t const (&q_fragments)[kStepsQk][kNumRowTiles][4], uint32_t k_lane) {
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumAccS; ++i) {
            acc_s[tile][i] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < kStepsQk; step += 2) {
#pragma unroll
        for (int i = 0; i < kNumAccS; i += 8) {  // 16 keys
            uint32_t keys[4];
            ldmatrix_x4(keys, kv_column_step(k_lane, step / 2) + i * 2 * kKvPanelRowBytes);
#pragma unroll
            for (int half = 0; half < min(kStepsQk - step, 2); ++half) {
                uint32_t const (&q)[kNumRowTiles][4] = q_fragments[step + half];
                uint32_t first[2];
                uint32_t second[2];
                widened(first, keys[half]);
                widened(second, keys[2 + half]);
#pragma unroll
                for (int tile = 0; tile < kNumRowTiles; ++tile) {
                    mma_m16n8k16(acc_s[tile] + i, q[tile], first[0], first[1]);
                    mma_m16n8k16(acc_s[tile] + i + 4, q[tile], second[0], second[1]);
                }
            }
        }
    }
}

// O += P V: one step of 16 keys after the other. Of 16 columns the even ones are one product, the odd ones another.
__device__ __forceinline__ void gemm_pv(
    float (&acc_o)[kNumRowTiles][kNumAccO], uint32_t const (&p_tile)[kNumRowTiles][kNumP], uint32_t v_lane) {
#pragma unroll
    for (int step = 0; step < kStepsPv; ++step) {
        uint32_t p[kNumRowTiles][4];
#pragma unroll
        for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[tile][i] = p_tile[tile][4 * step + i];
            }
        }
#pragma unroll
        for (int i = 0; i < kNumAccO; i += 16) {  // 32 columns
            uint32_t v[4];
            ldmatrix_x4_trans(v, kv_column_step(v_lane, i / 16) + step * 16 * kKvPanelRowBytes);
#pragma unroll
            for (int half = 0; half < min((kNumAccO - i) / 8, 2); ++half) {
                uint32_t even[2];
                uint32_t odd[2];
                widened(even, permute_bytes(v[2 * half], v[2 * half + 1], 0x6420u));
                widened(odd, permute_bytes(v[2 * half], v[2 * half + 1], 0x7531u));
#pragma unroll
                for (int tile = 0; tile < kNumRowTiles; ++tile) {
                    mma_m16n8k16(acc_o[tile] + i + 8 * half, p[tile], even[0], even[1]);
                    mma_m16n8k16(acc_o[tile] + i + 8 * half + 4, p[tile], odd[0], odd[1]);
                }
            }
        }
    }
}

// Putting together ----------------------------------------------------------------------------------------------------

// What the keys that were seen so far give for a row: the greatest score, and the sum of exp(scale * (score - max)).
struct RowSum {
    float max;
    float sum;
};

// The weight of sums that were taken from `max`, where they are taken from `of_all`.
__device__ __forceinline__ float weight_of(float max, float of_all, float factor) {
    return max == -kInfinity ? 0.0f : exp2_approx((max - of_all) * factor);
}

// Leaves each warp's sums of its rows in shared memory, and where its share of O will be: in its stage that is free, if it had
// a tile at all.
__device__ __forceinline__ void leave_sums(
    float const (&row_max)[kNumRowTiles][2], float const (&row_sum)[kNumRowTiles][2], uint32_t smem, uint32_t share, int warp,
    int lane) {
    if (lane == 0) {
        store_shared_int(smem + kSmemShares + 4 * warp, static_cast<int>(share));
    }
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float const sum = quad_sum(row_sum[i][half]);
            if (lane % 4 == 0) {
                int const row = 16 * i + 8 * half + lane / 4;
                store_shared_float2(smem + kSmemRowSums + 8 * (warp * kTileM + row), row_max[i][half], sum);
            }
        }
    }
}

// Where four columns of a row are in a share: rows begin in other banks, as they lie one behind the other.
__device__ __forceinline__ uint32_t quad_offset(int row, int quad) {
    int const turned = quad + 2 * (row % 8) % kRowQuads;
    return static_cast<uint32_t>(16 * (row * kRowQuads + (turned < kRowQuads ? turned : turned - kRowQuads)));
}

// Leaves 16 rows of a warp's share of O, taken from the warp's own greatest scores.
__device__ __forceinline__ void leave_share(float const (&acc_o)[kNumAccO], uint32_t share, int lane) {
    int const row = lane / 4;
#pragma unroll
    for (int j = 0; j < kNumAccO; j += 8) {  // 16 columns, the even ones and the odd ones
        uint32_t const to = share + quad_offset(row, j / 2 + lane % 4);
        store_shared_float4(to, acc_o[j], acc_o[j + 4], acc_o[j + 1], acc_o[j + 5]);
        store_shared_float4(to + 8 * 16 * kRowQuads, acc_o[j + 2], acc_o[j + 6], acc_o[j + 3], acc_o[j + 7]);
    }
}

// A row of all warps' shares: its sum, and four columns of O, not divided by it.
__device__ __forceinline__ RowSum merged_row(uint32_t smem, int row, int quad, float factor, float (&o)[4]) {
    RowSum of[kNumWarps];
    RowSum all = {-kInfinity, 0.0f};
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) {
        float found[2];
        load_shared_float2(found, smem + kSmemRowSums + 8 * (warp * kTileM + row));
        of[warp] = {found[0], found[1]};
        all.max = fmaxf(all.max, found[0]);
    }
    o[0] = o[1] = o[2] = o[3] = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) {
        float const weight = weight_of(of[warp].max, all.max, factor);
        all.sum = fmaf(of[warp].sum, weight, all.sum);
        uint32_t const share = static_cast<uint32_t>(load_shared_int(smem + kSmemShares + 4 * warp));
        float columns[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (share != kNoShare) {
            load_shared_float4(columns, share + quad_offset(row % 16, quad));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            o[i] = fmaf(columns[i], weight, o[i]);
        }
    }
    return all;
}

// Groups of four columns of the item's rows, those that exist.
__device__ __forceinline__ int num_quads(Params const& p, Item const& item) {
    return min(p.seqlen_q * p.num_heads_per_kv - item.m_block * kTileM, kTileM) * kRowQuads;
}

// The end of row `number` of the item: four columns of O, and LSE with the first of them. A row that saw no key gives 0 and
// -inf.
__device__ __forceinline__ void store_row(
    Params const& p, Item const& item, int number, RowSum all, float (&o)[4], int column, float factor) {
    Row const row = row_at(p, item, number);
    float const inverse = all.sum == 0.0f ? 0.0f : reciprocal_approx(all.sum) * v_scale(p, item.bidb, item.head_kv);
    int64_t const at = item.bidb * p.o_batch_stride + row.query * p.o_row_stride + row.head * p.o_head_stride + column;
    store_global_64(static_cast<unsigned char*>(p.o) + kElementBytes * at,
                    pack_bf16(o[0] * inverse, o[1] * inverse), pack_bf16(o[2] * inverse, o[3] * inverse));
    if (column == 0) {
        float const log_sum = log2_approx(all.sum) * kLn2;
        float const scale = p.softmax_scale * k_scale(p, item.bidb, item.head_kv);
        float const lse = all.sum == 0.0f ? -kInfinity : fmaf(all.max, scale, log_sum);
        int64_t const of_head = (static_cast<int64_t>(item.bidb) * p.num_heads + row.head) * p.seqlen_q;
        store_global_float(p.lse + of_head + row.query, lse);
    }
}

// Where a group of four columns of a part is in the memory of parts, and a row's sum.
constexpr int kNumberBytes = 4;
constexpr int kColumnsOfPart = kTileM * kHeadDim;
constexpr int kSumsOfPart = 2 * kTileM;

__device__ __forceinline__ float* part_o(Params const& p, int slot, int quad) {
    return p.parts + static_cast<int64_t>(slot) * kColumnsOfPart + 4 * quad;
}

__device__ __forceinline__ float* part_sum(Params const& p, int slot, int row) {
    return p.part_sums + static_cast<int64_t>(slot) * kSumsOfPart + 2 * row;
}

// What all parts of an item have, in the order of its keys, whoever comes last. Memory answers late, so that a thread asks for
// four columns of kParts parts at once (1 x 8k: 24.2 us, 25.5 with two such groups of 8 parts, H100), and where there are few
// parts, of kQuads groups of columns (16 x 8k, 32 heads over 2: 57 us, 62 without, H100).
constexpr int kFewParts = 4;

__device__ __forceinline__ void combine_many_parts(
    Params const& p, Item const& item, Share const& share, float factor, int thread) {
    constexpr int kQuads = 1;
    constexpr int kParts = 16;
    int const end = num_quads(p, item);
#pragma unroll 1
    for (int begin = thread; begin < end; begin += kQuads * kNumThreads) {
        RowSum all[kQuads];
        float o[kQuads][4];
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            all[q] = {-kInfinity, 0.0f};
            o[q][0] = o[q][1] = o[q][2] = o[q][3] = 0.0f;
        }
#pragma unroll 1
        for (int first = 0; first < share.count; first += kParts) {
            int const last = share.count - 1 - first;  // behind it that part is there again, and weighs nothing
            float sums[kQuads][kParts][2];
            float shares[kQuads][kParts][4];
#pragma unroll
            for (int q = 0; q < kQuads; ++q) {
                int const quad = q == 0 ? begin : min(begin + q * kNumThreads, end - 1);
                int const row = quad / kRowQuads;
                // Bytes from here on: one instruction an address.
                int64_t const sum = keep_wide(reinterpret_cast<int64_t>(part_sum(p, share.slots + first, row)));
                int64_t const columns = keep_wide(reinterpret_cast<int64_t>(part_o(p, share.slots + first, quad)));
                load_global_float2(sums[q][0], part_sum(p, slot_of(share, first), row));
                load_global_float4(shares[q][0], part_o(p, slot_of(share, first), quad));
#pragma unroll
                for (int i = 1; i < kParts; ++i) {
                    int64_t const from = min(i, last);
                    load_global_float2(sums[q][i], reinterpret_cast<float const*>(sum + from * (kNumberBytes * kSumsOfPart)));
                    load_global_float4(
                        shares[q][i], reinterpret_cast<float const*>(columns + from * (kNumberBytes * kColumnsOfPart)));
                }
            }
#pragma unroll
            for (int q = 0; q < kQuads; ++q) {
                float max = all[q].max;
#pragma unroll
                for (int i = 0; i < kParts; ++i) {
                    max = fmaxf(max, sums[q][i][0]);
                }
                float const of_before = weight_of(all[q].max, max, factor);
                all[q] = {max, all[q].sum * of_before};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    o[q][c] *= of_before;
                }
#pragma unroll
                for (int i = 0; i < kParts; ++i) {
                    float const weight = weight_of(i <= last ? sums[q][i][0] : -kInfinity, max, factor);
                    all[q].sum = fmaf(sums[q][i][1], weight, all[q].sum);
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        o[q][c] = fmaf(shares[q][i][c], weight, o[q][c]);
                    }
                }
            }
        }
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            int const quad = begin + q * kNumThreads;
            if (q == 0 || quad < end) {
                store_row(p, item, quad / kRowQuads, all[q], o[q], quad % kRowQuads * 4, factor);
            }
        }
    }
}

__device__ __forceinline__ void combine_few_parts(
    Params const& p, Item const& item, Share const& share, float factor, int thread) {
    constexpr int kQuads = 16 / kFewParts;
    constexpr int kParts = kFewParts;
    int const end = num_quads(p, item);
#pragma unroll 1
    for (int begin = thread; begin < end; begin += kQuads * kNumThreads) {
        RowSum all[kQuads];
        float o[kQuads][4];
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            all[q] = {-kInfinity, 0.0f};
            o[q][0] = o[q][1] = o[q][2] = o[q][3] = 0.0f;
        }
#pragma unroll 1
        for (int first = 0; first < share.count; first += kParts) {
            int const last = share.count - 1 - first;  // behind it that part is there again, and weighs nothing
            float sums[kQuads][kParts][2];
            float shares[kQuads][kParts][4];
#pragma unroll
            for (int q = 0; q < kQuads; ++q) {
                int const quad = q == 0 ? begin : min(begin + q * kNumThreads, end - 1);
                int const row = quad / kRowQuads;
                // Bytes from here on: one instruction an address.
                int64_t const sum = keep_wide(reinterpret_cast<int64_t>(part_sum(p, share.slots + first, row)));
                int64_t const columns = keep_wide(reinterpret_cast<int64_t>(part_o(p, share.slots + first, quad)));
                load_global_float2(sums[q][0], part_sum(p, slot_of(share, first), row));
                load_global_float4(shares[q][0], part_o(p, slot_of(share, first), quad));
#pragma unroll
                for (int i = 1; i < kParts; ++i) {
                    int64_t const from = min(i, last);
                    load_global_float2(sums[q][i], reinterpret_cast<float const*>(sum + from * (kNumberBytes * kSumsOfPart)));
                    load_global_float4(
                        shares[q][i], reinterpret_cast<float const*>(columns + from * (kNumberBytes * kColumnsOfPart)));
                }
            }
#pragma unroll
            for (int q = 0; q < kQuads; ++q) {
                float max = all[q].max;
#pragma unroll
                for (int i = 0; i < kParts; ++i) {
                    max = fmaxf(max, sums[q][i][0]);
                }
                float const of_before = weight_of(all[q].max, max, factor);
                all[q] = {max, all[q].sum * of_before};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    o[q][c] *= of_before;
                }
#pragma unroll
                for (int i = 0; i < kParts; ++i) {
                    float const weight = weight_of(i <= last ? sums[q][i][0] : -kInfinity, max, factor);
                    all[q].sum = fmaf(sums[q][i][1], weight, all[q].sum);
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        o[q][c] = fmaf(shares[q][i][c], weight, o[q][c]);
                    }
                }
            }
        }
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
            int const quad = begin + q * kNumThreads;
            if (q == 0 || quad < end) {
                store_row(p, item, quad / kRowQuads, all[q], o[q], quad % kRowQuads * 4, factor);
            }
        }
    }
}

// Of the end of a part, 16 rows that merged_row gives: those of the item where it is the only one, else the part's.
__device__ __forceinline__ void finish_rows(
    Params const& p, Item const& item, Share const& share, int first_row, float factor, uint32_t smem, int thread) {
    int const slot = slot_of(share, share.index);
    int const end = min(num_quads(p, item), (first_row + 16) * kRowQuads);
#pragma unroll 1
    for (int quad = first_row * kRowQuads + thread; quad < end; quad += kNumThreads) {
        int const row = quad / kRowQuads;
        int const of_row = quad % kRowQuads;
        float o[4];
        RowSum const all = merged_row(smem, row, of_row, factor, o);
        if (share.count == 1) {
            store_row(p, item, row, all, o, 4 * of_row, factor);
        } else {
            store_global_float4(part_o(p, slot, quad), o[0], o[1], o[2], o[3]);
            if (of_row == 0) {
                store_global_float2(part_sum(p, slot, row), all.max, all.sum);
            }
        }
    }
}

// The end of a part: all warps' shares together, and the item's rows if it is the last of its parts to come.
__device__ __forceinline__ void finish_part(
    Params const& p, Item const& item, Share const& share, float const (&acc_o)[kNumRowTiles][kNumAccO],
    float const (&row_max)[kNumRowTiles][2], float const (&row_sum)[kNumRowTiles][2], float factor, uint32_t smem,
    uint32_t stage, int thread) {
    int const lane = lane_id();
    leave_sums(row_max, row_sum, smem, stage, warp_id(), lane);
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
        if (stage != kNoShare) {
            leave_share(acc_o[i], stage, lane);
        }
        sync_block();
        finish_rows(p, item, share, 16 * i, factor, smem, thread);
        sync_block();  // the rows are stored, and shared memory free
    }
    if (share.count > 1) {
        if (thread == 0) {
            int const before = arrive_global(p.counters + share.slots, share.count - 1);
            store_shared_int(smem + kSmemArrived, before);
        }
        sync_block();
        if (load_shared_int(smem + kSmemArrived) == share.count - 1) {
            if (share.count <= kFewParts && num_quads(p, item) > kNumThreads) {
                combine_few_parts(p, item, share, factor, thread);
            } else {
                combine_many_parts(p, item, share, factor, thread);
            }
        }
    }
}

// A tile in which not every row sees every key.
__device__ __forceinline__ void mask_scores(
    Params const& p, Seqlen const& s, float (&acc_s)[kNumRowTiles][kNumAccS], Item const& item, int first_key, int lane) {
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
        int const first = row_at(p, item, 16 * i + lane / 4).query;
        int const second = row_at(p, item, 16 * i + lane / 4 + 8).query;
        int const ends[2] = {key_end(p, s, first), key_end(p, s, second)};
        apply_mask(acc_s[i], ends, first_key);
    }
}

// Times this a score is an exponent of 2.
__device__ __forceinline__ float exponent_factor(Params const& p, Seqlen const&, Item const& item) {
    return p.softmax_scale_log2 * k_scale(p, item.bidb, item.head_kv);
}

// What a warp has of a part's rows; `stage` is the address of the last of its stages, if it had a tile.
struct Rows {
    float acc_o[kNumRowTiles][kNumAccO];
    float max[kNumRowTiles][2];
    float sum[kNumRowTiles][2];
    float factor;  // times which a score is an exponent of 2
    uint32_t stage;
    Share share;
};

// The keys of one part of an item.
__device__ __forceinline__ void attend(
    Params const& p, Item const& item, Part const& part, QueryChunks& queries, WarpTiles& ring, Rows& of_part, uint32_t smem,
    int thread) {
    int const lane = lane_id();
    int const warp = warp_id();
    Seqlen const s = seqlen_of(p, item.bidb);
    BlockRange const tiles = tiles_of_part(p, s, item, part);
    float const factor = exponent_factor(p, s, item);
    if (ring.missing == kNumStages) {
        ring.take(p, s, item, part, tiles, warp, lane);
    }

    float acc_s[kNumRowTiles][kNumAccS];
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
        of_part.max[i][0] = of_part.max[i][1] = -kInfinity;
        of_part.sum[i][0] = of_part.sum[i][1] = 0.0f;
#pragma unroll
        for (int j = 0; j < kNumAccO; ++j) {
            of_part.acc_o[i][j] = 0.0f;
        }
    }
    of_part.factor = factor;
    of_part.stage = kNoShare;

    uint32_t const k_lane = kv_lane_offset_column_major(lane);
    uint32_t const v_lane = kv_lane_offset_row_major(lane);
    uint32_t q_operand[kStepsQk][kNumRowTiles][4];
    bool has_q = false;
    int tile = first_of_warp(tiles.begin, warp);
    sync_block();  // so that ptxas knows warps to be together: see WarpTiles
    while (any_lane(!has_q || tile < tiles.end)) {
        sync_warp();  // all lanes are done with the stage
#pragma unroll 1
        for (; ring.missing > 0; --ring.missing) {  // Q is asked for before all of them, as memory answers in turn
            ring.load(p, smem + kSmemLayout, warp, lane);
        }
        if (!has_q) {
            has_q = true;
            queries.store(smem, thread);
            of_part.share = share_of(p, item, part, work_of(smem + kSmemLayout));  // the keys are on their way
            sync_block();
            load_q_fragments(q_operand, smem + kSmemQ + lane_offset_row_major(lane));
            if (tile >= tiles.end) {
                break;
            }
        }
        cp_async_wait_2();
        sync_warp();
        uint32_t const stage = ring.stages + ring.stage;
        of_part.stage = stage;
        gemm_qk(acc_s, q_operand, stage + recompute(k_lane));
        if (tile >= tiles.end_full) {
            mask_scores(p, s, acc_s, item, tile * kTileN, lane);
        }
        float correction[kNumRowTiles][2];
        uint32_t p_tile[kNumRowTiles][kNumP];
        online_softmax_tiles(acc_s, of_part.max, of_part.sum, correction, factor, 0);
#pragma unroll
        for (int i = 0; i < kNumRowTiles; ++i) {
            rescale_o(of_part.acc_o[i], correction[i]);
            pack_p(p_tile[i], acc_s[i]);
        }
        gemm_pv(of_part.acc_o, p_tile, stage + kKvBytes + recompute(v_lane));
        ring.missing = 1;
        tile += kNumWarps;
    }
}

// Append: new keys and values behind those of each sequence, in place, and rotary embeddings of them and of Q -----------------

constexpr int kAppendThreads = 256;
constexpr int kRowChunks = 16;  // of 8 columns

// The keys that a sequence has before the new ones, its left padding included.
__device__ __forceinline__ int keys_before(Params const& p, int bidb) {
    return min(max(load_global_int(p.cache_seqlens + bidb), 0), p.seqlen_k);
}

// 8 columns of a row, `bytes` its first byte, turned by the angles of `position`. Columns from rotary_dim on are as they were.
// Pairs are neighbours, or else half of rotary_dim apart.
__device__ __forceinline__ void turned_chunk(
    Params const& p, uint32_t (&out)[4], unsigned char const* bytes, int chunk, int position) {
    load_global_128(out, bytes + 16 * chunk);
    int const half_chunks = p.rotary_dim / 16;
    if (chunk >= 2 * half_chunks) {
        return;
    }
    int64_t const of_position = static_cast<int64_t>(min(position, p.rotary_rows - 1)) * (p.rotary_dim / 2);
    unsigned char const* const cosines = static_cast<unsigned char const*>(p.rotary_cos) + kElementBytes * of_position;
    unsigned char const* const sines = static_cast<unsigned char const*>(p.rotary_sin) + kElementBytes * of_position;
    if (p.rotary_interleaved) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {  // two pairs have two angles, in one register
            int const at = (4 * chunk + i) * kElementBytes;
            float cosine[2];
            float sine[2];
            unpack_bf16(cosine, static_cast<uint32_t>(load_global_int(reinterpret_cast<int const*>(cosines + at))));
            unpack_bf16(sine, static_cast<uint32_t>(load_global_int(reinterpret_cast<int const*>(sines + at))));
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float x[2];
                unpack_bf16(x, out[i + j]);
                out[i + j] = pack_bf16(x[0] * cosine[j] - x[1] * sine[j], x[0] * sine[j] + x[1] * cosine[j]);
            }
        }
        return;
    }
    bool const is_first = chunk < half_chunks;
    int const angles = is_first ? chunk : chunk - half_chunks;
    uint32_t partner[4];
    uint32_t cosine_words[4];
    uint32_t sine_words[4];
    load_global_128(partner, bytes + 16 * (is_first ? chunk + half_chunks : angles));
    load_global_128(cosine_words, cosines + 16 * angles);
    load_global_128(sine_words, sines + 16 * angles);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float x[2];
        float y[2];
        float cosine[2];
        float sine[2];
        unpack_bf16(x, out[i]);
        unpack_bf16(y, partner[i]);
        unpack_bf16(cosine, cosine_words[i]);
        unpack_bf16(sine, sine_words[i]);
        float const sign = is_first ? -1.0f : 1.0f;
        out[i] = pack_bf16(x[0] * cosine[0] + sign * (y[0] * sine[0]), x[1] * cosine[1] + sign * (y[1] * sine[1]));
    }
}

// Eight columns as the caches hold them, from what they are times the scale.
__device__ __forceinline__ void narrowed(uint32_t (&packed)[2], uint32_t const (&columns)[4], float scale) {
    float const inverse = reciprocal_approx(scale);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float x[2];
        float y[2];
        unpack_bf16(x, columns[2 * i]);
        unpack_bf16(y, columns[2 * i + 1]);
        packed[i] = pack_e4m3(x[0] * inverse, x[1] * inverse) | pack_e4m3(y[0] * inverse, y[1] * inverse) << 16;
    }
}

// Row `row` of the new keys, or of the new values: it is dropped where the sequence's cache is full.
__device__ __forceinline__ void append_chunk(Params const& p, bool is_value, int row, int chunk) {
    int const head = row % p.num_heads_kv;
    int const token = row / p.num_heads_kv % p.seqlen_new;
    int const bidb = row / p.num_heads_kv / p.seqlen_new;
    int const position = keys_before(p, bidb) + token;
    if (position >= p.seqlen_k) {
        return;
    }
    Place const place = place_of_row(p, bidb, position);
    if (place.entry < 0) {
        return;
    }
    uint32_t columns[4];
    if (is_value) {
        int64_t const from = bidb * p.v_new_batch_stride + token * p.v_new_row_stride + head * p.v_new_head_stride + 8 * chunk;
        int64_t const to = place.entry * p.v_batch_stride + place.row * p.v_row_stride + head * p.v_head_stride + 8 * chunk;
        load_global_128(columns, static_cast<unsigned char const*>(p.v_new) + kElementBytes * from);
        uint32_t packed[2];
        narrowed(packed, columns, v_scale(p, bidb, head));
        store_global_64(static_cast<unsigned char*>(p.v) + to, packed[0], packed[1]);
    } else {
        int64_t const from = bidb * p.k_new_batch_stride + token * p.k_new_row_stride + head * p.k_new_head_stride;
        int64_t const to = place.entry * p.k_batch_stride + place.row * p.k_row_stride + head * p.k_head_stride + 8 * chunk;
        turned_chunk(p, columns, static_cast<unsigned char const*>(p.k_new) + kElementBytes * from, chunk, position);
        uint32_t packed[2];
        narrowed(packed, columns, k_scale(p, bidb, head));
        store_global_64(static_cast<unsigned char*>(p.k) + to, packed[0], packed[1]);
    }
}

// Row `row` of Q, turned, to where the other kernel reads it.
__device__ __forceinline__ void turn_query_chunk(Params const& p, int row, int chunk) {
    int const head = row % p.num_heads;
    int const query = row / p.num_heads % p.seqlen_q;
    int const bidb = row / p.num_heads / p.seqlen_q;
    int const position = keys_before(p, bidb) + (p.rotary_steps ? query : 0);
    int64_t const from = bidb * p.q_given_batch_stride + query * p.q_given_row_stride + head * p.q_given_head_stride;
    int64_t const to = bidb * p.q_batch_stride + query * p.q_row_stride + head * p.q_head_stride + 8 * chunk;
    uint32_t columns[4];
    turned_chunk(p, columns, static_cast<unsigned char const*>(p.q_given) + kElementBytes * from, chunk, position);
    store_global_128(static_cast<unsigned char*>(p.q) + kElementBytes * to, columns);
}

extern "C" __global__ void __launch_bounds__(kAppendThreads)
    fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8_append(const __grid_constant__ Params p) {
    int const index = static_cast<int>(blockIdx.x) * kAppendThreads + static_cast<int>(threadIdx.x);
    int const row = index / kRowChunks;
    int const chunk = index % kRowChunks;
    int const num_new = p.num_sequences * p.seqlen_new * p.num_heads_kv;
    int const num_queries = p.rotary_dim > 0 ? p.num_sequences * p.seqlen_q * p.num_heads : 0;
    if (row < num_new) {
        append_chunk(p, /*is_value=*/false, row, chunk);
    } else if (row < 2 * num_new) {
        append_chunk(p, /*is_value=*/true, row - num_new, chunk);
    } else if (row - 2 * num_new < num_queries) {
        turn_query_chunk(p, row - 2 * num_new, chunk);
    }
}

// Widen: the first keys of each sequence, and values, times their scales, in bf16 ----------------------------------------

// They go to k_wide and v_wide, (sequences, p.seqlen_wide, heads of K and V, kHeadDim), for kernels that take no 8-bit numbers.
constexpr int kWideChunks = 4;  // of 8 columns, that a thread asks for at once

// Eight columns as the caches hold them, times the scale.
__device__ __forceinline__ void widened_columns(uint32_t (&columns)[4], uint32_t const (&packed)[2], float scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        uint32_t pairs[2];
        widened(pairs, packed[i]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float x[2];
            unpack_fp16(x, pairs[j]);
            columns[2 * i + j] = pack_bf16(x[0] * scale, x[1] * scale);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kAppendThreads)
    fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8_widen(const __grid_constant__ Params p) {
    bool const is_value = blockIdx.y != 0;
    int const token_chunks = p.num_heads_kv * kRowChunks;
    int const bidb = static_cast<int>(blockIdx.x) / p.num_wide_blocks;
    int const first = (static_cast<int>(blockIdx.x) - bidb * p.num_wide_blocks) * kWideChunks * kAppendThreads;
    int const keys = keys_before(p, bidb);
    int const end = min(keys, p.seqlen_wide) * token_chunks;
    if (first >= end) {
        return;
    }
    unsigned char const* const cache = static_cast<unsigned char const*>(is_value ? p.v : p.k);
    int64_t const entry_stride = is_value ? p.v_batch_stride : p.k_batch_stride;
    int64_t const row_stride = is_value ? p.v_row_stride : p.k_row_stride;
    int64_t const head_stride = is_value ? p.v_head_stride : p.k_head_stride;
    // All places are asked for before the first one's columns, and those of all before a scale.
    int64_t places[kWideChunks];  // in the cache; -1: on no page
    int heads[kWideChunks];
#pragma unroll
    for (int i = 0; i < kWideChunks; ++i) {
        int const chunk = first + i * kAppendThreads + static_cast<int>(threadIdx.x);
        places[i] = -1;
        heads[i] = 0;
        if (chunk < end) {
            int const token = chunk / token_chunks;
            int const of_token = chunk - token * token_chunks;
            heads[i] = of_token / kRowChunks;
            Place const place = place_of_row(p, bidb, token);
            if (place.entry >= 0) {
                places[i] = place.entry * entry_stride + place.row * row_stride + heads[i] * head_stride +
                            8 * (of_token % kRowChunks);
            }
        }
    }
    uint32_t packed[kWideChunks][2];
#pragma unroll
    for (int i = 0; i < kWideChunks; ++i) {
        packed[i][0] = packed[i][1] = 0;
        if (places[i] >= 0) {
            load_global_64(packed[i], cache + places[i]);
        }
    }
    // Of a sequence with more keys than there is room for all become NaN, so that it shows.
    float const missing = keys > p.seqlen_wide ? __builtin_bit_cast(float, 0x7fffffffu) : 0.0f;
    unsigned char* const wide = static_cast<unsigned char*>(is_value ? p.v_wide : p.k_wide) +
                                16 * static_cast<int64_t>(bidb) * p.seqlen_wide * token_chunks;
#pragma unroll
    for (int i = 0; i < kWideChunks; ++i) {
        int const chunk = first + i * kAppendThreads + static_cast<int>(threadIdx.x);
        if (chunk < end) {
            uint32_t columns[4];
            float const scale = is_value ? v_scale(p, bidb, heads[i]) : k_scale(p, bidb, heads[i]);
            widened_columns(columns, packed[i], scale + missing);
            store_global_128(wide + 16 * static_cast<int64_t>(chunk), columns);
        }
    }
}

// Kernel --------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8(
    const __grid_constant__ Params p) {
    int const thread = static_cast<int>(threadIdx.x);
    uint32_t const smem = shared_memory_base();
    if (thread < 32) {
        lay_out(p, smem + kSmemLayout, thread);
    } else {
        ask_tables(p, thread - 32);
    }
    sync_block();
    int unit = begin_of_block(p, work_of(smem + kSmemLayout));
    WarpTiles ring;
    ring.stages = smem + kSmemStages + warp_id() * kNumStages * kStageBytes;
    ring.stage = 0;
    ring.missing = kNumStages;
    Item item;
    Rows rows;
    // How much work there is is asked for anew each time: two registers fewer in the loop over keys. And Q of the next part
    // while the one before ends, as memory answers late.
    for (bool is_first = true;; is_first = false) {
        Work const work = work_of(smem + kSmemLayout);
        bool const is_more = unit < end_of_block(p, work);
        Item next;
        Part next_part;
        QueryChunks queries;
        if (is_more) {
            next = item_at(p, smem + kSmemLayout, unit);
            next_part = part_at(p, next, work, unit);
            queries.ask(p, next, thread);
        }
        if (!is_first) {
            finish_part(p, item, rows.share, rows.acc_o, rows.max, rows.sum, rows.factor, smem, rows.stage, thread);
        }
        if (!is_more) {
            break;
        }
        item = next;
        unit = next_part.end;
        attend(p, item, next_part, queries, ring, rows, smem, thread);
    }
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_90a -cubin, or with NVRTC.
//
// Kernels, one after the other on one stream; each takes Params by value:
//   fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8_append
//     grid ((num_new_chunks + 255) / 256, 1, 1), 256 threads, 0 bytes of dynamic shared memory
//   fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8_widen
//     grid (batch * num_wide_blocks, 2, 1), 256 threads, 0 bytes of dynamic shared memory
//   fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8
//     grid (num_blocks, 1, 1), 256 threads, 208944 bytes of dynamic shared memory
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 208944
// Of a call over caches, beside batch, seqlen_q and heads:
//   seqlen_k: the most keys that a sequence can have: of an entry of the caches, or of all pages of a table's row
//   seqlen_new: keys that are appended to each sequence
//   entries: of the caches: places of sequences, or pages
//   split_shift: -1: keys are dealt out evenly; s: in parts of 64 << s keys, whatever the batch
//   rotary_dim, rotary_rows: columns that are turned, and positions of the tables of angles; 0: none
//   interleaved, rotary_steps: pairs are neighbours; queries have positions of their own
//   k_scale_batch, k_scale_head: from one sequence's scale of K to the next, and one head's
//   v_scale_batch, v_scale_head: of V likewise
//   seqlen_wide: so many keys of each sequence are written to k_wide in 16 bits, and values to v_wide; 0: none
//   Params has inverse_group = 1 / num_heads_per_kv, no whole number
// Sizes, in whole numbers:
//   num_sequences = batch
//   cache_entries = entries
//   rotary_interleaved = interleaved
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q * num_heads_per_kv + 15) / 16
//   fixed_parts = min(split_shift + 1, 1)
//   unit_shift = 1 + max(split_shift, 0)
//   least_units = 2 - fixed_parts * 1
//   unit_keys = 32 << unit_shift
//   num_units = ((seqlen_k + unit_keys - 1) / unit_keys + 1) * batch * num_heads_kv * num_m_blocks
//   num_blocks = min((num_units + least_units - 1) / least_units, num_sms)
//   entry_sequences = max((batch + 1023) / 1024, 1)
//   num_entries = (batch + entry_sequences - 1) / entry_sequences
//   rows_at_once = 1 + (num_m_blocks - 1) * min(min(8, num_blocks) / max(num_m_blocks, 1), 1)
//   row_rounds = num_m_blocks / rows_at_once
//   round_reciprocal = 2147483647 / max(row_rounds, 1)
//   num_runs = num_blocks / rows_at_once
//   item_units = 3 * (1 - fixed_parts) * min(batch * num_heads_kv * row_rounds / (num_runs + 1), 1)
//   runs_of_each = num_runs / max(num_heads_kv * row_rounds, 1)
//   are_nearly_all = min(20 * runs_of_each * num_heads_kv * row_rounds / (19 * max(num_runs, 1)), 1)
//   item_runs = runs_of_each * are_nearly_all * (1 - fixed_parts) * (1 / entry_sequences)
//   run_reciprocal = 2147483647 / max(num_runs, 1)
//   num_new_chunks = 16 * batch * (2 * seqlen_new * num_heads_kv + min(rotary_dim, 1) * seqlen_q * num_heads)
//   num_wide_chunks = 16 * seqlen_wide * num_heads_kv
//   num_wide_blocks = (num_wide_chunks + 1023) / 1024
//   num_slots = fixed_parts * num_units + (1 - fixed_parts) * 2 * num_blocks
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Device memory beside the tensors, in 4-byte numbers:
//   parts: num_slots * 2048
//   part_sums: num_slots * 32
//   counters: fixed_parts * num_units + (1 - fixed_parts) * num_blocks; all zeros before the first launch, and left so

}  // namespace fa2gen::fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8
