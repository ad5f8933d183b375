// fa2_fwd_sm80_bf16_d64_window_sink_drop_m128_n64_s2_w4
// SPDX-License-Identifier: BSD-3-Clause
// Copyright (c) 2026, the fa2gen authors
//
// Rendered by fa2gen from sm80/fwd.cu.j2; edit the template or the spec, not this file.
//   problem  fwd, head dim 64, bf16, window mask, attention sinks, dropout
//   tiling   128 query rows x 64 keys, 2 stages, 4 mma warps, 128-byte panels
//   launch   128 threads, 49152 bytes of dynamic shared memory
//   contents   26 Problem and tiling,  110 Threads,  132 Arithmetic,  192 Shared memory,  211 Global memory,
//             233 cp.async,  252 Fragments,  267 Registers,  276 mma,  312 d - window_left <= j <= d + window_right,
//             389 Online softmax,  546 Dropout,  758 Pipeline,  816 Matrix products,  899 Epilogue,  993 Kernel,
//            1076 Launch
//
// O = softmax(scale * Q K^T) V for one (batch, head) and 128 query rows a block (FlashAttention-2, Algorithm 1).
// Every warp owns 32 query rows and all keys of a block of keys, so that S, the softmax and P stay in its
// registers; warps share only the blocks of K and V, which cp.async brings into shared memory ahead of their use, from the
// last block to the first.

