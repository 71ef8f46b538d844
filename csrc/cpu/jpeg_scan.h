// From the coded picture of a JPEG file to planes of bytes: Huffman codes and the inverse
// transform.
#pragma once

#include <cstring>

#include "jpeg_file.h"
#include "jpeg_idct.h"

namespace uml::UML_ARCH {
namespace {

constexpr int64_t kRowSlack = 64;   // bytes that vectors may touch behind a row
constexpr int64_t kRowMargin = 16;  // bytes before a row
constexpr uint8_t kEndOfImage = 0xD9;

// Place of the k-th coefficient of a file in its block, as idct_two wants it (rows 16 apart).
constexpr uint8_t kPlace[64] = {
    0,  1,  16, 32, 17,  2,   3,   18, 33, 48, 64, 49, 34,  19,  4,   5,   20, 35,  50,  65, 80, 96,
    81, 66, 51, 36, 21,  6,   7,   22, 37, 52, 67, 82, 97,  112, 113, 98,  83, 68,  53,  38, 23, 39,
    54, 69, 84, 99, 114, 115, 100, 85, 70, 55, 71, 86, 101, 116, 117, 102, 87, 103, 118, 119};

// The coded bits of a scan, the next one on top. A value, so that it lives in registers.
struct Bits {
  const uint8_t* p;
  uint64_t top;
  int count;
  int made_up;  // zeros behind the end of the scan
};

__attribute__((noinline)) Bits filled_by_bytes(Bits b) {
  while (b.count <= 56) {
    uint64_t byte = *b.p;
    if (byte != 0xFF) {
      ++b.p;
    } else if (b.p[1] == 0) {
      b.p += 2;
    } else {
      byte = 0;
      b.made_up += 8;
    }
    b.top |= byte << (56 - b.count);
    b.count += 8;
  }
  return b;
}

// At least 32 bits.
UML_INLINE Bits filled(Bits b) {
  if (b.count >= 32) return b;
  uint64_t word;
  std::memcpy(&word, b.p, 8);
  // a byte 0xFF in it: stuffing or a marker
  if ((~word - 0x0101010101010101u) & word & 0x8080808080808080u) return filled_by_bytes(b);
  const int bytes = (63 - b.count) >> 3;
  b.top |= __builtin_bswap64(word) >> b.count;
  b.p += bytes;
  b.count += 8 * bytes;
  return b;
}

UML_INLINE void drop(Bits& b, int n) {
  b.top <<= n;
  b.count -= n;
}

// Length and symbol of a code longer than kHuffmanBits; length 0: there is none.
__attribute__((noinline)) int long_code(uint64_t top, const HuffmanTable& table) {
  const auto code = static_cast<uint32_t>(top >> 48);
  int length = kHuffmanBits + 1;
  while (code >= table.limit[length]) ++length;
  if (length > kLongestCode) return 0;
  return table.symbols[(table.first[length] + static_cast<int>(code >> (16 - length))) & 255] << 8 |
         length;
}

// Memory of a thread, kept from file to file.
struct Scratch {
  Buffer file;
  JpegTables tables = {};
  Buffer planes[3];
  Buffer row[2];
  alignas(64) int16_t blocks[128] = {};
};

// Collects blocks until there are two to transform.
struct BlockPair {
  int16_t* coefficients;
  uint8_t* out[2] = {};
  int64_t stride[2] = {};
  int count = 0;

  int16_t* next() { return coefficients + 8 * count; }

  UML_INLINE void add(uint8_t* to, int64_t row_stride, bool is_flat) {
    if (is_flat) {  // all coefficients but the mean are zero
      const int mean = ((*next() + 4) >> 3) + 128;
      *next() = 0;
      const uint64_t eight =
          0x0101010101010101u * static_cast<uint64_t>(larger(smaller(mean, 255), 0));
      for (int r = 0; r < 8; ++r) std::memcpy(to + r * row_stride, &eight, 8);
      return;
    }
    out[count] = to;
    stride[count] = row_stride;
    if (++count == 2) transform();
  }

  void transform() {
    idct_two(coefficients, out, stride);
    std::memset(coefficients, 0, 128 * sizeof(int16_t));
    count = 0;
  }

