// JSON from outside: options, and headers of files.
#ifndef VATTN_RUNTIME_JSON_TEXT_H_
#define VATTN_RUNTIME_JSON_TEXT_H_

#include <nlohmann/json.hpp>
#include <string>

namespace vattn {

// Deeper than anything of ours. Comparing, copying and writing a value recurse: a text of brackets
// alone would otherwise end the stack.
inline constexpr int kMaxJsonDepth = 64;

// True if brackets lie deeper than that, whatever else is wrong with the text.
inline bool NestsTooDeep(const std::string& text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted && c == '\\') ++i;
    if (c == '"') quoted = !quoted;
    if (quoted) continue;
    if ((c == '[' || c == '{') && ++depth > kMaxJsonDepth) return true;
    if (c == ']' || c == '}') --depth;
  }
  return false;
}

// A value of a foreign text in a message: short, printable, without a zero byte that would end the
// message.
inline std::string ShownJson(const nlohmann::json& value) {
  constexpr size_t kMost = 80;
  std::string text =
      value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMost) text = text.substr(0, kMost) + "...";
  return text;
}

}  // namespace vattn

#endif  // VATTN_RUNTIME_JSON_TEXT_H_
