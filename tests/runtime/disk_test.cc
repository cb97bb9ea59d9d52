// The disk of a runtime: stored prefixes, spilled sequences, ownership, damage.
#include "runtime/files/disk.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "tests/runtime/disk_world.h"

namespace vattn {
namespace {

class DiskTest : public testing::Test {
 protected:
  std::shared_ptr<Runtime> Open(int64_t blocks = 64, uint64_t disk_bytes = 0) {
    Options options = DiskOptions(/*uring=*/true, scratch_ / "disk", blocks);
    options.disk_bytes = disk_bytes;
    options.spill = true;
    return OpenRuntime(options, kSystemFileOps,
                       [this](LogLevel, const std::string& text) { log_ += text + "\n"; });
  }

  std::vector<std::string> Files(const std::string& start) const {
    std::vector<std::string> names = scratch_.Names("disk");
    std::erase_if(names, [&](const std::string& name) { return name.rfind(start, 0) != 0; });
    return names;
  }

  ScratchDirectory scratch_;
  std::string log_;
};

// Tokens that a new sequence begins with; 0: a miss.
int64_t Begin(const std::shared_ptr<Runtime>& runtime, const Prefix& prefix, std::string* content) {
  int64_t tokens = -1;
  const auto made = BeginFromPrefix(runtime, prefix, PrefixTier::kAuto, {}, &tokens);
  if (!made.ok()) {
    EXPECT_EQ(CodeOf(made.status()), Code::kNotFound) << made.status();
    return 0;
  }
  *content = ContentOf(**made);
  return tokens;
}

TEST_F(DiskTest, PrefixesSurviveARestart) {
  std::string content, read;
  {
    const std::shared_ptr<Runtime> runtime = Open();
    const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 900, 1);
    ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 900)).ok());
    ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 900)).ok());  // there already
    EXPECT_EQ(Files("prefix-").size(), 1u);
    EXPECT_EQ(runtime->Stats().disk_prefixes_saved, 1u);
    content = ContentOf(*sequence);
    EXPECT_EQ(Begin(runtime, MakePrefix("salt", 900), &read), 900);
    EXPECT_EQ(read, content);
  }
  const std::shared_ptr<Runtime> runtime = Open();
  EXPECT_EQ(runtime->disk()->bytes(),
            std::filesystem::file_size(scratch_ / "disk/" + Files("prefix-")[0]));
  EXPECT_EQ(Begin(runtime, MakePrefix("salt", 900), &read), 900);
  EXPECT_EQ(read, content);
  const StatsSnapshot stats = runtime->Stats();
  EXPECT_EQ(stats.prefix_hits, 1u);
  EXPECT_EQ(stats.prefix_tokens, 900u);
}

// Longer and shorter prompts share what they share, to the token; below 256 tokens it is a miss.
TEST_F(DiskTest, PrefixesMatchToTheToken) {
  const std::shared_ptr<Runtime> runtime = Open(200);
  const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 900, 1);
  ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 800)).ok());
  std::string read;
  for (const int64_t shared : {256, 257, 400, 511, 512, 799, 800}) {
    Prefix prompt = MakePrefix("salt", 900);
    prompt.tokens[static_cast<size_t>(shared)] = -1;
    EXPECT_EQ(Begin(runtime, prompt, &read), shared);
    EXPECT_EQ(read, ContentOf(*sequence, shared));
  }
  Prefix prompt = MakePrefix("salt", 900);
  prompt.tokens[255] = -1;
  EXPECT_EQ(Begin(runtime, prompt, &read), 0);
  EXPECT_EQ(Begin(runtime, MakePrefix("salt", 255), &read), 0);
  EXPECT_EQ(runtime->Stats().prefix_misses, 2u);

  // A longer one is preferred, also when both share the same pieces.
  ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 860)).ok());
  EXPECT_EQ(Begin(runtime, MakePrefix("salt", 900), &read), 860);
}

