// Instructions that the 32 lanes of a warp execute together.

#pragma once

#include "machine.h"

namespace machine {

template <class Operands, class Compute>
void collective(char const* name, Operands& operands, int line, Compute compute) {
    Thread& thread = current();
    Warp& warp = *thread.warp;
    Collective& meeting = warp.collective;
    if (meeting.arrived == 0) {
        meeting.name = name;
        meeting.line = line;
    } else if (meeting.name != name || meeting.line != line) {
        fail("%s at kernel.cc:%d, while %d lanes of this warp are at %s, kernel.cc:%d", name, line, meeting.arrived, meeting.name,
             meeting.line);
    }
    meeting.operands[thread.lane] = &operands;
    meeting.arrived += 1;
    if (meeting.arrived < kWarp) {
        block_on({Waiting::collective, name, 0, 0, line});
        return;
    }
    meeting.arrived = 0;
    Operands* all[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
        all[lane] = static_cast<Operands*>(meeting.operands[lane]);
    }
    compute(all);
    for (int lane = 0; lane < kWarp; ++lane) {
        if (lane != thread.lane) {
            wake(thread.block->threads[static_cast<std::size_t>(warp.index * kWarp + lane)]);
        }
    }
}

}  // namespace machine
