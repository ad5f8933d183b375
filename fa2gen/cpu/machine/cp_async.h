// cp.async: copies of 4, 8 or 16 bytes by threads, waited for in groups (PTX ISA, "cp.async").

#pragma once

#include <cstdint>
#include <vector>

namespace machine {

struct SmallCopy {
    std::uint32_t destination;
    int bytes;
    int source_bytes;  // the rest is filled with zeros
    void const* source;
    int line;
};

// Copies of a thread that land together, with an arrival at a barrier behind them.
struct CopiesAndArrival {
    std::vector<SmallCopy> copies;
    std::uint32_t barrier;
};

// A thread's copies: those not yet committed, and the committed groups from the oldest on.
struct SmallCopies {
    std::vector<SmallCopy> open;
    std::vector<std::vector<SmallCopy>> groups;
};

}  // namespace machine
