// Numbers on the command line, taken as they are written: digits alone, no sign that wraps, no
// entry that is empty.
#ifndef VATTN_BENCH_CLI_NUMBER_LISTS_H_
#define VATTN_BENCH_CLI_NUMBER_LISTS_H_

#include <CLI/CLI.hpp>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace vattn::bench {

// Whole numbers of a range. Refuses "-1" where 0 is the least, which would otherwise come out as
// 2^64 - 1, "0x10" and "010".
CLI::Validator Whole(int64_t low, int64_t high);
// Any number of 64 bits, 0 or more.
CLI::Validator Seed();

// The entries of "4096,32768", given as one word or several. Throws CLI::ValidationError with the
// option's name where one is empty or given twice.
std::vector<std::string> SplitList(const std::string& option,
                                   const std::vector<std::string>& words);

// An option that takes a list of whole numbers of a range.
template <class T>
CLI::Option* AddNumbers(CLI::App* app, const std::string& name, std::vector<T>* numbers,
                        const std::string& help, int64_t low, int64_t high) {
  std::string shown;
  for (const T number : *numbers) shown += (shown.empty() ? "" : ",") + std::to_string(number);
  const auto take = [name, numbers, low, high](const std::vector<std::string>& words) {
    numbers->clear();
    const CLI::Validator check = Whole(low, high);
    for (std::string& entry : SplitList(name, words)) {
      const std::string why = check(entry);
      if (!why.empty()) throw CLI::ValidationError(name, why);
      numbers->push_back(static_cast<T>(std::stoll(entry)));
    }
  };
  return app->add_option_function<std::vector<std::string>>(name, take, help)
      ->type_name("LIST")
      ->default_str(shown);
}

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_NUMBER_LISTS_H_
