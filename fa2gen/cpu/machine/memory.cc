// Loads, stores and small copies of single threads, and what they cost.

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace machine {

void complete_arrival(Block& block, std::uint32_t barrier);

std::uint32_t shared_memory_base() {
    return current().block->shared.base();
}

void load_shared(std::uint32_t address, void* value, int bytes, int line) {
    std::memcpy(value, current().block->shared.generic_read(address, static_cast<std::uint32_t>(bytes), line),
                static_cast<std::size_t>(bytes));
    count_lane(kLoadShared, address, bytes, line);
}

void store_shared(std::uint32_t address, void const* value, int bytes, int line) {
    Thread& thread = current();
    thread.block->shared.generic_write(address, value, static_cast<std::uint32_t>(bytes), thread.index, thread.unpublished, line);
    count_lane(kStoreShared, address, bytes, line);
}

Buffer const& check_inside(Launch const& launch, void const* address, std::uint64_t bytes, char const* verb, int line) {
    auto const* first = static_cast<unsigned char const*>(address);
    Buffer const* nearest = nullptr;
    auto distance = [&](Buffer const& buffer) {
        return first < buffer.address ? buffer.address - first : first - buffer.address;
    };
    for (std::uint32_t i = 0; i < launch.num_buffers; ++i) {
        Buffer const& buffer = launch.buffers[i];
        if (first >= buffer.address && first + bytes <= buffer.address + buffer.bytes) {
            return buffer;
        }
        if (nearest == nullptr || distance(buffer) < distance(*nearest)) {
            nearest = &buffer;
        }
    }
    fail("kernel.cc:%d %s %llu bytes of global memory outside of every tensor; the nearest is %s (%llu bytes), at its byte %lld", line,
         verb, static_cast<unsigned long long>(bytes), nearest == nullptr ? "none" : nearest->name,
         nearest == nullptr ? 0ull : static_cast<unsigned long long>(nearest->bytes),
         nearest == nullptr ? 0ll : static_cast<long long>(first - nearest->address));
}

void check_awaited(void const* address, std::uint64_t bytes, char const* verb, int line) {
    Thread const& thread = current();
    Buffer const& buffer = check_inside(thread.block->launch, address, bytes, verb, line);
    if (buffer.awaited != 0 && !thread.waited_for_grid) {
        fail("kernel.cc:%d %s %s, which the grid before writes, with no griddepcontrol.wait before it in this thread", line, verb,
             buffer.name);
    }
}

void griddepcontrol_wait() {
    current().waited_for_grid = true;
}

void check_global(void const* address, int bytes, bool write, int line) {
    if (reinterpret_cast<std::uintptr_t>(address) % static_cast<std::uintptr_t>(bytes) != 0) {
        fail("kernel.cc:%d: a global access of %d bytes at an address that is not a multiple of them", line, bytes);
    }
    auto const size = static_cast<std::uint64_t>(bytes);
    check_awaited(address, size, write ? "writes" : "reads", line);
    count(write ? kStoreGlobal : kLoadGlobal, size);
}

// cp.async: the destination is poisoned at issue and written when its thread waits ---------------------------------------

void cp_async(std::uint32_t destination, void const* source, int bytes, int source_bytes, int line) {
    Thread& thread = current();
    if ((bytes != 4 && bytes != 8 && bytes != 16) || source_bytes < 0 || source_bytes > bytes) {
        fail("cp.async of %d bytes, %d of them read, at kernel.cc:%d", bytes, source_bytes, line);
    }
    if (source_bytes > 0) {
        if (reinterpret_cast<std::uintptr_t>(source) % static_cast<std::uintptr_t>(bytes) != 0) {
            fail("kernel.cc:%d: cp.async of %d bytes from an address that is not a multiple of them", line, bytes);
        }
        check_inside(thread.block->launch, source, static_cast<std::uint64_t>(source_bytes), "reads", line);
    }
    thread.block->shared.begin_copy(destination, static_cast<std::uint32_t>(bytes), false, thread.index, line);
    thread.small_copies.open.push_back({destination, bytes, source_bytes, source, line});
    count(kCpAsync, static_cast<std::uint64_t>(bytes));
}

void cp_async_commit(int) {
    SmallCopies& copies = current().small_copies;
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
    maybe_yield();
}

void cp_async_wait(int pending, int) {
    Thread& thread = current();
    auto& groups = thread.small_copies.groups;
    auto const done = static_cast<std::ptrdiff_t>(groups.size()) - pending;
    for (std::ptrdiff_t i = 0; i < done; ++i) {
        for (SmallCopy const& copy : groups[static_cast<std::size_t>(i)]) {
            unsigned char data[16] = {};
            std::memcpy(data, copy.source, static_cast<std::size_t>(copy.source_bytes));
            thread.block->shared.end_small_copy(copy.destination, data, static_cast<std::uint32_t>(copy.bytes), thread.unpublished);
        }
    }
    if (done > 0) {
        groups.erase(groups.begin(), groups.begin() + done);
    }
    maybe_yield();
}

void cp_async_mbarrier_arrive(std::uint32_t barrier, int line) {
    Thread& thread = current();
    if (thread.block->mbarriers.count(barrier) == 0) {
        fail("kernel.cc:%d: cp.async arrives at the mbarrier at 0x%x, which is not initialised", line, barrier);
    }
    SmallCopies& mine = thread.small_copies;
    CopiesAndArrival all{{}, barrier};
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
    for (auto const& group : mine.groups) {
        all.copies.insert(all.copies.end(), group.begin(), group.end());
    }
    mine.groups.clear();
    thread.block->arrivals.push_back(std::move(all));
    maybe_yield();
}

// Called by the schedule. What lands is a thread's store to wgmma and TMA: who waits at the barrier must pass a fence.
void land(Block& block, CopiesAndArrival const& landing) {
    for (SmallCopy const& copy : landing.copies) {
        unsigned char data[16] = {};
        std::memcpy(data, copy.source, static_cast<std::size_t>(copy.source_bytes));
        block.shared.land_small_copy(copy.destination, data, static_cast<std::uint32_t>(copy.bytes));
    }
    complete_arrival(block, landing.barrier);
}

// Counters ----------------------------------------------------------------------------------------------------------------

void count(Primitive primitive, std::uint64_t bytes, std::uint64_t instructions) {
    Block& block = *current().block;
    if (block.launch.count_stats != 0) {
        block.stats.counts[primitive].bytes += bytes;
        block.stats.counts[primitive].instructions += instructions;
    }
}

// One access of some lanes: 128 bytes pass at a time, unless two of them are different words of one of the 32 banks.
void count_wavefronts(Block& block, Primitive primitive, std::uint32_t const* addresses, int lanes, int bytes) {
    if (block.launch.count_stats == 0) {
        return;
    }
    Count& total = block.stats.counts[primitive];
    int const at_once = std::max(128 / bytes, 1);
    for (int first = 0; first < lanes; first += at_once) {
        int const end = std::min(first + at_once, lanes);
        std::uint64_t most = 1;
        for (std::uint32_t bank = 0; bank < 32; ++bank) {
            std::vector<std::uint32_t> words;
            for (int lane = first; lane < end; ++lane) {
                for (std::uint32_t word = addresses[lane] / 4; word < (addresses[lane] + static_cast<std::uint32_t>(bytes) + 3) / 4; ++word) {
                    if (word % 32 == bank && std::find(words.begin(), words.end(), word) == words.end()) {
                        words.push_back(word);
                    }
                }
            }
            most = std::max<std::uint64_t>(most, words.size());
        }
        total.wavefronts += most;
        total.ideal += 1;
    }
}

// Lanes run one after the other here: the same access of several lanes is one instruction of the warp.
void count_lane(Primitive primitive, std::uint32_t address, int bytes, int line) {
    Thread& thread = current();
    if (thread.block->launch.count_stats == 0) {
        return;
    }
    std::vector<LaneAccess>& accesses = thread.warp->accesses;
    auto found = std::find_if(accesses.begin(), accesses.end(), [&](LaneAccess const& access) {
        return access.primitive == primitive && access.line == line && access.bytes == bytes && (access.lanes >> thread.lane & 1u) == 0;
    });
    if (found == accesses.end()) {
        found = accesses.insert(accesses.end(), LaneAccess{primitive, line, bytes, 0, {}});
    }
    if (found->lanes == 0) {
        count(primitive, 0);
    }
    count(primitive, static_cast<std::uint64_t>(bytes), 0);
    found->lanes |= 1u << thread.lane;
    found->addresses[thread.lane] = address;
    if (found->lanes == 0xffffffffu) {
        count_wavefronts(*thread.block, primitive, found->addresses, kWarp, bytes);
        accesses.erase(found);
    }
}

// What some lanes of a warp never joined.
void count_leftovers(Block& block) {
    for (Warp& warp : block.warps) {
        for (LaneAccess const& access : warp.accesses) {
            std::uint32_t addresses[kWarp];
            int lanes = 0;
            for (int lane = 0; lane < kWarp; ++lane) {
                if (access.lanes >> lane & 1u) {
                    addresses[lanes++] = access.addresses[lane];
                }
            }
            count_wavefronts(block, access.primitive, addresses, lanes, access.bytes);
        }
        warp.accesses.clear();
    }
}

}  // namespace machine
