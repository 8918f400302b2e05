// The largest error of each kind next to its bound.

#ifndef FLASH_ENTMAX_TOOLS_CHECK_ERROR_TABLE_H_
#define FLASH_ENTMAX_TOOLS_CHECK_ERROR_TABLE_H_

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "output.h"

namespace flash_entmax::cli {

class ErrorTable {
 public:
  // Notes one comparison; `kind` and `dtype` say what was compared, `problem` which problem it was.
  // NaN on either side fails.
  void Record(const std::string& kind, const std::string& dtype, double error, double bound,
              int64_t problem);

  bool passed() const;
  // One line a kind, for the type that came nearest to its bound; every type that failed as well.
  void Print() const;
  // Every kind and type.
  Json ToJson() const;
  // The problem of the worst failure, or −1.
  int64_t worst_problem() const;

 private:
  struct Line {
    int64_t comparisons = 0;
    int64_t failures = 0;
    // Of the comparison that came nearest to its bound, or exceeded it most.
    double error = 0.0;
    double bound = 0.0;
    double ratio = -1.0;
    int64_t problem = 0;
  };

  std::map<std::pair<std::string, std::string>, Line> lines_;
};

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_CHECK_ERROR_TABLE_H_
