#pragma once
#include <xxhash.h>

// The library hashes in the widest registers that the processor has only under other names, which
// its header makes known as macros.
#if defined(__x86_64__) && __has_include(<xxh_x86dispatch.h>)
#include <xxh_x86dispatch.h>
#endif

static inline void smelt_xxh3_update(XXH3_state_t *state, const void *bytes, size_t count) {
  XXH3_64bits_update(state, bytes, count);
}

static inline XXH64_hash_t smelt_xxh3(const void *bytes, size_t count) {
  return XXH3_64bits(bytes, count);
}