namespace fa2gen::fa2_fwd_sm80_bf16_d64_window_sink_drop_m128_n64_s2_w4 {

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
    float const* s_aux;
    int const* rng_state;
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
    int num_m_blocks;
    int window_left;
    int window_right;
    int chunk;
    int chunk_before;
    int keep_digit_0;
    int keep_digit_1;
    int keep_digit_2;
    int keep_digit_3;
    int keep_digit_4;
    int keep_digit_5;
    int keep_digit_6;
    int keep_digit_7;
    int keep_digit_8;
    int keep_digit_9;
    int keep_digit_10;
    int keep_digit_11;
    float keep_scale;
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

// By 32 bits and more it gives 0, which C++'s << does not promise.
__device__ __forceinline__ uint32_t shift_left(uint32_t value, int bits) {
    uint32_t shifted;
    asm("shl.b32 %0, %1, %2;" : "=r"(shifted) : "r"(value), "r"(bits));
    return shifted;
}

// Lower and upper half of a product: of C++'s product of 64-bit numbers ptxas adds 0 to each upper half (sm_90a).
__device__ __forceinline__ void multiply_wide(uint32_t (&halves)[2], uint32_t a, uint32_t b) {
    asm("{ .reg .b64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
        : "=r"(halves[0]), "=r"(halves[1]) : "r"(a), "r"(b));
}

__device__ __forceinline__ uint32_t rotate_left(uint32_t value, int bits) {
    uint32_t rotated;
    asm("shf.l.wrap.b32 %0, %1, %1, %2;" : "=r"(rotated) : "r"(value), "r"(bits));
    return rotated;
}

// Two fp32 values rounded to bf16 in one register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Four of the eight bytes of `low` and `high`, as the digits of `selector` number them, the last one first; of a digit with 8
// added 8 times the byte's sign.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
    return bytes;
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

// 16 bytes; the address is a multiple of 16.
__device__ __forceinline__ void load_global_int4(int (&r)[4], int const* address) {
    asm volatile("ld.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(address) : "memory");
}

__device__ __forceinline__ void store_global_float(float* address, float value) {
    *address = value;
}

__device__ __forceinline__ float load_global_float(float const* address) {
    return *address;
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
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
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

// What is visible: a window, aligned to the bottom right: with d = i + seqlen_k - seqlen_q, key j to row i iff
// d - window_left <= j <= d + window_right, and j and d lie in the same chunk of so many keys --------------------------
//
// window_left <= seqlen_k and window_right <= seqlen_q: those hide nothing, and no sum exceeds 32 bits. Without chunks, chunk
// and chunk_before are the longer of both lengths; with them, chunk is no longer than that, and chunk_before 0.

// Blocks [begin, end), of which [begin_full, end_full) need no mask.
struct BlockRange {
    int begin;
    int begin_full;
    int end_full;
    int end;
};

// The first key of the chunk of a row that stands at key d >= 0.
__device__ __forceinline__ int chunk_begin(Params const& p, int d) {
    return d - static_cast<int>(static_cast<unsigned>(d) % static_cast<unsigned>(p.chunk));
}

// Keys from this on are visible to a query row, up to key_end.
__device__ __forceinline__ int key_begin(Params const& p, Seqlen const& s, int row) {
    int const d = row + (s.k - s.q);
    int const begin = max(d - p.window_left, 0);
    return d >= 0 ? max(begin, chunk_begin(p, d)) : begin;
}

// Keys below this are visible to a query row; <= 0 where none is. Before key 0 lie chunks without any.
__device__ __forceinline__ int key_end(Params const& p, Seqlen const& s, int row) {
    int const d = row + (s.k - s.q);
    int const end = min(d, s.k - 1 - p.window_right) + 1 + p.window_right;
    int const in_chunk = d >= 0 ? min(chunk_begin(p, d), s.k - p.chunk) + p.chunk : p.chunk_before;
    return min(end, in_chunk);
}

// Rows that do not exist see none of the last block, so that what they skip are the blocks of rows that do.
__device__ __forceinline__ BlockRange key_blocks(Params const& p, Seqlen const& s, int first_row, int num_rows) {
    int const last_row = min(first_row + num_rows, s.q) - 1;
    int const end = (max(key_end(p, s, last_row), 0) + kTileN - 1) / kTileN;
    if (first_row > last_row) {
        return {end, end, end, end};
    }
    int const begin = min(key_begin(p, s, first_row) / kTileN, end);
    int const begin_full = (key_begin(p, s, last_row) + kTileN - 1) / kTileN;
    int const end_full = max(key_end(p, s, first_row), 0) / kTileN;
    return {begin, max(begin_full, begin), max(end_full, begin), end};
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
__device__ __forceinline__ void apply_mask(
    float (&acc_s)[kNumAccS], int const (&begins)[2], int const (&ends)[2], int first_key) {
    constexpr int kRegisters = kNumAccS / 2;  // of one row
    int const first_column = first_key + 2 * (lane_id() % 4);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        int const begin = registers_before(begins[row] - first_column);
        int const end = registers_before(ends[row] - first_column);
#pragma unroll
        for (int word = 0; word < kRegisters; word += 32) {
            uint32_t const visible =
                shift_left(0xffffffffu, max(begin - word, 0)) & ~shift_left(0xffffffffu, max(end - word, 0));
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

// Rounds probabilities to bf16. The accumulator layout of one product is the A layout of the next: no shuffles.
__device__ __forceinline__ void pack_p(uint32_t (&p)[kNumP], float const (&acc_s)[kNumAccS]) {
#pragma unroll
    for (int i = 0; i < kNumP; ++i) {
        p[i] = pack_bf16(acc_s[2 * i], acc_s[2 * i + 1]);
    }
}

// The logit of a query head's sink.
__device__ __forceinline__ float sink_of_head(Params const& p, int bidh, int) {
    return load_global_float(p.s_aux + bidh);
}

// The end of a row: one more exponential in its sum, that of the sink, which no row of V stands for. What O is to be multiplied
// with, and the natural logarithm of the sum. Of the greatest score and the sink the greater one is taken off both, so that
// nothing overflows, and from their difference, so that a sink near it is exact. A row that saw no key gives 0 and the sink.
__device__ __forceinline__ void finalize_softmax(
    float const (&row_max)[2], float const (&row_sum)[2], float (&inverse_sum)[2], float (&lse)[2], float softmax_scale,
    float sink) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float const sum = quad_sum(row_sum[row]);
        float const above = sum == 0.0f ? kInfinity : fmaf(-row_max[row], softmax_scale, sink);
        bool const leads = above > 0.0f;
        float const smaller = exp2_approx(-fabsf(above) * kLog2E);  // of the two exponentials, the greater being 1
        float const with_sink = leads ? fmaf(sum, smaller, 1.0f) : sum + smaller;
        inverse_sum[row] = (leads ? smaller : 1.0f) * reciprocal_approx(with_sink);
        float const log_sum = log2_approx(with_sink) * kLn2;
        lse[row] = leads ? sink + log_sum : fmaf(row_max[row], softmax_scale, log_sum);
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

// Dropout -------------------------------------------------------------------------------------------------------------
// Philox4x32 with 7 rounds (Salmon et al., 2011: the fewest that pass every test), a call for the 32 elements of a unit of 16
// queries and 64 keys that a lane holds in S: bit 16 * (key % 2) + key / 8 * 2 + row / 8 of each of its four words is one's
// own, the first four digits of its number. The others are sums of such bits of other elements, below. The comparison with a
// threshold is made digit by digit, of 32 numbers at once.

// Where the counters of a head begin: 128 random bits, and its place. The cipher's key is 0, so that those of its rounds are
// constants. Of the head and the sequence there are the products of the first round.
struct RandomState {
    uint32_t of_head[2];
    uint32_t of_sequence[2];
    uint32_t row;
    uint32_t key;
};

__device__ __forceinline__ RandomState random_state(Params const& p, int bidh, int bidb) {
    int bits[4];
    load_global_int4(bits, p.rng_state);
    RandomState state;
    multiply_wide(state.of_head, static_cast<uint32_t>(bits[0]) + bidh, 0xd2511f53u);
    multiply_wide(state.of_sequence, static_cast<uint32_t>(bits[1]) + bidb, 0xcd9e8d57u);
    state.row = static_cast<uint32_t>(bits[2]);
    state.key = static_cast<uint32_t>(bits[3]);
    return state;
}

constexpr uint32_t kRound0 = 0x9e3779b9u;
constexpr uint32_t kRound1 = 0xbb67ae85u;

// What three rounds make of a unit's queries, or of its keys, to which they come apart: so a walk along keys makes that of its
// queries once, and one along queries that of its keys (of 14 products of a call 10 are left).
struct Half {
    uint32_t words[3];
};

// Of the unit whose first query is 16 * row_unit.
__device__ __forceinline__ Half half_of_rows(RandomState const& state, int row_unit, int lane) {
    uint32_t second[2];
    uint32_t third[2];
    multiply_wide(second, state.of_sequence[1] ^ (state.row + 8 * row_unit + lane / 4), 0xd2511f53u);
    multiply_wide(third, second[1] ^ state.of_head[0] ^ kRound1, 0xcd9e8d57u);
    return {third[1], third[0], second[0]};
}

// Of the unit whose first key is 64 * key_unit.
__device__ __forceinline__ Half half_of_keys(RandomState const& state, int key_unit, int lane) {
    uint32_t second[2];
    uint32_t third[2];
    multiply_wide(second, state.of_head[1] ^ (state.key + 4 * key_unit + lane % 4), 0xcd9e8d57u);
    multiply_wide(third, second[1] ^ state.of_sequence[0] ^ kRound0, 0xd2511f53u);
    return {third[1], third[0], second[0]};
}

// From a counter to random bits: the rounds behind.
__device__ __forceinline__ void draw(uint32_t (&words)[4], Half const& of_rows, Half const& of_keys) {
    words[0] = of_rows.words[0] ^ of_keys.words[2] ^ 2 * kRound0;
    words[1] = of_rows.words[1];
    words[2] = of_keys.words[0] ^ of_rows.words[2] ^ 2 * kRound1;
    words[3] = of_keys.words[1];
#pragma unroll
    for (uint32_t round = 3; round < 7; ++round) {
        uint32_t first[2];
        uint32_t second[2];
        multiply_wide(first, words[0], 0xd2511f53u);
        multiply_wide(second, words[2], 0xcd9e8d57u);
        words[0] = second[1] ^ words[1] ^ round * kRound0;
        words[1] = second[0];
        words[2] = first[1] ^ words[3] ^ round * kRound1;
        words[3] = first[0];
    }
}

// One LOP3.
__device__ __forceinline__ uint32_t majority(uint32_t a, uint32_t b, uint32_t c) {
    return (a & b) | (a & c) | (b & c);
}

// Which of 32 elements are kept. A digit that is above the threshold's decides for, one below it against, and an equal one
// leaves it to the digits behind, so that each step is a majority. One element of 16 asks digits behind its own four, which
// are each the sum of three bits of other elements, and one of 256 the last four, which are the second four of another. So
// 8 digits of any 3 elements are independent, and 12 of any two but those (tests/unit/test_dropout.py).
__device__ __forceinline__ uint32_t compare(Params const& p, uint32_t const (&words)[4]) {
    uint32_t once[4];
    uint32_t again[4];
    once[0] = rotate_left(words[0], 5);
    again[0] = rotate_left(words[0], 25);
    once[1] = rotate_left(words[1], 19);
    again[1] = rotate_left(words[1], 3);
    once[2] = rotate_left(words[2], 28);
    again[2] = rotate_left(words[2], 9);
    once[3] = rotate_left(words[3], 26);
    again[3] = rotate_left(words[3], 4);
    uint32_t sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[i] = once[i] ^ again[(i + 1) % 4] ^ again[(i + 2) % 4];
    }
    uint32_t kept = 0;
    kept = majority(kept, sums[0], p.keep_digit_0);
    kept = majority(kept, sums[1], p.keep_digit_1);
    kept = majority(kept, sums[2], p.keep_digit_2);
    kept = majority(kept, sums[3], p.keep_digit_3);
    kept = rotate_left(kept, 11);
    kept = majority(kept, sums[0], p.keep_digit_4);
    kept = majority(kept, sums[1], p.keep_digit_5);
    kept = majority(kept, sums[2], p.keep_digit_6);
    kept = majority(kept, sums[3], p.keep_digit_7);
    kept = majority(kept, words[0], p.keep_digit_8);
    kept = majority(kept, words[1], p.keep_digit_9);
    kept = majority(kept, words[2], p.keep_digit_10);
    kept = majority(kept, words[3], p.keep_digit_11);
    return kept;
}

constexpr int kNumKeepWords = (kNumAccS + 31) / 32;

// Of 16 rows, the 64 keys of a block's word i. The first of a block that begins 32 keys behind a multiple of
// 64 are those from that on.
__device__ __forceinline__ uint32_t draw_word(
    Params const& p, RandomState const& state, Half const& of_rows, int first_key, int i, int lane) {
    uint32_t words[4];
    draw(words, of_rows, half_of_keys(state, first_key / 64 + i, lane));
    return compare(p, words);
}

__device__ __forceinline__ void draw_kept(
    uint32_t (&kept)[kNumKeepWords], Params const& p, RandomState const& state, int first_row, int first_key, int lane) {
    Half const of_rows = half_of_rows(state, first_row / 16, lane);
#pragma unroll
    for (int i = 0; i < kNumKeepWords; ++i) {
        kept[i] = draw_word(p, state, of_rows, first_key, i, lane);
    }
}

// What is kept of two elements of P in a register: PRMT makes 16 bits of each sign of a byte.
__device__ __forceinline__ uint32_t mask_of_pair(uint32_t const (&kept)[kNumKeepWords], int i) {
    int const bit = i % 16;
    return permute_bytes(kept[i / 16] << (7 - bit % 8), 0, bit < 8 ? 0xaa88u : 0xbb99u);
}

// Dropped elements of P become 0.
__device__ __forceinline__ void drop(uint32_t (&p_tile)[kNumP], uint32_t const (&kept)[kNumKeepWords]) {
#pragma unroll
    for (int i = 0; i < kNumP; ++i) {
        p_tile[i] &= mask_of_pair(kept, i);
    }
}

// Order of tiles: longest rows first, so that the last tiles to start are the short ones, within sections of heads whose K and
// V fit in L2 together (4k: 587 against 520 TFLOP/s head by head, d = 128, H200).
struct Tile {
    int m_block;
    int bidh;
    int bidb;
};

// Blocks start in order of x first: the tiles of one head run together and share its K and V in L2, the longest first.
__device__ __forceinline__ Tile tile_of_block(Params const& p, int block_x, int block_y, int block_z) {
    return {p.num_m_blocks - 1 - block_x, block_y, block_z};
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
        store_shared_32(address, pack_bf16(acc_o[i], acc_o[i + 1]));
        store_shared_32(address + 8 * kPanelRowBytes, pack_bf16(acc_o[i + 2], acc_o[i + 3]));
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
        // Rows behind the last query see what it does: their maxima, of zeros, are asked, too, whether one has risen.
        int const rows[2] = {min(row + 16 * i, s.q - 1), min(row + 16 * i + 8, s.q - 1)};
        int const begins[2] = {key_begin(p, s, rows[0]), key_begin(p, s, rows[1])};
        int const ends[2] = {key_end(p, s, rows[0]), key_end(p, s, rows[1])};
        apply_mask(acc_s[i], begins, ends, first_key);
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
    float const sink = sink_of_head(p, bidh, bidb);
    sync_warp();
#pragma unroll
    for (int i = 0; i < kNumRowTiles; ++i) {
        float inverse_sum[2];
        float lse[2];
        finalize_softmax(row_max[i], row_sum[i], inverse_sum, lse, p.softmax_scale, sink);
        inverse_sum[0] *= p.keep_scale;
        inverse_sum[1] *= p.keep_scale;
        rescale_o(acc_o[i], inverse_sum);
        store_lse(p, s, lse, row + 16 * i, bidh, bidb, lane);
        stage_o(acc_o[i], o_rows + 16 * i * kPanelRowBytes, lane);
    }
    sync_warp();
    store_o(p, s, o_rows, row, bidh, bidb, lane);
}

// Kernel --------------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(kNumThreads, 2) fa2_fwd_sm80_bf16_d64_window_sink_drop_m128_n64_s2_w4(
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
            if (n_block >= blocks.end_full || n_block < blocks.begin_full) {
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
                int const drop_thread = recompute(thread);
                int const drop_row = first_row + drop_thread / 32 * kNumRowTiles * 16 + 16 * i;
                uint32_t kept[kNumKeepWords];
                draw_kept(kept, p, random_state(p, bidh, bidb), drop_row, n_block * kTileN, drop_thread % 32);
                pack_p(p_tile[i], acc_s[i]);
                drop(p_tile[i], kept);
            }
            uint32_t const v_tile = pipeline.acquire_v(n_block - blocks.begin);
            gemm_pv(acc_o, p_tile, v_tile + recompute(v_lane));
        }
    }

    finish(p, s, acc_o, row_max, row_sum, first_row, bidh, bidb, recompute(thread));
}

// Launch --------------------------------------------------------------------------------------------------------------
// Compile with nvcc -std=c++17 -arch=sm_80 -cubin, or with NVRTC.
//
// Kernel; it takes Params by value:
//   fa2_fwd_sm80_bf16_d64_window_sink_drop_m128_n64_s2_w4
//     grid (num_m_blocks, num_heads, batch), 128 threads, 49152 bytes of dynamic shared memory
// Sizes, in whole numbers:
//   num_heads_per_kv = num_heads / num_heads_kv
//   num_m_blocks = (seqlen_q + 127) / 128
//   softmax_scale_log2 = softmax_scale * 1.4426950408889634
// Options; limited(x, n) is n where x < 0, else min(x, n):
//   window_left: keys that a query sees before its own place; -1: all
//   window_right: keys that it sees after it; -1: all, 0: a causal mask
//   chunk: a query sees its own chunk of so many keys alone; 0: all are one
//   dropout_p: the probability that an element of P is dropped, above 0 and below 1
//   Params has window_left = limited(window_left, seqlen_k)
//   Params has window_right = limited(window_right, seqlen_q)
//   Params has chunk = limited(chunk - 1, max(seqlen_q, seqlen_k) - 1) + 1
//   Params has chunk_before = (chunk < 1) * max(seqlen_q, seqlen_k)
//   Params has keep_digit_0 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 0 & 1)
//   Params has keep_digit_1 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 1 & 1)
//   Params has keep_digit_2 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 2 & 1)
//   Params has keep_digit_3 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 3 & 1)
//   Params has keep_digit_4 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 4 & 1)
//   Params has keep_digit_5 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 5 & 1)
//   Params has keep_digit_6 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 6 & 1)
//   Params has keep_digit_7 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 7 & 1)
//   Params has keep_digit_8 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 8 & 1)
//   Params has keep_digit_9 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 9 & 1)
//   Params has keep_digit_10 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 10 & 1)
//   Params has keep_digit_11 = -(min(max(lround((1 - dropout_p) * 4096), 1), 4095) >> 11 & 1)
//   Params has keep_scale = 1 / (1 - dropout_p)

}  // namespace fa2gen::fa2_fwd_sm80_bf16_d64_window_sink_drop_m128_n64_s2_w4
