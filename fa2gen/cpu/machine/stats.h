// What a kernel moves and where it waits for banks: counted only when asked for.

#pragma once

#include <cstdint>

namespace machine {

// In the order of fa2gen.cpu.run.PRIMITIVES.
enum Primitive {
    kLoadShared,
    kStoreShared,
    kLdmatrix,
    kStmatrix,
    kCpAsync,
    kTmaLoad,
    kTmaStore,
    kWgmma,
    kMma,
    kLoadGlobal,
    kStoreGlobal,
    kNumPrimitives,
};

// Instructions are those of a warp (of a warpgroup for wgmma). Wavefronts are trips through the 32 banks of shared memory; `ideal`
// is how many the same bytes would take with no two lanes in one bank.
struct Count {
    std::uint64_t instructions, bytes, wavefronts, ideal;
};

struct Stats {
    Count counts[kNumPrimitives];

    void add(Stats const& other) {
        for (int i = 0; i < kNumPrimitives; ++i) {
            counts[i].instructions += other.counts[i].instructions;
            counts[i].bytes += other.counts[i].bytes;
            counts[i].wavefronts += other.counts[i].wavefronts;
            counts[i].ideal += other.counts[i].ideal;
        }
    }
};

}  // namespace machine
