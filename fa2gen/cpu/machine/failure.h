// How the machine says that a kernel is wrong. `kernel.cc:<line>` in a message is a line of the rendered source; Python turns
// it into the template's line.

#pragma once

#include <exception>
#include <string>

namespace machine {

struct Failure : std::exception {
    explicit Failure(std::string text) : message(std::move(text)) {}
    char const* what() const noexcept override { return message.c_str(); }
    std::string message;
};

[[gnu::format(printf, 1, 2)]] std::string text(char const* format, ...);

// Ends the launch with this message, preceded by the running thread if there is one.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(char const* format, ...);

}  // namespace machine
