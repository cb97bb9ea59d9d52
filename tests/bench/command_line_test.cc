#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "bench/cli/environment.h"
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
