// What a rendered kernel sees of the machine: the primitives behind templates/cpu/*.cuh.j2, without their bodies.
//
// Kept free of heavy headers, so that a kernel compiles in a fraction of a second; all.cc is compiled once and linked.
// Each function takes the caller's line in the rendered source, which is how errors find the template line.

#pragma once

#include <cstddef>
#include <cstdint>

namespace machine {

struct Index3 {
    unsigned x, y, z;
};

// The part of a thread that CUDA code can name.
struct ThreadView {
    Index3 thread_idx, block_idx, block_dim, grid_dim;
};

// The running thread. Fibers of one block never leave their OS thread, so this is stable between two primitives.
extern __thread ThreadView const* self;

enum class Type : std::uint8_t { f16, bf16 };

// Shared memory and threads --------------------------------------------------------------------------------------------

std::uint32_t shared_memory_base();
void load_shared(std::uint32_t address, void* value, int bytes, int line);
void store_shared(std::uint32_t address, void const* value, int bytes, int line);

void sync_block(int line);
void sync_warp(int line);
bool elect_one(int line);
std::uint32_t shuffle_xor(std::uint32_t value, int lane_mask, int line);
std::uint32_t shuffle_from(std::uint32_t value, int lane, int line);
std::uint32_t shuffle_by_lane(std::uint32_t value, int lane, int line);
void named_barrier(int barrier, int num_threads, bool wait, int line);
void set_max_registers(int count, bool increase, int line);

// Global memory: addresses must lie in one of the launch's buffers -------------------------------------------------------

void check_global(void const* address, int bytes, bool write, int line);
// From here on this thread may use what the grid before wrote.
void griddepcontrol_wait();

// Copies that are not waited for -----------------------------------------------------------------------------------------

void cp_async(std::uint32_t destination, void const* source, int bytes, int source_bytes, int line);
void cp_async_commit(int line);
void cp_async_wait(int pending, int line);
// Arrives at a barrier when all of this thread's copies so far have landed.
void cp_async_mbarrier_arrive(std::uint32_t barrier, int line);

// What cuTensorMapEncodeTiled is told, in the 128 bytes of the driver's opaque map (fa2gen/cpu/run.py packs it).
struct alignas(64) TensorMap {
    std::uint64_t address;
    std::uint64_t strides[4];  // bytes, of dimension 1 and up
    std::uint32_t dims[5];
    std::uint16_t box[5];
    std::uint8_t rank;
    std::uint8_t element_bytes;
    std::uint16_t swizzle_bytes;  // 0: none
};
static_assert(sizeof(TensorMap) == 128, "a tensor map is 128 bytes");

void tma_load(std::uint32_t destination, TensorMap const& map, std::uint32_t barrier, int const* coordinates, int rank, int line);
void tma_store(TensorMap const& map, std::uint32_t source, int const* coordinates, int rank, int line);
void tma_store_commit(int line);
void tma_store_wait(int pending, bool read_only, int line);
void check_tensor_map(TensorMap const& map, int line);

// Runs of bytes between global and shared memory; a reduction adds fp32 numbers and belongs to the groups of tma_store.
void bulk_load(std::uint32_t destination, void const* source, std::uint32_t bytes, std::uint32_t barrier, int line);
void bulk_store(float* destination, std::uint32_t source, std::uint32_t bytes, int line);
void bulk_reduce_add(float* destination, std::uint32_t source, std::uint32_t bytes, int line);
// What orders blocks of threads: a wait for another block's number (ld.acquire in a loop), and the store that ends it (st.release).
void wait_global(int const* address, int value, int line);
int load_global_acquire(int const* address);
int claim_global(int* address);
int arrive_global(int* counter, int last, int line);
void store_global_release(int* address, int value, int line);
void fence_proxy_async_global();
// Atomically, one number at a time.
void reduce_add(float* destination, float const* values, int count);

void fence_proxy_async(int line);
void fence_mbarrier_init(int line);
void mbarrier_init(std::uint32_t barrier, std::uint32_t arrivals, int line);
void mbarrier_arrive(std::uint32_t barrier, std::uint32_t arrivals, std::uint32_t expected_bytes, int line);
void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity, int line);

// Matrix instructions ------------------------------------------------------------------------------------------------------

void ldmatrix(std::uint32_t address, std::uint32_t* registers, int count, bool transpose, int line);
void stmatrix(std::uint32_t address, std::uint32_t const* registers, int count, bool transpose, int line);
void mma_m16n8k16(Type type, float* d, std::uint32_t const* a, std::uint32_t const* b, float const* c, int line);

// A register of A. An lvalue is remembered by its address too, so that a change while the product runs is noticed.
struct ARegister {
    std::uint32_t value;
    std::uint32_t const* address;
    ARegister(std::uint32_t const& variable) : value(variable), address(&variable) {}
    ARegister(std::uint32_t&& temporary) : value(temporary), address(nullptr) {}
};

struct WgmmaShape {
    Type type;
    int n;
    bool a_transposed, b_transposed;  // MN-major in shared memory
};

void wgmma_fence(int line);
void wgmma_commit(int line);
void wgmma_wait(int pending, int line);
void wgmma_ss(WgmmaShape shape, float* d, std::uint64_t a, std::uint64_t b, bool accumulate, int line);
void wgmma_rs(WgmmaShape shape, float* d, ARegister const (&a)[4], std::uint64_t b, bool accumulate, int line);

}  // namespace machine
