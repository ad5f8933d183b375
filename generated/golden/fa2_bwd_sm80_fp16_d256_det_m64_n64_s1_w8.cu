// fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm80/bwd.cu.j2; edit the template or the spec, not this file.
//   problem  bwd, head dim 256, fp16, full mask, deterministic
//   tiling   64 query rows x 64 keys, 1 stages, 8 mma warps, 128-byte panels
//   launch   256 threads, 147968 bytes of dynamic shared memory
//   contents   29 Problem and tiling,  140 Threads,  159 Arithmetic,  183 Shared memory,  208 Global memory,
//             264 cp.async,  283 Fragments,  298 Registers,  307 mma,  364 What is visible,
//             570 Softmax and its gradient,  617 Matrix products,  750 Registers to shared memory,  842 Turns,
//             911 Kernels, 1114 Launch
//
// Gradients of O = softmax(scale * Q K^T) V (FlashAttention-2, Algorithm 2), in three kernels that run one after the other:
//   preprocess   dPsum = rowsum(dO * O) - dLSE and LSE in base 2 for every query, and dQ = 0
//   main         dK and dV of 64 keys a block; dQ is the sum of what all blocks of keys add to it, in fp32
//   postprocess  dQ scaled, rounded and put into rows
// The main kernel computes S^T = K Q^T and dP^T = V dO^T, 32 keys x 16 queries a warp. Peers are the
// 4 warps of the same keys: each has its own columns of dK and dV, and needs all queries for them. Its own P^T and dS^T are
// registers that the next product takes as they are; those of its peers it reads from shared memory.

namespace fa2gen::fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8 {

using uint32_t = unsigned int;
using int64_t = long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 256;
constexpr int kTileM = 64;  // queries
constexpr int kTileN = 64;  // keys
constexpr int kNumThreads = 256;
constexpr int kElementBytes = 2;

// How warps share the products. S^T: kNumPeers warps for the same keys. Columns of the head dim go round in steps of 16, to
// peers for dK and dV, and for dQ to the kNumDqColumnWarps warps of the same rows.
constexpr int kNumPeers = 4;
constexpr int kNumRowTiles = 2;  // of 16 keys, in each warp
constexpr int kWarpKeys = 32;
constexpr int kWarpQueries = 16;
constexpr int kNumDqColumnWarps = 4;
constexpr int kNumDqRowTiles = 2;  // of 16 queries, in each warp

constexpr int kStepsHeadDim = 16;
constexpr int kStepsWarpQueries = 1;
constexpr int kStepsN = 4;
constexpr int kColumnStepsDkv = 4;  // of each warp
constexpr int kColumnStepsDq = 4;

// One thread's share of 16 rows, in registers.
constexpr int kNumAccS = 8;
constexpr int kNumAccDkv = 32;
constexpr int kNumAccDq = 32;
constexpr int kNumP = 4;

// Shared memory: tiles are panels of 128 bytes a row, swizzled. P^T and dS^T lie as [key][query], a stage is
// Q, dO and their row statistics; dK and dV take the places of K and V.

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kPanelChunks = 8;  // of 16 bytes
constexpr int kNumPanels = 4;
constexpr int kStepsPerPanel = 4;
constexpr int kSwizzleShift = 0;  // 16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask)
constexpr int kSwizzleMask = 7;
constexpr int kCopyRows = 32;
constexpr uint32_t kQPanelBytes = 8192;  // of dO too
constexpr uint32_t kKvPanelBytes = 8192;
constexpr uint32_t kPPanelBytes = 8192;  // of dS^T too

constexpr uint32_t kSmemK = 0;
constexpr uint32_t kSmemV = 32768;
constexpr uint32_t kSmemP = 65536;
constexpr uint32_t kSmemDs = 73728;
constexpr uint32_t kSmemStages = 81920;
constexpr uint32_t kStageDout = 32768;
constexpr uint32_t kStageLse = 65536;
constexpr uint32_t kStageDpsum = 65792;

// Global memory: the sums of dQ lie in register order, [batch][head][m_block][warp][register][lane]: what a warp adds at once
// is then 128 bytes in a row.
constexpr int kDqSliceFloats = 2048;  // of one warp
constexpr int kDqBlockFloats = 16384;

// The kernel's scalar arguments; the order is the launcher's (KernelPlan.params).
struct Params {
    void const* q;
    void const* k;
    void const* v;
    void const* o;
    void const* dout;
    void* dq;
    void* dk;
    void* dv;
    float const* lse;
    float const* dlse;
    float* lse_log2;
    float* dpsum;
    float* dq_acc;
    int* dq_turns;
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
    int64_t dout_batch_stride;
    int64_t dout_row_stride;
    int64_t dout_head_stride;
    int64_t dq_batch_stride;
    int64_t dq_row_stride;
    int64_t dq_head_stride;
    int64_t dk_batch_stride;
    int64_t dk_row_stride;
    int64_t dk_head_stride;
    int64_t dv_batch_stride;
    int64_t dv_row_stride;
    int64_t dv_head_stride;
    int seqlen_q;
    int seqlen_k;
    int num_heads;
    int num_heads_kv;
    int num_heads_per_kv;
    int num_m_blocks;
    int num_n_blocks;
    int num_batch_heads_kv;
    int heads_per_section;
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

__device__ __forceinline__ void sync_block() {
    __syncthreads();
}

// Arithmetic ----------------------------------------------------------------------------------------------------------

// exp(x) is exp2(x * kLog2E).
constexpr float kLog2E = 1.44269504088896341f;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two fp32 values rounded to fp16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The two fp16 numbers of one register, the lower half first.
__device__ __forceinline__ void unpack_fp16(float (&values)[2], uint32_t packed) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(values[0]), "=f"(values[1]) : "r"(packed));
}

