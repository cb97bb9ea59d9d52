#include "memory/cgroup.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <vector>

namespace vattn {
namespace {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// The text up to the first white space as a number; `none` if there is none, as for "max".
uint64_t Number(const std::string& text, uint64_t none) {
  char* end = nullptr;
  const uint64_t value = std::strtoull(text.c_str(), &end, 10);
  return end == text.c_str() ? none : value;
}

// The number behind `key` in lines of "key number"; 0 without.
uint64_t Field(const std::string& text, const std::string& key) {
  std::istringstream lines(text);
  uint64_t value;
  for (std::string name; lines >> name >> value;) {
    if (name == key) return value;
  }
  return 0;
}

// mountinfo writes a space as \040, and so on.
std::string Unescaped(const std::string& text) {
  std::string plain;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size()) {
      plain += static_cast<char>(std::strtol(text.substr(i + 1, 3).c_str(), nullptr, 8));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

std::vector<std::string> Split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, by);) parts.push_back(part);
  return parts;
}

// A line of /proc/self/cgroup: "4:memory:/a/b", in version 2 "0::/a/b".
struct Membership {
  std::set<std::string> controllers;  // empty: version 2
  std::string path;
};

// A mounted tree of groups.
struct Mount {
  std::set<std::string> controllers;  // empty: version 2
  std::string group, at;              // the group that is seen at the mount point, and that point
};

std::vector<Membership> ReadMemberships(const std::string& proc) {
  std::vector<Membership> all;
  std::istringstream lines(ReadFile(proc + "/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::vector<std::string> names = Split(line.substr(first + 1, second - first - 1), ',');
    all.push_back({{names.begin(), names.end()}, line.substr(second + 1)});
  }
  return all;
}

std::vector<Mount> ReadMounts(const std::string& proc) {
  std::vector<Mount> all;
  std::istringstream lines(ReadFile(proc + "/mountinfo"));
  for (std::string line; std::getline(lines, line);) {
    // id parent major:minor root mount-point options [optional ...] - type source super-options
    std::istringstream words(line);
    std::vector<std::string> word{std::istream_iterator<std::string>(words), {}};
    const auto dash = std::find(word.begin(), word.end(), "-");
    if (word.size() < 6 || word.end() - dash < 4) continue;
    if (dash[1] != "cgroup" && dash[1] != "cgroup2") continue;
    Mount mount = {{}, Unescaped(word[3]), Unescaped(word[4])};
    if (dash[1] == "cgroup") {
      const std::vector<std::string> names = Split(dash[3], ',');
      mount.controllers.insert(names.begin(), names.end());
    }
    all.push_back(mount);
  }
  return all;
}

// The directories of the process's group and those above it, as far as they are mounted; the
// innermost first.
std::vector<std::string> GroupDirectories(const std::vector<Membership>& memberships,
                                          const std::vector<Mount>& mounts,
                                          const std::string& controller, const std::string& root) {
  for (const Mount& mount : mounts) {
    if (controller.empty() ? !mount.controllers.empty() : mount.controllers.count(controller) == 0)
      continue;
    for (const Membership& member : memberships) {
      if (controller.empty() ? !member.controllers.empty()
                             : member.controllers.count(controller) == 0)
        continue;
      // The part of the path below the group that is mounted. A container may see its own group
      // mounted and a path from the host's root, or from somewhere that it cannot see: then what is
      // mounted is all there is.
      const std::string above = mount.group == "/" ? "" : mount.group;
      std::string below = member.path;
      if (below.compare(0, above.size(), above) == 0) below.erase(0, above.size());
      if (below == "/" || below.compare(0, 3, "/..") == 0) below.clear();
      std::vector<std::string> directories;
      for (;;) {
        const std::string directory = root + mount.at + below;
        if (std::ifstream(directory + "/cgroup.procs").good()) directories.push_back(directory);
        if (below.empty()) return directories;
        below.erase(below.rfind('/') == std::string::npos ? 0 : below.rfind('/'));
      }
    }
  }
  return {};
}

void Limit(uint64_t limit, uint64_t use, uint64_t page_cache, CgroupLimits& limits) {
  const uint64_t held = use - std::min(use, page_cache);
  limits.memory_bytes = std::min(limits.memory_bytes, limit);
  limits.available_bytes = std::min(limits.available_bytes, limit - std::min(limit, held));
}

void LimitCpus(double quota, double period, CgroupLimits& limits) {
  if (quota <= 0 || period <= 0) return;
  limits.cpus = limits.cpus == 0 ? quota / period : std::min(limits.cpus, quota / period);
}

}  // namespace

CgroupLimits ReadCgroupLimits(const std::string& proc, const std::string& root) {
  const std::vector<Membership> memberships = ReadMemberships(proc);
  const std::vector<Mount> mounts = ReadMounts(proc);
  CgroupLimits limits;
  // What the kernel can give back without swapping: cached pages of files, not those of tmpfs.
  const auto cached = [](const std::string& stat, const std::string& start) {
    return Field(stat, start + "inactive_file") + Field(stat, start + "active_file");
  };
  for (const std::string& at : GroupDirectories(memberships, mounts, "", root)) {
    const uint64_t most = Number(ReadFile(at + "/memory.max"), UINT64_MAX);
    // Over it everything is slow
    const uint64_t high = Number(ReadFile(at + "/memory.high"), UINT64_MAX);
    if (std::min(most, high) != UINT64_MAX) {
      Limit(std::min(most, high), Number(ReadFile(at + "/memory.current"), 0),
            cached(ReadFile(at + "/memory.stat"), ""), limits);
    }
    std::istringstream quota(ReadFile(at + "/cpu.max"));  // "max 100000" or "50000 100000"
    std::string microseconds;
    double period = 0;
    if (quota >> microseconds >> period && microseconds != "max")
      LimitCpus(std::atof(microseconds.c_str()), period, limits);
  }
  constexpr uint64_t kNoLimit = uint64_t{1} << 62;  // version 1 says "none" by a number near 2^63
  for (const std::string& at : GroupDirectories(memberships, mounts, "memory", root)) {
    const uint64_t most = Number(ReadFile(at + "/memory.limit_in_bytes"), UINT64_MAX);
    if (most >= kNoLimit) continue;
    Limit(most, Number(ReadFile(at + "/memory.usage_in_bytes"), 0),
          cached(ReadFile(at + "/memory.stat"), "total_"), limits);
  }
  for (const std::string& at : GroupDirectories(memberships, mounts, "cpu", root)) {
    LimitCpus(std::atof(ReadFile(at + "/cpu.cfs_quota_us").c_str()),
              std::atof(ReadFile(at + "/cpu.cfs_period_us").c_str()), limits);
  }
  return limits;
}

}  // namespace vattn
