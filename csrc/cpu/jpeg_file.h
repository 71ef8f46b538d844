// The headers of a JPEG file. Plain functions, no vectors: compiled once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uml {

constexpr int kHuffmanBits = 10;  // codes up to this long are found in one look-up
constexpr int kLongestCode = 16;

// A Huffman table as decoders use it.
struct HuffmanTable {
  // One entry per value of the next kHuffmanBits bits. Bits 0-3: bits used, 0 where the code is
  // longer. Bit 4: the value lies in bits 16-31, its bits are counted in "used". Bits 8-11: zeros
  // before the value; bits 12-15: bits of the value that follow the code. An end of block has
  // neither.
  int32_t fast[1 << kHuffmanBits];
  // Codes of length n, left-aligned to 16 bits, are below limit[n]; the symbol of the first is
  // symbols[first[n]].
  uint32_t limit[kLongestCode + 2];
  int32_t first[kLongestCode + 1];
  uint8_t symbols[256];
};

// What a decoder keeps between files: their tables are mostly the same, so the last ones are
// known by their bytes and not made again.
struct JpegTables {
  struct Known {
    uint8_t bytes[17 + 256];
    ptrdiff_t size;
    HuffmanTable table;
  };
  Known dc[2];
  Known ac[2];
  int16_t quant[4][64];  // in the order of the file
};

struct JpegComponent {
  int id;
  int horizontal;  // sampling factors
  int vertical;
  const int16_t* quant;
  const HuffmanTable* dc;
  const HuffmanTable* ac;
};

struct JpegFile {
  int height;
  int width;
  int components;  // 1 or 3
  JpegComponent component[3];
  const uint8_t* scan;  // the first byte of the coded picture
};

// Bytes that only grow; what was in them is lost when they do.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least `size` bytes.
  uint8_t* of(size_t size);

 private:
  uint8_t* bytes_ = nullptr;
  size_t size_ = 0;
};

// Bytes that may be read behind a file: markers that no scan goes on after.
constexpr int64_t kFileSlack = 8;

// `size` bytes of an open file from `offset` on, and the slack; null if they are not there.
const uint8_t* read_file(int descriptor, int64_t offset, int64_t size, Buffer& buffer);

// Reads the headers of a plain JPEG: baseline, one scan, grey or YCbCr with halved or full colours.
// False for every other file, broken ones among them.
bool read_jpeg_headers(const uint8_t* bytes, size_t size, JpegTables& tables, JpegFile& file);

}  // namespace uml
