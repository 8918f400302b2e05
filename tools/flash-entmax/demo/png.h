// Small pictures as PNG files (ISO/IEC 15948), for pages that must not load anything else.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_PNG_H_
#define FLASH_ENTMAX_TOOLS_DEMO_PNG_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace flash_entmax::cli {

struct PaletteColour {
  uint8_t red = 0;
  uint8_t green = 0;
  uint8_t blue = 0;
  uint8_t alpha = 255;
};

// A picture of at most 256 colours; `pixels` are indices into `palette`, [height, width].
std::string EncodePng(int width, int height, const std::vector<PaletteColour>& palette,
                      const std::vector<uint8_t>& pixels);

// RFC 4648, with padding.
std::string EncodeBase64(std::string_view bytes);

// A zlib stream (RFC 1950) of `bytes`, compressed by repetitions of the last byte or the last row
// of `row_bytes` bytes only: what pictures with much empty space need.
std::string CompressZlib(std::string_view bytes, size_t row_bytes);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_PNG_H_
