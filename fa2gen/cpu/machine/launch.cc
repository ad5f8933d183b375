// The door that Python calls: runs all blocks of a grid, a few at a time on each OS thread.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>

#include "launch.h"
#include "machine.h"

namespace machine {

namespace {

using Clock = std::chrono::steady_clock;

// Shared by the OS threads of one launch.
struct Progress {
    std::atomic<std::uint64_t> next_block{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string message;  // of the first failure
    Stats stats{};

    void fail_with(std::string const& text) {
        std::lock_guard<std::mutex> const lock(mutex);
        if (!failed.exchange(true)) {
            message = text;
        }
    }
};

void work(Launch const& launch, Kernel kernel, void* const* arguments, Progress& progress) {
    std::uint64_t const num_blocks = static_cast<std::uint64_t>(launch.grid[0]) * launch.grid[1] * launch.grid[2];
    auto const deadline = Clock::now() + std::chrono::duration<double>(launch.time_limit);
    std::vector<std::unique_ptr<Block>> idle;
    std::vector<std::unique_ptr<Block>> running;
    std::mt19937_64 rng(launch.seed);
    std::uint64_t steps = 0;
    std::vector<Block*> stalled;  // since a block last moved or ended
    while (!progress.failed) {
        while (running.size() < launch.num_resident) {
            std::uint64_t const block = progress.next_block++;
            if (block >= num_blocks) {
                break;
            }
            if (idle.empty()) {
                idle.push_back(std::make_unique<Block>(launch, kernel, arguments));
            }
            auto const plane = static_cast<std::uint64_t>(launch.grid[0]) * launch.grid[1];
            idle.back()->start({static_cast<unsigned>(block % launch.grid[0]), static_cast<unsigned>(block % plane / launch.grid[0]),
                                static_cast<unsigned>(block / plane)});
            running.push_back(std::move(idle.back()));
            idle.pop_back();
        }
        if (running.empty()) {
            break;
        }
        std::size_t const i = launch.seed == 0 ? 0 : rng() % running.size();
        Block::Step const step = running[i]->step();
        if (step != Block::Step::stalled) {
            stalled.clear();
        } else if (std::find(stalled.begin(), stalled.end(), running[i].get()) == stalled.end()) {
            stalled.push_back(running[i].get());
            // Another OS thread's blocks may still help; then the time limit decides.
            if (stalled.size() == running.size() && launch.num_workers == 1) {
                running.front()->report_deadlock(stalled.size() - 1);
            }
            std::this_thread::yield();
        }
        if (step == Block::Step::ended) {
            std::lock_guard<std::mutex> const lock(progress.mutex);
            progress.stats.add(running[i]->stats);
            running[i]->stats = {};
            idle.push_back(std::move(running[i]));
            running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
        }
        if (++steps % 1024 == 0 && Clock::now() > deadline) {
            throw Failure(text("still running after %g s: an endless loop?", launch.time_limit));
        }
    }
}

}  // namespace

int launch(Launch const& launch, Kernel kernel, void* const* arguments, char* message, std::size_t message_bytes, Stats* stats) {
    Progress progress;
    auto run = [&] {
        try {
            work(launch, kernel, arguments, progress);
        } catch (Failure const& failure) {
            progress.fail_with(failure.message);
        } catch (std::exception const& error) {
            progress.fail_with(error.what());
        }
        self = nullptr;
    };
    std::vector<std::thread> workers;
    for (std::uint32_t i = 1; i < launch.num_workers; ++i) {
        workers.emplace_back(run);
    }
    run();
    for (std::thread& worker : workers) {
        worker.join();
    }
    *stats = progress.stats;
    std::size_t const length = std::min(progress.message.size(), message_bytes - 1);
    std::memcpy(message, progress.message.data(), length);
    message[length] = 0;
    return progress.failed ? 1 : 0;
}

}  // namespace machine
