#include "bench/replay/svg.h"

#include "bench/cli/text.h"

namespace vattn::bench {
namespace {

std::string Escape(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '&') {
      escaped += "&amp;";
    } else if (c == '<') {
      escaped += "&lt;";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      escaped += ' ';  // control characters are not allowed in XML
    } else {
      escaped += c;
    }
  }
  return escaped;
}

std::string Attribute(const char* name, double value) {
  return std::string(" ") + name + "=\"" + Fixed(value, 2) + "\"";
}

std::string Attribute(const char* name, const std::string& value) {
  return std::string(" ") + name + "=\"" + value + "\"";
}

std::string PointList(const std::vector<Point>& points) {
  std::string list;
  for (const Point& p : points) list += Fixed(p.x, 2) + "," + Fixed(p.y, 2) + " ";
  return list;
}

}  // namespace

Svg::Svg(int width, int height) {
  const std::string w = std::to_string(width), h = std::to_string(height);
  body_ = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + w + "\" height=\"" + h +
          "\" viewBox=\"0 0 " + w + " " + h + "\" font-family=\"Helvetica, Arial, sans-serif\">\n";
  Rect({0, 0}, width, height, "white");
}

void Svg::Line(Point from, Point to, const std::string& color, double width,
               const std::string& dash) {
  body_ += "<line" + Attribute("x1", from.x) + Attribute("y1", from.y) + Attribute("x2", to.x) +
           Attribute("y2", to.y) + Attribute("stroke", color) + Attribute("stroke-width", width);
  if (!dash.empty()) body_ += Attribute("stroke-dasharray", dash);
  body_ += "/>\n";
}

void Svg::Polyline(const std::vector<Point>& points, const std::string& color, double width) {
  body_ += "<polyline fill=\"none\"" + Attribute("points", PointList(points)) +
           Attribute("stroke", color) + Attribute("stroke-width", width) + "/>\n";
}

void Svg::Rect(Point corner, double width, double height, const std::string& fill) {
  body_ += "<rect" + Attribute("x", corner.x) + Attribute("y", corner.y) +
           Attribute("width", width) + Attribute("height", height) + Attribute("fill", fill) +
           "/>\n";
}

void Svg::Mark(Marker marker, Point at, double radius, const std::string& fill) {
  const double r = radius;
  switch (marker) {
    case Marker::kCircle:
      body_ += "<circle" + Attribute("cx", at.x) + Attribute("cy", at.y) + Attribute("r", r) +
               Attribute("fill", fill) + "/>\n";
      break;
    case Marker::kSquare:
      Rect({at.x - r, at.y - r}, 2 * r, 2 * r, fill);
      break;
    case Marker::kTriangle: {
      const std::vector<Point> corners = {
          {at.x - 1.2 * r, at.y + r}, {at.x + 1.2 * r, at.y + r}, {at.x, at.y - 1.2 * r}};
      body_ +=
          "<polygon" + Attribute("points", PointList(corners)) + Attribute("fill", fill) + "/>\n";
    }
  }
}

void Svg::Text(Point at, const std::string& text, double size, Anchor anchor, bool upwards) {
  const char* const anchors[] = {"start", "middle", "end"};
  body_ += "<text" + Attribute("x", at.x) + Attribute("y", at.y) + Attribute("font-size", size) +
           Attribute("text-anchor", std::string(anchors[static_cast<int>(anchor)]));
  if (upwards) {
    body_ += Attribute("transform", "rotate(-90 " + Fixed(at.x, 2) + " " + Fixed(at.y, 2) + ")");
  }
  body_ += " fill=\"#222\">" + Escape(text) + "</text>\n";
}

}  // namespace vattn::bench
