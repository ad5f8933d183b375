// Shared memory of one block: the bytes at the device's addresses, and a shadow that knows what has become of each 16 of them.
//
// Two kinds of accesses meet here. The *generic proxy* is loads, stores, ldmatrix and stmatrix of threads; the *async proxy* is
// TMA and wgmma (PTX ISA, "Async proxy"). The shadow finds, at the access and not by a wrong result later:
//   - a read or write of bytes that a copy in flight will still write;
//   - an async read (or overwrite) of bytes that a thread stored and has not published with fence.proxy.async;
//   - an async read of bytes of a cp.async that arrived at a barrier, with no such fence of the reading thread since;
//   - through `version`, bytes that change while a TMA store or a wgmma that was issued still reads them.
// Everything starts as NaN (in all three floating-point types), and so do the bytes that a copy in flight will write.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "failure.h"

namespace machine {

constexpr std::uint32_t kGranule = 16;  // the unit of swizzles, cp.async and TMA
constexpr unsigned char kPoison = 0xff;

struct Granule {
    std::uint32_t version = 0;      // counts writes of any kind
    std::uint16_t unpublished = 0;  // generic stores that their threads have not fenced
    std::uint16_t in_flight = 0;    // copies that will still write here
    std::uint32_t landing = 0;      // which cp.async with an arrival at a barrier wrote here last; 0: none
    int line = 0;                   // who wrote, or will write, last
    int thread = 0;
};

class SharedMemory {
  public:
    void reset(std::uint32_t base, std::uint32_t bytes, bool has_async_proxy) {
        base_ = base;
        landings_ = reader_landings_ = 0;
        has_async_proxy_ = has_async_proxy;
        bytes_.assign(bytes, kPoison);
        granules_.assign((bytes + kGranule - 1) / kGranule, Granule{});
        is_barrier_.assign((bytes + 7) / 8, false);
    }

    std::uint32_t base() const { return base_; }

    // A barrier object: nobody else may write its 8 bytes.
    void reserve_barrier(std::uint32_t address, int line) {
        check_range(address, 8, 8, line);
        is_barrier_[(address - base_) / 8] = true;
    }

    unsigned char const* generic_read(std::uint32_t address, std::uint32_t bytes, int line) {
        check_range(address, bytes, bytes, line);
        for_each_granule(address, bytes, [&](Granule& granule, std::uint32_t where) {
            if (granule.in_flight != 0) {
                fail("kernel.cc:%d reads shared memory 0x%x, which the copy of %s has not been waited for", line, where,
                     author(granule).c_str());
            }
        });
        return at(address);
    }

    // `unpublished` takes the granules that the writing thread must fence before the async proxy may see them.
    void generic_write(
        std::uint32_t address, void const* value, std::uint32_t bytes, int thread, std::vector<std::uint32_t>& unpublished, int line) {
        check_range(address, bytes, bytes, line);
        check_not_barrier(address, bytes, line);
        for_each_granule(address, bytes, [&](Granule& granule, std::uint32_t where) {
            if (granule.in_flight != 0) {
                fail("kernel.cc:%d writes shared memory 0x%x, which the copy of %s will still write", line, where,
                     author(granule).c_str());
            }
            if (has_async_proxy_) {
                granule.unpublished += 1;
                unpublished.push_back((where - base_) / kGranule);
            }
            mark(granule, thread, line);
        });
        std::memcpy(at(address), value, bytes);
    }

    // fence.proxy.async of one thread, for its own stores.
    void publish(std::vector<std::uint32_t>& unpublished) {
        for (std::uint32_t const index : unpublished) {
            granules_[index].unpublished -= 1;
        }
        unpublished.clear();
    }

    // One 16-byte chunk, for TMA or wgmma. Adds the chunk's version to `versions`.
    unsigned char const* async_read(std::uint32_t address, std::uint64_t& versions, int line) {
        check_range(address, kGranule, kGranule, line);
        Granule const& granule = granules_[(address - base_) / kGranule];
        if (granule.in_flight != 0) {
            fail("kernel.cc:%d reads shared memory 0x%x, which the copy of %s has not been waited for", line, address,
                 author(granule).c_str());
        }
        if (granule.landing > reader_landings_) {
            fail("kernel.cc:%d reads shared memory 0x%x through the async proxy; no fence.proxy.async of the reader followed the "
                 "cp.async of %s", line, address, author(granule).c_str());
        }
        if (granule.unpublished != 0) {
            fail("kernel.cc:%d reads shared memory 0x%x through the async proxy; the store of %s has no fence.proxy.async behind it",
                 line, address, author(granule).c_str());
        }
        versions += granule.version;
        return at(address);
    }

    std::uint32_t version(std::uint32_t address) const { return granules_[(address - base_) / kGranule].version; }