// Shared memory -------------------------------------------------------------------------------------------------------

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The address of the block's dynamic shared memory; the widest swizzle needs it on a 1024-byte boundary.
__device__ __forceinline__ uint32_t shared_memory_base() {
    return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory));
}

__device__ __forceinline__ void store_shared_32(uint32_t address, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load_shared_128(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// 8 bytes; the address is a multiple of 8.
__device__ __forceinline__ void load_shared_float2(float (&r)[2], uint32_t address) {
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(r[0]), "=f"(r[1]) : "r"(address) : "memory");
}

// Global memory -------------------------------------------------------------------------------------------------------

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
__device__ __forceinline__ void store_global_128(void* address, uint32_t const (&r)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void store_global_float4(float* address, float r0, float r1, float r2, float r3) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "f"(r0), "f"(r1), "f"(r2), "f"(r3) : "memory");
}

// Adds to one fp32 number; the addition is atomic. A warp's additions to 128 bytes in a row are one request.
__device__ __forceinline__ void reduce_add_global_float(float* address, float value) {
    asm volatile("red.global.add.f32 [%0], %1;" :: "l"(address), "f"(value) : "memory");
}

// Waits until the number at `address` is `value`; what its writer did before is then done.
__device__ __forceinline__ void wait_global(int const* address, int value) {
    asm volatile(
        "{\n"
        ".reg .pred waits;\n"
        ".reg .s32 found;\n"
        "wait_%=:\n"
        "ld.acquire.gpu.global.s32 found, [%0];\n"
        "setp.ne.s32 waits, found, %1;\n"
        "@waits bra wait_%=;\n"
        "}"
        :: "l"(address), "r"(value) : "memory");
}

// Publishes what this thread knows to be done, and `value`.
__device__ __forceinline__ void store_global_release(int* address, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" :: "l"(address), "r"(value) : "memory");
}

// cp.async ------------------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, past L1; both addresses are multiples of 16. Reads the first `source_bytes` (0 or 16)
// of them and fills the rest with zeros: with 0 the source is not touched.
__device__ __forceinline__ void cp_async_16(uint32_t destination, void const* source, int source_bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(destination), "l"(source), "r"(source_bytes) : "memory");
}

// Ends a group of this thread's copies; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most 0 of this thread's groups are still running; a block-wide barrier then publishes what they wrote.
__device__ __forceinline__ void cp_async_wait_0() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
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

__device__ __forceinline__ int key_begin(Params const&, Seqlen const&, int) {
    return 0;
}

constexpr int kNoQuery = 0x7fffffff;  // after all of them

// Query rows from this on see a key; none sees a key that does not exist.
__device__ __forceinline__ int query_begin(Params const&, Seqlen const& s, int key) {
    return key < s.k ? 0 : kNoQuery;
}

__device__ __forceinline__ BlockRange query_blocks(Params const& p, Seqlen const& s, int first_key) {
    int const end = num_query_blocks(p, s);
    return {0, first_key + kTileN <= s.k ? 0 : end, end, end};
}

// Sets the scores of queries that do not see a key to -inf: one comparison and one select an element. Bits as on Hopper take
// more where a warp has 16 queries of a key (d = 192: 24 instructions).
__device__ __forceinline__ void apply_mask(float (&acc_s)[kNumAccS], int const (&begins)[2], int first_row) {
    int const first_query = first_row + 2 * (lane_id() % 4);
#pragma unroll
    for (int key = 0; key < 2; ++key) {
        int const begin = begins[key] - first_query;
        auto sees = [&](int query) { return query >= begin; };
#pragma unroll
        for (int i = 2 * key; i < kNumAccS; i += 4) {
            acc_s[i] = sees(2 * i - 4 * key) ? acc_s[i] : -kInfinity;
            acc_s[i + 1] = sees(2 * i - 4 * key + 1) ? acc_s[i + 1] : -kInfinity;
        }
    }
}

// Order of blocks: of each head the first keys first, since the others wait for them in every sum of dQ; round all heads of a
// section, so that few blocks that run at a time wait for each other. Q, dO and dQ of a section fit in L2 together.
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

__device__ __forceinline__ int row_swizzle(int row) {
    return (row >> kSwizzleShift) & kSwizzleMask;
}

// Loads: 8 threads copy a panel row, all threads 32 rows at once

// One thread's part in every tile: chunk `column` of rows `row`, `row` + kCopyRows, ... of each panel.
struct CopyLane {
    int row;
    int column;       // in elements
    uint32_t offset;  // in the tile in shared memory
};