// What begins from a prefix goes on as a sequence that was given the same tokens.
TEST_F(DiskTest, ABegunSequenceGoesOn) {
  const std::shared_ptr<Runtime> runtime = Open(200);
  const std::unique_ptr<Sequence> whole = MakeSequence(runtime, 700, 1);
  ASSERT_TRUE(runtime->disk()->Store(*whole, MakePrefix("salt", 700)).ok());
  int64_t tokens = 0;
  auto begun = runtime->disk()->Begin(runtime, MakePrefix("salt", 700), {.id = 77}, &tokens);
  ASSERT_TRUE(begun.ok()) << begun.status();
  EXPECT_EQ((*begun)->id(), 77u);
  for (Sequence* sequence : {whole.get(), begun->get()}) {
    ASSERT_TRUE(AppendRandom(*sequence, 300, 9).ok());
    ASSERT_TRUE(sequence->BuildIndex().ok());
  }
  EXPECT_EQ(ContentOf(**begun), ContentOf(*whole));
}

TEST_F(DiskTest, SaltsNeverMeet) {
  const std::shared_ptr<Runtime> runtime = Open(200);
  const std::unique_ptr<Sequence> one = MakeSequence(runtime, 600, 1),
                                  two = MakeSequence(runtime, 600, 2);
  const std::string zero("a\0b", 3);  // any bytes
  ASSERT_TRUE(runtime->disk()->Store(*one, MakePrefix("a", 600)).ok());
  ASSERT_TRUE(runtime->disk()->Store(*two, MakePrefix(zero, 600)).ok());
  std::string read;
  EXPECT_EQ(Begin(runtime, MakePrefix("b", 600), &read), 0);
  EXPECT_EQ(Begin(runtime, MakePrefix("a", 600), &read), 600);
  EXPECT_EQ(read, ContentOf(*one));
  EXPECT_EQ(Begin(runtime, MakePrefix(zero, 600), &read), 600);
  EXPECT_EQ(read, ContentOf(*two));
  int64_t files = 0;
  ASSERT_TRUE(runtime->disk()->Forget("a", &files).ok());
  EXPECT_EQ(files, 1);
  EXPECT_EQ(Begin(runtime, MakePrefix("a", 600), &read), 0);
  EXPECT_EQ(Begin(runtime, MakePrefix(zero, 600), &read), 600);
}

// A file under the name that its digests would have, with other tokens in it, as if digests
// collided.
TEST_F(DiskTest, TokensAreComparedNotOnlyDigests) {
  std::string read;
  {
    const std::shared_ptr<Runtime> runtime = Open(200);
    const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 600, 1);
    ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 600)).ok());
    ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 600, 5000)).ok());
    const std::vector<std::string> files = Files("prefix-");
    ASSERT_EQ(files.size(), 2u);
    std::filesystem::rename(scratch_ / "disk/" + files[0], scratch_ / "swap");
    std::filesystem::rename(scratch_ / "disk/" + files[1], scratch_ / "disk/" + files[0]);
    std::filesystem::rename(scratch_ / "swap", scratch_ / "disk/" + files[1]);
    EXPECT_EQ(Begin(runtime, MakePrefix("salt", 600), &read), 0);
    EXPECT_EQ(runtime->Stats().prefix_mismatches, 1u);
  }
  // Taken over, their names give them away.
  const std::shared_ptr<Runtime> runtime = Open(200);
  EXPECT_EQ(runtime->Stats().disk_prefixes_damaged, 2u);
  EXPECT_TRUE(Files("prefix-").empty());
}

// Flips a bit at `place` of a file, in the page cache: writing it anew would cost a disk's time.
void FlipBit(const std::string& path, uint64_t place, int bit) {
  const int fd = open(path.c_str(), O_RDWR);
  char byte = 0;
  ASSERT_EQ(pread(fd, &byte, 1, static_cast<off_t>(place)), 1);
  byte = static_cast<char>(byte ^ (1 << bit));
  ASSERT_EQ(pwrite(fd, &byte, 1, static_cast<off_t>(place)), 1);
  close(fd);
}

// Every byte of the first and last 4 KiB, where the headers and tables are, and many between.
std::vector<uint64_t> Places(uint64_t bytes, int between, uint64_t stride) {
  std::vector<uint64_t> places;
  std::mt19937 engine(1);
  for (uint64_t i = 0; i < 4096; i += stride) places.push_back(i);
  for (uint64_t i = bytes - 4096; i < bytes; i += stride) places.push_back(i);
  for (int i = 0; i < between; ++i) places.push_back(engine() % bytes);
  return places;
}

