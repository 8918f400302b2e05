// The JSON header of a safetensors file: which tensors it holds, and where.
//
// A file is 8 bytes of header length (little endian), the header, and the data. The header is an
// object
//     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, …,
//      "__metadata__": {"key": "text", …}}
// with offsets in bytes from the start of the data. The tensors' ranges cover the data exactly,
// without holes and without overlap.

#ifndef FLASH_ENTMAX_SRC_IO_SAFETENSORS_HEADER_H_
#define FLASH_ENTMAX_SRC_IO_SAFETENSORS_HEADER_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "flash_entmax/status.h"
#include "flash_entmax/tensor.h"

namespace flash_entmax::io {

// One tensor, row-major and little endian.
struct SafetensorsEntry {
  std::string name;
  std::string dtype_name;      // As in the file: "F32", "BF16", "BOOL", …
  std::optional<DType> dtype;  // Nothing for the types that this library does not compute with.
  std::vector<int64_t> shape;
  int64_t begin = 0;  // Bytes from the start of the data.
  int64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  // In the order of their data.
  std::map<std::string, std::string> metadata;
};

// Reads the header's text. `data_bytes` is the size of the data that follows it. Whatever the text
// is, the result is a header of which everything above is true, or a Status; memory stays within a
// small multiple of the text.
Expected<SafetensorsHeader> ParseSafetensorsHeader(std::string_view text, int64_t data_bytes);

// The file's name for a type: "F32" for kFloat32. kUInt8 is "U8".
const char* SafetensorsNameOf(DType dtype);

// `text` in quotes, fit for a one-line message: clipped, control characters made visible.
std::string Quoted(std::string_view text);

}  // namespace flash_entmax::io

#endif  // FLASH_ENTMAX_SRC_IO_SAFETENSORS_HEADER_H_
