#include "demo/svg_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "demo/html_text.h"

namespace flash_entmax::cli {
namespace {

// The picture in its own units; the page scales it.
constexpr double kWidth = 460;
constexpr double kLeft = 58;
constexpr double kRight = 442;
constexpr double kPlotHeight = 220;
constexpr double kLegendRow = 20;
constexpr size_t kLegendColumns = 3;

double Transform(AxisScale scale, double value) {
  return scale == AxisScale::kLinear ? value : std::log2(value);
}

bool CanShow(AxisScale scale, double value) {
  return std::isfinite(value) && (scale == AxisScale::kLinear || value > 0.0);
}

// From values to places in the picture.
struct Mapping {
  AxisScale scale = AxisScale::kLinear;
  double low = 0.0;  // Values at the ends of the axis.
  double high = 1.0;
  double from = 0.0;  // Places of the ends.
  double to = 1.0;

  double operator()(double value) const {
    const double a = Transform(scale, low);
    const double b = Transform(scale, high);
    return from + (to - from) * (Transform(scale, value) - a) / (b - a);
  }
};

// The values of one axis with some room around them.
Mapping FitAxis(const Plot& plot, bool horizontal) {
  Mapping mapping;
  mapping.scale = horizontal ? plot.x.scale : plot.y.scale;
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  for (const PlotSeries& series : plot.series) {
    for (const PlotPoint& point : series.points) {
      if (!CanShow(plot.x.scale, point.x) || !CanShow(plot.y.scale, point.y)) continue;
      low = std::min(low, horizontal ? point.x : point.y);
      high = std::max(high, horizontal ? point.x : point.y);
    }
  }
  if (!(low <= high)) low = high = 1.0;
  const bool logarithmic = mapping.scale != AxisScale::kLinear;
  if (logarithmic) {
    const double room = std::pow(high / low, horizontal ? 0.03 : 0.08) * (high > low ? 1.0 : 2.0);
    mapping.low = low / room;
    mapping.high = high * room;
  } else {
    const double room = high > low ? 0.08 * (high - low) : 0.5;
    mapping.low = low - room;
    mapping.high = high + room;
  }
  return mapping;
}

// 1024 as "1k", 1048576 as "1M", 2000000 as "2M"; others as they are.
std::string ShortNumber(double value, bool binary) {
  const double thousand = binary ? 1024.0 : 1000.0;
  if (value >= thousand * thousand) return fmt::format("{:.3g}M", value / (thousand * thousand));
  if (value >= thousand) return fmt::format("{:.3g}k", value / thousand);
  return fmt::format("{:.3g}", value);
}

std::string Mark(size_t style, double x, double y, double size) {
  switch (style % 6) {
    case 0:
      return fmt::format(R"(<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>)", x, y, size);
    case 1:
      return fmt::format(R"(<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>)",
                         x - 0.9 * size, y - 0.9 * size, 1.8 * size, 1.8 * size);
    case 2:
      return fmt::format(R"(<path d="M{:.1f} {:.1f}l{:.1f} {:.1f}h{:.1f}z"/>)", x, y - 1.2 * size,
                         1.2 * size, 2.1 * size, -2.4 * size);
    case 3:
      return fmt::format(R"(<path d="M{:.1f} {:.1f}l{:.1f} {:.1f}l{:.1f} {:.1f}l{:.1f} {:.1f}z"/>)",
                         x, y - 1.3 * size, 1.3 * size, 1.3 * size, -1.3 * size, 1.3 * size,
                         -1.3 * size, -1.3 * size);
    case 4:
      return fmt::format(R"(<path d="M{:.1f} {:.1f}l{:.1f} {:.1f}h{:.1f}z"/>)", x, y + 1.2 * size,
                         1.2 * size, -2.1 * size, -2.4 * size);
    default:
      return fmt::format(R"(<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>)",
                         x - 0.5 * size, y - 1.3 * size, size, 2.6 * size);
  }
}

// The legend stands above the plot, so that it can cover no line.
std::string Legend(const Plot& plot) {
  std::string svg;
  for (size_t s = 0; s < plot.series.size(); ++s) {
    const double x =
        kLeft + static_cast<double>(s % kLegendColumns) * (kRight - kLeft) / kLegendColumns;
    const size_t row = s / kLegendColumns;
    const double y = 14 + static_cast<double>(row) * kLegendRow;
    svg += fmt::format(R"(<g class="series-{}"><path class="line" d="M{:.1f} {:.1f}h24"/>{}</g>)"
                       R"(<text x="{:.1f}" y="{:.1f}" dy="0.35em">{}</text>)",
                       s, x, y, Mark(s, x + 12, y, 4), x + 32, y, EscapeHtml(plot.series[s].name));
  }
  return svg;
}

std::string Axes(const Plot& plot, const Mapping& x, const Mapping& y) {
  std::string svg;
  for (const Tick& tick : Ticks(plot.x.scale, x.low, x.high, 8)) {
    const double at = x(tick.value);
    svg += fmt::format(R"(<path class="grid" d="M{:.1f} {:.1f}V{:.1f}"/>)", at, y.from, y.to);
    svg += fmt::format(R"(<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>)",
                       at, y.from + 17, tick.label);
  }
  for (const Tick& tick : Ticks(plot.y.scale, y.low, y.high, 6)) {
    const double at = y(tick.value);
    svg += fmt::format(R"(<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>)", x.from, at, x.to);
    svg += fmt::format(
        R"(<text class="tick" x="{:.1f}" y="{:.1f}" dy="0.35em" text-anchor="end">{}</text>)",
        x.from - 7, at, tick.label);
  }
  svg += fmt::format(R"(<path class="axis" d="M{:.1f} {:.1f}V{:.1f}H{:.1f}"/>)", x.from, y.to,
                     y.from, x.to);
  svg += fmt::format(R"(<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>)",
                     0.5 * (x.from + x.to), y.from + 38, EscapeHtml(plot.x.label));
  svg += fmt::format(
      R"svg(<text transform="translate(14 {:.1f}) rotate(-90)" text-anchor="middle">{}</text>)svg",
      0.5 * (y.from + y.to), EscapeHtml(plot.y.label));
  return svg;
}

std::string Line(const Plot& plot, size_t s, const Mapping& x, const Mapping& y) {
  std::string path;
  std::string marks;
  for (const PlotPoint& point : plot.series[s].points) {
    if (!CanShow(plot.x.scale, point.x) || !CanShow(plot.y.scale, point.y)) continue;
    path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", x(point.x), y(point.y));
    marks += fmt::format("<g><title>{}: {} {:.4g}, {} {:.4g}</title>{}</g>",
                         EscapeHtml(plot.series[s].name), EscapeHtml(plot.x.label), point.x,
                         EscapeHtml(plot.y.label), point.y,
                         Mark(s, x(point.x), y(point.y), point.marked ? 7 : 4));
  }
  return fmt::format(R"(<g class="series-{}"><path class="line" d="{}"/>{}</g>)", s, path, marks);
}

}  // namespace

std::vector<Tick> Ticks(AxisScale scale, double low, double high, int count) {
  std::vector<Tick> ticks;
  if (scale == AxisScale::kLinear) {
    double step = std::pow(10.0, std::floor(std::log10((high - low) / count)));
    for (const double factor : {2.0, 2.5, 2.0}) {
      if ((high - low) / step > count) step *= factor;
    }
    const int digits = std::max(0, static_cast<int>(std::ceil(-std::log10(step) - 1e-9)));
    for (double n = std::ceil(low / step); n * step <= high; ++n) {
      ticks.push_back({n * step, fmt::format("{:.{}f}", n * step, digits)});
    }
    return ticks;
  }
  const bool binary = scale == AxisScale::kLog2;
  const double base = binary ? 2.0 : 10.0;
  const double log_base = std::log2(base);
  const auto first = static_cast<int>(std::ceil(std::log2(low) / log_base - 1e-9));
  const auto last = static_cast<int>(std::floor(std::log2(high) / log_base + 1e-9));
  const int step = std::max(1, (last - first) / count + 1);
  // Less than two decades need values between them.
  const bool between = !binary && last - first < 2;
  for (int power = between ? first - 1 : first; power <= last; power += step) {
    for (const double factor : {1.0, 2.0, 5.0}) {
      if (factor != 1.0 && !between) break;
      const double value = factor * std::pow(base, power);
      if (value >= low && value <= high) ticks.push_back({value, ShortNumber(value, binary)});
    }
  }
  return ticks;
}

std::string RenderPlot(const Plot& plot) {
  const size_t legend_rows = (plot.series.size() + kLegendColumns - 1) / kLegendColumns;
  const double top = 12 + kLegendRow * static_cast<double>(legend_rows);
  Mapping x = FitAxis(plot, /*horizontal=*/true);
  Mapping y = FitAxis(plot, /*horizontal=*/false);
  x.from = kLeft;
  x.to = kRight;
  y.from = top + kPlotHeight;
  y.to = top;
  std::string svg =
      fmt::format(R"(<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">)", kWidth,
                  y.from + 46, EscapeHtml(plot.title));
  svg += Legend(plot) + Axes(plot, x, y);
  for (size_t s = 0; s < plot.series.size(); ++s) svg += Line(plot, s, x, y);
  return svg + "</svg>";
}

}  // namespace flash_entmax::cli
