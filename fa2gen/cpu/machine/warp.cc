// Shuffles, votes, barriers by number and the register file.

#include <algorithm>
#include <cstring>

#include "machine.h"
#include "warp.h"

namespace machine {

void sync_warp(int line) {
    int nothing = 0;
    collective("__syncwarp", nothing, line, [](int**) {});
}

bool elect_one(int line) {
    int nothing = 0;
    collective("elect.sync", nothing, line, [](int**) {});
    return current().lane == current().warp->elected;
}

namespace {

struct Shuffle {
    std::uint32_t value, result;
    unsigned source;
};

}  // namespace

std::uint32_t shuffle_from(std::uint32_t value, int source, int line) {
    Shuffle operands{value, 0, static_cast<unsigned>(source) % kWarp};
    collective("shfl.sync", operands, line, [](Shuffle** lanes) {
        for (int lane = 0; lane < kWarp; ++lane) {
            lanes[lane]->result = lanes[lanes[lane]->source]->value;
        }
    });
    return operands.result;
}

std::uint32_t shuffle_xor(std::uint32_t value, int lane_mask, int line) {
    return shuffle_from(value, current().lane ^ lane_mask, line);
}

// Each lane names its own source.
std::uint32_t shuffle_by_lane(std::uint32_t value, int source, int line) {
    struct Operands {
        std::uint32_t value, result;
        int source;
    } operands{value, 0, source};
    collective("shfl.sync", operands, line, [](Operands** lanes) {
        for (int lane = 0; lane < kWarp; ++lane) {
            lanes[lane]->result = lanes[lanes[lane]->source & (kWarp - 1)]->value;
        }
    });
    return operands.result;
}

// Barriers by number (PTX ISA, "bar / barrier") ----------------------------------------------------------------------------

void named_barrier(int number, int num_threads, bool wait, int line) {
    Thread& thread = current();
    if (number < 0 || number >= kNumNamedBarriers) {
        fail("barrier %d at kernel.cc:%d: there are 0 to %d", number, line, kNumNamedBarriers - 1);
    }
    if (num_threads <= 0 || num_threads % kWarp != 0 || num_threads > static_cast<int>(thread.block->launch.num_threads)) {
        fail("barrier %d at kernel.cc:%d for %d threads: a multiple of 32 up to the block's %u is needed", number, line, num_threads,
             thread.block->launch.num_threads);
    }
    NamedBarrier& barrier = thread.block->named_barriers[number];
    if (barrier.arrived != 0 && barrier.expected != num_threads) {
        fail("barrier %d at kernel.cc:%d for %d threads, while %d threads have arrived there for %d", number, line, num_threads,
             barrier.arrived, barrier.expected);
    }
    maybe_yield();
    barrier.expected = num_threads;
    barrier.arrived += 1;
    if (barrier.arrived == num_threads) {
        barrier.arrived = 0;
        wake_all(barrier.waiters);
    } else if (wait) {
        barrier.waiters.push_back(&thread);
        block_on({Waiting::named_barrier, "bar.sync", static_cast<std::uint32_t>(number), static_cast<std::uint32_t>(num_threads), line});
    }
}

void sync_block(int line) {
    named_barrier(0, static_cast<int>(current().block->launch.num_threads), true, line);
}

// Registers (PTX ISA, "setmaxnreg"): nothing to compute, but the rules and the pool are checked ------------------------------

void set_max_registers(int count, bool increase, int line) {
    if (count % 8 != 0 || count < 24 || count > 256) {
        fail("setmaxnreg %d at kernel.cc:%d: a multiple of 8 from 24 to 256 is needed", count, line);
    }
    Block& block = *current().block;
    Warp& warp = *current().warp;
    int nothing = 0;
    collective("setmaxnreg", nothing, line, [](int**) {});
    if (current().lane == 0) {
        warp.register_moves += 1;
        int const change = count - warp.registers;
        if (increase ? change < 0 : change > 0) {
            fail("setmaxnreg.%s %d at kernel.cc:%d, but the warp has %d registers a thread", increase ? "inc" : "dec", count, line,
                 warp.registers);
        }
        while (change > block.free_registers) {
            block.register_waiters.push_back(&current());
            block_on({Waiting::registers, "registers of the block's pool: each thread wants more, in units of a warp",
                      static_cast<std::uint32_t>(change), 0, line});
        }
        block.free_registers -= change;
        warp.registers = count;
        if (!increase) {
            wake_all(block.register_waiters);
        }
    }
    collective("setmaxnreg", nothing, line, [](int**) {});
}

}  // namespace machine
