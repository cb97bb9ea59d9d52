// Runtimes of vattn by the shape of the layers that they serve.
#ifndef VATTN_API_LLAMA_CPP_RUNTIMES_H_
#define VATTN_API_LLAMA_CPP_RUNTIMES_H_

#include <map>
#include <tuple>

#include "api/llama_cpp/flash_attention.h"
#include "vattn.hpp"

namespace vattn::llama_cpp {

// Cells that tables are learnt from at most; a verified runtime has room for a sequence of them.
inline constexpr int64_t kMostTaught = 16384;

class Runtimes {
 public:
  explicit Runtimes(const vattn_options& options) : options_(options) {}

  // Of one layer on the CPU, with this policy and as many threads; made when first asked for.
  const Runtime& Get(const Shape& shape, int32_t policy, int32_t threads);
  // What those with policy verified have counted together.
  vattn_stats Stats() const;
  const vattn_options& options() const { return options_; }

 private:
  vattn_options options_;
  std::map<std::tuple<Shape, int32_t, int32_t>, Runtime> made_;
};

}  // namespace vattn::llama_cpp

#endif  // VATTN_API_LLAMA_CPP_RUNTIMES_H_