TEST_F(DiskTest, AFlippedByteAnywhereIsRefused) {
  const std::shared_ptr<Runtime> runtime = Open(200);
  const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 600, 1);
  const std::string path = scratch_ / "saved";
  ASSERT_TRUE(sequence->Save(path).ok());
  uint64_t refused = 0;
  for (const uint64_t place : Places(std::filesystem::file_size(path), 1000, 1)) {
    const int bit = static_cast<int>(place * 5 % 8);
    FlipBit(path, place, bit);
    ASSERT_EQ(CodeOf(Sequence::Restore(runtime, path).status()), Code::kDataLoss)
        << "byte " << place;
    ASSERT_EQ(runtime->Stats().files_refused, ++refused);
    FlipBit(path, place, bit);
  }
  const auto restored = Sequence::Restore(runtime, path);
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(ContentOf(**restored), ContentOf(*sequence));
}

// The file of the prefix is removed, and the miss counted by its cause.
TEST_F(DiskTest, AFlippedByteAnywhereIsAMiss) {
  const std::shared_ptr<Runtime> runtime = Open(200);
  const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 600, 1);
  const Prefix prefix = MakePrefix("salt", 600);
  ASSERT_TRUE(runtime->disk()->Store(*sequence, prefix).ok());
  const std::string path = scratch_ / "disk/" + Files("prefix-")[0];
  std::string read;
  uint64_t misses = 0;
  for (const uint64_t place : Places(std::filesystem::file_size(path), 100, 61)) {
    FlipBit(path, place, static_cast<int>(place * 5 % 8));
    ASSERT_EQ(Begin(runtime, prefix, &read), 0) << "byte " << place;
    ASSERT_EQ(runtime->Stats().disk_prefixes_damaged, ++misses);
    ASSERT_TRUE(Files("prefix-").empty());
    ASSERT_EQ(runtime->disk()->bytes(), 0u);
    ASSERT_TRUE(runtime->disk()->Store(*sequence, prefix).ok());
  }
  EXPECT_NE(log_.find("does not match"), std::string::npos);
  EXPECT_EQ(Begin(runtime, prefix, &read), 600);
}

TEST_F(DiskTest, EvictsWhatWasUnusedForLongest) {
  uint64_t each;
  {
    const std::shared_ptr<Runtime> runtime = Open();
    const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 600, 1);
    ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 600)).ok());
    each = runtime->disk()->bytes();
    int64_t files = 0;
    ASSERT_TRUE(runtime->disk()->Forget("salt", &files).ok());
  }
  const std::shared_ptr<Runtime> runtime = Open(200, each * 7 / 2);
  const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 600, 1);
  const auto prefix = [](int i) { return MakePrefix("salt", 600, i * 1000); };
  std::string read;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(runtime->disk()->Store(*sequence, prefix(i)).ok());
  EXPECT_EQ(Begin(runtime, prefix(0), &read), 600);
  ASSERT_TRUE(runtime->disk()->Store(*sequence, prefix(3)).ok());
  EXPECT_EQ(runtime->Stats().disk_prefixes_evicted, 1u);
  EXPECT_EQ(Begin(runtime, prefix(1), &read), 0);
  for (const int i : {0, 2, 3}) EXPECT_EQ(Begin(runtime, prefix(i), &read), 600) << i;
  EXPECT_LE(runtime->disk()->bytes(), each * 7 / 2);

  // What can never fit is refused, and evicts nothing.
  const std::unique_ptr<Sequence> large = MakeSequence(runtime, 4000, 2);
  const absl::Status status = runtime->disk()->Store(*large, MakePrefix("salt", 4000));
  EXPECT_EQ(CodeOf(status), Code::kFull);
  EXPECT_NE(status.message().find("raise disk_bytes"), absl::string_view::npos) << status;
  EXPECT_EQ(runtime->Stats().disk_prefixes_evicted, 1u);
}

