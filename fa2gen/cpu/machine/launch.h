// How a rendered kernel is called with the arguments of a CUDA launch: an array of pointers to them.

#pragma once

#include <cstddef>
#include <utility>

namespace machine {

struct Launch;
struct Stats;
using Kernel = void (*)(void* const* arguments);

int launch(Launch const& launch, Kernel kernel, void* const* arguments, char* message, std::size_t message_bytes, Stats* stats);

template <class... Arguments, std::size_t... i>
void call_with(void (*kernel)(Arguments...), void* const* arguments, std::index_sequence<i...>) {
    kernel(*static_cast<Arguments const*>(arguments[i])...);
}

template <class... Arguments>
void call(void (*kernel)(Arguments...), void* const* arguments) {
    call_with(kernel, arguments, std::index_sequence_for<Arguments...>());
}

}  // namespace machine

// The symbols that a kernel's library exports, one for each kernel. The message is empty after a clean run; the result says whether
// it was one.
#define FA2GEN_CPU_ENTRY_AS(symbol, kernel)                                                                                    \
    extern "C" __attribute__((visibility("default"))) int symbol(                                                               \
        machine::Launch const* launch, void* const* arguments, char* message, std::size_t message_bytes, machine::Stats* stats) {      \
        return machine::launch(*launch, [](void* const* all) { machine::call(kernel, all); }, arguments, message, message_bytes, stats); \
    }
#define FA2GEN_CPU_ENTRY(kernel) FA2GEN_CPU_ENTRY_AS(fa2gen_cpu_launch, kernel)
