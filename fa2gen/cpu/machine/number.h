// 16-bit floating point: the conversions of `cvt.rn`, in portable integer arithmetic that compilers can vectorise.

#pragma once

#include <cstdint>
#include <cstring>

namespace machine {

inline float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t bits_from_float(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_from_bf16(std::uint32_t half) {
    return float_from_bits(half << 16);
}

// The exponent is rebiased by a multiplication, which also normalises subnormal numbers.
inline float float_from_f16(std::uint32_t half) {
    std::uint32_t const magnitude = bits_from_float(float_from_bits((half & 0x7fffu) << 13) * 0x1p112f);
    std::uint32_t const special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return float_from_bits(magnitude | special | (half & 0x8000u) << 16);
}

inline std::uint32_t bf16_from_float(float value) {
    std::uint32_t const bits = bits_from_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0x7fffu;  // what cvt gives for any NaN
    }
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

inline std::uint32_t f16_from_float(float value) {
    std::uint32_t const bits = bits_from_float(value);
    std::uint32_t const sign = bits >> 16 & 0x8000u;
    std::uint32_t const magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0x7fffu;
    }
    if (magnitude >= 0x477ff000u) {
        return sign | 0x7c00u;  // rounds to infinity
    }
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the addition do the rounding, at the right bit
        return sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f));
    }
    return sign | ((magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13);
}

// Four bits of exponent, three of mantissa; no infinity. As from_f16, the exponent is rebiased by a multiplication.
inline float float_from_e4m3(std::uint32_t byte) {
    std::uint32_t const magnitude = bits_from_float(float_from_bits((byte & 0x7fu) << 20) * 0x1p120f);
    std::uint32_t const special = (byte & 0x7fu) == 0x7fu ? 0x7fc00000u : 0u;
    return float_from_bits(magnitude | special | (byte & 0x80u) << 24);
}

// What is beyond 448 becomes 448.
inline std::uint32_t e4m3_from_float(float value) {
    std::uint32_t const bits = bits_from_float(value);
    std::uint32_t const sign = bits >> 24 & 0x80u;
    std::uint32_t const magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0x7fu;
    }
    if (magnitude >= 0x43e00000u) {
        return sign | 0x7eu;
    }
    if (magnitude < 0x3c800000u) {  // subnormal, in steps of 2^-9: as in f16_from_float
        return sign | (bits_from_float(float_from_bits(magnitude) + 0x1p14f) - bits_from_float(0x1p14f));
    }
    return sign | (((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3));
}

// Two values in one register, `low` in the lower half.
inline std::uint32_t pack_bf16(float low, float high) {
    return bf16_from_float(low) | bf16_from_float(high) << 16;
}

inline std::uint32_t pack_f16(float low, float high) {
    return f16_from_float(low) | f16_from_float(high) << 16;
}

}  // namespace machine
