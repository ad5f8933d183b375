// fa2_fwd_sm80_fp16_d64_m128_n64_s2_w4
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm80/fwd.cu.j2; edit the template or the spec, not this file.
//   problem  fwd, head dim 64, fp16, full mask
//   tiling   128 query rows x 64 keys, 2 stages, 4 mma warps, 128-byte panels
//   launch   128 threads, 49152 bytes of dynamic shared memory
//   contents   25 Problem and tiling,   89 Threads,  111 Arithmetic,  148 Shared memory,  167 Global memory,
//             179 cp.async,  198 Fragments,  213 Registers,  222 mma,  257 What is visible,  307 Online softmax,
//             514 Pipeline,  572 Matrix products,  655 Epilogue,  743 Kernel,  821 Launch
//
// O = softmax(scale * Q K^T) V for one (batch, head) and 128 query rows a block (FlashAttention-2, Algorithm 1).
// Every warp owns 32 query rows and all keys of a block of keys, so that S, the softmax and P stay in its
// registers; warps share only the blocks of K and V, which cp.async brings into shared memory ahead of their use, from the
// last block to the first.

namespace fa2gen::fa2_fwd_sm80_fp16_d64_m128_n64_s2_w4 {

using uint32_t = unsigned int;
using int64_t = long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);

// Problem and tiling --------------------------------------------------------------------------------------------------

constexpr int kHeadDim = 64;
constexpr int kTileM = 128;
constexpr int kTileN = 64;
constexpr int kNumStages = 2;
constexpr int kNumThreads = 128;
constexpr int kNumRowTiles = 2;  // of 16 rows, in each warp
constexpr int kElementBytes = 2;

// One thread's share of 16 rows, in registers.
constexpr int kNumAccS = 32;
constexpr int kNumAccO = 32;
constexpr int kNumP = 16;

constexpr int kStepsQk = 4;
constexpr int kStepsPv = 4;

// Shared memory: tiles are panels of 128 bytes a row, swizzled; O takes Q's place

constexpr int kPanelRowBytes = 128;
constexpr int kPanelColumns = 64;
constexpr int kPanelChunks = 8;  // of 16 bytes
constexpr int kNumPanels = 1;
constexpr int kStepsPerPanel = 4;
constexpr int kSwizzleShift = 0;  // 16-byte chunk c of row r lies at chunk c ^ ((r >> shift) & mask)
constexpr int kSwizzleMask = 7;
constexpr int kCopyRows = 16;
constexpr int kStoreRows = 4;
constexpr uint32_t kQPanelBytes = 16384;
constexpr uint32_t kKvPanelBytes = 8192;
constexpr uint32_t kKvBytes = 8192;
constexpr uint32_t kStageBytes = 16384;

constexpr uint32_t kSmemQ = 0;
constexpr uint32_t kSmemK = 16384;

// The kernel's scalar arguments; the order is the launcher's (KernelPlan.params).
struct Params {
    void const* q;
    void const* k;
    void const* v;
    void* o;
    float* lse;
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
    int seqlen_q;
    int seqlen_k;
    int num_heads;
    int num_heads_per_kv;
    float softmax_scale;
    float softmax_scale_log2;
};

// Threads -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_id() {
    return static_cast<int>(threadIdx.x % 32);
}

__device__ __forceinline__ float shfl_xor(float value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
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

// Two fp32 values rounded to fp16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
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

// Global memory -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void store_global_float(float* address, float value) {
    *address = value;
}

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void store_global_128(void* address, uint32_t const (&r)[4]) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "l"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
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

// Order of tiles: head by head, so that neighbouring blocks share K and V in L2.
struct Tile {
    int m_block;
    int bidh;
    int bidb;
};

// Blocks start in order of x first: the tiles of one head run together and share its K and V in L2.
__device__ __forceinline__ Tile tile_of_block(Params const&, int block_x, int block_y, int block_z) {
    return {block_x, block_y, block_z};
}

__device__ __forceinline__ int row_swizzle(int row) {
    return (row >> kSwizzleShift) & kSwizzleMask;
}

// Loads: 8 threads copy a panel row, all threads 16 rows at once

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

// Pipeline: a ring of kNumStages stages, each K and V of one block ------------------------------------------------------
// One barrier a block: it publishes this block's stage, and says that all warps are done with the stage before it, which is
// then loaded again, 1 block ahead.

