// JSON whose keys stay in the order in which they were set.
#ifndef VATTN_BENCH_CLI_JSON_H_
#define VATTN_BENCH_CLI_JSON_H_

#include <nlohmann/json.hpp>

namespace vattn::bench {

using Json = nlohmann::ordered_json;

}  // namespace vattn::bench

#endif  // VATTN_BENCH_CLI_JSON_H_