TEST_F(DiskTest, OneOwnerAtATime) {
  const std::shared_ptr<Runtime> runtime = Open();
  const Options options = DiskOptions(true, scratch_ / "disk");
  const absl::Status second = Runtime::Create(options, nullptr).status();
  EXPECT_EQ(CodeOf(second), Code::kInvalidArgument);
  EXPECT_NE(second.message().find("disk_path"), absl::string_view::npos) << second;
  EXPECT_NE(second.message().find("in use"), absl::string_view::npos) << second;
  Options nowhere = options;
  nowhere.disk_path = scratch_ / "no/such";
  EXPECT_EQ(CodeOf(Runtime::Create(nowhere, nullptr).status()), Code::kIoError);
}

// What a process that died leaves: temporary files and spilled sequences go, everything else stays.
TEST_F(DiskTest, TakesOverWhatADeadProcessLeft) {
  const pid_t child = fork();
  if (child == 0) {
    const std::shared_ptr<Runtime> runtime = Open();
    const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 600, 1);
    (void)runtime->disk()->Store(*sequence, MakePrefix("salt", 600));
    (void)sequence->Spill();
    kill(getpid(), SIGKILL);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFSIGNALED(status));
  std::ofstream(scratch_ / "disk/.vattn-0123.tmp") << "half a file";
  std::ofstream(scratch_ / "disk/notes.txt") << "not ours";
  EXPECT_EQ(Files("spill-").size(), 1u);
  const std::shared_ptr<Runtime> runtime = Open();
  ASSERT_NE(runtime, nullptr);
  EXPECT_EQ(scratch_.Names("disk").size(), 3u);  // lock, notes, prefix
  std::string read;
  EXPECT_EQ(Begin(runtime, MakePrefix("salt", 600), &read), 600);
}

// Prefixes of another layout take room, are no hits, and go first.
TEST_F(DiskTest, OtherLayoutsAreLeftAlone) {
  {
    const std::shared_ptr<Runtime> runtime = Open();
    const std::unique_ptr<Sequence> sequence = MakeSequence(runtime, 600, 1);
    ASSERT_TRUE(runtime->disk()->Store(*sequence, MakePrefix("salt", 600)).ok());
  }
  Options options = DiskOptions(true, scratch_ / "disk");
  options.sinks = 32;
  const std::shared_ptr<Runtime> runtime = OpenRuntime(options, kSystemFileOps);
  std::string read;
  EXPECT_EQ(Begin(runtime, MakePrefix("salt", 600), &read), 0);
  EXPECT_EQ(Files("prefix-").size(), 1u);
  EXPECT_GT(runtime->disk()->bytes(), 0u);
  EXPECT_EQ(runtime->Stats().disk_prefixes_damaged, 0u);
  int64_t files = 0;
  ASSERT_TRUE(runtime->disk()->Forget("salt", &files).ok());  // a tenant's wish reaches them, too
  EXPECT_EQ(files, 1);
}

// Ten sequences in a pool for three: whoever is used wakes, whoever was unused for longest sleeps.
TEST_F(DiskTest, SpillsTheColdest) {
  const std::shared_ptr<Runtime> runtime = Open(36);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<std::string> content;
  for (uint32_t i = 0; i < 10; ++i) {
    sequences.push_back(MakeSequence(runtime, 600, i));
    content.push_back(ContentOf(*sequences.back()));
    EXPECT_EQ(sequences.back()->hibernated(), false);
  }
  EXPECT_EQ(Files("spill-").size(), 7u);
  for (int i = 0; i < 10; ++i) EXPECT_EQ(sequences[i]->hibernated(), i < 7) << i;
  std::mt19937 engine(1);
  for (int i = 0; i < 60; ++i) {
    Sequence& one = *sequences[engine() % 10];
    const std::lock_guard<std::mutex> lock(one.use());
    one.Touch();
    ASSERT_TRUE(one.Wake().ok());
    ASSERT_EQ(one.length(0), 600);
  }
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(sequences[i]->Wake().ok());
    EXPECT_EQ(ContentOf(*sequences[i]), content[i]) << i;
  }
  EXPECT_EQ(runtime->Stats().full_refusals, 0u);
  sequences.clear();
  EXPECT_TRUE(Files("spill-").empty());
  EXPECT_EQ(runtime->disk()->bytes(), 0u);
  EXPECT_EQ(runtime->store().num_free(), 36);
}

}  // namespace
}  // namespace vattn