  void finish() {
    uint8_t nowhere[64];
    if (count == 0) return;
    out[1] = nowhere;
    stride[1] = 8;
    transform();
  }
};

// No picture has coefficients of this size: they would overflow in libjpeg's 16-bit sums.
constexpr int kLargest = 8192;

enum class Found { kValue, kEnd, kBroken };

// The next run of zeros and the value behind it.
UML_INLINE Found next_value(Bits& b, const HuffmanTable& table, int& run, int& value) {
  const int entry = table.fast[b.top >> (64 - kHuffmanBits)];
  run = entry >> 8 & 15;
  if (entry & 16) {
    drop(b, entry & 15);
    value = entry >> 16;
    return Found::kValue;
  }
  int size = entry >> 12 & 15;
  if (entry != 0) {
    drop(b, entry & 15);
  } else {
    const int code = long_code(b.top, table);
    if (code == 0) return Found::kBroken;
    drop(b, code & 31);
    run = code >> 12;
    size = code >> 8 & 15;
  }
  if (size == 0) return Found::kEnd;
  const int bits = static_cast<int>(b.top >> (64 - size));
  drop(b, size);
  value = bits < 1 << (size - 1) ? bits + 1 - (1 << size) : bits;
  return Found::kValue;
}

// Decodes a block to `block` (zeros before) and says whether it has only a mean; false: broken.
UML_INLINE bool decode_block(Bits& bits, const JpegComponent& component, int& mean, int16_t* block,
                             bool& is_flat) {
  const int16_t* quant = component.quant;
  Bits b = filled(bits);
  int run = 0;
  int value = 0;
  const Found kind = next_value(b, *component.dc, run, value);
  if (kind == Found::kBroken) return false;
  if (kind == Found::kValue) mean += value;
  if (mean != static_cast<int16_t>(mean)) return false;
  const int scaled = mean * quant[0];
  unsigned beyond = static_cast<unsigned>(scaled + kLargest);
  block[0] = static_cast<int16_t>(scaled);
  is_flat = true;
  const HuffmanTable& table = *component.ac;
  for (int k = 1; k < 64; ++k) {
    b = filled(b);
    const Found found = next_value(b, table, run, value);
    if (found == Found::kValue) {
      k += run;
      if (k > 63) return false;
      const int coefficient = value * quant[k];
      beyond |= static_cast<unsigned>(coefficient + kLargest);
      block[kPlace[k]] = static_cast<int16_t>(coefficient);
      is_flat = false;
      continue;
    }
    if (found == Found::kBroken) return false;
    if (run != 15) break;
    k += run;
  }
  bits = b;
  return beyond < 2 * kLargest;
}

// One plane of bytes per component.
struct Planes {
  uint8_t* plane[3];
  int64_t stride[3];
};

// The coded picture to one plane of bytes per component, whole blocks; false if it is broken.
bool decode_planes(const JpegFile& file, Scratch& scratch, Planes& planes) {
  const int wide = file.component[0].horizontal;
  const int high = file.component[0].vertical;
  const int64_t units_x = (file.width + 8 * wide - 1) / (8 * wide);
  const int64_t units_y = (file.height + 8 * high - 1) / (8 * high);
  for (int c = 0; c < file.components; ++c) {
    planes.stride[c] = units_x * 8 * file.component[c].horizontal + 2 * kRowMargin;
    const int64_t rows = units_y * 8 * file.component[c].vertical;
    const int64_t size = planes.stride[c] * rows + kRowSlack;
    planes.plane[c] = scratch.planes[c].of(static_cast<size_t>(size)) + kRowMargin;
  }
  std::memset(scratch.blocks, 0, sizeof scratch.blocks);
  BlockPair pair{scratch.blocks};
  Bits bits{file.scan, 0, 0, 0};
  int means[3] = {};
  for (int64_t y = 0; y < units_y; ++y) {
    for (int64_t x = 0; x < units_x; ++x) {
      for (int c = 0; c < file.components; ++c) {
        const JpegComponent& component = file.component[c];
        for (int v = 0; v < component.vertical; ++v) {
          for (int h = 0; h < component.horizontal; ++h) {
            bool is_flat;
            if (!decode_block(bits, component, means[c], pair.next(), is_flat)) return false;
            const int64_t row = (y * component.vertical + v) * 8;
            const int64_t column = (x * component.horizontal + h) * 8;
            const int64_t stride = planes.stride[c];
            pair.add(planes.plane[c] + row * stride + column, stride, is_flat);
          }
        }
      }
    }
  }
  pair.finish();
  const int left = bits.count - bits.made_up;
  return left >= 0 && left < 8 && bits.p[0] == 0xFF && bits.p[1] == kEndOfImage;
}

}  // namespace
}  // namespace uml::UML_ARCH
