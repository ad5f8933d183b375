// TMA loads and stores of boxes: swizzled on shared addresses, zero-filled on load and clipped on store.

#include "tma.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace machine {

void complete_bytes(Block& block, std::uint32_t barrier, std::uint32_t bytes);

namespace {

constexpr std::uint32_t kChunk = 16;

// Calls visit(shared address, global address or null, bytes inside the tensor) for each 16 bytes of the box.
template <class Visit>
void for_each_chunk(BoxCopy const& copy, Visit visit) {
    TensorMap const& map = copy.map;
    for (std::uint32_t row = 0; row < copy.rows(); ++row) {
        bool inside = true;
        std::uint64_t global = map.address;
        std::uint32_t rest = row;
        for (int i = 1; i < map.rank; ++i) {
            std::int64_t const position = copy.coordinates[i] + static_cast<std::int64_t>(rest % map.box[i]);
            rest /= map.box[i];
            inside = inside && position >= 0 && position < static_cast<std::int64_t>(map.dims[i]);
            global += static_cast<std::uint64_t>(position) * map.strides[i - 1];
        }
        for (std::uint32_t at = 0; at < copy.row_bytes(); at += kChunk) {
            // Clipping cuts whole 16-byte chunks as long as the innermost size is a multiple of them: checked in check_box.
            std::int64_t const column = copy.coordinates[0] + static_cast<std::int64_t>(at / map.element_bytes);
            bool const chunk_inside = inside && column >= 0 && column < static_cast<std::int64_t>(map.dims[0]);
            std::uint64_t const address = global + static_cast<std::uint64_t>(column) * map.element_bytes;
            visit(swizzle(copy.address + row * copy.pitch() + at, map.swizzle_bytes),
                  chunk_inside ? reinterpret_cast<unsigned char*>(address) : nullptr);
        }
    }
}

void check_box(BoxCopy const& copy, int rank, int line) {
    TensorMap const& map = copy.map;
    check_tensor_map(map, line);
    if (rank != map.rank) {
        fail("kernel.cc:%d gives %d coordinates for a tensor map of rank %d", line, rank, map.rank);
    }
    std::uint32_t const elements = kChunk / map.element_bytes;
    if (copy.coordinates[0] % static_cast<int>(elements) != 0 || map.dims[0] % elements != 0) {
        fail("kernel.cc:%d: column %d of %u: boxes that cut a 16-byte chunk are not modelled", line, copy.coordinates[0], map.dims[0]);
    }
    current().block->shared.check_range(copy.address, copy.footprint(), 128, line);
}

BoxCopy make_copy(TensorMap const& map, std::uint32_t address, std::uint32_t barrier, int const* coordinates, int line) {
    BoxCopy copy{map, address, barrier, {}, 0, {}, current().index, line, false};
    std::copy(coordinates, coordinates + map.rank, copy.coordinates);
    return copy;
}

}  // namespace

// What the driver refuses to encode, and where a map may lie.
void check_tensor_map(TensorMap const& map, int line) {
    if (reinterpret_cast<std::uintptr_t>(&map) % 64 != 0) {
        fail("kernel.cc:%d: the tensor map is not at a multiple of 64 bytes", line);
    }
    std::uint32_t const row_bytes = map.box[0] * map.element_bytes;
    bool valid = map.rank >= 1 && map.rank <= 5 && map.address % 16 == 0 && row_bytes % 16 == 0 &&
                 (map.swizzle_bytes == 0 || row_bytes <= map.swizzle_bytes);
    for (int i = 0; i < map.rank; ++i) {
        valid = valid && map.box[i] >= 1 && map.box[i] <= 256 && map.dims[i] >= 1;
        valid = valid && (i == 0 || map.strides[i - 1] % 16 == 0);
    }
    if (!valid) {
        fail("kernel.cc:%d: the tensor map is not one that the driver would encode", line);
    }
}

