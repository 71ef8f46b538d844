#include "jpeg_file.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace uml {

namespace {

constexpr uint8_t kStartOfImage = 0xD8;
constexpr uint8_t kBaseline = 0xC0;
constexpr uint8_t kHuffman = 0xC4;
constexpr uint8_t kScan = 0xDA;
constexpr uint8_t kQuant = 0xDB;
constexpr uint8_t kRestart = 0xDD;
constexpr uint8_t kApp0 = 0xE0;
constexpr uint8_t kAdobe = 0xEE;
constexpr uint8_t kApp15 = 0xEF;
constexpr uint8_t kComment = 0xFE;

// Makes the table of the bytes of a DHT segment: 16 counts, then symbols. False if the counts are
// no prefix code.
bool make_table(const uint8_t* counts, const uint8_t* symbols, bool is_dc, HuffmanTable& table) {
  std::memset(table.fast, 0, sizeof table.fast);
  uint32_t code = 0;
  int at = 0;
  for (int length = 1; length <= kLongestCode; ++length) {
    table.first[length] = at - static_cast<int32_t>(code);
    for (int i = 0; i < counts[length - 1]; ++i, ++at, ++code) {
      if (code >= (1u << length)) return false;
      const int symbol = symbols[at];
      const int run = is_dc ? 0 : symbol >> 4;
      const int size = is_dc ? symbol : symbol & 15;
      if (is_dc && size > 11) return false;
      table.symbols[at] = static_cast<uint8_t>(symbol);
      if (length > kHuffmanBits) continue;
      const int left = kHuffmanBits - length;
      for (int rest = 0; rest < 1 << left; ++rest) {
        int entry = length | run << 8 | size << 12;
        if (size > 0 && size <= left) {
          int value = rest >> (left - size);
          if (value < 1 << (size - 1)) value += 1 - (1 << size);
          entry = (length + size) | 1 << 4 | run << 8 |
                  static_cast<int>(static_cast<uint32_t>(value) << 16);
        }
        table.fast[(code << left) + static_cast<uint32_t>(rest)] = entry;
      }
    }
    table.limit[length] = code << (kLongestCode - length);
    code <<= 1;
  }
  table.limit[kLongestCode + 1] = ~0u;
  return true;
}

bool read_huffman(const uint8_t* p, const uint8_t* end, JpegTables& tables, int& seen) {
  while (p < end) {
    if (end - p < 17 || (p[0] & 0xEE) != 0) return false;
    int count = 0;
    for (int i = 1; i <= kLongestCode; ++i) count += p[i];
    const ptrdiff_t size = 17 + count;
    if (count > 256 || end - p < size) return false;
    const bool is_dc = p[0] < 16;
    JpegTables::Known& known = (is_dc ? tables.dc : tables.ac)[p[0] & 15];
    if (known.size != size || std::memcmp(known.bytes, p, static_cast<size_t>(size)) != 0) {
      known.size = 0;
      if (!make_table(p + 1, p + 17, is_dc, known.table)) return false;
      std::memcpy(known.bytes, p, static_cast<size_t>(size));
      known.size = size;
    }
    seen |= 1 << (p[0] >> 3 | (p[0] & 1));
    p += size;
  }
  return true;
}

bool read_quant(const uint8_t* p, const uint8_t* end, JpegTables& tables, int& seen) {
  for (; p < end; p += 65) {
    if (end - p < 65 || p[0] > 3) return false;  // above 3: 16-bit steps
    for (int k = 0; k < 64; ++k) tables.quant[p[0]][k] = p[1 + k];
    seen |= 1 << p[0];
  }
  return true;
}

}  // namespace

Buffer::~Buffer() { std::free(bytes_); }

uint8_t* Buffer::of(size_t size) {
  if (size <= size_) return bytes_;
  std::free(bytes_);
  size_ = 0;
  bytes_ = static_cast<uint8_t*>(std::malloc(size));
  if (bytes_ == nullptr) throw std::bad_alloc();
  size_ = size;
  return bytes_;
}

