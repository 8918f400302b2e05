// Line plots as inline SVG. Colours come from the page's style sheet (classes series-0 … series-5).

#ifndef FLASH_ENTMAX_TOOLS_DEMO_SVG_PLOT_H_
#define FLASH_ENTMAX_TOOLS_DEMO_SVG_PLOT_H_

#include <string>
#include <vector>

namespace flash_entmax::cli {

enum class AxisScale { kLinear, kLog2, kLog10 };

struct PlotAxis {
  std::string label;  // With the unit.
  AxisScale scale = AxisScale::kLinear;
};

struct PlotPoint {
  double x = 0.0;
  double y = 0.0;
  bool marked = false;  // Drawn larger.
};

struct PlotSeries {
  std::string name;
  std::vector<PlotPoint> points;  // Points that the axes cannot show (log of ≤ 0) are left out.
};

struct Plot {
  std::string title;
  PlotAxis x;
  PlotAxis y;
  std::vector<PlotSeries> series;  // At most six, told apart by colour and mark.
};

std::string RenderPlot(const Plot& plot);

struct Tick {
  double value = 0.0;
  std::string label;
};

// Round values within [low, high], about `count` of them, at least one.
std::vector<Tick> Ticks(AxisScale scale, double low, double high, int count);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_SVG_PLOT_H_