void tma_load(std::uint32_t destination, TensorMap const& map, std::uint32_t barrier, int const* coordinates, int rank, int line) {
    Thread& thread = current();
    BoxCopy const copy = make_copy(map, destination, barrier, coordinates, line);
    check_tensor_map(map, line);
    check_box(copy, rank, line);
    auto const found = thread.block->mbarriers.find(barrier);
    if (found == thread.block->mbarriers.end() || !found->second.visible_to_tma) {
        fail("kernel.cc:%d: the mbarrier at 0x%x of a TMA load is not initialised, or no fence.mbarrier_init followed", line, barrier);
    }
    for_each_chunk(copy, [&](std::uint32_t shared, unsigned char const*) {
        thread.block->shared.begin_copy(shared, kChunk, true, thread.index, line);
    });
    thread.block->loads.push_back(copy);
    count(kTmaLoad, copy.bytes());
    maybe_yield();
}

void land(Block& block, BoxCopy const& load) {
    for_each_chunk(load, [&](std::uint32_t shared, unsigned char const* global) {
        unsigned char* const destination = block.shared.landing(shared);
        if (global != nullptr) {
            check_inside(block.launch, global, kChunk, "loads", load.line);
            std::memcpy(destination, global, kChunk);
        } else {
            std::memset(destination, 0, kChunk);
        }
        block.shared.end_copy(shared, kChunk);
    });
    complete_bytes(block, load.barrier, load.bytes());
}

void tma_store(TensorMap const& map, std::uint32_t source, int const* coordinates, int rank, int line) {
    Thread& thread = current();
    BoxCopy copy = make_copy(map, source, 0, coordinates, line);
    check_tensor_map(map, line);
    check_box(copy, rank, line);
    thread.block->shared.read_behind(thread.seen_landings);
    // Nothing is read yet, but what is not ready now is a mistake even if it will be by then.
    for_each_chunk(copy, [&](std::uint32_t shared, unsigned char*) { thread.block->shared.async_read(shared, copy.versions, line); });
    thread.stores.open.push_back(std::move(copy));
    count(kTmaStore, thread.stores.open.back().bytes());
    maybe_yield();
}

void tma_store_commit(int) {
    BulkStores& stores = current().stores;
    stores.groups.push_back(std::move(stores.open));
    stores.open.clear();
}

namespace {

// As late as the wait allows: whoever overwrites the source before is found by its version.
void read_source(BoxCopy& store) {
    if (!store.image.empty()) {
        return;
    }
    std::uint64_t versions = 0;
    current().block->shared.read_behind(current().seen_landings);
    for_each_chunk(store, [&](std::uint32_t shared, unsigned char*) {
        unsigned char const* const chunk = current().block->shared.async_read(shared, versions, store.line);
        store.image.insert(store.image.end(), chunk, chunk + kChunk);
    });
    if (versions != store.versions) {
        fail("shared memory at 0x%x changed while the TMA store of kernel.cc:%d was reading it", store.address, store.line);
    }
}

void write_destination(BoxCopy const& store) {
    unsigned char const* chunk = store.image.data();
    for_each_chunk(store, [&](std::uint32_t, unsigned char* global) {
        if (global != nullptr) {
            check_inside(current().block->launch, global, kChunk, "stores", store.line);
            if (store.adds) {
                float values[kChunk / sizeof(float)];
                std::memcpy(values, chunk, kChunk);
                reduce_add(reinterpret_cast<float*>(global), values, kChunk / sizeof(float));
            } else {
                std::memcpy(global, chunk, kChunk);
            }
        }
        chunk += kChunk;
    });
}

}  // namespace

void tma_store_wait(int pending, bool read_only, int) {
    auto& groups = current().stores.groups;
    auto const done = static_cast<std::ptrdiff_t>(groups.size()) - pending;
    for (std::ptrdiff_t i = 0; i < done; ++i) {
        for (BoxCopy& store : groups[static_cast<std::size_t>(i)]) {
            read_source(store);
            if (!read_only) {
                write_destination(store);
            }
        }
    }
    if (done > 0 && !read_only) {
        groups.erase(groups.begin(), groups.begin() + done);
    }
    maybe_yield();
}

