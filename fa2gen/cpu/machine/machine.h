// The machine: blocks of warps of threads, one fiber a thread, and the schedule that runs them.
//
// A thread runs until it must wait; then the schedule decides who is next: a warp, or the copy engine, which lands one TMA load.
// Seed 0 is the fixed schedule: warps in turn, and copies land only when no thread can run, which is as late as possible. Any other
// seed draws priorities for the warps and the engine and redraws them now and then, so that some warp starves or runs far ahead;
// threads then also give way at random where they arrive or issue. The same seed gives the same run.

#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cp_async.h"
#include "device.h"
#include "failure.h"
#include "fiber.h"
#include "mbarrier.h"
#include "shared_memory.h"
#include "stats.h"
#include "tma.h"
#include "wgmma.h"

namespace machine {

constexpr int kWarp = 32;
constexpr int kNumNamedBarriers = 16;

struct Block;
struct Warp;

// What a thread waits for; `what` and the numbers are for the report of a deadlock.
struct Waiting {
    enum Kind : std::uint8_t { nothing, collective, mbarrier, named_barrier, wgmma, registers, global } kind = nothing;
    char const* what = "";
    std::uint32_t number = 0;
    std::uint32_t detail = 0;
    int line = 0;
};

struct Thread : ThreadView {
    Block* block = nullptr;
    Warp* warp = nullptr;
    int index = 0;
    int lane = 0;
    bool done = false;
    Fiber fiber;
    Waiting waiting;

    std::vector<std::uint32_t> unpublished;  // granules of shared memory
    std::uint32_t seen_landings = 0;         // of cp.async with an arrival, as many as its last fence.proxy.async saw
    SmallCopies small_copies;
    BulkStores stores;
    bool waited_for_grid = false;
    bool unfenced_global_wait = false;  // has waited for another block, and no proxy fence followed
    WgmmaThread wgmma;
};

// An instruction that all 32 lanes execute together: each leaves its operands, the last one computes for all.
struct Collective {
    char const* name = nullptr;
    int line = 0;
    int arrived = 0;
    void* operands[kWarp] = {};
};

// The same load or store in the lanes of a warp, put together to count bank conflicts.
struct LaneAccess {
    Primitive primitive;
    int line;
    int bytes;
    std::uint32_t lanes;
    std::uint32_t addresses[kWarp];
};

struct Warp {
    std::uint32_t ready = 0;  // lanes that can run
    double priority = 0;
    int index = 0;
    int elected = 0;  // elect.sync's choice: any lane, but always the same
    int registers = 0;
    int register_moves = 0;
    Collective collective;
    std::vector<LaneAccess> accesses;
};

struct NamedBarrier {
    int expected = 0;
    int arrived = 0;
    std::vector<Thread*> waiters;
};

// A thread that waits for a number in global memory, which another block writes.
struct GlobalWaiter {
    Thread* thread;
    int const* address;
    int value;
};

struct Buffer {
    char const* name;
    unsigned char* address;
    std::uint64_t bytes;
    std::uint32_t awaited;  // the grid before writes it, and this one may start before that has ended
};

// What Python asks for (fa2gen/cpu/run.py has the same fields).
struct Launch {
    std::uint32_t grid[3];
    std::uint32_t num_threads;
    std::uint32_t shared_base;
    std::uint32_t shared_bytes;
    std::uint32_t has_async_proxy;
    std::uint32_t count_stats;
    std::uint32_t num_workers;   // OS threads
    std::uint32_t num_resident;  // blocks that one OS thread runs in turn
    std::uint64_t seed;
    double time_limit;  // seconds
    std::uint32_t num_buffers;
    Buffer const* buffers;
};

using Kernel = void (*)(void* const* arguments);

struct Block {
    Block(Launch const& launch, Kernel kernel, void* const* arguments);

    void start(Index3 index);
    // One decision of the schedule: whether a thread or a copy has moved; else all have ended, or only another block can help.
    enum class Step { moved, ended, stalled };
    Step step();
    // Its threads that can not go on; with `others` blocks of this launch that can not either.
    [[noreturn]] void report_deadlock(std::size_t others = 0);

    Launch const& launch;
    Kernel kernel;
    void* const* arguments;

    SharedMemory shared;
    Mbarriers mbarriers;
    NamedBarrier named_barriers[kNumNamedBarriers];
    std::vector<BoxCopy> loads;               // in flight
    std::vector<CopiesAndArrival> arrivals;  // likewise
    std::vector<GlobalWaiter> global_waiters;
    int free_registers = 0;
    std::vector<Thread*> register_waiters;
    std::vector<Warpgroup> warpgroups;
    std::vector<Warp> warps;
    std::deque<Thread> threads;
    Stats stats{};
    Index3 index{};

    bool random() const { return launch.seed != 0; }
    // True once in `of` times, and never with the fixed schedule.
    bool chance(unsigned of) { return random() && rng_() % of == 0; }
    unsigned draw(unsigned below) { return static_cast<unsigned>(rng_() % below); }

  private:
    void run(Warp& warp);
    void land_one_copy();
    void wake_global_waiters();
    void check_end();
    double draw_priority() { return static_cast<double>(rng_() >> 11) * 0x1p-53; }

    Stacks stacks_;
    std::mt19937_64 rng_;
    int last_warp_ = 0;
    double engine_priority_ = 0;
};

inline Thread& current() {
    return *const_cast<Thread*>(static_cast<Thread const*>(self));
}

// The running thread stops until someone wakes it.
void block_on(Waiting waiting);
void wake(Thread& thread);
void wake_all(std::vector<Thread*>& threads);
// A point where another warp may run first, if the seed says so.
void maybe_yield();

// Global memory of the kernel is that of the launch's buffers.
Buffer const& check_inside(Launch const& launch, void const* address, std::uint64_t bytes, char const* verb, int line);
// Likewise; and the running thread has waited for the grid that writes there.
void check_awaited(void const* address, std::uint64_t bytes, char const* verb, int line);

// Waits for all 32 lanes; the last one to come calls `compute` with the operands of all.
template <class Operands, class Compute>
void collective(char const* name, Operands& operands, int line, Compute compute);

void count(Primitive primitive, std::uint64_t bytes, std::uint64_t instructions = 1);
void count_wavefronts(Block& block, Primitive primitive, std::uint32_t const* addresses, int lanes, int bytes);
void count_lane(Primitive primitive, std::uint32_t address, int bytes, int line);
void count_leftovers(Block& block);

// The parts that the schedule calls.
void land(Block& block, BoxCopy const& load);
void land(Block& block, CopiesAndArrival const& copies);
void finish_stores(Thread& thread);
void check_wgmma_end(Thread& thread);

}  // namespace machine
