// mbarrier objects: phases, arrivals and transaction counts (PTX ISA, "mbarrier").

#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace machine {

struct Thread;

struct Mbarrier {
    std::uint32_t count = 0;    // arrivals that complete a phase
    std::uint32_t pending = 0;  // of them, still missing
    std::int64_t bytes = 0;     // expected and not yet written; a copy may land before its bytes are expected
    std::uint32_t phase = 0;
    bool visible_to_tma = false;  // fence.mbarrier_init or fence.proxy.async has followed the init
    int thread = 0;               // that initialised it
    std::vector<Thread*> waiters;
};

using Mbarriers = std::map<std::uint32_t, Mbarrier>;  // by address

}  // namespace machine