    // A copy is issued: its destination is nobody's until it lands.
    void begin_copy(std::uint32_t address, std::uint32_t bytes, bool async_proxy, int thread, int line) {
        check_range(address, bytes, bytes < kGranule ? bytes : kGranule, line);
        check_not_barrier(address, bytes, line);
        for_each_granule(address, bytes, [&](Granule& granule, std::uint32_t where) {
            if (granule.in_flight != 0 && bytes >= kGranule) {
                fail("kernel.cc:%d copies to shared memory 0x%x, which the copy of %s will still write", line, where,
                     author(granule).c_str());
            }
            if (granule.unpublished != 0 && async_proxy) {
                fail("kernel.cc:%d copies to shared memory 0x%x through the async proxy; the store of %s has no fence.proxy.async "
                     "behind it", line, where, author(granule).c_str());
            }
            granule.in_flight += 1;
            mark(granule, thread, line);
        });
        std::memset(at(address), kPoison, bytes);
    }

    // The copy lands: what `bytes` of it hold. `end_copy` must follow for the whole destination.
    unsigned char* landing(std::uint32_t address) { return at(address); }

    void end_copy(std::uint32_t address, std::uint32_t bytes) {
        for_each_granule(address, bytes, [&](Granule& granule, std::uint32_t) {
            granule.in_flight -= 1;
            granule.version += 1;
        });
    }

    // The end of a cp.async that arrives at a barrier.
    void land_small_copy(std::uint32_t address, void const* data, std::uint32_t bytes) {
        end_copy(address, bytes);
        std::memcpy(at(address), data, bytes);
        landings_ += 1;
        granules_[(address - base_) / kGranule].landing = landings_;
    }

    // How many of those there were, and up to which of them the next async reads have fences.
    std::uint32_t landings() const { return landings_; }
    void read_behind(std::uint32_t landings) { reader_landings_ = landings; }

    // The end of a cp.async, which belongs to the generic proxy: wgmma and TMA need a fence behind it.
    void end_small_copy(std::uint32_t address, void const* data, std::uint32_t bytes, std::vector<std::uint32_t>& unpublished) {
        end_copy(address, bytes);
        std::memcpy(at(address), data, bytes);
        if (has_async_proxy_) {
            std::uint32_t const index = (address - base_) / kGranule;
            granules_[index].unpublished += 1;
            unpublished.push_back(index);
        }
    }

    void check_range(std::uint32_t address, std::uint32_t bytes, std::uint32_t alignment, int line) const {
        if (address % alignment != 0) {
            fail("kernel.cc:%d: shared address 0x%x is not a multiple of %u", line, address, alignment);
        }
        if (address < base_ || address - base_ + bytes > bytes_.size()) {
            fail("kernel.cc:%d: shared address 0x%x (%u bytes) is outside of the block's 0x%x to 0x%x", line, address, bytes, base_,
                 static_cast<unsigned>(base_ + bytes_.size()));
        }
    }

  private:
    static std::string author(Granule const& granule) {
        return text("kernel.cc:%d (thread %d)", granule.line, granule.thread);
    }

    static void mark(Granule& granule, int thread, int line) {
        granule.version += 1;
        granule.thread = thread;
        granule.line = line;
    }

    unsigned char* at(std::uint32_t address) { return bytes_.data() + (address - base_); }

    template <class Visit>
    void for_each_granule(std::uint32_t address, std::uint32_t bytes, Visit visit) {
        std::uint32_t const last = (address - base_ + bytes - 1) / kGranule;
        for (std::uint32_t index = (address - base_) / kGranule; index <= last; ++index) {
            visit(granules_[index], base_ + index * kGranule);
        }
    }

    void check_not_barrier(std::uint32_t address, std::uint32_t bytes, int line) const {
        for (std::uint32_t index = (address - base_) / 8; index <= (address - base_ + bytes - 1) / 8; ++index) {
            if (is_barrier_[index]) {
                fail("kernel.cc:%d writes over the mbarrier at 0x%x", line, base_ + 8 * index);
            }
        }
    }

    std::uint32_t base_ = 0;
    std::uint32_t landings_ = 0;
    std::uint32_t reader_landings_ = 0;
    bool has_async_proxy_ = false;
    std::vector<unsigned char> bytes_;
    std::vector<Granule> granules_;
    std::vector<unsigned char> is_barrier_;
};

// Swizzles xor address bits [4, 4+b) with bits [7, 7+b), b = 3, 2, 1 for 128, 64, 32 bytes (0: none). TMA and wgmma apply them to the
// absolute address (confirmed on an H200).
inline std::uint32_t swizzle(std::uint32_t address, unsigned span) {
    std::uint32_t const mask = span == 128 ? 7 : span == 64 ? 3 : span == 32 ? 1 : 0;
    return address ^ (address >> 7 & mask) << 4;
}

}  // namespace machine
