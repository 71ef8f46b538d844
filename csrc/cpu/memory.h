// What the operating system is told about memory that kernels write.
#pragma once

#include <cstddef>

namespace uml {

// Asks for huge pages behind the `bytes` at `data`, if those are large and not yet written to; does
// nothing on systems without such advice. Call before the first write.
void prefer_huge_pages(void* data, size_t bytes);

// True if the `bytes` at `data`, private memory as allocators give it, now are zeros that no kernel
// needs to write: where a large buffer's pages are fresh they come as zeros from the system, huge
// ones, each when it is first touched. False, with nothing done, for other buffers and on systems
// without such advice.
bool zero_by_pages(void* data, size_t bytes);

}  // namespace uml
