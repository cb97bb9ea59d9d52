// Limits of control groups, read from trees as containers and services have them.
#include "memory/cgroup.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "tests/runtime/disk_world.h"

namespace vattn {
namespace {

class CgroupTest : public testing::Test {
 protected:
  void Write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(scratch_ / path).parent_path());
    std::ofstream(scratch_ / path) << text;
  }
  // A group is a directory with cgroup.procs.
  void Group(const std::string& at, const std::vector<std::pair<std::string, std::string>>& files) {
    Write(at + "/cgroup.procs", "");
    for (const auto& [name, text] : files) Write(at + "/" + name, text + "\n");
  }
  void Process(const std::string& cgroup, const std::string& mountinfo) {
    Write("proc/cgroup", cgroup);
    Write("proc/mountinfo", "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + mountinfo);
  }
  CgroupLimits Read() { return ReadCgroupLimits(scratch_ / "proc", scratch_ / "root"); }

  ScratchDirectory scratch_;
};

constexpr char kV2Mount[] =
    "30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

TEST_F(CgroupTest, NoneWithoutGroups) {
  const CgroupLimits limits = Read();
  EXPECT_EQ(limits.memory_bytes, UINT64_MAX);
  EXPECT_EQ(limits.available_bytes, UINT64_MAX);
  EXPECT_EQ(limits.cpus, 0);
  // The real one of this process can be read.
  EXPECT_GE(ReadCgroupLimits().memory_bytes, 1u << 20);
}

TEST_F(CgroupTest, VersionTwo) {
  Process("0::/pod/app\n", kV2Mount);
  Group("root/sys/fs/cgroup", {});
  Group("root/sys/fs/cgroup/pod",
        {{"memory.max", "max"}, {"cpu.max", "max 100000"}, {"memory.current", "900"}});
  Group("root/sys/fs/cgroup/pod/app",
        {{"memory.max", "1000000"},
         {"memory.high", "max"},
         {"memory.current", "700000"},
         {"memory.stat",
          "anon 300000\nfile 400000\nshmem 100000\ninactive_file 200000\n"
          "active_file 100000"},
         {"cpu.max", "150000 100000"}});
  CgroupLimits limits = Read();
  EXPECT_EQ(limits.memory_bytes, 1000000u);
  EXPECT_EQ(limits.available_bytes, 600000u);  // of what is used, 300,000 can be given back
  EXPECT_DOUBLE_EQ(limits.cpus, 1.5);
  // The groups above limit, too, and what slows down counts as what ends.
  Group("root/sys/fs/cgroup/pod",
        {{"memory.max", "800000"}, {"memory.current", "750000"}, {"cpu.max", "50000 100000"}});
  limits = Read();
  EXPECT_EQ(limits.memory_bytes, 800000u);
  EXPECT_EQ(limits.available_bytes, 50000u);
  EXPECT_DOUBLE_EQ(limits.cpus, .5);
  Group("root/sys/fs/cgroup/pod/app", {{"memory.high", "500000"}});
  EXPECT_EQ(Read().memory_bytes, 500000u);
  EXPECT_EQ(Read().available_bytes, 50000u);
}

// In a container with a namespace of its own its group is the root of the tree.
TEST_F(CgroupTest, VersionTwoInItsOwnNamespace) {
  Process("0::/\n", kV2Mount);
  Group("root/sys/fs/cgroup",
        {{"memory.max", "536870912"}, {"memory.current", "1048576"}, {"cpu.max", "50000 100000"}});
  EXPECT_EQ(Read().memory_bytes, 536870912u);
  EXPECT_EQ(Read().available_bytes, 535822336u);
  EXPECT_DOUBLE_EQ(Read().cpus, .5);
  Process("0::/../outside\n", kV2Mount);  // moved out of the namespace
  EXPECT_EQ(Read().memory_bytes, 536870912u);
}

TEST_F(CgroupTest, VersionOne) {
  Process("4:memory:/slice/unit\n3:cpu,cpuacct:/slice\n1:name=systemd:/\n",
          "31 22 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
          "32 22 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n");
  Group("root/sys/fs/cgroup/memory", {{"memory.limit_in_bytes", "9223372036854771712"}});
  Group("root/sys/fs/cgroup/memory/slice",
        {{"memory.limit_in_bytes", "2000000"}, {"memory.usage_in_bytes", "1500000"}});
  Group("root/sys/fs/cgroup/memory/slice/unit", {{"memory.limit_in_bytes", "1000000"},
                                                 {"memory.usage_in_bytes", "400000"},
                                                 {"memory.stat",
                                                  "cache 1\ntotal_inactive_file 50000\n"
                                                  "total_active_file 50000"}});
  Group("root/sys/fs/cgroup/cpu,cpuacct",
        {{"cpu.cfs_quota_us", "-1"}, {"cpu.cfs_period_us", "100000"}});
  Group("root/sys/fs/cgroup/cpu,cpuacct/slice",
        {{"cpu.cfs_quota_us", "250000"}, {"cpu.cfs_period_us", "100000"}});
  const CgroupLimits limits = Read();
  EXPECT_EQ(limits.memory_bytes, 1000000u);
  EXPECT_EQ(limits.available_bytes, 500000u);
  EXPECT_DOUBLE_EQ(limits.cpus, 2.5);
}

// A container without a namespace sees its own group mounted, and its path from the host's root.
TEST_F(CgroupTest, VersionOneMountedFromWithin) {
  Process("4:memory:/docker/abc def\n",
          "31 22 0:27 /docker/abc\\040def /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
  Group("root/sys/fs/cgroup/memory",
        {{"memory.limit_in_bytes", "700000"}, {"memory.usage_in_bytes", "100000"}});
  EXPECT_EQ(Read().memory_bytes, 700000u);
  EXPECT_EQ(Read().available_bytes, 600000u);
}

// Both at once, as on machines in between; a use over the limit leaves nothing.
TEST_F(CgroupTest, BothVersions) {
  Process(
      "4:memory:/a\n0::/b\n",
      std::string(kV2Mount) + "31 22 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
  Group("root/sys/fs/cgroup/memory/a",
        {{"memory.limit_in_bytes", "100"}, {"memory.usage_in_bytes", "200"}});
  Group("root/sys/fs/cgroup/b", {{"cpu.max", "200000 100000"}});
  EXPECT_EQ(Read().memory_bytes, 100u);
  EXPECT_EQ(Read().available_bytes, 0u);
  EXPECT_DOUBLE_EQ(Read().cpus, 2);
}

}  // namespace
}  // namespace vattn
