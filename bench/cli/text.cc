#include "bench/cli/text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace vattn::bench {
namespace {

std::string Print(const char* format, int precision, double value) {
  if (!std::isfinite(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof(text), format, precision, value);
  return text;
}

}  // namespace

std::string Number(double value, int digits) {
  // %g turns to exponents where the digits before the point no longer fit.
  return std::abs(value) >= std::pow(10, digits) ? Fixed(value, 0) : Print("%.*g", digits, value);
}

std::string Fixed(double value, int decimals) { return Print("%.*f", decimals, value); }

std::string Percent(double share) {
  return std::isfinite(share) ? Number(share * 100, 3) + " %" : "-";
}

std::string Bytes(double bytes) {
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  for (; bytes >= 1024 && unit + 1 < std::size(units); ++unit) bytes /= 1024;
  return Number(bytes, 4) + " " + units[unit];
}

double Rounded(float value) {
  char text[64];
  const auto printed = std::to_chars(text, text + sizeof(text), value);
  double result = value;
  std::from_chars(text, printed.ptr, result);
  return result;
}

std::string MarkdownTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> width(rows[0].size(), 3);
  for (const auto& row : rows) {
    for (size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  }
  std::string text;
  for (size_t r = 0; r < rows.size(); ++r) {
    text += '|';
    for (size_t c = 0; c < rows[r].size(); ++c) {
      const size_t pad = width[c] - rows[r][c].size();
      text.append(c == 0 ? 1 : pad + 1, ' ').append(rows[r][c]).append(c == 0 ? pad : 0, ' ');
      text += " |";
    }
    text += '\n';
    if (r > 0) continue;
    text += '|';
    for (size_t c = 0; c < width.size(); ++c) {
      text.append(1, ' ').append(width[c] - 1, '-').append(c == 0 ? "- |" : ": |");
    }
    text += '\n';
  }
  return text;
}

}  // namespace vattn::bench