__device__ __forceinline__ CopyLane copy_lane(int thread) {
    int const row = thread / kPanelChunks;
    int const chunk = thread % kPanelChunks;
    return {row, 8 * chunk, static_cast<uint32_t>(row * kPanelRowBytes + ((chunk ^ row_swizzle(row)) << 4))};
}

// Where a thread reads a tensor: its chunk of its first row in the next tile. `first` leads to the sequence's row 0.
struct Source {
    unsigned char const* next;
    int64_t row_bytes;
};

__device__ __forceinline__ Source source_of(
    void const* tensor, int64_t first, int64_t row_stride, int64_t head_stride, int64_t row, int head, int column) {
    int64_t const elements = first + row * row_stride + head * head_stride + column;
    return {static_cast<unsigned char const*>(tensor) + kElementBytes * elements, kElementBytes * row_stride};
}

// One tile of `rows` rows, of which the tensor has the first `num_rows`; the others, and columns past the head dim, become
// zeros: a V of NaN times a P of 0 would be NaN.
__device__ __forceinline__ void load_tile(
    uint32_t tile, int rows, uint32_t panel_bytes, Source const& source, CopyLane const& lane, int num_rows) {
    unsigned char const* from = source.next;
#pragma unroll
    for (int first = 0; first < rows; first += kCopyRows) {
        int const row_bytes = lane.row + first < num_rows ? 16 : 0;
        uint32_t const to = tile + lane.offset + first * kPanelRowBytes;
        if (first + kCopyRows <= rows || lane.row + first < rows) {
#pragma unroll
            for (int panel = 0; panel < kNumPanels; ++panel) {
                int const bytes = panel * kPanelColumns + lane.column < kHeadDim ? row_bytes : 0;
                cp_async_16(to + panel * panel_bytes, from + panel * kPanelRowBytes, bytes);
            }
        }
        from += kCopyRows * source.row_bytes;
    }
}

// Pipeline: one stage. The next block of queries loads under dQ, after a barrier: all warps are done with Q and dO.

// Where the block of queries is that was loaded last, and how one is loaded. What a thread's place decides is computed again
// for each: the products need the registers more.
struct QueryLoads {
    uint32_t stages;  // address of the first stage
    unsigned char const* q;  // this thread's chunk of its first row
    unsigned char const* dout;

    __device__ __forceinline__ void load(Params const& p, Seqlen const& s, QueryWalk const& at, uint32_t stage) {
        int const thread = static_cast<int>(recompute(threadIdx.x));
        CopyLane const lane = copy_lane(thread);
        int const num_rows = s.q - at.m_block * kTileM;
        load_tile(stage, kTileM, kQPanelBytes, {q, kElementBytes * p.q_row_stride}, lane, num_rows);
        load_tile(stage + kStageDout, kTileM, kQPanelBytes, {dout, kElementBytes * p.dout_row_stride}, lane, num_rows);
        if (thread < kTileM / 2) {  // LSE and then dPsum, four rows a thread
            float const* const statistics = thread < kTileM / 4 ? p.lse_log2 : p.dpsum;
            int64_t const row = static_cast<int64_t>(at.query_block) * kTileM + thread % (kTileM / 4) * 4;
            cp_async_16(stage + kStageLse + 16 * thread, statistics + row, 16);
        }
        cp_async_commit();
    }

    // The block behind the one at `walk`, if there is one.
    __device__ __forceinline__ void load_next(
        Params const& p, Seqlen const& s, BlockRange const& blocks, QueryWalk const& walk, uint32_t stage) {
        if (walk.remaining > 1) {
            QueryWalk next = walk;
            next.next(p, blocks);
            int64_t const rows = (next.m_block - walk.m_block) * kTileM;
            int64_t const heads = next.bidh - walk.bidh;
            q += kElementBytes * (rows * p.q_row_stride + heads * p.q_head_stride);
            dout += kElementBytes * (rows * p.dout_row_stride + heads * p.dout_head_stride);
            load(p, s, next, stage);
        }
    }
};

struct QueryPipeline {
    QueryLoads loads;

    // Begins the load of the first block; K and V join its group.
    __device__ __forceinline__ void start(Params const& p, Seqlen const& s, QueryWalk const& walk) {
        loads.load(p, s, walk, loads.stages);
    }

    // The address of this block's stage.
    __device__ __forceinline__ uint32_t acquire(Params const&, Seqlen const&, BlockRange const&, QueryWalk const&) {
        cp_async_wait_0();
        sync_block();
        return loads.stages;
    }

    __device__ __forceinline__ void release(
        Params const& p, Seqlen const& s, BlockRange const& blocks, QueryWalk const& walk) {
        sync_block();
        loads.load_next(p, s, blocks, walk, loads.stages);
    }
};

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

// Rounds to fp16. The accumulator layout of one product is the A layout of the next: no shuffles.
__device__ __forceinline__ void pack(uint32_t (*packed)[kNumP], float const (*values)[kNumAccS]) {
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumP; ++i) {
            packed[tile][i] = pack_fp16(values[tile][2 * i], values[tile][2 * i + 1]);
        }
    }
}

