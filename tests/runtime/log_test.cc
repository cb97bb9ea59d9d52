// Loggers that call back: no lock is held, nothing calls itself, nothing is lost by what they
// throw.
#include "runtime/log.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#include "api/vattn.h"
#include "tests/runtime/disk_world.h"

namespace vattn {
namespace {

class LogTest : public testing::Test {
 protected:
  void SetUp() override { alarm(60); }  // a lock that is held would hang
  void TearDown() override {
    alarm(0);
    unsetenv("VATTN_LOG_LEVEL");
  }
  ScratchDirectory scratch_;
};

// Inside of the library: damaged prefixes that cannot be removed, evictions, spills, spills that
// fail.
TEST_F(LogTest, NoLockIsHeld) {
  static FileOps ops;
  static bool stays, full;
  ops = kSystemFileOps;
  ops.unlink = [](const char* path) {
    if (!stays || std::string(path).find(".vattn") == std::string::npos)
      return kSystemFileOps.unlink(path);
    errno = EPERM;
    return -1;
  };
  ops.open = [](const char* path, int flags, mode_t mode) {
    if (!full || (flags & O_ACCMODE) != O_WRONLY) return kSystemFileOps.open(path, flags, mode);
    errno = ENOSPC;
    return -1;
  };
  stays = full = false;
  Options options = DiskOptions(true, scratch_ / "disk", 36);
  options.spill = true;
  std::shared_ptr<Runtime> runtime;
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<std::string> lines;
  const Logger logger = [&](LogLevel, const std::string& text) {
    lines.push_back(text);
    if (runtime == nullptr) return;
    (void)runtime->Stats();
    (void)runtime->disk()->bytes();
    for (const auto& each : sequences) {
      if (each == nullptr) continue;
      const std::unique_lock<std::mutex> use(each->use(), std::try_to_lock);
      EXPECT_TRUE(use.owns_lock()) << text;
    }
  };
  runtime = OpenRuntime(options, ops, logger);
  for (uint32_t i = 0; i < 5; ++i) sequences.push_back(MakeSequence(runtime, 600, i));
  EXPECT_FALSE(lines.empty());  // that they were spilled
  lines.clear();
  full = true;
  EXPECT_EQ(CodeOf(AppendRandom(**Sequence::Create(runtime, {}), 2000, 9)), Code::kFull);
  EXPECT_FALSE(lines.empty());  // that one could not be
  lines.clear();
  full = false;
  ASSERT_TRUE(runtime->disk()->Store(*sequences[4], MakePrefix("salt", 600)).ok());
  for (const std::string& name : scratch_.Names("disk")) {
    if (name.rfind("prefix-", 0) != 0) continue;
    const int fd = open((scratch_ / ("disk/" + name)).c_str(), O_WRONLY);
    ASSERT_EQ(pwrite(fd, "?", 1, 5000), 1);
    close(fd);
  }
  stays = true;
  int64_t tokens = 0;
  EXPECT_FALSE(
      BeginFromPrefix(runtime, MakePrefix("salt", 600), PrefixTier::kDisk, {}, &tokens).ok());
  EXPECT_GE(lines.size(), 2u);  // damaged, and stays
  stays = false;
  lines.clear();
  sequences.clear();
  runtime.reset();
  EXPECT_TRUE(lines.empty());
}

// Through the C API: the handle of the call itself may be used.
struct Caller {
  vattn_runtime* runtime = nullptr;
  std::vector<vattn_sequence*> sequences;
  bool wakes = true;
  int lines = 0, failures = 0, depth = 0, deepest = 0;

