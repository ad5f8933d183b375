// What orders blocks of threads against each other: numbers in global memory that one waits for and another writes.

#include "machine.h"

namespace machine {

void wait_global(int const* address, int value, int line) {
    Thread& thread = current();
    maybe_yield();
    int found = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    while (found != value) {
        thread.block->global_waiters.push_back({&thread, address, value});
        block_on({Waiting::global, "ld.acquire", static_cast<std::uint32_t>(value), static_cast<std::uint32_t>(found), line});
        found = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    }
    thread.unfenced_global_wait = true;
}

// A number that another block has stored: bulk copies that follow are not ordered behind what it did.
int load_global_acquire(int const* address) {
    maybe_yield();
    int const found = __atomic_load_n(address, __ATOMIC_ACQUIRE);
    current().unfenced_global_wait |= found != 0;
    return found;
}

// From 0 to 1: atom.cas.
int claim_global(int* address) {
    maybe_yield();
    int found = 0;
    __atomic_compare_exchange_n(address, &found, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    current().unfenced_global_wait |= found != 0;
    if (found == 1) {
        current().fiber.leave();  // still ready: who has it may be behind in this OS thread, or has failed, and callers ask again
    } else {
        maybe_yield();
    }
    return found;
}

// Counts up to `last` and begins again: atom.inc.
int arrive_global(int* counter, int last, int line) {
    maybe_yield();
    int before = __atomic_load_n(counter, __ATOMIC_RELAXED);
    do {
        if (before < 0 || before > last) {
            fail("kernel.cc:%d finds %d arrivals where %d are the last", line, before, last);
        }
    } while (!__atomic_compare_exchange_n(
        counter, &before, before == last ? 0 : before + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    maybe_yield();
    return before;
}

// Publishes what has been done; copies that this thread only issued have not.
void store_global_release(int* address, int value, int line) {
    BulkStores const& stores = current().stores;
    if (!stores.open.empty() || !stores.groups.empty()) {
        BoxCopy const& copy = stores.open.empty() ? stores.groups.front().front() : stores.open.front();
        fail("kernel.cc:%d tells other blocks that the bulk copy of kernel.cc:%d is done, which was not waited for", line, copy.line);
    }
    maybe_yield();
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
    maybe_yield();
}

void fence_proxy_async_global() {
    current().unfenced_global_wait = false;
}

}  // namespace machine
