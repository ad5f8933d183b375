// wgmma.mma_async: what a warpgroup has issued, and what each of its threads has not yet waited for.
//
// An instruction is computed when the last of the 128 threads has issued it, into an accumulator of its own; a thread's registers
// get the result when that thread waits. From issue to wait they hold a signaling NaN, which no copy changes and any arithmetic
// does, and must still hold it then. Operands in shared memory must not change until the last of the threads has waited.

#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "device.h"

namespace machine {

constexpr int kWarpgroup = 128;
constexpr int kMaxN = 256;

struct Thread;

// 64 x n sums, row by row. Instructions that add to the same registers with no wait between them share one.
using Accumulator = std::vector<float>;

struct Wgmma {
    WgmmaShape shape;
    bool a_in_registers;
    std::uint64_t a, b;
    bool accumulate;
    int line;
    int issued = 0;  // by how many threads
    int waited = 0;  // for, by how many threads
    std::shared_ptr<Accumulator> accumulator;
    std::vector<std::uint32_t> a_registers;   // [thread][4]
    std::uint64_t versions = 0;               // of the shared operands, when computed
    std::uint32_t seen_landings = UINT32_MAX;  // of cp.async, the least that a fence of a thread that issued it saw
};

// Registers that a thread gave to a wgmma: wgmma.fence looks at all of them, so that a later change shows.
struct RegisterArray {
    std::uint32_t const* first;
    int count;
    std::uint64_t hash;  // at the last fence
};

// An accumulator in flight: the registers `d` of one thread belong to the hardware until instruction `last` is waited for.
struct Pending {
    float* d;
    std::shared_ptr<Accumulator> accumulator;
    int n;
    std::int64_t last;
};

struct PendingA {
    ARegister a[4];
    std::int64_t index;
    int line;
};

struct WgmmaThread {
    std::int64_t issued = 0;
    std::int64_t waited = 0;
    std::vector<std::int64_t> groups;  // instructions issued when each group was committed
    bool fenced = false;               // since the last wait
    std::vector<RegisterArray> arrays;
    std::vector<Pending> pending;
    std::deque<PendingA> pending_a;
};

struct Warpgroup {
    std::deque<Wgmma> instructions;  // `first` is the index of the oldest that is kept
    std::int64_t first = 0;
    std::int64_t computed = 0;
    std::vector<Thread*> waiters;
};

}  // namespace machine
