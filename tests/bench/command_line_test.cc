#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "bench/cli/environment.h"
#include "bench/cli/progress.h"
#include "bench/cli/text.h"

namespace vattn::bench {
namespace {

CommandLine Make(const std::vector<const char*>& words) {
  return CommandLine(static_cast<int>(words.size()), words.data());
}

TEST(CommandLineTest, QuotesForAShell) {
  EXPECT_EQ(Make({"vattn", "doctor"}).Text(), "vattn doctor");
  EXPECT_EQ(Make({"a b", "it's", "", "$x", "--y=1,2"}).Text(), "'a b' 'it'\\''s' '' '$x' --y=1,2");
}

TEST(CommandLineTest, ReproduceSpellsTheSeedOutOnce) {
  EXPECT_EQ(Make({"vattn", "replay"}).Reproduce(5), "vattn replay --seed 5");
  EXPECT_EQ(Make({"vattn", "--seed", "5"}).Reproduce(5), "vattn --seed 5");
  EXPECT_EQ(Make({"vattn", "--seed=5"}).Reproduce(5), "vattn --seed=5");
  EXPECT_EQ(Make({"vattn", "--seeds", "4"}).Reproduce(5), "vattn --seeds 4 --seed 5");
}

TEST(EnvironmentTest, EveryResultSaysWhereItIsFrom) {
  const Json header = ResultHeader(Make({"vattn", "step"}));
  EXPECT_EQ(header["schema_version"], kSchemaVersion);
  EXPECT_EQ(header["command"], "vattn step");
  for (const char* key : {"version", "build", "date", "cpu", "cores", "memory_bytes", "os"}) {
    EXPECT_TRUE(header["environment"].contains(key)) << key;
  }
}

// Off a terminal: nothing for a while, then a line now and then, whole ones.
TEST(ProgressTest, LinesOffATerminal) {
  if (isatty(STDERR_FILENO)) GTEST_SKIP() << "a terminal";
  const auto said = [](std::chrono::milliseconds between, int counts) {
    testing::internal::CaptureStderr();
    {
      Progress progress(between);
      progress.Begin("subject");
      for (int i = 1; i <= counts; ++i) {
        progress.Count(i, counts);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    }
    return testing::internal::GetCapturedStderr();
  };
  EXPECT_EQ(said(std::chrono::seconds(10), 20), "");
  const std::string some = said(std::chrono::milliseconds(20), 40);
  const auto lines = std::count(some.begin(), some.end(), '\n');
  EXPECT_GE(lines, 2);
  EXPECT_LE(lines, 20);
  EXPECT_EQ(some.substr(0, 15), "vattn: subject ");
  EXPECT_EQ(some.find_first_of("\r\033"), std::string::npos);
}

TEST(TextTest, Numbers) {
  EXPECT_EQ(Number(12345.6, 3), "12346");
  EXPECT_EQ(Number(1.2345, 3), "1.23");
  EXPECT_EQ(Number(.1, 3), "0.1");
  EXPECT_EQ(Number(NAN, 3), "-");
  EXPECT_EQ(Fixed(INFINITY, 2), "-");
  EXPECT_EQ(Percent(.0421), "4.21 %");
  EXPECT_EQ(Percent(1), "100 %");
  EXPECT_EQ(Bytes(1536), "1.5 KiB");
  EXPECT_EQ(Rounded(.1f), .1);
}

TEST(TextTest, MarkdownTable) {
  EXPECT_EQ(MarkdownTable({{"", "x"}, {"long", "1.5"}}),
            "|      |   x |\n"
            "| ---- | --: |\n"
            "| long | 1.5 |\n");
}

}  // namespace
}  // namespace vattn::bench
