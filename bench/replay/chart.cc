#include "bench/replay/chart.h"

#include <algorithm>
#include <cmath>

#include "bench/cli/text.h"

namespace vattn::bench {
namespace {

constexpr char kGrid[] = "#e4e4e4", kFrame[] = "#444";

std::string TickLabel(double value, Unit unit) {
  return unit == Unit::kPercent ? Percent(value) : Number(value, 3);
}

double Position(const Axis& axis, double value) {
  if (!axis.log) return (value - axis.low) / (axis.high - axis.low);
  return std::log(std::max(value, axis.low) / axis.low) / std::log(axis.high / axis.low);
}

}  // namespace

Axis LinearAxis(const std::string& label, const std::vector<double>& values, Unit unit) {
  double high = 0;
  for (const double value : values) high = std::max(high, std::isfinite(value) ? value : 0);
  if (high <= 0) high = 1;
  high *= 1.15;
  const double power = std::pow(10, std::floor(std::log10(high / 4)));
  const double ratio = high / 4 / power;  // 1 to 10
  const double step = power * (ratio < 1.5 ? 1 : ratio < 3.5 ? 2 : ratio < 7.5 ? 5 : 10);
  Axis axis = {label, 0, high, false, {}};
  for (int i = 0; i * step <= high; ++i)
    axis.ticks.push_back({i * step, TickLabel(i * step, unit)});
  return axis;
}

Axis LogAxis(const std::string& label, const std::vector<double>& values, Unit unit) {
  double low = INFINITY, high = 0;
  for (const double value : values) {
    if (!std::isfinite(value) || value <= 0) continue;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (high == 0) low = high = 1;
  Axis axis = {label, low / 1.3, high * 1.3, true, {}};
  for (int e = static_cast<int>(std::floor(std::log10(axis.low))); e <= std::log10(axis.high);
       ++e) {
    for (const double digit : {1.0, 2.0, 5.0}) {
      const double value = digit * std::pow(10, e);
      if (value >= axis.low && value <= axis.high) {
        axis.ticks.push_back({value, TickLabel(value, unit)});
      }
    }
  }
  return axis;
}

Chart::Chart(Svg* svg, Point corner, double width, double height, const std::string& title, Axis x,
             Axis y)
    : svg_(svg),
      corner_(corner),
      width_(width),
      height_(height),
      x_(std::move(x)),
      y_(std::move(y)) {
  const double left = corner.x, top = corner.y, right = left + width, bottom = top + height;
  for (const Tick& tick : x_.ticks) {
    const double at = ToPixels({tick.value, y_.low}).x;
    svg->Line({at, top}, {at, bottom}, kGrid, 1);
    svg->Line({at, bottom}, {at, bottom + 4}, kFrame, 1);
    svg->Text({at, bottom + 16}, tick.label, 11, Anchor::kMiddle);
  }
  for (const Tick& tick : y_.ticks) {
    const double at = ToPixels({x_.low, tick.value}).y;
    svg->Line({left, at}, {right, at}, kGrid, 1);
    svg->Line({left - 4, at}, {left, at}, kFrame, 1);
    svg->Text({left - 7, at + 4}, tick.label, 11, Anchor::kEnd);
  }
  svg->Line({left, top}, {left, bottom}, kFrame, 1);
  svg->Line({left, bottom}, {right, bottom}, kFrame, 1);
  svg->Text({left, top - 10}, title, 13);
  svg->Text({left + width / 2, bottom + 34}, x_.label, 12, Anchor::kMiddle);
  svg->Text({left - 52, top + height / 2}, y_.label, 12, Anchor::kMiddle, /*upwards=*/true);
}

Point Chart::ToPixels(Point data) const {
  return {corner_.x + width_ * Position(x_, data.x),
          corner_.y + height_ * (1 - Position(y_, data.y))};
}

void Chart::AddLine(const Series& series) {
  std::vector<Point> pixels;
  for (const Point& point : series.points) {
    if (std::isfinite(point.x) && std::isfinite(point.y)) pixels.push_back(ToPixels(point));
  }
  svg_->Polyline(pixels, series.color, 1.6);
  for (const Point& pixel : pixels) svg_->Mark(series.marker, pixel, 4, series.color);
}

void Chart::AddBars(const Series& series, double bar_width) {
  const double floor = corner_.y + height_;
  for (const Point& point : series.points) {
    if (!std::isfinite(point.y)) continue;
    const Point left = ToPixels({point.x - bar_width / 2, point.y});
    const Point right = ToPixels({point.x + bar_width / 2, point.y});
    svg_->Rect(left, right.x - left.x, floor - left.y, series.color);
  }
}

void Chart::AddLevel(double y, const std::string& color, const std::string& label) {
  const double at = ToPixels({x_.low, y}).y;
  svg_->Line({corner_.x, at}, {corner_.x + width_, at}, color, 1.4, "6 4");
  svg_->Text({corner_.x + width_ - 4, at - 5}, label, 11, Anchor::kEnd);
}

void Chart::AddLegend(const std::vector<Series>& series) {
  size_t longest = 0;
  for (const Series& one : series) longest = std::max(longest, one.name.size());
  const double width = 34 + 6.4 * static_cast<double>(longest);
  const Point corner = {corner_.x + width_ - width - 8, corner_.y + 8};
  svg_->Rect(corner, width, 18.0 * static_cast<double>(series.size()) + 8, "white");
  for (size_t i = 0; i < series.size(); ++i) {
    const double y = corner.y + 15 + 18 * static_cast<double>(i);
    svg_->Line({corner.x + 4, y}, {corner.x + 24, y}, series[i].color, 1.6);
    svg_->Mark(series[i].marker, {corner.x + 14, y}, 4, series[i].color);
    svg_->Text({corner.x + 30, y + 4}, series[i].name, 12);
  }
}

}  // namespace vattn::bench
