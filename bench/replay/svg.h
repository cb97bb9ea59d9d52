// A minimal SVG writer: shapes in, text out.
#ifndef VATTN_BENCH_REPLAY_SVG_H_
#define VATTN_BENCH_REPLAY_SVG_H_

#include <string>
#include <vector>

namespace vattn::bench {

struct Point {
  double x = 0, y = 0;
};

enum class Marker { kCircle, kSquare, kTriangle };
enum class Anchor { kStart, kMiddle, kEnd };

// Coordinates are pixels, y grows downwards.
class Svg {
 public:
  Svg(int width, int height);

  // dash: as stroke-dasharray, "" for a solid line.
  void Line(Point from, Point to, const std::string& color, double width,
            const std::string& dash = "");
  void Polyline(const std::vector<Point>& points, const std::string& color, double width);
  void Rect(Point corner, double width, double height, const std::string& fill);
  void Mark(Marker marker, Point at, double radius, const std::string& fill);
  void Text(Point at, const std::string& text, double size, Anchor anchor = Anchor::kStart,
            bool upwards = false);

  // The whole file.
  std::string Finish() const { return body_ + "</svg>\n"; }

 private:
  std::string body_;
};

}  // namespace vattn::bench

#endif  // VATTN_BENCH_REPLAY_SVG_H_
