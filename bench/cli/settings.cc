#include "bench/cli/settings.h"

#include "bench/cli/text.h"

namespace vattn::bench {

Choices BackendChoices() {
  return {{"auto", VATTN_BACKEND_AUTO}, {"cpu", VATTN_BACKEND_CPU}, {"cuda", VATTN_BACKEND_CUDA}};
}
Choices BoundChoices() { return {{"sharp", VATTN_BOUND_SHARP}, {"safe", VATTN_BOUND_SAFE}}; }
Choices DTypeChoices() { return {{"f32", VATTN_F32}, {"f16", VATTN_F16}, {"bf16", VATTN_BF16}}; }
Choices IndexChoices() {
  return {{"balanced", VATTN_INDEX_BALANCED}, {"exact", VATTN_INDEX_EXACT},
          {"sign", VATTN_INDEX_SIGN},         {"hadamard2", VATTN_INDEX_HADAMARD2},
          {"page", VATTN_INDEX_PAGE},         {"pooled", VATTN_INDEX_POOLED},
          {"clusters", VATTN_INDEX_CLUSTERS}, {"external", VATTN_INDEX_EXTERNAL}};
}
Choices NormChoices() { return {{"value", VATTN_NORM_VALUE}, {"output", VATTN_NORM_OUTPUT}}; }
Choices OnUnverifiedChoices() {
  return {{"dense", VATTN_ON_UNVERIFIED_DENSE}, {"best_effort", VATTN_ON_UNVERIFIED_BEST_EFFORT}};
}
Choices PolicyChoices() {
  return {{"verified", VATTN_POLICY_VERIFIED},
          {"topk", VATTN_POLICY_TOPK},
          {"topk-uniform", VATTN_POLICY_TOPK_UNIFORM},
          {"dense", VATTN_POLICY_DENSE}};
}
Choices TargetChoices() {
  return {{"sdpa", VATTN_TARGET_SDPA},
          {"numerator", VATTN_TARGET_NUMERATOR},
          {"denominator", VATTN_TARGET_DENOMINATOR}};
}

std::string ChoiceName(const Choices& choices, int32_t value) {
  for (const auto& [name, choice] : choices) {
    if (choice == value) return name;
  }
  return std::to_string(value);
}

Json SettingsJson(const vattn_options& options) {
  return {{"policy", ChoiceName(PolicyChoices(), options.policy)},
          {"index", ChoiceName(IndexChoices(), options.index)},
          {"index_bytes", options.index_bytes},
          {"value_bits", options.value_bits},
          {"epsilon", Rounded(options.epsilon)},
          {"delta", Rounded(options.delta)},
          {"norm", ChoiceName(NormChoices(), options.norm)},
          {"norm_floor", Rounded(options.norm_floor)},
          {"bound", ChoiceName(BoundChoices(), options.bound)},
          {"on_unverified", ChoiceName(OnUnverifiedChoices(), options.on_unverified)},
          {"max_looks", options.max_looks},
          {"pilot", options.pilot},
          {"seed", options.seed},
          {"refresh", options.refresh},
          {"min_selected", options.min_selected},
          {"max_selected_share", Rounded(options.max_selected_share)},
          {"topk_share", Rounded(options.topk_share)},
          {"base_share", Rounded(options.base_share)},
          {"target", ChoiceName(TargetChoices(), options.target)},
          {"hot_share", Rounded(options.hot_share)},
          {"sinks", options.sinks},
          {"window", options.window},
          {"exact_below", options.exact_below},
          {"dtype", ChoiceName(DTypeChoices(), options.dtype)},
          {"backend", ChoiceName(BackendChoices(), options.backend)},
          {"num_threads", options.num_threads}};
}

std::string DescribePolicy(const vattn_options& options) {
  const std::string promise = "epsilon " + Number(options.epsilon, 3) + ", delta " +
                              Number(options.delta, 3) + ", norm " +
                              ChoiceName(NormChoices(), options.norm);
  switch (options.policy) {
    case VATTN_POLICY_VERIFIED:
      return promise;
    case VATTN_POLICY_TOPK:
      return "top-k " + Percent(options.topk_share);
    case VATTN_POLICY_TOPK_UNIFORM:
      return "top-k " + Percent(options.topk_share) + ", base " + Percent(options.base_share) +
             ", epsilon " + Number(options.epsilon, 3) + ", delta " + Number(options.delta, 3);
    default:
      return "every row";
  }
}

std::string DescribeCodes(const vattn_options& options) {
  const std::string keys = options.index_bytes == 0
                               ? "codes of the default size"
                               : std::to_string(options.index_bytes) + " bytes of code";
  return options.value_bits == 0
             ? keys
             : keys + ", values of " + std::to_string(options.value_bits) + " bits";
}

}  // namespace vattn::bench
