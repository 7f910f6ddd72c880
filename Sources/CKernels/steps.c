#include "include/kernels.h"
#include "lanes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define AVX2 __attribute__((target("avx2,popcnt")))

// A stable sort by comparison with pivots: eight elements at a time are parted into those below
// and those above, each side closed up by a shuffle. The pivots form a tree in which common keys
// lie near the root, so that an element passes about as many as its key has bits of entropy. A
// piece is sorted in a core's own cache; then the pieces' runs of each key are put end to end.

enum {
  key_count = 256,
  piece = smelt_steps_piece,
  // A store of eight may reach so far beyond what counts, at each level of the tree.
  spare = 8 * key_count,
  largest_piece_count = smelt_steps_largest / smelt_steps_piece,
};

struct scratch {
  uint32_t elements[piece + spare], others[piece + spare];
  uint32_t runs[largest_piece_count][key_count];
};
_Static_assert(sizeof(struct scratch) == smelt_steps_scratch, "as the header says");

// For each mask the numbers of its set bits, a byte each.
#define BELOW(m, i) __builtin_popcount((m) & ((1 << (i)) - 1))
#define BIT(m, i) ((uint64_t)((m) >> (i) & 1) * (i) << 8 * BELOW(m, i))
#define BITS(m) (BIT(m, 0) | BIT(m, 1) | BIT(m, 2) | BIT(m, 3) | BIT(m, 4) | BIT(m, 5) | BIT(m, 6) | BIT(m, 7))
#define BITS_4(m) BITS(m), BITS((m) + 1), BITS((m) + 2), BITS((m) + 3)
#define BITS_16(m) BITS_4(m), BITS_4((m) + 4), BITS_4((m) + 8), BITS_4((m) + 12)
#define BITS_64(m) BITS_16(m), BITS_16((m) + 16), BITS_16((m) + 32), BITS_16((m) + 48)
static const uint64_t set_bits[256] = {BITS_64(0), BITS_64(64), BITS_64(128), BITS_64(192)};

// Keys below a pivot are in the first branch. A branch is a node, or −1 − key.
struct tree {
  struct node {
    int pivot, below, above;
  } nodes[key_count - 1];
  int count;
  // How many elements have smaller keys than each, about.
  uint32_t sums[key_count + 1];
};

static int grow(struct tree *tree, int first, int end) {
  if (end - first == 1) return -1 - first;
  const uint32_t *sums = tree->sums, middle = sums[first] + sums[end];
  int pivot = first + 1;
  uint32_t least = UINT32_MAX;
  for (int k = first + 1; k < end; k++) {
    uint32_t distance = 2 * sums[k] > middle ? 2 * sums[k] - middle : middle - 2 * sums[k];
    if (distance < least) least = distance, pivot = k;
  }
  struct node *node = &tree->nodes[tree->count++];
  int place = tree->count - 1;
  node->pivot = pivot;
  node->below = grow(tree, first, pivot);
  node->above = grow(tree, pivot, end);
  return place;
}

// The first byte after the sign.
INLINE uint8_t key(uint16_t bits) { return (uint8_t)(bits >> 7); }

static int grow_tree(struct tree *tree, const uint16_t *reference, size_t count) {
  uint32_t counts[key_count];
  for (int k = 0; k < key_count; k++) counts[k] = 1;
  for (size_t i = 0; i < count; i += 61) counts[key(reference[i])] += 64;
  tree->count = 0;
  tree->sums[0] = 0;
  for (int k = 0; k < key_count; k++) tree->sums[k + 1] = tree->sums[k] + counts[k];
  return grow(tree, 0, key_count);
}

// Where the sorted elements of a piece go.
struct output {
  const struct tree *tree;
  uint16_t *next;
  uint32_t *runs;
};

// Sorts elements that have their key above their lower 16 bits, and writes these. Both arrays have
// room for them all and are scratch memory afterwards.
AVX2 static void sort(struct output *output, int branch, uint32_t *elements, size_t count,
                      uint32_t *others) {
  while (count > 0 && branch >= 0) {
    const struct node *node = &output->tree->nodes[branch];
    uint32_t last = ((uint32_t)node->pivot << 16) - 1;
    __m256i limit = _mm256_set1_epi32((int)last);
    size_t below = 0, above = 0, i = 0;
    for (; i + 8 <= count; i += 8) {
      __m256i eight = _mm256_loadu_si256((const __m256i *)(elements + i));
      __m256i isAbove = _mm256_cmpgt_epi32(eight, limit);
      unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(isAbove));
      __m256i lower = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)set_bits[mask ^ 255]));
      __m256i upper = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)set_bits[mask]));
      // In place: what is below never overtakes what has been read.
      _mm256_storeu_si256((__m256i *)(elements + below), _mm256_permutevar8x32_epi32(eight, lower));
      _mm256_storeu_si256((__m256i *)(others + above), _mm256_permutevar8x32_epi32(eight, upper));
      unsigned taken = (unsigned)__builtin_popcount(mask);
      above += taken;
      below += 8 - taken;
    }
    for (; i < count; i++) {
      uint32_t one = elements[i];
      if (one > last) others[above++] = one;
      else elements[below++] = one;
    }
    sort(output, node->below, elements, below, others + above + 8);
    uint32_t *sorted = elements;
    elements = others;
    others = sorted;
    count = above;
    branch = node->above;
  }
  if (count == 0) return;
  output->runs[-1 - branch] = (uint32_t)count;
  for (size_t i = 0; i < count; i++) output->next[i] = (uint16_t)elements[i];
  output->next += count;
}

