#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <utility>

namespace flash_entmax::cli {
namespace {

// Work shorter than this needs no bar.
constexpr std::chrono::milliseconds kSilence{1000};
// A bar that changes faster cannot be read.
constexpr std::chrono::milliseconds kInterval{100};
constexpr int kBarWidth = 24;

// Back to the first column, and nothing left of the line.
constexpr const char* kClearLine = "\r\x1B[K";

std::string Duration(double seconds) {
  const auto whole = static_cast<int64_t>(std::ceil(seconds));
  if (whole < 60) return fmt::format("{} s", whole);
  if (whole < 3600) return fmt::format("{} min {:02} s", whole / 60, whole % 60);
  return fmt::format("{} h {:02} min", whole / 3600, whole / 60 % 60);
}

// 1234567 as 1.23M.
std::string Count(double value) {
  if (value >= 1e9) return fmt::format("{:.3g}G", value * 1e-9);
  if (value >= 1e6) return fmt::format("{:.3g}M", value * 1e-6);
  if (value >= 1e4) return fmt::format("{:.3g}k", value * 1e-3);
  return fmt::format("{:.4g}", value);
}

}  // namespace

Progress::Progress(const CommonOptions& common, std::string label, int64_t total, std::string unit)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      enabled_(!common.json && !common.quiet && total > 0 && isatty(STDERR_FILENO) == 1),
      start_(Clock::now()),
      next_draw_(start_ + kSilence) {}

Progress::~Progress() {
  if (!drawn_) return;
  std::fputs(kClearLine, stderr);
  std::fflush(stderr);
}

void Progress::Add(int64_t amount) {
  if (!enabled_) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  done_ += amount;
  const Clock::time_point now = Clock::now();
  if (now < next_draw_) return;
  next_draw_ = now + kInterval;
  Draw(now);
}

void Progress::Draw(Clock::time_point now) {
  const double share = static_cast<double>(done_) / static_cast<double>(total_);
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double speed = static_cast<double>(done_) / seconds;
  const double left = done_ > 0 ? static_cast<double>(total_ - done_) / speed : 0.0;
  std::string bar;
  for (int i = 0; i < kBarWidth; ++i) {
    bar += static_cast<double>(i) < share * kBarWidth ? "█" : "░";
  }
  const std::string line =
      fmt::format("{}{} {} {:3.0f} %  {}/{} {}  {} {}/s  {} left", kClearLine, label_, bar,
                  share * 100, Count(static_cast<double>(done_)),
                  Count(static_cast<double>(total_)), unit_, Count(speed), unit_, Duration(left));
  std::fputs(line.c_str(), stderr);
  std::fflush(stderr);
  drawn_ = true;
}

}  // namespace flash_entmax::cli
