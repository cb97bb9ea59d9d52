// The parser of saved sequences. The bytes describe the records of a file, which is then written
// with right checksums, and changes to its bytes, some of them with the header made right again. It
// is refused, or gives a sequence that can be used; nothing of the pool is lost either way.
//
//   flags, then records: type 0 to 7, 0 for the end, and
//     bit 3 clear: 16 bits length, bytes      bit 3 set: 8 bits; a block of that number's noise
//   then changes: 32 bits where, 8 bits what
#include <algorithm>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "memory/checksum.h"
#include "memory/status.h"
#include "runtime/batch.h"
#include "runtime/files/sequence_file.h"
#include "runtime/runtime.h"
#include "runtime/sequence.h"
#include "tests/fuzz/input.h"

namespace vattn::test {
namespace {

constexpr int64_t kBlocks = 6;

std::shared_ptr<Runtime> MakeRuntime() {
  Options options;
  options.num_q_heads = 2;
  options.num_kv_heads = 1;
  options.head_dim_k = options.head_dim_v = 16;
  options.dtype = DType::kF32;
  options.backend = BackendKind::kCpu;
  options.num_threads = 1;
  options.index_bytes = 16;
  options.exact_below = 64;
  options.window = 16;
  options.huge_pages = false;
  options.io_engine = IoEngine::kPread;
  options.io_depth = 1;
  options.io_block_bytes = 4096;
  options.io_buffered = true;
  options.host_bytes = static_cast<uint64_t>(kBlocks * MakeStorage(options).block.bytes);
  absl::StatusOr<std::shared_ptr<Runtime>> made = Runtime::Create(options, nullptr);
  Require(made.ok(), std::string(made.status().message()));
  return *made;
}

void WriteRecords(Input& input, const Runtime& runtime, const std::string& path) {
  const auto block_bytes = static_cast<size_t>(runtime.storage().block.bytes);
  auto writer =
      SnapshotWriter::Create(path, LayoutOf(runtime.options(), runtime.storage()), 0, runtime.io());
  Require(writer.ok(), "no writer");
  for (int records = 0; records < 12; ++records) {
    const uint8_t kind = input.Byte();
    if (kind % 16 == 0) break;
    std::vector<std::byte> payload;
    if (kind / 8 % 2 == 0) {
      payload = input.Take(input.Below(1 << 13));
    } else {
      uint32_t noise = input.Byte();
      payload.resize(block_bytes);
      for (std::byte& byte : payload) {
        noise = noise * 1664525 + 1013904223;
        byte = static_cast<std::byte>(noise >> 24);
      }
    }
    Require((*writer)->Add(kind % 8, payload).ok(), "a record is refused");
  }
  Require((*writer)->Commit(/*durable=*/false).ok(), "a file is refused");
}

void Change(Input& input, bool repair, const std::string& path) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  bool changed = false;
  while (!input.empty()) {
    const uint32_t at = input.Below(UINT32_MAX) % bytes.size();
    bytes[at] = static_cast<char>(input.Byte());
    changed = true;
  }
  if (!changed) return;
  // Headers whose checksum is their last 8 bytes: that of the file, those of records at its end.
  for (size_t at = 0; repair && at + 64 <= bytes.size();
       at = at == 0 ? bytes.size() - std::min<size_t>(bytes.size(), 64 * 12) / 64 * 64 : at + 64) {
    const uint64_t sum = ChecksumOf(std::as_bytes(std::span(bytes.data() + at, 56)));
    const bool header = at == 0 || std::memcmp(bytes.data() + at, "RCRD", 4) == 0;
    if (header) std::memcpy(bytes.data() + at + 56, &sum, 8);
  }
  file.clear();
  file.seekp(0);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// Whatever a restored sequence holds, it can be used.
void Use(Sequence& sequence, const std::shared_ptr<Runtime>& runtime, const std::string& path) {
  const std::vector<float> row(32, .25f);
  std::vector<float> out(32);
  Batch batch(runtime, 1);
  Require(batch.Set(0, &sequence).ok(), "no place in a batch");
  for (int step = 0; step < 2; ++step) {
    const absl::Status begun = batch.BeginStep(1);
    if (CodeOf(begun) == Code::kFull) break;
    Require(begun.ok(), std::string(begun.message()));
    const absl::Status attended = batch.Attend(
        {.q = row.data(), .k_new = row.data(), .v_new = row.data(), .out = out.data()});
    Require(attended.ok(), std::string(attended.message()));
  }
  Require(batch.Clear(0).ok(), "stays in its batch");
  Require(sequence.Save(path).ok(), "cannot be saved");
  Require(sequence.Truncate(sequence.length(0) / 2).ok(), "cannot be cut");
  Require(sequence.Hibernate(path).ok() && sequence.Wake().ok(), "does not wake up");
}

}  // namespace
}  // namespace vattn::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace vattn;        // NOLINT: one function
  using namespace vattn::test;  // NOLINT
  static const std::shared_ptr<Runtime> runtime = MakeRuntime();
  const std::string path = ScratchFolder() + "/file";
  Input input(data, size);
  const uint8_t flags = input.Byte();
  WriteRecords(input, *runtime, path);
  Change(input, flags % 2 == 1, path);
  {
    absl::StatusOr<std::unique_ptr<Sequence>> made = Sequence::Restore(runtime, path);
    const Code code = CodeOf(made.status());
    Require(code == Code::kOk || code == Code::kDataLoss || code == Code::kFull,
            std::string(made.status().message()));
    if (made.ok()) Use(**made, runtime, path);
  }
  Require(runtime->store().num_free() == kBlocks, "blocks are lost");
  return 0;
}