// Sorts the elements that are in the scratch memory, those of one more piece.
AVX2 static void sort_piece(struct scratch *scratch, size_t number, const struct tree *tree, int root,
                            size_t count, uint16_t *sorted) {
  uint32_t *runs = scratch->runs[number];
  memset(runs, 0, sizeof scratch->runs[number]);
  struct output output = {tree, sorted, runs};
  sort(&output, root, scratch->elements, count, scratch->others);
}

// A float's bits as a number that grows with it, and back.
INLINE uint16_t ordered(uint16_t bits) { return bits ^ (uint16_t)((int16_t)bits >> 15 | 0x8000); }
INLINE uint16_t unordered(uint16_t value) { return value ^ (uint16_t)(~((int16_t)value >> 15) | 0x8000); }

// 0, −1, 1, −2 … as 0, 1, 2, 3 …
INLINE uint16_t folded(uint16_t steps) { return (uint16_t)(steps << 1) ^ (uint16_t)((int16_t)steps >> 15); }
INLINE uint16_t unfolded(uint16_t code) { return code >> 1 ^ (uint16_t)-(code & 1); }

bool smelt_sorts_steps(void) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
}

AVX2 void smelt_split_steps(uint16_t *elements, const uint16_t *reference, size_t count,
                            uint8_t *upper, uint8_t *lower, void *memory) {
  struct scratch *scratch = memory;
  struct tree tree;
  int root = grow_tree(&tree, reference, count);
  size_t pieces = 0;
  for (size_t begin = 0; begin < count; begin += piece, pieces++) {
    size_t length = count - begin < piece ? count - begin : piece;
    const uint16_t *mine = elements + begin, *other = reference + begin;
    for (size_t i = 0; i < length; i++)
      scratch->elements[i] = (uint32_t)key(other[i]) << 16 | folded(ordered(mine[i]) - ordered(other[i]));
    sort_piece(scratch, pieces, &tree, root, length, elements + begin);
  }
  size_t taken[largest_piece_count] = {0};
  for (int k = 0; k < key_count; k++) {
    for (size_t p = 0; p < pieces; p++) {
      const uint16_t *run = elements + p * piece + taken[p];
      size_t length = scratch->runs[p][k];
      for (size_t i = 0; i < length; i++) {
        upper[i] = run[i] >> 8;
        lower[i] = (uint8_t)run[i];
      }
      taken[p] += length;
      upper += length;
      lower += length;
    }
  }
}

AVX2 void smelt_add_steps(const uint8_t *upper, const uint8_t *lower, size_t count,
                          uint16_t *elements, uint16_t *places, void *memory) {
  struct scratch *scratch = memory;
  struct tree tree;
  int root = grow_tree(&tree, elements, count);
  size_t pieces = 0;
  for (size_t begin = 0; begin < count; begin += piece, pieces++) {
    size_t length = count - begin < piece ? count - begin : piece;
    for (size_t i = 0; i < length; i++)
      scratch->elements[i] = (uint32_t)key(elements[begin + i]) << 16 | (uint32_t)i;
    sort_piece(scratch, pieces, &tree, root, length, places + begin);
  }
  // Where the next run of each key is among all.
  size_t next[key_count], sum = 0;
  for (int k = 0; k < key_count; k++) {
    next[k] = sum;
    for (size_t p = 0; p < pieces; p++) sum += scratch->runs[p][k];
  }
  for (size_t p = 0; p < pieces; p++) {
    const uint16_t *place = places + p * piece;
    uint16_t *steps = (uint16_t *)scratch->others, *mine = elements + p * piece;
    size_t total = 0;
    for (int k = 0; k < key_count; k++) {
      size_t length = scratch->runs[p][k];
      const uint8_t *high = upper + next[k], *low = lower + next[k];
      for (size_t i = 0; i < length; i++) steps[place[i]] = (uint16_t)(high[i] << 8 | low[i]);
      next[k] += length;
      place += length;
      total += length;
    }
    for (size_t i = 0; i < total; i++) mine[i] = unordered(ordered(mine[i]) + unfolded(steps[i]));
  }
}
#else
bool smelt_sorts_steps(void) { return false; }

void smelt_split_steps(uint16_t *elements, const uint16_t *reference, size_t count, uint8_t *upper,
                       uint8_t *lower, void *memory) { __builtin_trap(); }

void smelt_add_steps(const uint8_t *upper, const uint8_t *lower, size_t count, uint16_t *elements,
                     uint16_t *places, void *memory) { __builtin_trap(); }
#endif
