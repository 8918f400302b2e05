#include "demo/png.h"

#include <algorithm>
#include <array>
#include <cstddef>

namespace flash_entmax::cli {
namespace {

void AppendBigEndian(uint32_t value, std::string* out) {
  for (int shift = 24; shift >= 0; shift -= 8) out->push_back(static_cast<char>(value >> shift));
}

uint32_t Crc32(std::string_view bytes) {
  uint32_t crc = 0xFFFFFFFFU;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
  }
  return ~crc;
}

uint32_t Adler32(std::string_view bytes) {
  constexpr uint32_t kModulus = 65521;
  uint32_t a = 1;
  uint32_t b = 0;
  for (const char c : bytes) {
    a = (a + static_cast<unsigned char>(c)) % kModulus;
    b = (b + a) % kModulus;
  }
  return (b << 16) | a;
}

void AppendChunk(std::string_view type, std::string_view data, std::string* out) {
  AppendBigEndian(static_cast<uint32_t>(data.size()), out);
  std::string body(type);
  body += data;
  *out += body;
  AppendBigEndian(Crc32(body), out);
}

// Writes the fixed Huffman code of DEFLATE (RFC 1951, section 3.2.6).
class DeflateWriter {
 public:
  DeflateWriter() { Bits(0b011, 3); }  // The last block; fixed codes.

  void Literal(unsigned char byte) { Symbol(byte); }

  // Repeats `length` bytes, 3 to 258, from `distance` bytes back.
  void Match(int length, int distance) {
    static constexpr std::array<int, 29> kLengthBase = {3,  4,  5,  6,   7,   8,   9,   10,  11, 13,
                                                        15, 17, 19, 23,  27,  31,  35,  43,  51, 59,
                                                        67, 83, 99, 115, 131, 163, 195, 227, 258};
    static constexpr std::array<int, 29> kLengthBits = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                                        2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    const auto l = static_cast<size_t>(
        std::upper_bound(kLengthBase.begin(), kLengthBase.end(), length) - kLengthBase.begin() - 1);
    Symbol(257 + static_cast<int>(l));
    Bits(static_cast<uint32_t>(length - kLengthBase[l]), kLengthBits[l]);
    // Distance codes come in pairs of the same number of extra bits: 1, 2, 3, 4, 5–6, 7–8, 9–12, …
    int code = 0;
    int base = 1;
    int extra = 0;
    while (distance >= base + (1 << extra)) {
      base += 1 << extra;
      ++code;
      extra = code < 2 ? 0 : code / 2 - 1;
    }
    ReversedBits(static_cast<uint32_t>(code), 5);
    Bits(static_cast<uint32_t>(distance - base), extra);
  }

  std::string Finish() {
    Symbol(256);
    if (used_ > 0) bytes_.push_back(static_cast<char>(buffer_));
    return std::move(bytes_);
  }

 private:
  void Symbol(int symbol) {
    if (symbol < 144) {
      ReversedBits(static_cast<uint32_t>(0x30 + symbol), 8);
    } else if (symbol < 256) {
      ReversedBits(static_cast<uint32_t>(0x190 + symbol - 144), 9);
    } else if (symbol < 280) {
      ReversedBits(static_cast<uint32_t>(symbol - 256), 7);
    } else {
      ReversedBits(static_cast<uint32_t>(0xC0 + symbol - 280), 8);
    }
  }

  // Huffman codes begin with their highest bit, all else with the lowest.
  void ReversedBits(uint32_t value, int count) {
    for (int i = count - 1; i >= 0; --i) Bits((value >> i) & 1U, 1);
  }

  void Bits(uint32_t value, int count) {
    for (int i = 0; i < count; ++i) {
      buffer_ |= ((value >> i) & 1U) << used_;
      if (++used_ < 8) continue;
      bytes_.push_back(static_cast<char>(buffer_));
      buffer_ = 0;
      used_ = 0;
    }
  }