const uint8_t* read_file(int descriptor, int64_t offset, int64_t size, Buffer& buffer) {
  uint8_t* file = buffer.of(static_cast<size_t>(size + kFileSlack));
  for (int64_t at = 0; at < size;) {
    const ssize_t got = pread(descriptor, file + at, static_cast<size_t>(size - at),
                              static_cast<off_t>(offset + at));
    if (got <= 0) return nullptr;
    at += got;
  }
  for (int64_t i = size; i < size + kFileSlack; i += 2) {
    file[i] = 0xFF;
    file[i + 1] = 0xD8;
  }
  return file;
}

bool read_jpeg_headers(const uint8_t* bytes, size_t size, JpegTables& tables, JpegFile& file) {
  if (size < 4 || bytes[0] != 0xFF || bytes[1] != kStartOfImage) return false;
  const uint8_t* p = bytes + 2;
  const uint8_t* end = bytes + size;
  bool is_jfif = false;
  int quants = 0;
  int quant_of[3] = {};
  int huffmans = 0;
  file.components = 0;
  for (;;) {
    if (end - p < 4 || p[0] != 0xFF) return false;
    const uint8_t marker = p[1];
    const int length = p[2] << 8 | p[3];
    const uint8_t* body = p + 4;
    const uint8_t* next = p + 2 + length;
    if (length < 2 || next > end) return false;
    p = next;
    if (marker == kBaseline) {
      const int count = length >= 8 ? body[5] : 0;
      if (file.components != 0 || (count != 1 && count != 3) || length != 8 + 3 * count ||
          body[0] != 8) {
        return false;
      }
      file.components = count;
      file.height = body[1] << 8 | body[2];
      file.width = body[3] << 8 | body[4];
      if (file.height == 0 || file.width == 0) return false;
      for (int c = 0; c < count; ++c) {
        const uint8_t* of = body + 6 + 3 * c;
        file.component[c] = {of[0], of[1] >> 4, of[1] & 15, nullptr, nullptr, nullptr};
        if (of[2] > 3) return false;
        quant_of[c] = of[2];
      }
    } else if (marker == kHuffman) {
      if (!read_huffman(body, next, tables, huffmans)) return false;
    } else if (marker == kQuant) {
      if (!read_quant(body, next, tables, quants)) return false;
    } else if (marker == kApp0) {
      if (length >= 16 && std::memcmp(body, "JFIF", 5) == 0) {
        if (body[5] != 1) return false;  // the version
        is_jfif = true;
      }
    } else if (marker == kAdobe || marker == kRestart) {
      return false;  // other colours; pieces that start anew
    } else if (marker == kScan) {
      const int count = file.components;
      if (count == 0 || length != 6 + 2 * count || body[0] != count) return false;
      const uint8_t* last = body + 1 + 2 * count;
      if (last[0] != 0 || last[1] != 63 || last[2] != 0) return false;
      for (int c = 0; c < count; ++c) {
        JpegComponent& component = file.component[c];
        const int dc = body[2 + 2 * c] >> 4;
        const int ac = body[2 + 2 * c] & 15;
        if (body[1 + 2 * c] != component.id || dc > 1 || ac > 1) return false;
        if (!(huffmans & 1 << dc) || !(huffmans & 4 << ac) || !(quants & 1 << quant_of[c])) {
          return false;
        }
        component.quant = tables.quant[quant_of[c]];
        component.dc = &tables.dc[dc].table;
        component.ac = &tables.ac[ac].table;
      }
      break;
    } else if ((marker < kApp0 || marker > kApp15) && marker != kComment) {
      return false;
    }
  }
  file.scan = p;
  const JpegComponent* c = file.component;
  if (file.components == 1) return c[0].horizontal == 1 && c[0].vertical == 1;
  if (!is_jfif && (c[0].id != 1 || c[1].id != 2 || c[2].id != 3)) return false;
  const bool is_full_colour =
      c[1].horizontal == 1 && c[1].vertical == 1 && c[2].horizontal == 1 && c[2].vertical == 1;
  // libjpeg does not smooth colours this narrow
  if (c[0].horizontal == 2 && file.width <= 4) return false;
  const int factors = c[0].horizontal * 10 + c[0].vertical;
  return is_full_colour && (factors == 11 || factors == 21 || factors == 22);
}

}  // namespace uml
