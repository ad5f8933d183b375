// mbarriers and proxy fences.

#include "machine.h"

namespace machine {

namespace {

Mbarrier& barrier_at(std::uint32_t address, int line) {
    Mbarriers& barriers = current().block->mbarriers;
    auto const found = barriers.find(address);
    if (found == barriers.end()) {
        fail("kernel.cc:%d uses the mbarrier at 0x%x, which is not initialised", line, address);
    }
    return found->second;
}

void complete_phase_if_done(Mbarrier& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase += 1;
        barrier.pending = barrier.count;
        wake_all(barrier.waiters);
    }
}

}  // namespace

void mbarrier_init(std::uint32_t address, std::uint32_t arrivals, int line) {
    Thread& thread = current();
    if (arrivals == 0 || arrivals >= 1u << 20) {
        fail("mbarrier at 0x%x at kernel.cc:%d for %u arrivals: 1 to 2^20 - 1 are needed", address, line, arrivals);
    }
    if (thread.block->mbarriers.count(address) != 0) {
        fail("kernel.cc:%d initialises the mbarrier at 0x%x again", line, address);
    }
    thread.block->shared.reserve_barrier(address, line);
    Mbarrier& barrier = thread.block->mbarriers[address];
    barrier.count = barrier.pending = arrivals;
    barrier.thread = thread.index;
    maybe_yield();
}

// fence.mbarrier_init, or any proxy fence, by the thread that initialised.
void fence_mbarrier_init(int) {
    Thread& thread = current();
    for (auto& [address, barrier] : thread.block->mbarriers) {
        static_cast<void>(address);
        barrier.visible_to_tma |= barrier.thread == thread.index;
    }
}

void fence_proxy_async(int line) {
    Thread& thread = current();
    thread.seen_landings = thread.block->shared.landings();
    thread.block->shared.publish(thread.unpublished);
    fence_mbarrier_init(line);
    maybe_yield();
}

// Bytes are expected before the arrival counts: the phase can not complete between the two.
void mbarrier_arrive(std::uint32_t address, std::uint32_t arrivals, std::uint32_t expected_bytes, int line) {
    maybe_yield();
    Mbarrier& barrier = barrier_at(address, line);
    if (arrivals > barrier.pending) {
        fail("kernel.cc:%d arrives at the mbarrier at 0x%x, where all %u arrivals of phase %u have been made", line, address,
             barrier.count, barrier.phase);
    }
    barrier.bytes += expected_bytes;
    barrier.pending -= arrivals;
    complete_phase_if_done(barrier);
    maybe_yield();
}

void mbarrier_wait(std::uint32_t address, std::uint32_t parity, int line) {
    if (parity > 1) {
        fail("kernel.cc:%d waits for parity %u of the mbarrier at 0x%x", line, parity, address);
    }
    maybe_yield();
    Mbarrier& barrier = barrier_at(address, line);
    // The phase of parity P has completed when the current one has the other parity. A thread that is woken looks again: meanwhile
    // the barrier may have gone on to a phase that it must then wait for.
    while ((barrier.phase & 1) == parity) {
        barrier.waiters.push_back(&current());
        block_on({Waiting::mbarrier, "mbarrier", address, parity, line});
    }
}

// An arrival that the copies of a thread made. Called by the schedule, not by a thread.
void complete_arrival(Block& block, std::uint32_t address) {
    Mbarrier& barrier = block.mbarriers[address];
    if (barrier.pending == 0) {
        throw Failure(text("cp.async arrives at the mbarrier at 0x%x, where all %u arrivals of phase %u have been made", address,
                           barrier.count, barrier.phase));
    }
    barrier.pending -= 1;
    complete_phase_if_done(barrier);
}

// Bytes of a copy have landed. Called by the schedule, not by a thread.
void complete_bytes(Block& block, std::uint32_t address, std::uint32_t bytes) {
    Mbarrier& barrier = block.mbarriers[address];
    barrier.bytes -= bytes;
    complete_phase_if_done(barrier);
}

}  // namespace machine
