// Numbers as text, and markdown tables.
#ifndef VATTN_BENCH_CLI_TEXT_H_
#define VATTN_BENCH_CLI_TEXT_H_

#include <cstdint>
#include <string>
#include <vector>

namespace vattn::bench {

// Up to `digits` significant digits, no trailing zeros; "-" for a value that is not finite.
std::string Number(double value, int digits);
// `decimals` digits behind the point; "-" for a value that is not finite.
std::string Fixed(double value, int decimals);
// A share as "4.21 %".
std::string Percent(double share);
// "1.5 GiB".
std::string Bytes(double bytes);
// A float as the shortest decimal that names it: .1f gives .1, not .10000000149.
double Rounded(float value);

// Rows of equal length, the first being the header; columns padded so that it reads as plain text.
// The first column is left aligned, the others right.
std::string MarkdownTable(const std::vector<std::vector<std::string>>& rows);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_TEXT_H_