// Matrix products -----------------------------------------------------------------------------------------------------

// This lane's address in a 16 x 16 tile as the A operand, or as B stored [k][n]: matrices (0, 0), (8, 0), (0, 8), (8, 8)
// of (row, column).
__device__ __forceinline__ uint32_t lane_offset_row_major(int lane) {
    int const row = lane % 16;
    return static_cast<uint32_t>(row * kPanelRowBytes + ((lane / 16 ^ row_swizzle(row)) << 4));
}

// This lane's address in a 16 x 16 tile as B stored [n][k]: matrices (0, 0), (0, 8), (8, 0), (8, 8).
__device__ __forceinline__ uint32_t lane_offset_column_major(int lane) {
    int const row = lane % 8 + lane / 16 * 8;
    return static_cast<uint32_t>(row * kPanelRowBytes + ((lane / 8 % 2 ^ row_swizzle(row)) << 4));
}

// The same lane's address `step` * 16 columns further on.
__device__ __forceinline__ uint32_t column_step(uint32_t lane_address, int step, uint32_t panel_bytes) {
    return (lane_address ^ static_cast<uint32_t>(step % kStepsPerPanel * 32)) + step / kStepsPerPanel * panel_bytes;
}

// Whether step `i` of a warp is one of the head dim: where warps do not share the steps evenly, the last of some is not.
__device__ __forceinline__ bool has_step(int i, int num_warps, int column_warp) {
    return num_warps * (i + 1) <= kStepsHeadDim || column_warp + num_warps * i < kStepsHeadDim;
}

// S^T = K Q^T, or dP^T = V dO^T: one step of 16 columns of the head dim after the other.
__device__ __forceinline__ void gemm_s(float (&acc_s)[kNumRowTiles][kNumAccS], uint32_t key_lane, uint32_t query_lane) {
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumAccS; ++i) {
            acc_s[tile][i] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < kStepsHeadDim; ++step) {
        uint32_t keys[kNumRowTiles][4];
#pragma unroll
        for (int tile = 0; tile < kNumRowTiles; ++tile) {
            ldmatrix_x4(keys[tile], column_step(key_lane, step, kKvPanelBytes) + tile * 16 * kPanelRowBytes);
        }
#pragma unroll
        for (int i = 0; i < kNumAccS; i += 8) {  // 16 queries
            uint32_t queries[4];
            ldmatrix_x4(queries, column_step(query_lane, step, kQPanelBytes) + i * 2 * kPanelRowBytes);
#pragma unroll
            for (int tile = 0; tile < kNumRowTiles; ++tile) {
                mma_m16n8k16(acc_s[tile] + i, keys[tile], queries[0], queries[1]);
                mma_m16n8k16(acc_s[tile] + i + 4, keys[tile], queries[2], queries[3]);
            }
        }
    }
}

// acc += A B, for 16 rows of B and the warp's columns: acc is [num_tiles][num_steps][8], A [num_tiles][4].
__device__ __forceinline__ void multiply_rows(
    float* acc, uint32_t const (*a)[4], uint32_t b_lane, int num_tiles, int num_steps, int num_warps, uint32_t panel_bytes,
    int column_warp) {
#pragma unroll
    for (int i = 0; i < num_steps; ++i) {
        if (has_step(i, num_warps, column_warp)) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, column_step(b_lane, num_warps * i, panel_bytes));
#pragma unroll
            for (int tile = 0; tile < num_tiles; ++tile) {
                mma_m16n8k16(acc + (tile * num_steps + i) * 8, a[tile], b[0], b[1]);
                mma_m16n8k16(acc + (tile * num_steps + i) * 8 + 4, a[tile], b[2], b[3]);
            }
        }
    }
}

// dV += P^T dO, or dK += dS^T Q, for the queries of the warp's own P^T or dS^T; `rows_lane` is in their rows of dO or Q.
__device__ __forceinline__ void gemm_dkv_own(
    float (&acc)[kNumRowTiles][kNumAccDkv], uint32_t const (&p_tile)[kNumRowTiles][kNumP], uint32_t rows_lane, int peer) {
#pragma unroll
    for (int step = 0; step < kStepsWarpQueries; ++step) {
        uint32_t p[kNumRowTiles][4];
#pragma unroll
        for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[tile][i] = p_tile[tile][4 * step + i];
            }
        }
        multiply_rows(acc[0], p, rows_lane + step * 16 * kPanelRowBytes, kNumRowTiles, kColumnStepsDkv, kNumPeers,
                      kQPanelBytes, peer);
    }
}

