#include "memory.h"

#include <cstdint>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace uml {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

// Allocators map the memory of large buffers anew each time, or give it back in between; its pages
// of 4 KiB then fault one by one. Smaller buffers are mostly kept, and have few huge pages in them.
constexpr size_t kLarge = size_t{4} << 20;
constexpr uintptr_t kPage = 4 << 10, kHugePage = 2 << 20;

// Whole pages of the memory.
struct Pages {
  uintptr_t begin, end;
  Pages(void* data, size_t bytes, uintptr_t page)
      : begin((reinterpret_cast<uintptr_t>(data) + page - 1) / page * page),
        end((reinterpret_cast<uintptr_t>(data) + bytes) / page * page) {}
  bool advise(int advice) const {
    return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
  }
  // Whether nothing has been written to three of the pages.
  bool are_fresh() const {
    const uintptr_t places[] = {begin, begin + (end - begin) / 2 / kPage * kPage, end - kPage};
    for (const uintptr_t at : places) {
      unsigned char is_present = 1;
      if (mincore(reinterpret_cast<void*>(at), kPage, &is_present) != 0 || is_present & 1) {
        return false;
      }
    }
    return true;
  }
};

}  // namespace

void prefer_huge_pages(void* data, size_t bytes) {
  if (bytes >= kLarge) Pages(data, bytes, kHugePage).advise(MADV_HUGEPAGE);
}

// The gradient of 30,522 x 384 of which 1,895 rows are written, on one Sapphire Rapids core: 16.5
// ms as small pages with a pass of zeros, 3.7 as huge pages with one, 2.0 without the pass. Small
// pages without it take 2.2, but 20 more when an optimiser or clipping writes to the rest. Zeros in
// memory that is there already: 1.7.
bool zero_by_pages(void* data, size_t bytes) {
  if (bytes < kLarge) return false;
  const Pages whole(data, bytes, kPage);
  // The advice drops what is on the pages that are there after all; it fails where they are locked.
  if (!whole.are_fresh() || !whole.advise(MADV_DONTNEED)) return false;
  prefer_huge_pages(data, bytes);
  const auto first = reinterpret_cast<uintptr_t>(data);
  std::memset(data, 0, whole.begin - first);
  std::memset(reinterpret_cast<void*>(whole.end), 0, first + bytes - whole.end);
  return true;
}
#else
void prefer_huge_pages(void*, size_t) {}
bool zero_by_pages(void*, size_t) { return false; }
#endif

}  // namespace uml
