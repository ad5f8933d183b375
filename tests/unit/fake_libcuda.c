// A libcuda.so.1 for machines without a GPU: it loads anything, launches nothing, and remembers what it was asked.
// tests/unit/test_launch.py compiles it, and reads the structs below through ctypes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum { MAX_ARGUMENTS = 12, MAP_BYTES = 128, ARGUMENT_BYTES = 512 };

struct Launch {
    uint64_t count, function, stream;
    uint32_t grid[3], block[3], shared_bytes;
    uint32_t misaligned;  // arguments that are not on the 64-byte grid
    uint32_t starts_early;  // programmatic stream serialization
    uint8_t arguments[MAX_ARGUMENTS][ARGUMENT_BYTES];
};

// What cuTensorMapEncodeTiled writes in place of NVIDIA's opaque 128 bytes.
struct Map {
    uint64_t address, sizes[5], strides[4];
    uint32_t box[5];
    int32_t data_type, rank, swizzle, l2_promotion;
};

struct Launch fake_launch;
struct Launch fake_launches[4];               // the last ones; number n is at n % 4
uint64_t fake_encodes;
uint32_t fake_argument_sizes[MAX_ARGUMENTS];  // what the "loaded" kernel says of itself
uint32_t fake_num_arguments;
uint32_t fake_sizes_before[MAX_ARGUMENTS], fake_num_before;  // of kernels called *_preprocess
uint32_t fake_sizes_after[MAX_ARGUMENTS], fake_num_after;    // and *_postprocess
uint32_t fake_sizes_first[MAX_ARGUMENTS], fake_num_first;    // and *_prepare
int32_t fake_shared_limit;                    // the attribute as last set
CUresult fake_launch_result, fake_encode_result;
uint32_t fake_launches_before_failure;        // how many succeed before fake_launch_result is given
uint32_t fake_encodes_before_failure;         // and before fake_encode_result is
uint32_t fake_wrong_context_launches;         // how many launches to refuse for want of a context

uint64_t fake_allocated_at = 0x7f1200000000, fake_allocated_bytes, fake_cleared_on;
uint32_t fake_relaxed;                        // the capture mode of the thread

CUresult cuInit(unsigned flags) { return 0; }
// FAKE_VERSION and FAKE_GPUS in the environment: as cuDriverGetVersion and cuDeviceGetCount give them.
static int setting(char const* name, int otherwise) { return getenv(name) ? atoi(getenv(name)) : otherwise; }
CUresult cuDriverGetVersion(int* version) { *version = setting("FAKE_VERSION", 13000); return 0; }
CUresult cuDeviceGetCount(int* count) { *count = setting("FAKE_GPUS", 1); return *count ? 0 : 100; }
CUresult cuDeviceGetName(char* name, int length, int device) { strncpy(name, "NVIDIA Fake", length); return 0; }
CUresult cuDeviceTotalMem_v2(size_t* bytes, int device) { *bytes = (size_t)80 << 30; return 0; }
CUresult cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
    *value = attribute == 16 ? 132 : attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 232448 : 1;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)0x1000; return 0; }
CUresult cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
CUresult cuCtxGetCurrent(void** context) { *context = (void*)0x1000; return 0; }
CUresult cuCtxSetCurrent(void* context) { return 0; }
CUresult cuCtxGetDevice(int* device) { *device = 0; return 0; }
CUresult cuCtxPushCurrent_v2(void* context) { return 0; }
CUresult cuCtxPopCurrent_v2(void** context) { *context = (void*)0x1000; return 0; }
CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
    int const before = fake_relaxed ? 2 : 0;
    fake_relaxed = *mode == 2;
    *mode = before;
    return 0;
}
CUresult cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    *address = fake_allocated_at;
    fake_allocated_bytes = bytes;
    return fake_launch_result;
}
CUresult cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void* stream) {
    fake_cleared_on = (uint64_t)stream;
    return address != fake_allocated_at || bytes != fake_allocated_bytes || value || !fake_relaxed;
}
CUresult cuGetErrorString(CUresult error, char const** text) { *text = "as the test asked"; return 0; }
CUresult cuGetErrorName(CUresult error, char const** text) { *text = "FAKE"; return 0; }

CUresult cuLibraryLoadData(void** library, void const* image, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
    *library = (void*)0x2000;
    return memcmp(image, "\x7f" "ELF", 4) ? 200 : 0;
}
CUresult cuLibraryUnload(void* library) { return 0; }
// Kernel 0x3000 + n is function 0x4000 + n: n is 0, or 1 and 2 for the kernels before and after the main one, 3 for the first.
CUresult cuLibraryGetKernel(void** kernel, void* library, char const* name) {
    *kernel = (void*)(uintptr_t)(0x3000 + (strstr(name, "_preprocess") != NULL) + 2 * (strstr(name, "_postprocess") != NULL) +
                                 3 * (strstr(name, "_prepare") != NULL));
    return 0;
}
CUresult cuKernelGetLibrary(void** library, void* kernel) { *library = (void*)0x2000; return 0; }
CUresult cuKernelGetFunction(void** function, void* kernel) {
    *function = (void*)((uintptr_t)kernel + 0x1000);
    return 0;
}

