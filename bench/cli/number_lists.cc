#include "bench/cli/number_lists.h"

#include <algorithm>
#include <charconv>

namespace vattn::bench {
namespace {

template <class T>
CLI::Validator InRange(T low, T high) {
  return CLI::Validator(
      [low, high](std::string& text) -> std::string {
        T value;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool whole = error == std::errc() && end == text.data() + text.size();
        const size_t sign = !text.empty() && text[0] == '-' ? 1 : 0;
        const bool octal = text.size() > sign + 1 && text[sign] == '0';  // CLI11 reads "010" as 8
        if (whole && !octal && value >= low && value <= high) return "";
        return "\"" + text + "\" is no whole number from " + std::to_string(low) + " to " +
               std::to_string(high);
      },
      "");
}

}  // namespace

CLI::Validator Whole(int64_t low, int64_t high) { return InRange(low, high); }
CLI::Validator Seed() { return InRange<uint64_t>(0, std::numeric_limits<uint64_t>::max()); }

std::vector<std::string> SplitList(const std::string& option,
                                   const std::vector<std::string>& words) {
  std::vector<std::string> entries;
  for (const std::string& word : words) {
    size_t begin = 0;
    for (;;) {
      const size_t comma = std::min(word.find(',', begin), word.size());
      std::string entry = word.substr(begin, comma - begin);
      if (entry.empty())
        throw CLI::ValidationError(option, "\"" + word + "\" has an entry that is empty");
      if (std::find(entries.begin(), entries.end(), entry) != entries.end()) {
        throw CLI::ValidationError(option, entry + " is given twice");
      }
      entries.push_back(std::move(entry));
      if (comma == word.size()) break;
      begin = comma + 1;
    }
  }
  return entries;
}

}  // namespace vattn::bench
