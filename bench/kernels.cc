// How near the register tiles of CPU attention come to the machine: the rate of the float32 tile of
// Q·Kᵀ beside the rate of independent multiply-adds, and that of the screened 8-bit tile beside
// independent dot products of 8-bit integers; the screened 7-bit tile beside twice the rate of
// multiply-adds, about what its five instructions for 64 products allow. One thread; peak and
// tile in turns, so that a clock that changes changes both, and in time of the processor, so that
// other programs matter less. The medians of the ratios are what counts.
//
// The keys are a few blocks of one head, in the second-level cache as they are when a panel of rows
// passes over them. Run through `./dev bench kernels`.

#include "cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels.cc"
#include "hwy/foreach_target.h"
// Must follow foreach_target.h, which includes this file once for every instruction set.
#include "cpu/tile-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace flash_entmax::bench {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
namespace engine = cpu::HWY_NAMESPACE;

// Multiply-adds of registers alone, as many chains as the tile has; returns how many floats were
// multiplied.
double PeakFloat(int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  engine::Tile<float> tile;
  // Different numbers, or the compiler adds one of them for all.
  HWY_ALIGN float start[engine::kTileRows * engine::TileWidth<float>()];
  for (size_t i = 0; i < engine::kTileRows * engine::TileWidth<float>(); ++i) {
    start[i] = sink[0] * static_cast<float>(i);
  }
  tile.Load(start, engine::TileWidth<float>());
  const auto a = hn::Set(d, sink[0]);
  const auto b = hn::Set(d, sink[1]);
  for (int64_t i = 0; i < rounds; ++i) {
    HWY_UNROLL(engine::kTileRows)
    for (int r = 0; r < engine::kTileRows; ++r) {
      HWY_UNROLL(engine::kTileVectors)
      for (int v = 0; v < engine::kTileVectors; ++v) {
        tile.row[r][v] = hn::MulAdd(a, b, tile.row[r][v]);
      }
    }
  }
  HWY_ALIGN float out[engine::kTileRows * engine::TileWidth<float>()];
  tile.Store(out, engine::TileWidth<float>());
  for (const float x : out) sink[2] += x;
  return static_cast<double>(rounds) * engine::kTileRows * engine::TileWidth<float>();
}

// The tile over all `blocks` of keys, `rounds` times.
double TileFloat(const float* query, const float* keys, int64_t blocks, int64_t depth,
                 int64_t rounds, float* sink) {
  constexpr auto kWidth = static_cast<int64_t>(engine::TileWidth<float>());
  HWY_ALIGN float limit[engine::kTileRows];
  for (float& x : limit) x = 1e30f;
  uint32_t hits = 0;
  for (int64_t i = 0; i < rounds; ++i) {
    for (int64_t block = 0; block < blocks; ++block) {
      engine::Tile<float> tile;
      tile.Zero();
      tile.MultiplyAdd(query, static_cast<size_t>(depth), keys + block * kWidth * depth,
                       static_cast<size_t>(kWidth), static_cast<size_t>(depth));
      hits |= tile.RowsAbove(limit);  // As the search does.
    }
  }
  sink[2] += static_cast<float>(hits);
  return static_cast<double>(rounds * blocks * depth) * engine::kTileRows *
         engine::TileWidth<float>();
}

int64_t TileRows() { return engine::kTileRows; }
int64_t TileKeys() { return static_cast<int64_t>(engine::TileWidth<float>()); }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace flash_entmax::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "cpu/aligned_array.h"
#include "cpu/screen_int7.h"
#include "cpu/screen_int8.h"
#include "flash_entmax/machine.h"
#include "random.h"

