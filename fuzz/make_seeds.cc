// Writes the seeds of the fuzz targets: a few well-formed inputs that mutations start from.
// Usage: make_seeds FOLDER

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "io/atomic_file.h"
#include "io/safetensors.h"

namespace flash_entmax {
namespace {

Status WriteSafetensorsSeeds(const std::string& folder) {
  std::vector<double> memory(64, 1.0);
  std::vector<io::NamedTensor> tensors;
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                            DType::kUInt8, DType::kInt32, DType::kInt64}) {
    tensors.push_back({NameOf(dtype), TensorView::Contiguous(memory.data(), dtype, {2, 1, 3})});
    Status status = io::WriteSafetensors(folder + "/" + NameOf(dtype), {tensors.back()});
    if (!status.ok()) return status;
  }
  if (Status status = io::WriteSafetensors(folder + "/empty", {}); !status.ok()) return status;
  return io::WriteSafetensors(folder + "/all", tensors, {{"format", "pt"}});
}

// Bytes of many kinds; a structured target reads them as its choices.
Status WriteByteSeeds(const std::string& folder) {
  for (int seed = 0; seed < 16; ++seed) {
    std::string bytes;
    uint32_t state = static_cast<uint32_t>(seed) * 2654435761u + 1;
    for (int i = 0; i < 256; ++i) {
      state = state * 1664525u + 1013904223u;
      bytes += static_cast<char>(state >> 24);
    }
    const Status status = io::WriteFileAtomically(folder + "/" + std::to_string(seed), bytes);
    if (!status.ok()) return status;
  }
  return Status::Ok();
}

int Main(const std::string& folder) {
  std::error_code error;
  for (const char* target : {"safetensors", "attention", "mapping"}) {
    std::filesystem::create_directories(folder + "/" + target, error);
  }
  for (const Status& status :
       {WriteSafetensorsSeeds(folder + "/safetensors"), WriteByteSeeds(folder + "/attention"),
        WriteByteSeeds(folder + "/mapping")}) {
    if (!status.ok()) {
      std::fprintf(stderr, "make_seeds: %s\n", status.message().c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace flash_entmax

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: make_seeds FOLDER\n");
    return 2;
  }
  return flash_entmax::Main(argv[1]);
}