static uint32_t const* sizes_of(unsigned n, uint32_t* count) {
    *count = n == 0 ? fake_num_arguments : n == 1 ? fake_num_before : n == 2 ? fake_num_after : fake_num_first;
    return n == 0 ? fake_argument_sizes : n == 1 ? fake_sizes_before : n == 2 ? fake_sizes_after : fake_sizes_first;
}

CUresult cuKernelGetParamInfo(void* kernel, size_t index, size_t* offset, size_t* size) {
    uint32_t count;
    uint32_t const* const sizes = sizes_of((unsigned)((uintptr_t)kernel - 0x3000), &count);
    if (index >= count) return 1;
    *offset = 0;
    *size = sizes[index];
    return 0;
}
CUresult cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
    if (attribute == 8) fake_shared_limit = value;
    return value > 232448 ? 1 : 0;
}

CUresult cuTensorMapEncodeTiled(struct Map* map, int data_type, uint32_t rank, uint64_t address, uint64_t const* sizes,
                                uint64_t const* strides, uint32_t const* box, uint32_t const* element_strides,
                                int interleave, int swizzle, int l2_promotion, int fill) {
    ++fake_encodes;
    if (fake_encode_result && !fake_encodes_before_failure) return fake_encode_result;
    if (fake_encode_result) --fake_encodes_before_failure;
    if ((uint64_t)map % 64) return 1;
    memset(map, 0, MAP_BYTES);
    *map = (struct Map){.address = address, .data_type = data_type, .rank = (int)rank, .swizzle = swizzle,
                        .l2_promotion = l2_promotion};
    memcpy(map->sizes, sizes, rank * sizeof *sizes);
    memcpy(map->strides, strides, (rank - 1) * sizeof *strides);
    memcpy(map->box, box, rank * sizeof *box);
    return 0;
}

static CUresult launch(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared_bytes, void* stream, void** arguments, unsigned starts_early) {
    if (fake_wrong_context_launches) {
        --fake_wrong_context_launches;
        return 201;
    }
    if (fake_launch_result && !fake_launches_before_failure) return fake_launch_result;
    if (fake_launch_result) --fake_launches_before_failure;
    ++fake_launch.count;
    fake_launch.function = (uint64_t)function;
    fake_launch.stream = (uint64_t)stream;
    memcpy(fake_launch.grid, (uint32_t[3]){gx, gy, gz}, sizeof fake_launch.grid);
    memcpy(fake_launch.block, (uint32_t[3]){bx, by, bz}, sizeof fake_launch.block);
    fake_launch.shared_bytes = shared_bytes;
    fake_launch.starts_early = starts_early;
    uint32_t count;
    uint32_t const* const sizes = sizes_of((unsigned)((uintptr_t)function - 0x4000), &count);
    for (unsigned i = 0; i < count; ++i) {
        fake_launch.misaligned += (uint64_t)arguments[i] % 64 != 0;
        memcpy(fake_launch.arguments[i], arguments[i], sizes[i]);
    }
    fake_launches[fake_launch.count % 4] = fake_launch;
    return 0;
}

CUresult cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared_bytes, void* stream, void** arguments, void** extra) {
    return launch(function, gx, gy, gz, bx, by, bz, shared_bytes, stream, arguments, 0);
}

struct LaunchAttribute {
    int32_t id;
    union {
        uint32_t number;
        uint64_t all[8];
    } value;
};

struct LaunchConfig {
    uint32_t grid[3], block[3], shared_bytes;
    void* stream;
    struct LaunchAttribute const* attributes;
    uint32_t num_attributes;
};

CUresult cuLaunchKernelEx(struct LaunchConfig const* config, void* function, void** arguments, void** extra) {
    uint32_t starts_early = 0;
    for (uint32_t i = 0; i < config->num_attributes; ++i) {
        if (config->attributes[i].id != 6) return 1;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        starts_early = config->attributes[i].value.number;
    }
    uint32_t const *const grid = config->grid, *const block = config->block;
    return launch(function, grid[0], grid[1], grid[2], block[0], block[1], block[2], config->shared_bytes, config->stream,
                  arguments, starts_early);
}

CUresult cuGetProcAddress_v2(char const* name, void** address, int version, uint64_t flags, int* status) {
    static char const* const versions[] = {"", "_v2", "_v3"};
    char symbol[128];
    *address = NULL;
    for (int i = 2; i >= 0 && !*address; --i) {
        strncpy(symbol, name, sizeof symbol - 4);
        symbol[sizeof symbol - 4] = 0;
        strcat(symbol, versions[i]);
        *address = dlsym(RTLD_DEFAULT, symbol);
    }
    if (status) *status = *address ? 0 : 1;
    return 0;
}