  static void Log(void* user, int32_t, const char*) {
    Caller& self = *static_cast<Caller*>(user);
    ++self.lines;
    self.deepest = std::max(self.deepest, ++self.depth);
    vattn_stats stats;
    if (self.runtime != nullptr &&
        vattn_runtime_stats(self.runtime, &stats, sizeof(stats)) != VATTN_OK)
      ++self.failures;
    for (vattn_sequence* const sequence : self.sequences) {
      int64_t tokens = 0;
      if (vattn_sequence_length(sequence, 0, &tokens) != VATTN_OK) ++self.failures;
      if (self.wakes) vattn_sequence_wake(sequence);  // spills another one: lines that are dropped
    }
    vattn_sequence_length(nullptr, 0, nullptr);  // notes a text of its own
    --self.depth;
  }
};

TEST_F(LogTest, CallbacksMayCall) {
  Caller caller;
  vattn_options options;
  vattn_options_init(&options, sizeof(options));
  options.num_q_heads = 4;
  options.head_dim_k = options.head_dim_v = 64;
  options.dtype = VATTN_F32;
  options.backend = VATTN_BACKEND_CPU;
  options.num_threads = 1;
  options.spill = 1;
  const std::string path = scratch_ / "disk";
  options.disk_path = path.c_str();
  options.host_bytes = 16 << 20;
  options.log = Caller::Log;
  options.log_user = &caller;
  vattn_runtime* runtime = nullptr;
  ASSERT_EQ(vattn_runtime_create(&options, &runtime), VATTN_OK) << vattn_last_error();
  caller.runtime = runtime;
  const std::vector<float> rows(3000 * 2 * 64, .5f);
  vattn_append_params append;
  vattn_append_params_init(&append, sizeof(append));
  append.num_tokens = 3000;
  append.k = append.v = rows.data();
  for (int i = 0; i < 8; ++i) {
    vattn_sequence* made = nullptr;
    ASSERT_EQ(vattn_sequence_create(runtime, nullptr, &made), VATTN_OK);
    caller.sequences.push_back(made);
    ASSERT_EQ(vattn_append(made, &append), VATTN_OK) << vattn_last_error();
  }
  EXPECT_GE(caller.lines, 3);
  EXPECT_EQ(caller.failures, 0);
  EXPECT_EQ(caller.deepest, 1);
  // The text is that of the call that failed, not of a call that the logger made.
  caller.wakes = false;
  ASSERT_EQ(vattn_sequence_hibernate(caller.sequences[0], (scratch_ / "file").c_str()), VATTN_OK);
  std::filesystem::resize_file(scratch_ / "file", 100);
  const int before = caller.lines;
  EXPECT_EQ(vattn_sequence_wake(caller.sequences[0]), VATTN_DATA_LOSS);
  EXPECT_GT(caller.lines, before);
  EXPECT_NE(std::string(vattn_last_error()).find("not a vattn snapshot"), std::string::npos)
      << vattn_last_error();
  const std::vector<vattn_sequence*> sequences = std::exchange(caller.sequences, {});
  for (vattn_sequence* const each : sequences) vattn_sequence_destroy(each);
  vattn_runtime_destroy(runtime);
}

TEST_F(LogTest, WhatALoggerThrowsEndsThere) {
  int lines = 0;
  const auto logger = std::make_shared<const Logger>([&](LogLevel, const std::string&) {
    ++lines;
    throw std::runtime_error("disk full");
  });
  LogLine(logger, LogLevel::kInfo, "one");
  {
    const LogHold outer, inner;
    LogLine(logger, LogLevel::kInfo, "two");
    LogLine(logger, LogLevel::kInfo, "three");
    EXPECT_EQ(lines, 1);
  }
  EXPECT_EQ(lines, 3);
}

TEST_F(LogTest, TheEnvironmentsLevelIsHeard) {
  const auto lines_at = [&](const char* level) {
    if (level == nullptr)
      unsetenv("VATTN_LOG_LEVEL");
    else
      setenv("VATTN_LOG_LEVEL", level, 1);
    std::vector<LogLevel> levels;
    Options options = DiskOptions(true, scratch_ / "disk", 36);
    options.spill = true;
    const std::shared_ptr<Runtime> runtime = OpenRuntime(
        options, kSystemFileOps, [&](LogLevel l, const std::string&) { levels.push_back(l); });
    for (const LogLevel l :
         {LogLevel::kError, LogLevel::kWarning, LogLevel::kInfo, LogLevel::kDebug})
      runtime->Log(l, "x");
    return levels.size();
  };
  EXPECT_EQ(lines_at(nullptr), 4u);
  EXPECT_EQ(lines_at(""), 4u);
  EXPECT_EQ(lines_at("error"), 1u);
  EXPECT_EQ(lines_at("warning"), 2u);
  EXPECT_EQ(lines_at("info"), 3u);
  EXPECT_EQ(lines_at("debug"), 4u);
  for (const char* const wrong : {"loud", "INFO", "2", "error "}) {
    setenv("VATTN_LOG_LEVEL", wrong, 1);
    const absl::Status status = Runtime::Create(DiskOptions(true, ""), nullptr).status();
    EXPECT_EQ(CodeOf(status), Code::kInvalidArgument);
    EXPECT_NE(
        status.message().find(std::string("VATTN_LOG_LEVEL in the environment is \"") + wrong),
        absl::string_view::npos)
        << status;
  }
}

TEST_F(LogTest, TheEnvironmentsBackendIsHeard) {
  const std::string before =
      std::getenv("VATTN_BACKEND") == nullptr ? "" : std::getenv("VATTN_BACKEND");
  for (const BackendKind backend : {BackendKind::kAuto, BackendKind::kCpu}) {
    Options options = DiskOptions(true, "");
    options.backend = backend;
    for (const char* const wrong : {"gpu", "CPU", "cuda:0", "1"}) {
      setenv("VATTN_BACKEND", wrong, 1);
      const absl::Status status = Runtime::Create(options, nullptr).status();
      EXPECT_EQ(CodeOf(status), Code::kInvalidArgument);
      EXPECT_NE(status.message().find("must be auto, cpu or cuda"), absl::string_view::npos)
          << status;
    }
    for (const char* const right : {"", "auto", "cpu"}) {
      setenv("VATTN_BACKEND", right, 1);
      EXPECT_TRUE(Runtime::Create(options, nullptr).ok()) << right;
    }
  }
  setenv("VATTN_BACKEND", before.c_str(), 1);
}

}  // namespace
}  // namespace vattn