// The same for the queries of the warp's peers, from what they wrote; `p_lane` and `rows_lane` are in the tiles' first queries.
__device__ __forceinline__ void gemm_dkv_peers(
    float (&acc)[kNumRowTiles][kNumAccDkv], uint32_t p_lane, uint32_t rows_lane, int peer) {
#pragma unroll
    for (int other = 1; other < kNumPeers; ++other) {
        int const first = (peer ^ other) * kStepsWarpQueries;
        uint32_t const p_first = column_step(p_lane, first, kPPanelBytes);
        uint32_t const rows_first = rows_lane + first * 16 * kPanelRowBytes;
#pragma unroll
        for (int step = 0; step < kStepsWarpQueries; ++step) {
            uint32_t p[kNumRowTiles][4];
#pragma unroll
            for (int tile = 0; tile < kNumRowTiles; ++tile) {
                ldmatrix_x4(p[tile], column_step(p_first, step, kPPanelBytes) + tile * 16 * kPanelRowBytes);
            }
            multiply_rows(acc[0], p, rows_first + step * 16 * kPanelRowBytes, kNumRowTiles, kColumnStepsDkv, kNumPeers,
                          kQPanelBytes, peer);
        }
    }
}

// dQ = dS K, for the warp's rows: one step of 16 keys after the other. dS is transposed as it is read.
__device__ __forceinline__ void gemm_dq(
    float (&acc_dq)[kNumDqRowTiles][kNumAccDq], uint32_t ds_lane, uint32_t k_lane, int column_warp) {
#pragma unroll
    for (int tile = 0; tile < kNumDqRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumAccDq; ++i) {
            acc_dq[tile][i] = 0.0f;
        }
    }
#pragma unroll
    for (int step = 0; step < kStepsN; ++step) {
        uint32_t ds[kNumDqRowTiles][4];
#pragma unroll
        for (int tile = 0; tile < kNumDqRowTiles; ++tile) {
            ldmatrix_x4_trans(ds[tile], column_step(ds_lane, tile, kPPanelBytes) + step * 16 * kPanelRowBytes);
        }
        multiply_rows(acc_dq[0], ds, k_lane + step * 16 * kPanelRowBytes, kNumDqRowTiles, kColumnStepsDq, kNumDqColumnWarps,
                      kKvPanelBytes, column_warp);
    }
}

// Registers to shared memory, shared memory to rows -----------------------------------------------------------------------

// Where this lane's accumulators of row `row` + lane / 4 begin in a tile, in its 16-byte chunk `chunk` of the columns.
__device__ __forceinline__ uint32_t store_offset(int lane, int row, int chunk, uint32_t panel_bytes) {
    int const lane_row = lane / 4;
    return (row + lane_row) * kPanelRowBytes + ((chunk % kPanelChunks ^ row_swizzle(lane_row)) << 4) +
           chunk / kPanelChunks * panel_bytes + lane % 4 * 4;
}

// The same lane's address `chunk` chunks further on, with no carry from the first chunk.
__device__ __forceinline__ uint32_t chunk_step(uint32_t lane_address, int chunk, uint32_t panel_bytes) {
    return (lane_address ^ static_cast<uint32_t>(chunk % kPanelChunks << 4)) + chunk / kPanelChunks * panel_bytes;
}

// The warp's P^T or dS^T as [key][query]. Rows 8 apart have the same swizzle.
__device__ __forceinline__ void stage_p(uint32_t const (&p_tile)[kNumRowTiles][kNumP], uint32_t lane_address) {
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumP; i += 2) {  // 8 queries
            uint32_t const to = chunk_step(lane_address, i / 2, kPPanelBytes) + tile * 16 * kPanelRowBytes;
            store_shared_32(to, p_tile[tile][i]);
            store_shared_32(to + 8 * kPanelRowBytes, p_tile[tile][i + 1]);
        }
    }
}

// 16 rows of the warp's columns of dK, dV or dQ, times `factor`, rounded.
__device__ __forceinline__ void stage_rows(
    float const* acc, int num_steps, int num_warps, uint32_t lane_address, uint32_t panel_bytes, float factor,
    int column_warp) {
#pragma unroll
    for (int i = 0; i < 2 * num_steps; ++i) {  // 8 columns
        if (has_step(i / 2, num_warps, column_warp)) {
            float const* const r = acc + 4 * i;
            uint32_t const to = chunk_step(lane_address, 2 * num_warps * (i / 2) + i % 2, panel_bytes);
            store_shared_32(to, pack_fp16(r[0] * factor, r[1] * factor));
            store_shared_32(to + 8 * kPanelRowBytes, pack_fp16(r[2] * factor, r[3] * factor));
        }
    }
}

// Where a thread writes a tensor: its chunk of its first row in the tile.
struct Destination {
    unsigned char* first;
    int64_t row_bytes;
};

__device__ __forceinline__ Destination destination_of(
    void* tensor, int64_t first, int64_t row_stride, int64_t head_stride, int64_t row, int head, int column) {
    int64_t const elements = first + row * row_stride + head * head_stride + column;
    return {static_cast<unsigned char*>(tensor) + kElementBytes * elements, kElementBytes * row_stride};
}

