// A fiber: a stack of its own and a switch to and from the scheduler. About 10 ns a switch on x86-64; elsewhere ucontext,
// which costs a system call each time and is several times slower.

#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define FA2GEN_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FA2GEN_ASAN 1
#endif
#endif

#ifdef FA2GEN_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__ELF__) && !defined(FA2GEN_UCONTEXT)
#define FA2GEN_OWN_SWITCH 1
// Saves what a call must preserve, swaps stacks, restores. (The floating-point control words are never changed.)
extern "C" void fa2gen_host_switch(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .type fa2gen_host_switch, @function
    .hidden fa2gen_host_switch
fa2gen_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fa2gen_host_switch, .-fa2gen_host_switch
)");
#else
#include <ucontext.h>
#endif

namespace machine {

// Enough for the register arrays of a kernel; sanitizers put red zones between all of them.
#ifdef FA2GEN_ASAN
constexpr std::size_t kStackBytes = 512 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

// The stacks of all threads of a block, in one mapping; a page is touched only when a fiber needs it.
class Stacks {
  public:
    explicit Stacks(std::size_t count) : bytes_(count * kStackBytes) {
        memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory_ == MAP_FAILED) {
            throw std::bad_alloc();
        }
    }
    ~Stacks() { munmap(memory_, bytes_); }
    Stacks(Stacks const&) = delete;
    Stacks& operator=(Stacks const&) = delete;

    unsigned char* stack(std::size_t i) const { return static_cast<unsigned char*>(memory_) + i * kStackBytes; }

  private:
    void* memory_;
    std::size_t bytes_;
};

// `entry` must not return: its last act is to leave for good.
class Fiber {
  public:
    void reset(unsigned char* stack, void (*entry)()) {
        stack_ = stack;
#ifdef FA2GEN_ASAN
        ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);  // a fiber that was abandoned left its red zones
        fake_stack_ = nullptr;
#endif
#ifdef FA2GEN_OWN_SWITCH
        auto** top = reinterpret_cast<void**>(stack + kStackBytes);
        *--top = nullptr;  // where entry would return to; also puts the stack at 8 modulo 16, as a call does
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) {
            *--top = nullptr;
        }
        inside_ = top;
#else
        getcontext(&inside_);
        inside_.uc_stack.ss_sp = stack;
        inside_.uc_stack.ss_size = kStackBytes;
        inside_.uc_link = nullptr;
        makecontext(&inside_, entry, 0);
#endif
    }

    // From the scheduler into the fiber, until it leaves.
    void enter() {
#ifdef FA2GEN_ASAN
        void* scheduler_fake_stack = nullptr;
        __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack_, kStackBytes);
#endif
#ifdef FA2GEN_OWN_SWITCH
        fa2gen_host_switch(&outside_, inside_);
#else
        swapcontext(&outside_, &inside_);
#endif
#ifdef FA2GEN_ASAN
        __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    }

    // The first thing a fiber does.
    void started() {
#ifdef FA2GEN_ASAN
        __sanitizer_finish_switch_fiber(nullptr, &outside_stack_, &outside_bytes_);
#endif
    }

    // From the fiber back to the scheduler; `finished`: never to be entered again.
    void leave(bool finished = false) {
#ifdef FA2GEN_ASAN
        __sanitizer_start_switch_fiber(finished ? nullptr : &fake_stack_, outside_stack_, outside_bytes_);
#else
        static_cast<void>(finished);
#endif
#ifdef FA2GEN_OWN_SWITCH
        fa2gen_host_switch(&inside_, outside_);
#else
        swapcontext(&inside_, &outside_);
#endif
#ifdef FA2GEN_ASAN
        __sanitizer_finish_switch_fiber(fake_stack_, &outside_stack_, &outside_bytes_);
#endif
    }

  private:
    unsigned char* stack_ = nullptr;
#ifdef FA2GEN_OWN_SWITCH
    void* inside_ = nullptr;
    void* outside_ = nullptr;
#else
    ucontext_t inside_;
    ucontext_t outside_;
#endif
#ifdef FA2GEN_ASAN
    void* fake_stack_ = nullptr;
    void const* outside_stack_ = nullptr;
    std::size_t outside_bytes_ = 0;
#endif
};

}  // namespace machine
