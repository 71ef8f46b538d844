// What the operating system is told about memory that kernels write.
#pragma once

#include <cstddef>

namespace uml {

// Asks for huge pages behind `bytes` at `data` where a buffer is so large that its pages are always
// fresh; does nothing for smaller ones and on systems without such advice. Call before the first
// write.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace uml