struct KvPipeline {
    uint32_t stages;  // address of stage 0
    Source k;
    Source v;
    CopyLane lane;
    uint32_t read;   // byte offsets of the stage in use, and of the stage to load next
    uint32_t write;

    __device__ __forceinline__ void load(int num_keys) {
        load_tile(stages + write, kTileN, kKvPanelBytes, k, lane, num_keys);
        load_tile(stages + write + kKvBytes, kTileN, kKvPanelBytes, v, lane, num_keys);
        k.next -= kTileN * k.row_bytes;
        v.next -= kTileN * v.row_bytes;
        write = after(write);
    }

    static __device__ __forceinline__ uint32_t after(uint32_t stage) {
        return stage == (kNumStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
    }

    // Begins the loads of the first blocks visited. Of the first, `num_keys` keys exist; of all others, all.
    __device__ __forceinline__ void start(int num_blocks, int num_keys) {
        read = 0;
        write = 0;
        load(num_keys);
        cp_async_commit();
#pragma unroll
        for (int ahead = 1; ahead < kNumStages - 1; ++ahead) {
            if (ahead < num_blocks) {
                load(kTileN);
            }
            cp_async_commit();
        }
    }

    // K of this block.
    __device__ __forceinline__ uint32_t acquire_k(int more, int) {
        cp_async_wait_0();
        sync_block();
        if (more >= kNumStages - 1) {
            load(kTileN);
        }
        cp_async_commit();
        return stages + read;
    }

    // V of this block.
    __device__ __forceinline__ uint32_t acquire_v(int) {
        uint32_t const v_tile = stages + read + kKvBytes;
        read = after(read);
        return v_tile;
    }
};

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

__device__ __forceinline__ void load_q_fragments(uint32_t (&q)[kStepsQk][kNumRowTiles][4], uint32_t q_lane) {
#pragma unroll
    for (int step = 0; step < kStepsQk; ++step) {
#pragma unroll
        for (int tile = 0; tile < kNumRowTiles; ++tile) {
            ldmatrix_x4(q[step][tile], column_step(q_lane, step, kQPanelBytes) + tile * 16 * kPanelRowBytes);
        }
    }
}

// S = Q K^T: one step of 16 columns of the head dim after the other.
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
    for (int step = 0; step < kStepsQk; ++step) {
        uint32_t const (&q)[kNumRowTiles][4] = q_fragments[step];
#pragma unroll
        for (int i = 0; i < kNumAccS; i += 8) {  // 16 keys
            uint32_t keys[4];
            ldmatrix_x4(keys, column_step(k_lane, step, kKvPanelBytes) + i * 2 * kPanelRowBytes);
#pragma unroll
            for (int tile = 0; tile < kNumRowTiles; ++tile) {
                mma_m16n8k16(acc_s[tile] + i, q[tile], keys[0], keys[1]);
                mma_m16n8k16(acc_s[tile] + i + 4, q[tile], keys[2], keys[3]);
            }
        }
    }
}

// O += P V: one step of 16 keys after the other.
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
        uint32_t const v_rows = v_lane + step * 16 * kPanelRowBytes;
#pragma unroll
        for (int i = 0; i + 8 <= kNumAccO; i += 8) {  // 16 columns
            uint32_t v[4];
            ldmatrix_x4_trans(v, column_step(v_rows, i / 8, kKvPanelBytes));
#pragma unroll
            for (int tile = 0; tile < kNumRowTiles; ++tile) {
                mma_m16n8k16(acc_o[tile] + i, p[tile], v[0], v[1]);
                mma_m16n8k16(acc_o[tile] + i + 4, p[tile], v[2], v[3]);
            }
        }
    }
}

// Epilogue ------------------------------------------------------------------------------------------------------------

// One 16-row tile; `o_rows` is the address of its first row in panel 0.
__device__ __forceinline__ void stage_o(float const (&acc_o)[kNumAccO], uint32_t o_rows, int lane) {
    int const row = lane / 4;  // and row + 8, whose swizzle is the same
    uint32_t const o_lane = o_rows + row * kPanelRowBytes + (row_swizzle(row) << 4) + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < kNumAccO; i += 4) {  // 8 columns: one chunk
        int const chunk = i / 4;
        uint32_t const in_panel = o_lane ^ static_cast<uint32_t>(chunk % kPanelChunks << 4);
        uint32_t const address = in_panel + chunk / kPanelChunks * kQPanelBytes;
        store_shared_32(address, pack_fp16(acc_o[i], acc_o[i + 1]));
        store_shared_32(address + 8 * kPanelRowBytes, pack_fp16(acc_o[i + 2], acc_o[i + 3]));
    }
}

