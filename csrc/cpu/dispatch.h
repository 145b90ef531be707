// Which instruction set runs. Chosen from cpuid on first use; tests may force a lower one.
#pragma once
#include "types.h"

namespace entrgi {

const Kernels& kernels();

// Force an instruction set ("baseline", "avx2", "avx512", "avx512_bf16", "amx"), or "" for the best one. Returns false, and
// changes nothing, when the name is unknown or this machine cannot run it.
bool set_isa(const char* name);

// The names this machine can run, best first; `count` entries.
const char* const* supported_isas(int* count);
// The names compiled in, best first.
const char* const* compiled_isas(int* count);

}  // namespace entrgi