// One tile of `rows` rows, of which the tensor has the first `num_rows`; 16 bytes a lane.
__device__ __forceinline__ void store_tile(
    uint32_t tile, int rows, uint32_t panel_bytes, Destination const& destination, CopyLane const& lane, int num_rows) {
    unsigned char* to = destination.first;
#pragma unroll
    for (int first = 0; first < rows; first += kCopyRows) {
        if (lane.row + first < min(rows, num_rows)) {
#pragma unroll
            for (int panel = 0; panel < kNumPanels; ++panel) {
                if (panel * kPanelColumns + lane.column < kHeadDim) {
                    uint32_t chunk[4];
                    load_shared_128(chunk, tile + lane.offset + first * kPanelRowBytes + panel * panel_bytes);
                    store_global_128(to + panel * kPanelRowBytes, chunk);
                }
            }
        }
        to += kCopyRows * destination.row_bytes;
    }
}

// This lane's first number in its warp's slice of the sums of one block of queries.
__device__ __forceinline__ float* dq_slice(Params const& p, int query_block, int thread) {
    return p.dq_acc + static_cast<int64_t>(query_block) * kDqBlockFloats + thread / 32 * kDqSliceFloats + thread % 32;
}

// Adds a warp's share of dQ to the sums in global memory: 32 lanes, 128 bytes in a row.
__device__ __forceinline__ void add_dq(float const (&acc_dq)[kNumDqRowTiles][kNumAccDq], float* dq_acc, int column_warp) {
#pragma unroll
    for (int tile = 0; tile < kNumDqRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumAccDq; ++i) {
            if (has_step(i / 8, kNumDqColumnWarps, column_warp)) {
                reduce_add_global_float(dq_acc + (tile * kNumAccDq + i) * 32, acc_dq[tile][i]);
            }
        }
    }
}

// Turns: blocks of keys add to a block of queries in their order -----------------------------------------------------------
//
// A number for each block of queries says which block of keys adds next. No deadlock: a block waits for blocks of lower index
// alone, and those have started before it (as GPUs do it; CUDA does not promise that). So the lowest that has not ended waits
// for nobody, and ends.

// Until the block of keys before n_block has added; an addition that follows comes after its.
__device__ __forceinline__ void wait_for_turn(int const* turn, int n_block) {
    wait_global(turn, n_block);
}

// This thread's additions must be complete, and others' known to it by a barrier.
__device__ __forceinline__ void pass_turn(int* turn, int n_block) {
    store_global_release(turn, n_block + 1);
}

// As add_dq, but after the blocks of keys before n_block. Barriers: nobody adds before the turn, all have added when it passes.
__device__ __forceinline__ void add_dq_in_turn(
    Params const& p, float const (&acc_dq)[kNumDqRowTiles][kNumAccDq], int query_block, int n_block, int thread,
    int column_warp) {
    if (thread == 0) {
        wait_for_turn(p.dq_turns + query_block, n_block);
    }
    sync_block();
    add_dq(acc_dq, dq_slice(p, query_block, thread), column_warp);
    sync_block();
    if (thread == 0) {
        pass_turn(p.dq_turns + recompute(query_block), recompute(n_block));
    }
}

// A block in which not every query sees every key.
__device__ __forceinline__ void mask_scores(
    Params const& p, Seqlen const& s, float (&acc_s)[kNumRowTiles][kNumAccS], int warp_key, int warp_query, int lane) {
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
        int const key = warp_key + 16 * tile + lane / 4;
        int const begins[2] = {query_begin(p, s, key), query_begin(p, s, key + 8)};
        apply_mask(acc_s[tile], begins, warp_query);
    }
}

// The end of a block of keys.
__device__ __forceinline__ void finish(
    Params const& p, float const (&acc_dk)[kNumRowTiles][kNumAccDkv], float const (&acc_dv)[kNumRowTiles][kNumAccDkv],
    int index, int thread) {
    KeyBlock const block = key_block_at(p, index);
    CopyLane const copy = copy_lane(thread);
    uint32_t const smem = shared_memory_base();
    int const peer = thread / 32 % kNumPeers;
    int const warp_key = thread / 32 / kNumPeers * kWarpKeys;
    uint32_t const dk_out = smem + kSmemK + store_offset(thread % 32, warp_key, 2 * peer, kKvPanelBytes);
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
        uint32_t const rows = dk_out + 16 * tile * kPanelRowBytes;
        stage_rows(acc_dk[tile], kColumnStepsDkv, kNumPeers, rows, kKvPanelBytes, p.softmax_scale, peer);
        stage_rows(acc_dv[tile], kColumnStepsDkv, kNumPeers, rows + (kSmemV - kSmemK), kKvPanelBytes, 1.0f, peer);
    }
    sync_block();
    int const key = block.n_block * kTileN;
    Seqlen const s = seqlen_of(p, block.bidb);
    Destination const dk = destination_of(p.dk, first_key(s, block.bidb, p.dk_batch_stride, p.dk_row_stride), p.dk_row_stride,
                                          p.dk_head_stride, key + copy.row, block.head_kv, copy.column);
    Destination const dv = destination_of(p.dv, first_key(s, block.bidb, p.dv_batch_stride, p.dv_row_stride), p.dv_row_stride,
                                          p.dv_head_stride, key + copy.row, block.head_kv, copy.column);
    store_tile(smem + kSmemK, kTileN, kKvPanelBytes, dk, copy, s.k - key);
    store_tile(smem + kSmemV, kTileN, kKvPanelBytes, dv, copy, s.k - key);
}

