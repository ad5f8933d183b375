// Blocks, warps, threads and the schedule: see machine.h.

#include "machine.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <map>

namespace machine {

__thread ThreadView const* self = nullptr;

std::string text(char const* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

void fail(char const* format, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    std::string where;
    if (self != nullptr) {
        Thread const& thread = current();
        Index3 const block = thread.block_idx;
        where = text("block (%u, %u, %u) thread %d: ", block.x, block.y, block.z, thread.index);
    }
    throw Failure(where + buffer);
}

// Threads --------------------------------------------------------------------------------------------------------------

namespace {

// A failure inside a fiber, on its way to the scheduler: exceptions do not cross stacks.
thread_local std::unique_ptr<Failure> failure;

void run_thread() {
    Thread& thread = current();
    thread.fiber.started();
    try {
        thread.block->kernel(thread.block->arguments);
        finish_stores(thread);
        check_wgmma_end(thread);
    } catch (Failure const& caught) {
        failure = std::make_unique<Failure>(caught);
    }
    thread.done = true;
    thread.fiber.leave(/*finished=*/true);
}

}  // namespace

void block_on(Waiting waiting) {
    Thread& thread = current();
    thread.waiting = waiting;
    thread.warp->ready &= ~(1u << thread.lane);
    thread.fiber.leave();
}

void wake(Thread& thread) {
    thread.waiting = {};
    thread.warp->ready |= 1u << thread.lane;
}

void wake_all(std::vector<Thread*>& threads) {
    for (Thread* thread : threads) {
        wake(*thread);
    }
    threads.clear();
}

void maybe_yield() {
    Thread& thread = current();
    if (thread.block->chance(4)) {
        thread.fiber.leave();  // still ready
    }
}

// Blocks ---------------------------------------------------------------------------------------------------------------

Block::Block(Launch const& launch, Kernel kernel, void* const* arguments)
    : launch(launch), kernel(kernel), arguments(arguments), stacks_(launch.num_threads) {}

void Block::start(Index3 block_index) {
    index = block_index;
    std::uint64_t const linear = index.x + launch.grid[0] * (index.y + static_cast<std::uint64_t>(launch.grid[1]) * index.z);
    rng_.seed(launch.seed * 0x9e3779b97f4a7c15u + linear);
    shared.reset(launch.shared_base, launch.shared_bytes, launch.has_async_proxy != 0);
    mbarriers.clear();
    for (NamedBarrier& barrier : named_barriers) {
        barrier = {};
    }
    loads.clear();
    arrivals.clear();
    global_waiters.clear();
    free_registers = 0;
    register_waiters.clear();
    warpgroups.clear();
    warpgroups.resize((launch.num_threads + kWarpgroup - 1) / kWarpgroup);
    warps.clear();
    warps.resize(launch.num_threads / kWarp);
    threads.clear();
    last_warp_ = -1;
    engine_priority_ = draw_priority();

    // A thread starts with its share of the register file, as __launch_bounds__ of one block a multiprocessor gives it.
    int const registers = static_cast<int>(std::min<std::uint32_t>(65536u / launch.num_threads / 8 * 8, 256));
    for (std::size_t i = 0; i < warps.size(); ++i) {
        warps[i].index = static_cast<int>(i);
        warps[i].ready = 0xffffffffu;
        warps[i].priority = draw_priority();
        warps[i].elected = random() ? static_cast<int>(draw(kWarp)) : 0;
        warps[i].registers = registers;
    }
    for (std::uint32_t i = 0; i < launch.num_threads; ++i) {
        Thread& thread = threads.emplace_back();
        thread.thread_idx = {i, 0, 0};
        thread.block_idx = index;
        thread.block_dim = {launch.num_threads, 1, 1};
        thread.grid_dim = {launch.grid[0], launch.grid[1], launch.grid[2]};
        thread.block = this;
        thread.warp = &warps[i / kWarp];
        thread.index = static_cast<int>(i);
        thread.lane = static_cast<int>(i % kWarp);
        thread.fiber.reset(stacks_.stack(i), run_thread);
    }
}

void Block::wake_global_waiters() {
    for (std::size_t i = 0; i < global_waiters.size();) {
        GlobalWaiter const& waiter = global_waiters[i];
        if (__atomic_load_n(waiter.address, __ATOMIC_ACQUIRE) != waiter.value) {
            ++i;
            continue;
        }
        wake(*waiter.thread);
        global_waiters.erase(global_waiters.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

Block::Step Block::step() {
    wake_global_waiters();
    int const num_warps = static_cast<int>(warps.size());
    Warp* next = nullptr;
    bool const has_copies = !loads.empty() || !arrivals.empty();
    if (!random()) {
        for (int i = 1; i <= num_warps && next == nullptr; ++i) {
            Warp& warp = warps[static_cast<std::size_t>((last_warp_ + i) % num_warps)];
            next = warp.ready != 0 ? &warp : nullptr;
        }
    } else {
        for (Warp& warp : warps) {
            if (warp.ready != 0 && (next == nullptr || warp.priority > next->priority)) {
                next = &warp;
            }
        }
        if (has_copies && next != nullptr && engine_priority_ > next->priority) {
            next = nullptr;
        }
    }

    if (next != nullptr) {
        last_warp_ = next->index;
        if (chance(8)) {
            next->priority = draw_priority();
        }
        run(*next);
        return Step::moved;
    }
    if (has_copies) {
        land_one_copy();
        return Step::moved;
    }
    if (!global_waiters.empty()) {
        return Step::stalled;
    }
    for (Thread const& thread : threads) {
        if (!thread.done) {
            report_deadlock();
        }
    }
    check_end();
    return Step::ended;
}

void Block::run(Warp& warp) {
    std::uint32_t const lanes = warp.ready;
    int const first = random() ? static_cast<int>(draw(kWarp)) : 0;
    for (int i = 0; i < kWarp; ++i) {
        int const lane = (first + i) % kWarp;
        // A lane that another one woke meanwhile runs in the next round.
        if ((lanes & warp.ready & 1u << lane) == 0) {
            continue;
        }
        Thread& thread = threads[static_cast<std::size_t>(warp.index * kWarp + lane)];
        self = &thread;
        thread.fiber.enter();
        self = nullptr;
        if (thread.done) {
            warp.ready &= ~(1u << lane);
        }
        if (failure) {
            Failure const caught = *failure;
            failure.reset();
            throw caught;
        }
    }
}

void Block::land_one_copy() {
    std::size_t i = random() ? draw(static_cast<unsigned>(loads.size() + arrivals.size())) : 0;
    if (chance(8)) {
        engine_priority_ = draw_priority();
    }
    if (i >= loads.size()) {
        i -= loads.size();
        CopiesAndArrival const copies = std::move(arrivals[i]);
        arrivals.erase(arrivals.begin() + static_cast<std::ptrdiff_t>(i));
        land(*this, copies);
        return;
    }
    BoxCopy const load = loads[i];
    loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(i));
    land(*this, load);
}

void Block::check_end() {
    count_leftovers(*this);
    bool const starts_early = std::any_of(launch.buffers, launch.buffers + launch.num_buffers,
                                          [](Buffer const& buffer) { return buffer.awaited != 0; });
    if (starts_early && std::none_of(threads.begin(), threads.end(), [](Thread const& thread) { return thread.waited_for_grid; })) {
        throw Failure(text("block (%u, %u, %u) ends with no griddepcontrol.wait: the grid behind could start before the one before "
                           "has ended", index.x, index.y, index.z));
    }
    for (std::size_t group = 0; group < warpgroups.size(); ++group) {
        for (std::size_t i = 4 * group; i < std::min(4 * group + 4, warps.size()); ++i) {
            if (warps[i].register_moves != warps[4 * group].register_moves) {
                throw Failure(text("block (%u, %u, %u): setmaxnreg was executed %d times by warp %zu and %d times by warp %zu of "
                                   "the same warpgroup", index.x, index.y, index.z, warps[4 * group].register_moves, 4 * group,
                                   warps[i].register_moves, i));
            }
        }
    }
}

void Block::report_deadlock(std::size_t others) {
    struct Group {
        int first, last, count;
    };
    std::map<std::string, Group> groups;
    for (Thread const& thread : threads) {
        if (thread.done) {
            continue;
        }
        Waiting const& w = thread.waiting;
        std::string why;
        switch (w.kind) {
            case Waiting::mbarrier: {
                Mbarrier const& barrier = mbarriers[w.number];
                why = text("mbarrier 0x%x, parity %u, which is in phase %u with %u of %u arrivals and %lld bytes missing", w.number,
                           w.detail, barrier.phase, barrier.pending, barrier.count, static_cast<long long>(barrier.bytes));
                break;
            }
            case Waiting::named_barrier:
                why = text("barrier %u of %u threads, where %d have arrived", w.number, w.detail, named_barriers[w.number].arrived);
                break;
            case Waiting::collective:
                why = text("%s, which %d of 32 lanes of warp %d have reached", w.what, thread.warp->collective.arrived,
                           thread.warp->index);
                break;
            case Waiting::wgmma: {
                Warpgroup const& group = warpgroups[static_cast<std::size_t>(thread.index / kWarpgroup)];
                why = text("the wgmma of kernel.cc:%d, which %d of 128 threads have issued",
                           group.instructions[static_cast<std::size_t>(group.computed - group.first)].line,
                           group.instructions[static_cast<std::size_t>(group.computed - group.first)].issued);
                break;
            }
            case Waiting::global:
                why = text("%u in global memory, where %u is: another block's to write", w.number, w.detail);
                break;
            default:
                why = text("%s %u", w.what, w.number);
        }
        why += text(" at kernel.cc:%d", w.line);
        auto const [where, fresh] = groups.try_emplace(why, Group{thread.index, thread.index, 0});
        static_cast<void>(fresh);
        where->second.last = thread.index;
        where->second.count += 1;
    }
    std::string report = text("deadlock in block (%u, %u, %u), with no copy in flight:", index.x, index.y, index.z);
    if (others != 0) {
        report = text("deadlock of %zu blocks, of which no other starts before one ends; in block (%u, %u, %u):", others + 1, index.x,
                      index.y, index.z);
    }
    for (auto const& [why, group] : groups) {
        report += group.count == 1 ? text("\n  thread %d waits for ", group.first)
                                   : text("\n  %d threads (%d to %d) wait for ", group.count, group.first, group.last);
        report += why;
    }
    throw Failure(report);
}

}  // namespace machine
