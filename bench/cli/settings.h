// Names of the library's choices on the command line and in JSON, and settings in words.
#ifndef VATTN_BENCH_CLI_SETTINGS_H_
#define VATTN_BENCH_CLI_SETTINGS_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "api/vattn.h"
#include "bench/cli/json.h"

namespace vattn::bench {

using Choices = std::vector<std::pair<std::string, int32_t>>;
Choices BackendChoices();
Choices BoundChoices();
Choices DTypeChoices();
Choices IndexChoices();
Choices NormChoices();
Choices OnUnverifiedChoices();
Choices PolicyChoices();
Choices TargetChoices();
// The name of value; its number if it has none.
std::string ChoiceName(const Choices& choices, int32_t value);

// Every option that decides a result.
Json SettingsJson(const vattn_options& options);
// What the policy is set to, in a few words.
std::string DescribePolicy(const vattn_options& options);
// What is kept beside the rows.
std::string DescribeCodes(const vattn_options& options);

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_SETTINGS_H_
