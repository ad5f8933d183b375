// Matrix instructions of a warp: ldmatrix, stmatrix, mma.sync (PTX ISA, "Warp-level matrix instructions").

#include <cstring>

#include "machine.h"
#include "number.h"
#include "warp.h"

namespace machine {

namespace {

struct MatrixAccess {
    std::uint32_t address;
    std::uint32_t* registers;
};

struct Pair {
    std::uint16_t low, high;
};

}  // namespace

// Lane l gives the address of row l % 8 of matrix l / 8, and gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix;
// transposed, row and column change places.
void ldmatrix(std::uint32_t address, std::uint32_t* registers, int count_, bool transpose, int line) {
    MatrixAccess operands{address, registers};
    collective("ldmatrix", operands, line, [&](MatrixAccess** lanes) {
        Block& block = *current().block;
        std::uint32_t addresses[kWarp];
        for (int m = 0; m < count_; ++m) {
            std::uint16_t matrix[8][8];
            for (int row = 0; row < 8; ++row) {
                addresses[8 * m + row] = lanes[8 * m + row]->address;
                std::memcpy(matrix[row], block.shared.generic_read(addresses[8 * m + row], 16, line), 16);
            }
            for (int lane = 0; lane < kWarp; ++lane) {
                int const row = lane / 4;
                int const column = 2 * (lane % 4);
                std::uint32_t const low = transpose ? matrix[column][row] : matrix[row][column];
                std::uint32_t const high = transpose ? matrix[column + 1][row] : matrix[row][column + 1];
                lanes[lane]->registers[m] = low | high << 16;
            }
        }
        count(kLdmatrix, static_cast<std::uint64_t>(128 * count_));
        count_wavefronts(block, kLdmatrix, addresses, 8 * count_, 16);
    });
}

// The inverse. Each lane's elements are its own store: each must be fenced by its own lane.
void stmatrix(std::uint32_t address, std::uint32_t const* registers, int count_, bool transpose, int line) {
    MatrixAccess operands{address, const_cast<std::uint32_t*>(registers)};
    collective("stmatrix", operands, line, [&](MatrixAccess** lanes) {
        Thread& last = current();
        Block& block = *last.block;
        std::uint32_t addresses[kWarp];
        for (int m = 0; m < count_; ++m) {
            for (int row = 0; row < 8; ++row) {
                addresses[8 * m + row] = lanes[8 * m + row]->address;
                block.shared.check_range(addresses[8 * m + row], 16, 16, line);
            }
            for (int lane = 0; lane < kWarp; ++lane) {
                Thread& owner = block.threads[static_cast<std::size_t>(last.warp->index * kWarp + lane)];
                int const row = lane / 4;
                int const column = 2 * (lane % 4);
                std::uint32_t const pair = lanes[lane]->registers[m];
                for (int i = 0; i < 2; ++i) {
                    auto const value = static_cast<std::uint16_t>(pair >> 16 * i);
                    int const r = transpose ? column + i : row;
                    int const c = transpose ? row : column + i;
                    block.shared.generic_write(addresses[8 * m + r] + static_cast<std::uint32_t>(2 * c), &value, 2, owner.index,
                                               owner.unpublished, line);
                }
            }
        }
        count(kStmatrix, static_cast<std::uint64_t>(128 * count_));
        count_wavefronts(block, kStmatrix, addresses, 8 * count_, 16);
    });
    maybe_yield();
}

namespace {

struct MmaOperands {
    float* d;
    std::uint32_t const* a;
    std::uint32_t const* b;
    float const* c;
};

template <float (*decode)(std::uint32_t)>
void multiply(MmaOperands** lanes) {
    float a[16][16];
    float b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        int const g = lane / 4;
        int const t = 2 * (lane % 4);
        for (int i = 0; i < 2; ++i) {
            for (int half = 0; half < 4; ++half) {  // a0, a1: rows g, g + 8; a2, a3: eight columns further
                a[g + 8 * (half % 2)][t + 8 * (half / 2) + i] = decode(lanes[lane]->a[half] >> 16 * i & 0xffffu);
            }
            for (int half = 0; half < 2; ++half) {
                b[t + 8 * half + i][g] = decode(lanes[lane]->b[half] >> 16 * i & 0xffffu);
            }
        }
    }
    float d[16][8] = {};
    for (int row = 0; row < 16; ++row) {
        for (int k = 0; k < 16; ++k) {
            for (int column = 0; column < 8; ++column) {
                d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
            lanes[lane]->d[i] = lanes[lane]->c[i] + d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
        }
    }
}

}  // namespace

void mma_m16n8k16(Type type, float* d, std::uint32_t const* a, std::uint32_t const* b, float const* c, int line) {
    MmaOperands operands{d, a, b, c};
    collective("mma.sync", operands, line, [&](MmaOperands** lanes) {
        if (type == Type::bf16) {
            multiply<float_from_bf16>(lanes);
        } else {
            multiply<float_from_f16>(lanes);
        }
        count(kMma, 0);
    });
}

}  // namespace machine