// `first_row` is the warp's first row in the tensor; rows from seqlen_q on are dropped.
__device__ __forceinline__ void store_o(
    Params const& p, Seqlen const& s, uint32_t o_rows, int first_row, int bidh, int bidb, int lane) {
    int const lane_row = lane / kPanelChunks;
    int const lane_chunk = lane % kPanelChunks;
    int64_t const elements = first_query(s, bidb, p.o_batch_stride, p.o_row_stride) + bidh * p.o_head_stride + 8 * lane_chunk;
    unsigned char* const of_head = static_cast<unsigned char*>(p.o) + kElementBytes * elements;
#pragma unroll
    for (int first = 0; first < kNumRowTiles * 16; first += kStoreRows) {
        int const row = first + lane_row;
        uint32_t const from = o_rows + row * kPanelRowBytes + ((lane_chunk ^ row_swizzle(row)) << 4);
        unsigned char* const to = of_head + kElementBytes * (first_row + row) * p.o_row_stride;
        if (first_row + row < s.q) {
#pragma unroll
            for (int panel = 0; panel < kNumPanels; ++panel) {
                if (panel * kPanelColumns + 8 * lane_chunk < kHeadDim) {
                    uint32_t chunk[4];
                    load_shared_128(chunk, from + panel * kQPanelBytes);
                    store_global_128(to + panel * kPanelRowBytes, chunk);
                }
            }
        }
    }
}

__device__ __forceinline__ void store_lse(
    Params const& p, Seqlen const& s, float const (&lse)[2], int row, int bidh, int bidb, int lane) {
    if (lane % 4 == 0) {
        float* const of_head = p.lse + lse_of_head(p, s, bidh, bidb);
        int const first = row + lane / 4;
        if (first < s.q) {
            store_global_float(of_head + first, lse[0]);
        }
        if (first + 8 < s.q) {
            store_global_float(of_head + first + 8, lse[1]);
        }
    }
}

// A block in which not every row sees every key.
__device__ __forceinline__ void mask_scores(
    Params const& p, Seqlen const& s, float (&acc_s)[kNumRowTiles][kNumAccS], int first_row, int first_key, int thread) {
    int const row = first_row + thread / 32 * kNumRowTiles * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
        int const ends[2] = {key_end(p, s, row + 16 * i), key_end(p, s, row + 16 * i + 8)};
        apply_mask(acc_s[i], ends, first_key);
    }
}

// The end of a tile. Each warp reads and writes only its own rows of Q's place.
__device__ __forceinline__ void finish(
    Params const& p, Seqlen const& s, float (&acc_o)[kNumRowTiles][kNumAccO], float const (&row_max)[kNumRowTiles][2],
    float const (&row_sum)[kNumRowTiles][2], int first_row, int bidh, int bidb, int thread) {
    int const lane = thread % 32;
    int const warp_row = thread / 32 * kNumRowTiles * 16;
    uint32_t const o_rows = shared_memory_base() + kSmemQ + warp_row * kPanelRowBytes;
    int const row = first_row + warp_row;
    sync_warp();
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
        float inverse_sum[2];
        float lse[2];
        finalize_softmax(row_max[i], row_sum[i], inverse_sum, lse, p.softmax_scale);
        rescale_o(acc_o[i], inverse_sum);
        store_lse(p, s, lse, row + 16 * i, bidh, bidb, lane);
        stage_o(acc_o[i], o_rows + 16 * i * kPanelRowBytes, lane);
    }
    sync_warp();
    store_o(p, s, o_rows, row, bidh, bidb, lane);
}