namespace flash_entmax::bench {

HWY_EXPORT(PeakFloat);
HWY_EXPORT(TileFloat);
HWY_EXPORT(TileRows);
HWY_EXPORT(TileKeys);

namespace {

constexpr int kTurns = 41;
constexpr int64_t kKeys = 512;

double ThreadSeconds() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Numbers multiplied in a second, in units of 1e9.
template <typename Function>
double Rate(const Function& function) {
  const double start = ThreadSeconds();
  const double products = function();
  return products / (ThreadSeconds() - start) * 1e-9;
}

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

template <typename Peak, typename Tile>
void Compare(const char* name, int64_t depth, const Peak& peak, const Tile& tile) {
  std::vector<double> peaks;
  std::vector<double> tiles;
  std::vector<double> shares;
  peak();
  tile();
  for (int turn = 0; turn < kTurns; ++turn) {
    peaks.push_back(Rate(peak));
    tiles.push_back(Rate(tile));
    shares.push_back(tiles.back() / peaks.back());
  }
  std::sort(shares.begin(), shares.end());
  std::printf("%-8s d %4lld  peak %7.1f  tile %7.1f G multiply-adds/s  share %.3f (%.3f to %.3f)\n",
              name, static_cast<long long>(depth), Median(peaks), Median(tiles), Median(shares),
              shares[shares.size() / 10], shares[shares.size() - 1 - shares.size() / 10]);
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
// Independent dot products of four bytes a lane: 24 chains, as the tile has.
__attribute__((target("avx512f,avx512vnni"))) double PeakInt8(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(
        "vpdpbusd %%zmm31, %%zmm30, %%zmm0\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm1\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm2\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm3\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm4\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm5\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm6\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm7\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm8\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm9\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm10\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm11\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm12\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm13\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm14\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm15\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm16\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm17\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm18\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm19\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm20\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm21\n\t"
        "vpdpbusd %%zmm31, %%zmm30, %%zmm22\n\tvpdpbusd %%zmm31, %%zmm30, %%zmm23"
        :
        :
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20",
          "xmm21", "xmm22", "xmm23");
  }
  return static_cast<double>(rounds) * 24.0 * 64.0;
}
#else
double PeakInt8(int64_t /*rounds*/) { return 0.0; }
#endif

cpu::AlignedArray<float> Gauss(int64_t count, uint64_t seed) {
  Random random(seed);
  auto values = cpu::MakeAligned<float>(static_cast<size_t>(count));  // As the engine's are.
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(random.Gauss());
  return values;
}

// Too high for any product, and too low for the norms alone to say so.
void SetHighLimits(const cpu::ScreenRows& rows, int64_t count, float key_norm, float* limit) {
  for (int64_t r = 0; r < count; ++r) limit[r] = 0.9f * rows.norm[r] * key_norm;
}

void CompareInt8(int64_t depth, int64_t rounds) {
  constexpr int64_t kBlocks = kKeys / cpu::kInt8Keys;
  const int64_t padded = cpu::ScreenDepth(cpu::Screening::kInt8, depth);
  const auto query = Gauss(cpu::kInt8Rows * depth, 3);
  const auto keys = Gauss(kKeys * depth, 4);
  std::vector<int8_t> rounded_query(static_cast<size_t>(cpu::kInt8Rows * padded + 64));
  std::vector<uint8_t> rounded(static_cast<size_t>(kKeys * padded));
  cpu::ScreenRows rows;
  if (!cpu::RoundQueriesInt8(query.get(), static_cast<size_t>(depth), static_cast<size_t>(depth),
                             /*matrix_unit=*/false, rounded_query.data(), &rows)) {
    return;
  }
  std::vector<cpu::KeyBlockBound> bounds(static_cast<size_t>(kBlocks));
  for (int64_t b = 0; b < kBlocks; ++b) {
    bounds[static_cast<size_t>(b)].norm = 1.5f * std::sqrt(static_cast<float>(depth));
    cpu::RoundKeysInt8(keys.get() + b * cpu::kInt8Keys * depth, static_cast<size_t>(depth),
                       rounded.data() + b * cpu::kInt8Keys * padded,
                       &bounds[static_cast<size_t>(b)]);
  }
  float limit[16] = {};
  SetHighLimits(rows, cpu::kInt8Rows, bounds[0].norm, limit);
  static cpu::ScreenHits hits;
  Compare(
      "int8", depth, [&] { return PeakInt8(rounds * kBlocks * depth / 4); },
      [&] {
        for (int64_t i = 0; i < rounds; ++i) {
          for (int64_t b = 0; b < kBlocks; ++b) {
            cpu::ScreenTileInt8(rows, rounded_query.data(), bounds[static_cast<size_t>(b)],
                                rounded.data() + b * cpu::kInt8Keys * padded,
                                static_cast<size_t>(depth), limit, 1e-5f, 0, &hits);
          }
        }
        return static_cast<double>(rounds * kKeys * depth * cpu::kInt8Rows);
      });
  if (hits.count != 0) std::printf("int8: products passed that should not\n");
}

void CompareInt7(int64_t tile_rows, int64_t width, int64_t depth, int64_t rounds) {
  const int64_t blocks = kKeys / width;
  const auto bytes = [&](int64_t count) {
    return cpu::ScreenBytes(cpu::Screening::kInt7, count, depth);
  };
  const auto query = Gauss(tile_rows * depth, 3);
  const auto keys = Gauss(kKeys * depth, 4);
  const auto rounded_query = cpu::MakeAligned<uint8_t>(static_cast<size_t>(bytes(tile_rows)));
  const auto rounded = cpu::MakeAligned<uint8_t>(static_cast<size_t>(bytes(kKeys)));
  cpu::ScreenRows rows;
  if (!cpu::RoundQueriesInt7(query.get(), static_cast<size_t>(depth), static_cast<size_t>(depth),
                             rounded_query.get(), &rows)) {
    return;
  }
  const auto bounds = cpu::MakeAligned<cpu::KeyBlockBound>(static_cast<size_t>(blocks));
  for (int64_t b = 0; b < blocks; ++b) {
    bounds[b] = {};
    bounds[b].norm = 1.5f * std::sqrt(static_cast<float>(depth));
    cpu::RoundKeysInt7(keys.get() + b * width * depth, static_cast<size_t>(depth),
                       rounded.get() + bytes(b * width), &bounds[b]);
  }
  float limit[16] = {};
  SetHighLimits(rows, tile_rows, bounds[0].norm, limit);
  static cpu::ScreenHits hits;
  float sink[3] = {1e-3f, 1e-3f, 0.0f};
  Compare(
      "int7", depth,
      [&] { return 2.0 * HWY_DYNAMIC_DISPATCH(PeakFloat)(rounds * blocks * depth / 2, sink); },
      [&] {
        for (int64_t i = 0; i < rounds; ++i) {
          for (int64_t b = 0; b < blocks; ++b) {
            cpu::ScreenTileInt7(rows, rounded_query.get(), bounds[b],
                                rounded.get() + bytes(b * width), static_cast<size_t>(depth), limit,
                                1e-5f, 0, &hits);
          }
        }
        return static_cast<double>(rounds * kKeys * depth * tile_rows);
      });
  if (hits.count != 0) std::printf("int7: products passed that should not\n");
}

int Main() {
  std::printf("instruction set %s, one thread, medians of %d turns (10th to 90th percentile)\n",
              ActiveInstructionSet().c_str(), kTurns);
  const int64_t rows = HWY_DYNAMIC_DISPATCH(TileRows)();
  const int64_t width = HWY_DYNAMIC_DISPATCH(TileKeys)();
  for (const int64_t depth : {32, 64, 128, 256}) {
    const int64_t blocks = kKeys / width;
    const int64_t rounds = 102400 / depth;
    const auto query = Gauss(rows * depth, 1);
    const auto keys = Gauss(blocks * width * depth, 2);
    float sink[3] = {1e-3f, 1e-3f, 0.0f};
    Compare(
        "float32", depth,
        [&] { return HWY_DYNAMIC_DISPATCH(PeakFloat)(rounds * blocks * depth, sink); },
        [&] {
          return HWY_DYNAMIC_DISPATCH(TileFloat)(query.get(), keys.get(), blocks, depth, rounds,
                                                 sink);
        });
  }
  for (const int64_t depth : {32, 64, 128, 256}) {
    if (cpu::CanScreenInt7()) CompareInt7(rows, width, depth, 204800 / depth);
  }
  for (const int64_t depth : {32, 64, 128, 256}) {
    if (cpu::CanScreenInt8()) CompareInt8(depth, 409600 / depth);
  }
  return EXIT_SUCCESS;
}

}  // namespace
}  // namespace flash_entmax::bench

int main() { return flash_entmax::bench::Main(); }

#endif  // HWY_ONCE
