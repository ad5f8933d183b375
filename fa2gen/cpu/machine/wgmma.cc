// wgmma: see wgmma.h for what is kept, and the PTX ISA for "wgmma.mma_async", "Matrix descriptor format" and "Strides".

#include "wgmma.h"

#include <algorithm>

#include "machine.h"
#include "number.h"
#include "warp.h"

namespace machine {

namespace {

constexpr int kK = 16;
constexpr int kRows = 64;
constexpr std::uint32_t kPoisonBits = 0x7fa0deadu;  // a signaling NaN

Warpgroup& warpgroup_of(Thread const& thread) {
    return thread.block->warpgroups[static_cast<std::size_t>(thread.index / kWarpgroup)];
}

// The row and column of register r of one thread (fa2gen.layout.accumulator_position).
int accumulator_row(int thread, int r) {
    return 16 * (thread / kWarp) + thread % kWarp / 4 + 8 * (r >> 1 & 1);
}
int accumulator_column(int thread, int r) {
    return 8 * (r >> 2) + 2 * (thread % 4) + (r & 1);
}

// Shared-memory operands -----------------------------------------------------------------------------------------------------

struct Descriptor {
    std::uint32_t start, leading, stride;
    unsigned span;  // of the swizzle, in bytes; 0: none
};

Descriptor decode(std::uint64_t bits, int line) {
    constexpr std::uint64_t kMeaning = 0xc0003fff3fff3fffu;
    if ((bits & ~kMeaning) != 0) {
        fail("kernel.cc:%d: matrix descriptor 0x%016llx has bits outside of its fields (a carry?) or a base offset", line,
             static_cast<unsigned long long>(bits));
    }
    constexpr unsigned kSpans[4] = {0, 128, 64, 32};
    auto field = [&](int shift) { return static_cast<std::uint32_t>(bits >> shift & 0x3fffu) << 4; };
    return {field(0), field(16), field(32), kSpans[bits >> 62]};
}

// Calls visit(address, first, k) for each 16-byte chunk of a K-major operand (rows `first`, columns k to k + 7) or of an MN-major one
// (rows `first` to first + 7, column k): `rows` x 16 elements, where rows are M of A and N of B.
template <class Visit>
void for_each_chunk(Descriptor const& d, int rows, bool transposed, Visit visit) {
    if (!transposed) {
        for (int row = 0; row < rows; ++row) {
            std::uint32_t const core = d.start + static_cast<std::uint32_t>(row / 8) * d.stride;
            std::uint32_t const within = static_cast<std::uint32_t>(row % 8) * (d.span == 0 ? 16 : d.span);
            for (std::uint32_t chunk = 0; chunk < 2; ++chunk) {
                visit(swizzle(core + within + chunk * (d.span == 0 ? d.leading : 16), d.span), row, static_cast<int>(8 * chunk));
            }
        }
        return;
    }
    for (int k = 0; k < kK; ++k) {
        auto const k8 = static_cast<std::uint32_t>(k / 8);
        auto const within = static_cast<std::uint32_t>(k % 8);
        for (std::uint32_t chunk = 0; chunk < static_cast<std::uint32_t>(rows) / 8; ++chunk) {
            // Without a swizzle the two strides change places.
            std::uint32_t const per_panel = d.span / 16;
            std::uint32_t const address = d.span == 0
                ? d.start + chunk * d.stride + k8 * d.leading + within * 16
                : d.start + chunk / per_panel * d.leading + chunk % per_panel * 16 + k8 * d.stride + within * d.span;
            visit(swizzle(address, d.span), static_cast<int>(8 * chunk), k);
        }
    }
}

template <float (*to_float)(std::uint32_t)>
void load_chunk(unsigned char const* chunk, float* out) {
    std::uint16_t halves[8];
    std::memcpy(halves, chunk, sizeof halves);
    for (int i = 0; i < 8; ++i) {
        out[i] = to_float(halves[i]);
    }
}

// An operand as numbers: element (row, k) goes to out[row * row_step + k * k_step].
template <float (*to_float)(std::uint32_t)>
void load_operand(
    SharedMemory& shared, Descriptor const& d, int rows, bool transposed, int row_step, int k_step, float* out,
    std::uint64_t& versions, int line) {
    for_each_chunk(d, rows, transposed, [&](std::uint32_t address, int row, int k) {
        float values[8];
        load_chunk<to_float>(shared.async_read(address, versions, line), values);
        float* const first = out + row * row_step + k * k_step;
        int const step = transposed ? row_step : k_step;
        for (int i = 0; i < 8; ++i) {
            first[i * step] = values[i];
        }
    });
}

// d[64][n] += a[64][16] b[16][n]
void multiply(float* __restrict d, float const* __restrict a, float const* __restrict b, int n) {
    for (int row = 0; row < kRows; ++row) {
        float* __restrict const out = d + row * n;
        float const* const a_row = a + row * kK;
        for (int column = 0; column < n; ++column) {
            float sum = out[column];
            for (int k = 0; k < kK; ++k) {
                sum += a_row[k] * b[k * n + column];
            }
            out[column] = sum;
        }
    }
}

template <float (*to_float)(std::uint32_t)>
void compute(SharedMemory& shared, Wgmma& op) {
    float a[kRows * kK];
    float b[kK * kMaxN];
    int const n = op.shape.n;
    if (op.a_in_registers) {
        for (int thread = 0; thread < kWarpgroup; ++thread) {
            for (int r = 0; r < 4; ++r) {
                int const row = accumulator_row(thread, 2 * (r % 2));
                int const k = 2 * (thread % 4) + 8 * (r / 2);
                std::uint32_t const pair = op.a_registers[static_cast<std::size_t>(4 * thread + r)];
                a[row * kK + k] = to_float(pair & 0xffffu);
                a[row * kK + k + 1] = to_float(pair >> 16);
            }
        }
    } else {
        load_operand<to_float>(shared, decode(op.a, op.line), kRows, op.shape.a_transposed, kK, 1, a, op.versions, op.line);
    }
    load_operand<to_float>(shared, decode(op.b, op.line), n, op.shape.b_transposed, 1, n, b, op.versions, op.line);
    if (!op.accumulate) {
        std::fill(op.accumulator->begin(), op.accumulator->end(), 0.0f);
    }
    multiply(op.accumulator->data(), a, b, n);
}

// All threads have waited for `op`: until now its operands in shared memory belonged to it.
void verify(SharedMemory const& shared, Wgmma const& op) {
    std::uint64_t versions = 0;
    auto add = [&](std::uint32_t address, int, int) { versions += shared.version(address); };
    if (!op.a_in_registers) {
        for_each_chunk(decode(op.a, op.line), kRows, op.shape.a_transposed, add);
    }
    for_each_chunk(decode(op.b, op.line), op.shape.n, op.shape.b_transposed, add);
    if (versions != op.versions) {
        fail("an operand in shared memory changed while the wgmma of kernel.cc:%d was reading it", op.line);
    }
}

// Registers -------------------------------------------------------------------------------------------------------------------

// Arrays of an inner scope may be gone, with red zones in their place.
__attribute__((no_sanitize("address"))) std::uint64_t hash_registers(std::uint32_t const* first, int count) {
    std::uint64_t hash = 0;
    for (int i = 0; i < count; ++i) {
        hash = (hash ^ first[i]) * 0x9e3779b97f4a7c15u;
        hash ^= hash >> 29;
    }
    return hash;
}

// What a wgmma reads or replaces must be as it was at the last wgmma.fence of this thread.
void check_fenced(WgmmaThread& mine, void const* address, int count, char const* what, int line) {
    auto const* const first = static_cast<std::uint32_t const*>(address);
    auto const known = std::find_if(mine.arrays.begin(), mine.arrays.end(),
                                    [&](RegisterArray const& array) { return array.first == first && array.count == count; });
    std::uint64_t const hash = hash_registers(first, count);
    if (known == mine.arrays.end() ? !mine.fenced : known->hash != hash) {
        fail("kernel.cc:%d: no wgmma.fence since the %s registers of this wgmma were last written", line, what);
    }
    if (known == mine.arrays.end()) {
        mine.arrays.push_back({first, count, hash});
    }
}

void take_accumulator(Thread& thread, Wgmma& op, float* d, bool first_issue) {
    WgmmaThread& mine = thread.wgmma;
    int const count = op.shape.n / 2;
    int const t = thread.index % kWarpgroup;
    auto pending = std::find_if(mine.pending.begin(), mine.pending.end(), [&](Pending const& p) { return p.d == d; });
    if (pending == mine.pending.end()) {
        check_fenced(mine, d, count, "accumulator", op.line);
        if (first_issue) {
            op.accumulator = std::make_shared<Accumulator>(static_cast<std::size_t>(kRows * op.shape.n));
        }
        if (op.accumulate) {
            for (int r = 0; r < count; ++r) {
                (*op.accumulator)[static_cast<std::size_t>(accumulator_row(t, r) * op.shape.n + accumulator_column(t, r))] = d[r];
            }
        }
        pending = mine.pending.insert(mine.pending.end(), Pending{d, op.accumulator, op.shape.n, 0});
        for (int r = 0; r < count; ++r) {
            std::memcpy(&d[r], &kPoisonBits, sizeof kPoisonBits);
        }
    } else if (first_issue) {
        op.accumulator = pending->accumulator;
    }
    if (op.accumulator != pending->accumulator || pending->n != op.shape.n) {
        fail("kernel.cc:%d: this wgmma uses accumulators that are in flight with another shape or in other threads", op.line);
    }
    pending->last = mine.issued;
}

// All wgmma instructions are .sync.aligned: no lane leaves one before its warp has come.
void converge(char const* name, int line) {
    int nothing = 0;
    collective(name, nothing, line, [](int**) {});
}

void issue(Wgmma described, float* d, ARegister const* a_registers) {
    Thread& thread = current();
    converge("wgmma.mma_async", described.line);
    Warpgroup& group = warpgroup_of(thread);
    WgmmaThread& mine = thread.wgmma;
    int const line = described.line;
    int const n = described.shape.n;
    if (n % 8 != 0 || n < 8 || n > kMaxN) {
        fail("kernel.cc:%d: wgmma with n = %d", line, n);
    }
    auto const slot = static_cast<std::size_t>(mine.issued - group.first);
    bool const first_issue = slot == group.instructions.size();
    if (first_issue) {
        group.instructions.push_back(std::move(described));
    }
    Wgmma& op = group.instructions[slot];
    if (!first_issue && (op.line != line || op.a != described.a || op.b != described.b || op.accumulate != described.accumulate ||
                         op.shape.n != n || op.a_in_registers != described.a_in_registers)) {
        fail("kernel.cc:%d: the threads of a warpgroup give different operands to one wgmma (the other is kernel.cc:%d)", line, op.line);
    }
    take_accumulator(thread, op, d, first_issue);
    if (a_registers != nullptr) {
        op.a_registers.resize(4 * kWarpgroup);
        PendingA pending{{a_registers[0], a_registers[1], a_registers[2], a_registers[3]}, mine.issued, line};
        for (int r = 0; r < 4; ++r) {
            op.a_registers[static_cast<std::size_t>(4 * (thread.index % kWarpgroup) + r)] = pending.a[r].value;
            if (pending.a[r].address != nullptr) {
                check_fenced(mine, pending.a[r].address, 1, "A", line);
            }
        }
        mine.pending_a.push_back(pending);
    }
    mine.issued += 1;
    op.issued += 1;
    op.seen_landings = std::min(op.seen_landings, thread.seen_landings);
    if (op.issued == kWarpgroup) {
        SharedMemory& shared = thread.block->shared;
        shared.read_behind(op.seen_landings);
        if (op.shape.type == Type::bf16) {
            compute<float_from_bf16>(shared, op);
        } else {
            compute<float_from_f16>(shared, op);
        }
        count(kWgmma, static_cast<std::uint64_t>((op.a_in_registers ? 0 : kRows * kK * 2) + op.shape.n * kK * 2));
        group.computed += 1;
        wake_all(group.waiters);
    }
}

}  // namespace

void wgmma_fence(int line) {
    converge("wgmma.fence", line);
    WgmmaThread& mine = current().wgmma;
    mine.fenced = true;
    for (RegisterArray& array : mine.arrays) {
        array.hash = hash_registers(array.first, array.count);
    }
}

void wgmma_ss(WgmmaShape shape, float* d, std::uint64_t a, std::uint64_t b, bool accumulate, int line) {
    Wgmma op{};
    op.shape = shape;
    op.a = a;
    op.b = b;
    op.accumulate = accumulate;
    op.line = line;
    issue(std::move(op), d, nullptr);
}

void wgmma_rs(WgmmaShape shape, float* d, ARegister const (&a)[4], std::uint64_t b, bool accumulate, int line) {
    Wgmma op{};
    op.shape = shape;
    op.a_in_registers = true;
    op.b = b;
    op.accumulate = accumulate;
    op.line = line;
    issue(std::move(op), d, a);
}

void wgmma_commit(int line) {
    converge("wgmma.commit_group", line);
    WgmmaThread& mine = current().wgmma;
    mine.groups.push_back(mine.issued);
    maybe_yield();
}

void wgmma_wait(int pending_groups, int line) {
    Thread& thread = current();
    Warpgroup& group = warpgroup_of(thread);
    WgmmaThread& mine = thread.wgmma;
    mine.fenced = false;
    std::int64_t until = mine.waited;
    auto const done = static_cast<std::ptrdiff_t>(mine.groups.size()) - pending_groups;
    if (done > 0) {
        until = mine.groups[static_cast<std::size_t>(done - 1)];
        mine.groups.erase(mine.groups.begin(), mine.groups.begin() + done);
    }
    while (group.computed < until) {
        group.waiters.push_back(&thread);
        block_on({Waiting::wgmma, "wgmma", 0, 0, line});
    }

    for (; mine.waited < until; ++mine.waited) {
        group.instructions[static_cast<std::size_t>(mine.waited - group.first)].waited += 1;
    }
    while (!group.instructions.empty() && group.instructions.front().waited == kWarpgroup) {
        verify(thread.block->shared, group.instructions.front());
        group.instructions.pop_front();
        group.first += 1;
    }
    while (!mine.pending_a.empty() && mine.pending_a.front().index < until) {
        PendingA const& oldest = mine.pending_a.front();
        for (ARegister const& a : oldest.a) {
            if (a.address != nullptr && *a.address != a.value) {
                fail("an A register of the wgmma of kernel.cc:%d was written before the wait of kernel.cc:%d", oldest.line, line);
            }
        }
        mine.pending_a.pop_front();
    }
    int const t = thread.index % kWarpgroup;
    for (std::size_t i = 0; i < mine.pending.size();) {
        Pending const& ready = mine.pending[i];
        if (ready.last >= until) {
            ++i;
            continue;
        }
        for (int r = 0; r < ready.n / 2; ++r) {
            if (bits_from_float(ready.d[r]) != kPoisonBits) {
                fail("an accumulator register was written while a wgmma was in flight, before the wait of kernel.cc:%d", line);
            }
            ready.d[r] = (*ready.accumulator)[static_cast<std::size_t>(accumulator_row(t, r) * ready.n + accumulator_column(t, r))];
        }
        mine.pending.erase(mine.pending.begin() + static_cast<std::ptrdiff_t>(i));
    }
    converge("wgmma.wait_group", line);
    maybe_yield();
}

void check_wgmma_end(Thread& thread) {
    if (!thread.wgmma.pending.empty()) {
        fail("the thread ends with accumulators of a wgmma that it has not waited for");
    }
}

}  // namespace machine
