// How keys and values reach the consumers of the tile path's forward (tile_forward.cuh): the passes
// over the keys of a unit, and the producer warp that streams them through a ring of stages.
//
// The producer takes units from a queue and streams the sample and the first passes of each
// unasked; after that it follows the consumers' commands.
#ifndef FLASH_ENTMAX_CUDA_TILE_FORWARD_STREAM_CUH_
#define FLASH_ENTMAX_CUDA_TILE_FORWARD_STREAM_CUH_

#include "pipeline.cuh"

namespace flash_entmax::cuda {

template <class Element>
struct TileForwardParams {
  Shape shape;
  Tensor<const Element> query;
  Tensor<Element> output;
  const RowBound* bound;  // from screening; null: none
  SavedState saved;
  Control* control;
  bool all_units;                    // every unit, not only the flagged ones
  Tensor<const Element> key, value;  // the tensors of the maps
};

// The passes over the keys of a unit. A pass goes over every `stride`-th tile that all queries see
// whole, or (stride 0) over all tiles that some query sees.
struct UnitPasses {
  static constexpr int kSamples = 4;  // half tiles of 64 keys
  static constexpr int kTileKeys = 2 * kSumKeys;

  int tiles;   // key tiles that some query sees
  int common;  // keys that every query sees

  __device__ __forceinline__ UnitPasses(const Shape& shape, int unit)
      : tiles(UnitTiles(shape, unit, kTileKeys)),
        common(shape.VisibleKeys(unit % shape.Units() * Shape::kUnitRows)) {}

  // The sample: half tiles spread over those that every query sees, or all half tiles.
  __device__ __forceinline__ int SampleHalf(int i) const {
    return (2 * i + 1) * max(kSamples, common / kSumKeys) / (2 * kSamples);
  }
  __device__ __forceinline__ bool SampleIsAll() const { return 2 * tiles <= kSamples; }

  __device__ __forceinline__ int FirstStride() const {
    return tiles >= 64 ? 32 : tiles >= 32 ? 8 : tiles >= 16 ? 4 : 0;
  }
  static __device__ __forceinline__ int NextStride(int stride) { return stride == 32 ? 8 : 0; }
  static __device__ __forceinline__ int FirstTile(int stride) { return max(stride, 0) / 2; }
  static __device__ __forceinline__ int Step(int stride) { return max(stride, 1); }
  __device__ __forceinline__ int EndTile(int stride) const {
    return stride > 0 ? common / kTileKeys : tiles;
  }
};

template <int kHeadDim, bool kSave>
struct TileForwardTraits {
  static constexpr int kConsumers = 2;
  static constexpr int kTileKeys = UnitPasses::kTileKeys;
  static constexpr int kStages = kHeadDim == 128 ? 6 : 8;
  static constexpr int kConsumerThreads = kConsumers * kWarpGroupThreads;
  static constexpr int kThreads = kConsumerThreads + kWarpGroupThreads;
  static constexpr int kStageBytes = kTileBytes<kHeadDim, kTileKeys>;
  static constexpr int kConsumerBarrier = 1;
  static constexpr int kGroupBarrier = 2;  // and the next: one warp group each
  static constexpr int kMaxPasses = 16;
  static constexpr int kMaxOutputs = 4;
  // What does not fit into registers in the output pass: queries (then read from shared memory), a
  // second set of scores, a second set of operands.
  static constexpr bool kSharedQuery = kHeadDim == 128 && kSave;
  static constexpr bool kTwoScores = !kSharedQuery;
  static constexpr bool kTwoOperands = !kSave;
  static constexpr int kQueryBytes = kSharedQuery ? kTileBytes<kHeadDim, Shape::kUnitRows> : 0;
};

// What the producer streams when the consumers have all of a unit's sample and first passes.
enum class TileCommand { kSums, kOutput, kNextUnit };

template <int kHeadDim, bool kSave>
struct TileForwardShared {
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  alignas(1024) char tile[Traits::kStages][Traits::kStageBytes];
  alignas(1024) char query[Traits::kQueryBytes + 16];
  UnitFactors factors;
  uint64_t full[Traits::kStages];
  uint64_t empty[Traits::kStages];
  uint64_t unit_ready;
  uint64_t command_ready;
  // Where work units are taken from. Here because the compiler would compute the address for all
  // threads, and the consumers have no register for it.
  int* queue;
  int unit;  // -1: no more work
  TileCommand command;
};

template <class Element, int kHeadDim, bool kSave>
__device__ __forceinline__ void TileForwardProducer(const CUtensorMap& key_map,
                                                    const CUtensorMap& value_map,
                                                    const TileForwardParams<Element>& params,
                                                    int flagged_count,
                                                    TileForwardShared<kHeadDim, kSave>& shared) {
  using Traits = TileForwardTraits<kHeadDim, kSave>;
  const Shape& shape = params.shape;
  RingPosition<Traits::kStages> position;
  int command_parity = 0;
  for (;;) {
    const int next = atomicAdd(shared.queue, 1);
    const int used_units = (shape.queries + Shape::kUnitRows - 1) / Shape::kUnitRows;
    int unit = -1;
    if (params.all_units) {
      // Those with the most keys first.
      if (next < shape.BatchHeads() * used_units) {
        unit =
            next % shape.BatchHeads() * shape.Units() + used_units - 1 - next / shape.BatchHeads();
      }
    } else if (next < flagged_count) {
      unit = params.saved.flagged_units[next];
    }
    shared.unit = unit;
    cute::arrive_barrier(shared.unit_ready);
    if (unit < 0) break;

    const UnitPasses passes(shape, unit);
    const int head = unit / shape.Units();
    const int batch = head / shape.heads, kv_head = head % shape.heads / shape.group;
    constexpr int kSample = -1, kKeysAndValues = -2;  // other than a stride
    int pass = kSample;
    for (;;) {
      const int first = pass == kSample ? 0 : UnitPasses::FirstTile(pass);
      const int end = pass != kSample    ? passes.EndTile(pass)
                      : passes.tiles > 0 ? UnitPasses::kSamples
                                         : 0;
#pragma unroll 1
      for (int i = first; i < end; i += UnitPasses::Step(pass)) {
        const int tile = pass == kSample ? passes.SampleHalf(i) / 2 : i;
#pragma unroll 1
        for (int is_value = 0; is_value <= static_cast<int>(pass == kKeysAndValues); ++is_value) {
          cute::wait_barrier(shared.empty[position.stage], position.parity ^ 1);
          uint64_t* const full = &shared.full[position.stage];
          cute::set_barrier_transaction_bytes(*full, Traits::kStageBytes);
          LoadTile<kHeadDim, UnitPasses::kTileKeys>(is_value ? value_map : key_map, full,
                                                    shared.tile[position.stage],
                                                    tile * UnitPasses::kTileKeys, kv_head, batch);
          position.Advance();
        }
      }
      if (pass == kSample && !passes.SampleIsAll()) {
        pass = passes.FirstStride();
      } else if (pass > 0) {
        pass = UnitPasses::NextStride(pass);
      } else {
        cute::wait_barrier(shared.command_ready, command_parity);
        command_parity ^= 1;
        const TileCommand command = shared.command;
        if (command == TileCommand::kNextUnit) break;
        pass = command == TileCommand::kOutput ? kKeysAndValues : 0;
      }
    }
  }
}

}  // namespace flash_entmax::cuda

#endif  // FLASH_ENTMAX_CUDA_TILE_FORWARD_STREAM_CUH_
