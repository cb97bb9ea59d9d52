#include "bench/cli/doctor.h"

#include <cstdio>
#include <memory>
#include <string>

#include "api/vattn.h"
#include "bench/cli/failure.h"
#include "bench/cli/file_arguments.h"
#include "bench/cli/handles.h"
#include "bench/cli/json.h"

namespace vattn::bench {
namespace {

Json AskDoctor() {
  size_t needed = 0;
  Check(vattn_doctor(nullptr, 0, &needed), "vattn_doctor");
  std::string text(needed + 1, '\0');
  Check(vattn_doctor(text.data(), text.size(), &needed), "vattn_doctor");
  text.resize(needed);
  return Json::parse(text);
}

// Objects become sections, everything else a line.
void Print(const Json& object, int indent) {
  size_t width = 0;
  for (const auto& [key, value] : object.items()) width = std::max(width, key.size());
  for (const auto& [key, value] : object.items()) {
    if (value.is_object()) {
      std::printf("%*s%s\n", indent, "", key.c_str());
      Print(value, indent + 2);
    } else {
      const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
      std::printf("%*s%-*s  %s\n", indent, "", static_cast<int>(width), key.c_str(), text.c_str());
    }
  }
}

void RunDoctor(const std::string& json_path, const CommandLine& command) {
  const Json found = AskDoctor();
  std::printf("%s\n", EnvironmentLine().c_str());
  Print(found, 0);
  if (json_path.empty()) return;
  Json result = ResultHeader(command);
  result["doctor"] = found;
  WriteJson(json_path, result);
}

}  // namespace

void AddDoctorCommand(CLI::App* app, const CommandLine& command) {
  CLI::App* sub = app->add_subcommand("doctor", "Say what this machine offers");
  auto json_path = std::make_shared<std::string>();
  auto files = std::make_shared<FileArguments>(sub);
  files->AddOutput("--json", json_path.get(), "Also write it to this file");
  sub->callback([json_path, files, &command] {
    files->Check();
    RunDoctor(*json_path, command);
  });
}

}  // namespace vattn::bench