// Bulk copies: one row of chunks, as a map without a swizzle would describe it ------------------------------------------------

namespace {

BoxCopy make_bulk_copy(void const* global, std::uint32_t shared, std::uint32_t bytes, std::uint32_t barrier, int line) {
    auto const address = reinterpret_cast<std::uint64_t>(global);
    if (address % kChunk != 0 || bytes % kChunk != 0 || bytes == 0 || bytes / sizeof(float) > 0xffff) {
        fail("kernel.cc:%d: a bulk copy of %u bytes at a global address that ends in 0x%x: multiples of 16 are needed", line, bytes,
             static_cast<unsigned>(address % 256));
    }
    check_awaited(global, bytes, barrier != 0 ? "loads" : "adds to", line);
    TensorMap map{};
    map.address = address;
    map.dims[0] = bytes / sizeof(float);
    map.box[0] = static_cast<std::uint16_t>(map.dims[0]);
    map.rank = 1;
    map.element_bytes = sizeof(float);
    int const origin = 0;
    BoxCopy const copy = make_copy(map, shared, barrier, &origin, line);
    current().block->shared.check_range(shared, bytes, kChunk, line);
    return copy;
}

}  // namespace

void bulk_load(std::uint32_t destination, void const* source, std::uint32_t bytes, std::uint32_t barrier, int line) {
    Block& block = *current().block;
    auto const found = block.mbarriers.find(barrier);
    if (found == block.mbarriers.end() || !found->second.visible_to_tma) {
        fail("kernel.cc:%d: the mbarrier at 0x%x of a bulk load is not initialised, or no fence.mbarrier_init followed", line, barrier);
    }
    block.loads.push_back(make_bulk_copy(source, destination, bytes, barrier, line));
    block.shared.begin_copy(destination, bytes, true, current().index, line);
    count(kTmaLoad, bytes);
    maybe_yield();
}

namespace {

void copy_to_global(float* destination, std::uint32_t source, std::uint32_t bytes, bool adds, int line) {
    if (current().unfenced_global_wait) {
        fail("kernel.cc:%d: a bulk copy to global memory, with no fence.proxy.async.global since this thread waited for another block",
             line);
    }
    BoxCopy copy = make_bulk_copy(destination, source, bytes, 0, line);
    copy.adds = adds;
    current().block->shared.read_behind(current().seen_landings);
    for_each_chunk(copy, [&](std::uint32_t shared, unsigned char*) { current().block->shared.async_read(shared, copy.versions, line); });
    current().stores.open.push_back(std::move(copy));
    count(kTmaStore, bytes);
    maybe_yield();
}

}  // namespace

void bulk_store(float* destination, std::uint32_t source, std::uint32_t bytes, int line) {
    copy_to_global(destination, source, bytes, false, line);
}

void bulk_reduce_add(float* destination, std::uint32_t source, std::uint32_t bytes, int line) {
    copy_to_global(destination, source, bytes, true, line);
}

void reduce_add(float* destination, float const* values, int count) {
    for (int i = 0; i < count; ++i) {
        auto* const bits = reinterpret_cast<std::uint32_t*>(destination + i);
        std::uint32_t before = __atomic_load_n(bits, __ATOMIC_RELAXED);
        std::uint32_t after;
        do {
            float sum;
            std::memcpy(&sum, &before, sizeof sum);
            sum += values[i];
            std::memcpy(&after, &sum, sizeof after);
        } while (!__atomic_compare_exchange_n(bits, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    }
}

// A thread ends: stores that have read their source complete by themselves, others would read memory that is no longer theirs.
void finish_stores(Thread& thread) {
    if (!thread.stores.open.empty()) {
        fail("the thread ends with the TMA store of kernel.cc:%d not committed", thread.stores.open.front().line);
    }
    for (auto& group : thread.stores.groups) {
        for (BoxCopy const& store : group) {
            if (store.image.empty()) {
                fail("the thread ends before the TMA store of kernel.cc:%d has read shared memory", store.line);
            }
            write_destination(store);
        }
    }
}

}  // namespace machine