// Kernel --------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kNumThreads, 2) fa2_fwd_sm80_fp16_d64_m128_n64_s2_w4(
    const __grid_constant__ Params p) {
    int const thread = static_cast<int>(threadIdx.x);
    Tile const tile = tile_of_block(
        p, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z));
    int const bidh = tile.bidh;
    int const bidb = tile.bidb;
    uint32_t const smem = shared_memory_base();
    int const lane = thread % 32;
    int const warp_row = thread / 32 * kNumRowTiles * 16;  // of the tile
    uint32_t const q_rows = smem + kSmemQ + warp_row * kPanelRowBytes;
    int const first_row = tile.m_block * kTileM;
    Seqlen const s = seqlen_of(p, bidb);
    BlockRange const blocks = key_blocks(p, s, first_row, kTileM);

    float acc_s[kNumRowTiles][kNumAccS];
    float acc_o[kNumRowTiles][kNumAccO];
    float row_max[kNumRowTiles][2];
    float row_sum[kNumRowTiles][2];
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
        row_max[i][0] = row_max[i][1] = -kInfinity;
        row_sum[i][0] = row_sum[i][1] = 0.0f;
#pragma unroll
        for (int j = 0; j < kNumAccO; ++j) {
            acc_o[i][j] = 0.0f;
        }
    }

    if (blocks.begin < blocks.end) {
        int n_block = blocks.end - 1;
        int const last_key = n_block * kTileN;
        int const head_kv = bidh / p.num_heads_per_kv;
        CopyLane const copy = copy_lane(thread);
        Source const q = source_of(p.q, first_query(s, bidb, p.q_batch_stride, p.q_row_stride), p.q_row_stride,
                                   p.q_head_stride, first_row + copy.row, bidh, copy.column);
        Source const key = source_of(p.k, first_key(s, bidb, p.k_batch_stride, p.k_row_stride), p.k_row_stride,
                                     p.k_head_stride, last_key + copy.row, head_kv, copy.column);
        Source const value = source_of(p.v, first_key(s, bidb, p.v_batch_stride, p.v_row_stride), p.v_row_stride,
                                       p.v_head_stride, last_key + copy.row, head_kv, copy.column);
        load_tile(smem + kSmemQ, kTileM, kQPanelBytes, q, copy, s.q - first_row);
        KvPipeline pipeline = {smem + kSmemK, key, value, copy};
        pipeline.start(blocks.end - blocks.begin, s.k - last_key);

        uint32_t const k_lane = lane_offset_column_major(lane);
        uint32_t const v_lane = lane_offset_row_major(lane);
        uint32_t q_operand[kStepsQk][kNumRowTiles][4];
        cp_async_wait_0();
        sync_block();
        load_q_fragments(q_operand, q_rows + v_lane);

        // One loop for masked and other blocks: with two, each keeps registers for the other, and d = 128 spills.
        for (; n_block >= blocks.begin; --n_block) {
            uint32_t const k_tile = pipeline.acquire_k(n_block - blocks.begin, s.k - n_block * kTileN);
            gemm_qk(acc_s, q_operand, k_tile + recompute(k_lane));
            if (n_block >= blocks.end_full) {
                mask_scores(p, seqlen_of(p, bidb), acc_s, first_row, n_block * kTileN, recompute(thread));
            }
            float correction[kNumRowTiles][2];
            uint32_t p_tile[kNumRowTiles][kNumP];
#pragma unroll
            for (int i = 0; i < kNumRowTiles; ++i) {
                if (i % kSoftmaxTiles == 0) {
                    online_softmax_tiles(acc_s, row_max, row_sum, correction, p.softmax_scale_log2, i);
                }
                rescale_o(acc_o[i], correction[i]);
                pack_p(p_tile[i], acc_s[i]);
            }
            uint32_t const v_tile = pipeline.acquire_v(n_block - blocks.begin);
            gemm_pv(acc_o, p_tile, v_tile + recompute(v_lane));
        }
    }

    finish(p, s, acc_o, row_max, row_sum, first_row, bidh, bidb, recompute(thread));
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_80 -cubin, or with NVRTC.
// `fa2gen render fa2_fwd_sm80_fp16_d64_m128_n64_s2_w4 --with-host` adds a launcher in C++.
//
// Kernel; it takes Params by value:
//   fa2_fwd_sm80_fp16_d64_m128_n64_s2_w4
//     grid (num_m_blocks, num_heads, batch), 128 threads, 49152 bytes of dynamic shared memory
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q + 127) / 128
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634

}  // namespace fa2gen::fa2_fwd_sm80_fp16_d64_m128_n64_s2_w4
