// TMA: boxes of up to five dimensions between global and shared memory (PTX ISA, "Tensors", "cp.async.bulk.tensor").

#pragma once

#include <cstdint>
#include <vector>

#include "device.h"

namespace machine {

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

    std::uint32_t row_bytes() const {
        return map.box[0] * map.element_bytes;
    }

    std::uint32_t rows() const {
        std::uint32_t product = 1;
        for (int i = 1; i < map.rank; ++i) {
            product *= map.box[i];
        }
        return product;
    }

    std::uint32_t bytes() const {
        return rows() * row_bytes();
    }

    // From one row to the next in shared memory: a box narrower than its swizzle leaves the rest of each row as it was.
    std::uint32_t pitch() const {
        return map.swizzle_bytes != 0 ? map.swizzle_bytes : row_bytes();
    }

    std::uint32_t footprint() const {
        return rows() * pitch();
    }
};

// A thread's stores: those not yet committed, and the committed groups from the oldest on.
struct BulkStores {
    std::vector<BoxCopy> open;
    std::vector<std::vector<BoxCopy>> groups;
};

}  // namespace machine
