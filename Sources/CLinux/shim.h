#pragma once
#include <malloc.h>
#include <sys/types.h>

// Declared by <fcntl.h> and <stdio.h> only under _GNU_SOURCE, which Swift's Glibc module does not set.
int sync_file_range(int fd, off_t offset, off_t count, unsigned int flags);
int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags);
static const unsigned int smelt_rename_exchange = 2; // RENAME_EXCHANGE
static const unsigned int smelt_sync_file_range_write = 2; // SYNC_FILE_RANGE_WRITE
// SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER
static const unsigned int smelt_sync_file_range_wait = 7;

// Likewise, from <unistd.h>.
int pipe2(int ends[2], int flags);

/// Makes the allocator give every larger block back to the system when it is freed.
static inline void smelt_return_freed_blocks(void) { mallopt(M_MMAP_THRESHOLD, 256 << 10); }

/// Makes it keep them for the next that asks, but the largest: fresh pages cost more than to
/// fill them.
static inline void smelt_keep_freed_blocks(void) {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  // All from one heap that grows: other heaps are too small for matrices.
  mallopt(M_ARENA_MAX, 1);
}
