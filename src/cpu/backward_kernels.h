// The parts of attention's backward pass that are compiled for every instruction set.

#ifndef FLASH_ENTMAX_SRC_CPU_BACKWARD_KERNELS_H_
#define FLASH_ENTMAX_SRC_CPU_BACKWARD_KERNELS_H_

#include <cstdint>
#include <vector>

#include "cpu/attention_panel.h"
#include "cpu/backward_inputs.h"
#include "cpu/saved_support.h"

namespace flash_entmax::cpu {

// One head of one sequence. Rows and keys count within the sequence; pointers to numbers of rows
// point at the sequence's first.
template <typename T>
struct BackwardHead {
  // Mask, modifiers, curve and head size; packed keys where scores are needed again.
  PanelInput<T> scores;
  const T* packed_values = nullptr;  // Like the keys, for products with dO; for dense rows.
  double alpha = 1.5;
  double scale = 1.0;  // Of the problem, without query_scale.
  RowsView<const T> query;
  RowsView<const T> key;
  RowsView<const T> value;
  RowsView<const T> grad_output;
  int64_t value_size = 0;
  int64_t query_width = 0;  // Padded sizes.
  int64_t value_width = 0;
  const double* factor = nullptr;  // scale·query_scale of each row.
  const SavedRow* saved = nullptr;
  const uint8_t* dense = nullptr;  // 1 for the rows that the dense way computes.
  const double* delta = nullptr;   // Of dense rows.

  // Results; null where not wanted.
  RowsView<T> grad_query;  // Of dense rows, before the factor.
  RowsView<T> grad_key;
  RowsView<T> grad_value;
  double* grad_alpha = nullptr;
  double* grad_slope = nullptr;
  double* grad_query_scale = nullptr;
  // The bias's gradient where every score has an element of its own, else null: element (row, key)
  // of the head. For dense rows alone.
  T* grad_bias = nullptr;
  int64_t grad_bias_row_stride = 0;
  int64_t grad_bias_key_stride = 0;
};

// One entry of the support on its way to its key: coefficients of dO and of the query.
template <typename T>
struct ColumnEntry {
  int32_t key;
  int32_t row;
  T probability;
  T weight;
};

// Buffers of one thread.
template <typename T>
struct BackwardMemory {
  struct Found {
    std::vector<T> score;
    std::vector<int32_t> key;
    size_t count = 0;
  };

  // Where BackwardRows puts the query's gradient: its first row is the panel's. Null if not wanted.
  RowsView<T> grad_query;
  std::vector<T> grad_query_rows;  // For those who have no better place.

  std::vector<T> query;  // Times the factor.
  std::vector<T> probability;
  std::vector<double> sensitivity;  // u
  std::vector<T> grad_probability;
  std::vector<T> grad_score;
  std::vector<T> product;
  std::vector<T> row;
  std::vector<Found> found;
  std::vector<ColumnEntry<T>> entries;  // Of the last panel.
  std::vector<T> entry_grad_score;      // Before the cap, for the bias; if wanted.

  // The dense way's.
  std::vector<T> grad_output;
  std::vector<T> weights;
  std::vector<T> raw;
};

// The rows [first, first + queries) that are not dense: everything a row owns, and the entries for
// the keys. May throw std::bad_alloc.
template <typename T>
void BackwardRows(const BackwardHead<T>& head, int64_t first, int64_t queries,
                  const SavedPanel<T>& saved, bool want_entries, bool want_grad_score,
                  BackwardMemory<T>* memory);

// Adds entries to the rows of grad_key and grad_value, in order.
template <typename T>
void BackwardColumns(const BackwardHead<T>& head, const ColumnEntry<T>* entries, int64_t count);

// Rows and keys of the dense way's blocks.
inline constexpr int64_t kDenseBlock = 96;

// Σ u and Σ u·dP of the dense rows of [first, end), at most kDenseBlock, over all keys.
template <typename T>
void DenseSums(const BackwardHead<T>& head, int64_t first, int64_t end, double* sum_u,
               double* sum_ug, BackwardMemory<T>* memory);

// Adds what the dense rows of [first_row, end_row) and the keys of [first_key, end_key) give to all
// gradients. first_key is a multiple of kDenseBlock.
template <typename T>
void DenseGradients(const BackwardHead<T>& head, int64_t first_row, int64_t end_row,
                    int64_t first_key, int64_t end_key, BackwardMemory<T>* memory);

}  // namespace flash_entmax::cpu

#endif  // FLASH_ENTMAX_SRC_CPU_BACKWARD_KERNELS_H_