// Kernels -------------------------------------------------------------------------------------------------------------

// Which block of queries a block of threads takes, before the main kernel and after it: the last one first. That one begins
// with the first heads, of which L2 then has what was written last, and leaves the last sums in L2.
__device__ __forceinline__ int query_block_number() {
    return static_cast<int>(gridDim.x - 1 - blockIdx.x);
}

// Row statistics of one block of queries, and zeros for its dQ and its turn. 32 lanes share a row, 16 bytes each.
extern "C" __global__ void __launch_bounds__(128) fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8_preprocess(
    const __grid_constant__ Params p) {
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
                unpack_fp16(a, o_chunk[i]);
                unpack_fp16(b, dout_chunk[i]);
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

    if (thread == 0) {
        store_global_int(p.dq_turns + block.index, key_begin(p, s, m_block * kTileM) / kTileN);
    }
    float* const dq_acc = p.dq_acc + static_cast<int64_t>(block.index) * kDqBlockFloats;
    for (int i = 4 * thread; i < kDqBlockFloats; i += 4 * kThreads) {
        store_global_float4(dq_acc + i, 0.0f, 0.0f, 0.0f, 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8(
    const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    int const thread = static_cast<int>(threadIdx.x);
    int const lane = lane_id();
    int const warp = warp_id();
    int const peer = warp % kNumPeers;
    int const warp_key = warp / kNumPeers * kWarpKeys;  // of the block
    int const warp_query = peer * kWarpQueries;
    int const dq_column_warp = warp % kNumDqColumnWarps;
    KeyBlock const block = key_block_at(p, static_cast<int>(blockIdx.x));
    int const block_key = block.n_block * kTileN;
    Seqlen const s = seqlen_of(p, block.bidb);
    BlockRange const blocks = query_blocks(p, s, block_key);

    float acc_dk[kNumRowTiles][kNumAccDkv];
    float acc_dv[kNumRowTiles][kNumAccDkv];
#pragma unroll
    for (int tile = 0; tile < kNumRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumAccDkv; ++i) {
            acc_dk[tile][i] = 0.0f;
            acc_dv[tile][i] = 0.0f;
        }
    }

    QueryWalk walk = start_walk(p, s, block, blocks);
    if (walk.remaining > 0) {
        CopyLane const copy = copy_lane(thread);
        Source const key = source_of(p.k, first_key(s, block.bidb, p.k_batch_stride, p.k_row_stride), p.k_row_stride,
                                     p.k_head_stride, block_key + copy.row, block.head_kv, copy.column);
        Source const value = source_of(p.v, first_key(s, block.bidb, p.v_batch_stride, p.v_row_stride), p.v_row_stride,
                                       p.v_head_stride, block_key + copy.row, block.head_kv, copy.column);
        int const first_row = walk.m_block * kTileM + copy.row;
        Source const q = source_of(p.q, first_query(s, block.bidb, p.q_batch_stride, p.q_row_stride), p.q_row_stride,
                                   p.q_head_stride, first_row, walk.bidh, copy.column);
        Source const dout = source_of(p.dout, first_query(s, block.bidb, p.dout_batch_stride, p.dout_row_stride),
                                      p.dout_row_stride, p.dout_head_stride, first_row, walk.bidh, copy.column);
        load_tile(smem + kSmemK, kTileN, kKvPanelBytes, key, copy, s.k - block_key);
        load_tile(smem + kSmemV, kTileN, kKvPanelBytes, value, copy, s.k - block_key);
        QueryPipeline pipeline = { {smem + kSmemStages, q.next, dout.next} };
        pipeline.start(p, s, walk);

        // Addresses of this lane in the first 16 columns of its rows; those in stages are offsets.
        uint32_t const row_major = lane_offset_row_major(lane);
        uint32_t const column_major = lane_offset_column_major(lane);
        uint32_t const k_lane = smem + kSmemK + warp_key * kPanelRowBytes + row_major;
        uint32_t const p_lane = smem + kSmemP + warp_key * kPanelRowBytes + row_major;
        uint32_t const p_out = smem + kSmemP + store_offset(lane, warp_key, warp_query / 8, kPPanelBytes);
        uint32_t const q_lane = warp_query * kPanelRowBytes + column_major;
        uint32_t const rows_lane = column_step(row_major, peer, kQPanelBytes);
        uint32_t const ds_lane =
            smem + kSmemDs + column_step(column_major, warp / kNumDqColumnWarps * kNumDqRowTiles, kPPanelBytes);
        uint32_t const k_columns = smem + kSmemK + column_step(row_major, dq_column_warp, kKvPanelBytes);

        for (; walk.remaining > 0; walk.next(p, blocks)) {
            uint32_t const stage = pipeline.acquire(p, s, blocks, walk);
            float acc_s[kNumRowTiles][kNumAccS];
            uint32_t p_tile[kNumRowTiles][kNumP];
            gemm_s(acc_s, recompute(k_lane), stage + q_lane);
            if (walk.needs_mask(blocks)) {
                mask_scores(p, s, acc_s, block_key + warp_key, walk.m_block * kTileM + warp_query, recompute(lane));
            }
            probabilities(acc_s, stage + kStageLse + 4 * warp_query, p.softmax_scale_log2);
            pack(p_tile, acc_s);
            stage_p(p_tile, recompute(p_out));
            gemm_dkv_own(acc_dv, p_tile, stage + kStageDout + warp_query * kPanelRowBytes + rows_lane, peer);

            float acc_dp[kNumRowTiles][kNumAccS];
            uint32_t ds_tile[kNumRowTiles][kNumP];
            gemm_s(acc_dp, recompute(k_lane) + (kSmemV - kSmemK), stage + kStageDout + q_lane);
            score_gradients(acc_dp, acc_s, stage + kStageDpsum + 4 * warp_query);
            pack(ds_tile, acc_dp);
            stage_p(ds_tile, recompute(p_out) + (kSmemDs - kSmemP));
            gemm_dkv_own(acc_dk, ds_tile, stage + warp_query * kPanelRowBytes + rows_lane, peer);

            // P and dS of all warps are there.
            sync_block();
            gemm_dkv_peers(acc_dv, recompute(p_lane), stage + kStageDout + rows_lane, recompute(peer));
            gemm_dkv_peers(acc_dk, recompute(p_lane) + (kSmemDs - kSmemP), stage + rows_lane, recompute(peer));
            pipeline.release(p, s, blocks, walk);

            float acc_dq[kNumDqRowTiles][kNumAccDq];
            gemm_dq(acc_dq, recompute(ds_lane), recompute(k_columns), dq_column_warp);
            add_dq_in_turn(p, acc_dq, walk.query_block, block_key / kTileN, recompute(thread), dq_column_warp);
        }
    }

    // dK and dV go where K and V were: all warps must be done with them.
    sync_block();
    finish(p, acc_dk, acc_dv, static_cast<int>(recompute(blockIdx.x)), static_cast<int>(recompute(thread)));
}

// One block of queries of dQ: from sums in register order to rows, through shared memory.
extern "C" __global__ void __launch_bounds__(kNumThreads) fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8_postprocess(
    const __grid_constant__ Params p) {
    uint32_t const smem = shared_memory_base();
    QueryBlock const block = query_block_at(p, query_block_number());
    Seqlen const s = seqlen_of(p, block.bidb);
    int const lane = lane_id();
    int const warp = warp_id();
    int const column_warp = warp % kNumDqColumnWarps;
    int const warp_row = warp / kNumDqColumnWarps * kNumDqRowTiles * 16;
    float const* const slice = dq_slice(p, block.index, static_cast<int>(threadIdx.x));
    float acc_dq[kNumDqRowTiles][kNumAccDq];
#pragma unroll
    for (int tile = 0; tile < kNumDqRowTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kNumAccDq; ++i) {
            acc_dq[tile][i] = load_global_float(slice + (tile * kNumAccDq + i) * 32);
        }
    }
    uint32_t const dq_out = smem + store_offset(lane, warp_row, 2 * column_warp, kQPanelBytes);
#pragma unroll
    for (int tile = 0; tile < kNumDqRowTiles; ++tile) {
        stage_rows(acc_dq[tile], kColumnStepsDq, kNumDqColumnWarps, dq_out + 16 * tile * kPanelRowBytes, kQPanelBytes,
                   p.softmax_scale, column_warp);
    }
    sync_block();
    CopyLane const copy = copy_lane(static_cast<int>(threadIdx.x));
    int const first_row = block.m_block * kTileM;
    Destination const dq = destination_of(p.dq, first_query(s, block.bidb, p.dq_batch_stride, p.dq_row_stride), p.dq_row_stride,
                                          p.dq_head_stride, first_row + copy.row, block.bidh, copy.column);
    store_tile(smem, kTileM, kQPanelBytes, dq, copy, s.q - first_row);
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_80 -cubin, or with NVRTC.
// `fa2gen render fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8 --with-host` adds a launcher in C++.
//
// Kernels, one after the other on one stream; each takes Params by value:
//   fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8_preprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 128 threads, 0 bytes of dynamic shared memory
//   fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8
//     grid (num_n_blocks * num_heads_kv * batch, 1, 1), 256 threads, 147968 bytes of dynamic shared memory
//     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 147968
//   fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8_postprocess
//     grid (num_m_blocks * num_heads * batch, 1, 1), 256 threads, 32768 bytes of dynamic shared memory
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q + 63) / 64
//   num_n_blocks = (seqlen_k + 63) / 64
//   num_batch_heads_kv = batch * num_heads_kv
//   section_bytes = 33554432 * min(num_heads_per_kv, 2)
//   heads_per_section = min(max(1, section_bytes / (num_heads_per_kv * seqlen_q * 2048)), batch * num_heads_kv)
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Device memory beside the tensors, in 4-byte numbers:
//   lse_log2: num_m_blocks * num_heads * batch * 64
//   dpsum: num_m_blocks * num_heads * batch * 64
//   dq_acc: num_m_blocks * num_heads * batch * 16384
//   dq_turns: num_m_blocks * num_heads * batch

}  // namespace fa2gen::fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8
