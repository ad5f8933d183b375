// TMA: boxes of up to five dimensions between global and shared memory (PTX ISA, "Tensors", "cp.async.bulk.tensor").

#pragma once

#include <cstdint>
#include <vector>

#include "device.h"

namespace host {

// One copy that was issued. The map is copied: its kernel argument may be gone when the copy lands.
struct BoxCopy {
    TensorMap map;
    std::uint32_t address;  // in shared memory
    std::uint32_t barrier;  // loads only
    int coordinates[5];
    std::uint64_t versions;            // stores: of the source, at issue
    std::vector<unsigned char> image;  // stores: the box, once it has been read
    int thread;
    int line;
    bool adds = false;  // a reduction: fp32 numbers are added to what is there

    std::uint32_t bytes() const {
        std::uint32_t product = map.element_bytes;
        for (int i = 0; i < map.rank; ++i) {
            product *= map.box[i];
        }
        return product;
    }
};

// A thread's stores: those not yet committed, and the committed groups from the oldest on.
struct BulkStores {
    std::vector<BoxCopy> open;
    std::vector<std::vector<BoxCopy>> groups;
};

}  // namespace host
