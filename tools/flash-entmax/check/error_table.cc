#include "check/error_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

namespace flash_entmax::cli {

void ErrorTable::Record(const std::string& kind, const std::string& dtype, double error,
                        double bound, int64_t problem) {
  Line& line = lines_[{kind, dtype}];
  ++line.comparisons;
  const bool passed = error <= bound;
  if (!passed) ++line.failures;
  double ratio = std::numeric_limits<double>::infinity();
  if (error == 0.0 && bound >= 0.0) {
    ratio = 0.0;
  } else if (bound > 0.0 && error >= 0.0) {
    ratio = error / bound;
  }
  if (ratio > line.ratio) {
    line.error = error;
    line.bound = bound;
    line.ratio = ratio;
    line.problem = problem;
  }
}

bool ErrorTable::passed() const {
  return std::all_of(lines_.begin(), lines_.end(),
                     [](const auto& item) { return item.second.failures == 0; });
}

void ErrorTable::Print() const {
  Table table({"what", "worst type", "comparisons", "error", "bound", "of bound", "problem", ""});
  for (auto first = lines_.begin(); first != lines_.end();) {
    auto worst = first;
    int64_t comparisons = 0;
    auto end = first;
    for (; end != lines_.end() && end->first.first == first->first.first; ++end) {
      comparisons += end->second.comparisons;
      if (end->second.ratio > worst->second.ratio) worst = end;
    }
    for (auto item = first; item != end; ++item) {
      const Line& line = item->second;
      if (item != worst && line.failures == 0) continue;
      table.Add({item->first.first, item->first.second,
                 fmt::format("{}", item == worst ? comparisons : line.comparisons),
                 fmt::format("{:.2e}", line.error), fmt::format("{:.2e}", line.bound),
                 fmt::format("{:.1f} %", line.ratio * 100), fmt::format("{}", line.problem),
                 line.failures == 0 ? "PASS" : fmt::format("FAIL ({} times)", line.failures)});
    }
    first = end;
  }
  table.Print();
}

int64_t ErrorTable::worst_problem() const {
  int64_t problem = -1;
  double ratio = -1.0;
  for (const auto& [key, line] : lines_) {
    if (line.failures == 0 || line.ratio <= ratio) continue;
    ratio = line.ratio;
    problem = line.problem;
  }
  return problem;
}

Json ErrorTable::ToJson() const {
  Json rows = Json::array();
  for (const auto& [key, line] : lines_) {
    rows.push_back({{"what", key.first},
                    {"dtype", key.second},
                    {"comparisons", line.comparisons},
                    {"failures", line.failures},
                    {"error", JsonNumber(line.error)},
                    {"bound", JsonNumber(line.bound)},
                    {"problem", line.problem},
                    {"passed", line.failures == 0}});
  }
  return rows;
}

}  // namespace flash_entmax::cli
