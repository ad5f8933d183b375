// All of the machine in one translation unit: compiled once for a compiler and its options, then linked to every kernel.

#include "global.cc"
#include "launch.cc"
#include "machine.cc"
#include "matrix.cc"
#include "mbarrier.cc"
#include "memory.cc"
#include "tma.cc"
#include "warp.cc"
#include "wgmma.cc"