  std::string bytes_;
  uint32_t buffer_ = 0;
  int used_ = 0;
};

// How many bytes from `at` on repeat those `distance` bytes earlier.
int MatchLength(std::string_view bytes, size_t at, size_t distance) {
  constexpr int kLongest = 258;
  if (distance == 0 || distance > at) return 0;
  int length = 0;
  while (length < kLongest && at + static_cast<size_t>(length) < bytes.size() &&
         bytes[at + static_cast<size_t>(length)] ==
             bytes[at + static_cast<size_t>(length) - distance]) {
    ++length;
  }
  return length;
}

}  // namespace

std::string CompressZlib(std::string_view bytes, size_t row_bytes) {
  constexpr int kShortest = 3;
  constexpr size_t kFarthest = 32768;
  DeflateWriter writer;
  for (size_t at = 0; at < bytes.size();) {
    int best = MatchLength(bytes, at, 1);
    size_t distance = 1;
    if (row_bytes <= kFarthest && best < 64) {
      if (const int length = MatchLength(bytes, at, row_bytes); length > best) {
        best = length;
        distance = row_bytes;
      }
    }
    if (best >= kShortest) {
      writer.Match(best, static_cast<int>(distance));
      at += static_cast<size_t>(best);
    } else {
      writer.Literal(static_cast<unsigned char>(bytes[at]));
      ++at;
    }
  }
  std::string stream = "\x78\x01";  // Deflate, a window of 32 KiB, fastest.
  stream += writer.Finish();
  AppendBigEndian(Adler32(bytes), &stream);
  return stream;
}

std::string EncodePng(int width, int height, const std::vector<PaletteColour>& palette,
                      const std::vector<uint8_t>& pixels) {
  // Four bits a pixel where sixteen colours are enough.
  const bool small = palette.size() <= 16;
  const auto columns = static_cast<size_t>(width);
  const size_t row_bytes = 1 + (small ? (columns + 1) / 2 : columns);
  std::string rows;
  for (size_t y = 0; y < static_cast<size_t>(height); ++y) {
    rows.push_back('\0');  // No filter.
    const uint8_t* row = pixels.data() + y * columns;
    for (size_t x = 0; x < columns; x += small ? 2 : 1) {
      const int first = row[x];
      const int second = x + 1 < columns ? row[x + 1] : 0;
      rows.push_back(static_cast<char>(small ? first * 16 + second : first));
    }
  }
  std::string header;
  AppendBigEndian(static_cast<uint32_t>(width), &header);
  AppendBigEndian(static_cast<uint32_t>(height), &header);
  header.push_back(small ? 4 : 8);
  header.push_back(3);     // Palette.
  header.append(3, '\0');  // Deflate, the usual filters, not interlaced.
  std::string colours;
  std::string alphas;
  for (const PaletteColour& colour : palette) {
    colours.push_back(static_cast<char>(colour.red));
    colours.push_back(static_cast<char>(colour.green));
    colours.push_back(static_cast<char>(colour.blue));
    alphas.push_back(static_cast<char>(colour.alpha));
  }
  std::string png = "\x89PNG\r\n\x1A\n";
  AppendChunk("IHDR", header, &png);
  AppendChunk("PLTE", colours, &png);
  AppendChunk("tRNS", alphas, &png);
  AppendChunk("IDAT", CompressZlib(rows, row_bytes), &png);
  AppendChunk("IEND", "", &png);
  return png;
}

std::string EncodeBase64(std::string_view bytes) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t at = 0; at < bytes.size(); at += 3) {
    const size_t count = std::min<size_t>(3, bytes.size() - at);
    uint32_t group = 0;
    for (size_t i = 0; i < 3; ++i) {
      group = group * 256 + (i < count ? static_cast<unsigned char>(bytes[at + i]) : 0U);
    }
    for (size_t i = 0; i < 4; ++i) {
      text.push_back(i <= count ? kDigits[(group >> (18 - 6 * i)) & 63U] : '=');
    }
  }
  return text;
}

}  // namespace flash_entmax::cli
