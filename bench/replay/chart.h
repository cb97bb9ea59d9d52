// A chart: a frame with two axes, and data drawn in its coordinates.
#ifndef VATTN_BENCH_REPLAY_CHART_H_
#define VATTN_BENCH_REPLAY_CHART_H_

#include <string>
#include <vector>

#include "bench/replay/svg.h"

namespace vattn::bench {

struct Tick {
  double value;
  std::string label;
};

struct Axis {
  std::string label;
  double low = 0, high = 1;  // both over 0 if log
  bool log = false;
  std::vector<Tick> ticks;
};

enum class Unit { kPlain, kPercent };
// An axis from 0 to a little over the largest value, with round ticks.
Axis LinearAxis(const std::string& label, const std::vector<double>& values, Unit unit);
// An axis around the values, with ticks at 1, 2 and 5 times powers of ten. Values of 0 are ignored.
Axis LogAxis(const std::string& label, const std::vector<double>& values, Unit unit);

struct Series {
  std::string name, color;
  Marker marker = Marker::kCircle;
  std::vector<Point> points;  // in data coordinates
};

class Chart {
 public:
  // corner: the upper left end of the frame. Draws frame, grid, ticks, labels and title.
  Chart(Svg* svg, Point corner, double width, double height, const std::string& title, Axis x,
        Axis y);

  void AddLine(const Series& series);  // joined by a line
  void AddBars(const Series& series, double bar_width);
  void AddLevel(double y, const std::string& color, const std::string& label);
  // Names and markers in the upper right corner.
  void AddLegend(const std::vector<Series>& series);

 private:
  Point ToPixels(Point data) const;

  Svg* svg_;
  Point corner_;
  double width_, height_;
  Axis x_, y_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_CHART_H_
