// memory/device.h with and without a device, and how a runtime chooses its backend.
#include "memory/device.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "memory/status.h"
#include "tests/api/attention_model.h"

namespace vattn {
namespace {

std::string Text(const absl::Status& status) { return std::string(status.message()); }

// VATTN_BACKEND as given until the end of the scope.
class Environment {
 public:
  explicit Environment(const char* value) {
    const char* before = std::getenv("VATTN_BACKEND");
    if (before != nullptr) before_ = before;
    Set(value);
  }
  ~Environment() { Set(before_ ? before_->c_str() : nullptr); }

 private:
  static void Set(const char* value) {
    if (value == nullptr) unsetenv("VATTN_BACKEND");
    if (value != nullptr) setenv("VATTN_BACKEND", value, /*overwrite=*/1);
  }
  std::optional<std::string> before_;
};

vattn_options OptionsWith(int32_t backend) {
  vattn_options options = test::OptionsFor({});
  options.backend = backend;
  options.host_bytes = 4 << 20;
  return options;
}

int32_t Chosen(const vattn_options& options) { return Runtime(options).Options().backend; }

void ExpectRefused(vattn_code code, const vattn_options& options, const std::string& text) {
  vattn_runtime* runtime = nullptr;
  EXPECT_EQ(vattn_runtime_create(&options, &runtime), code);
  EXPECT_EQ(runtime, nullptr);
  EXPECT_NE(std::string(vattn_last_error()).find(text), std::string::npos) << vattn_last_error();
}

void ExpectNotSupported(const vattn_options& options, const std::string& text) {
  ExpectRefused(VATTN_NOT_SUPPORTED, options, text);
}

class NoDeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!ListDevices().empty()) GTEST_SKIP() << "there is a CUDA device";
  }
};

class DeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (ListDevices().empty()) GTEST_SKIP() << "there is no CUDA device";
    absl::StatusOr<std::unique_ptr<Device>> opened = Device::Open(0);
    ASSERT_TRUE(opened.ok()) << opened.status();
    device_ = *std::move(opened);
  }
  std::unique_ptr<Device> device_;
};

TEST_F(NoDeviceTest, OpenSaysSo) {
  for (const int ordinal : {0, 1, -1}) {
    const absl::StatusOr<std::unique_ptr<Device>> device = Device::Open(ordinal);
    ASSERT_FALSE(device.ok());
    EXPECT_EQ(CodeOf(device.status()), Code::kNotSupported);
    EXPECT_NE(Text(device.status()).find("CUDA"), std::string::npos) << device.status();
  }
}

TEST_F(NoDeviceTest, CudaIsRefusedAndAutoIsTheCpu) {
  {
    const Environment none(nullptr);
    ExpectNotSupported(OptionsWith(VATTN_BACKEND_CUDA), "CUDA");
    EXPECT_EQ(Chosen(OptionsWith(VATTN_BACKEND_AUTO)), VATTN_BACKEND_CPU);
  }
  const Environment cuda("cuda");
  ExpectNotSupported(OptionsWith(VATTN_BACKEND_AUTO), "CUDA");
  EXPECT_EQ(Chosen(OptionsWith(VATTN_BACKEND_CPU)), VATTN_BACKEND_CPU);
}

TEST(BackendChoiceTest, TheEnvironmentDecidesForAuto) {
  const int32_t best = ListDevices().empty() ? VATTN_BACKEND_CPU : VATTN_BACKEND_CUDA;
  {
    const Environment cpu("cpu");
    EXPECT_EQ(Chosen(OptionsWith(VATTN_BACKEND_AUTO)), VATTN_BACKEND_CPU);
  }
  {
    const Environment none(nullptr);
    EXPECT_EQ(Chosen(OptionsWith(VATTN_BACKEND_AUTO)), best);
  }
  {
    const Environment other("tpu");
    ExpectRefused(VATTN_INVALID_ARGUMENT, OptionsWith(VATTN_BACKEND_AUTO),
                  "VATTN_BACKEND in the environment is \"tpu\"");
  }
  if (best == VATTN_BACKEND_CPU) return;
  const Environment cpu("cpu");
  EXPECT_EQ(Chosen(OptionsWith(VATTN_BACKEND_CUDA)), VATTN_BACKEND_CUDA);
}

// What the CUDA backend lacks: auto means the CPU then, and cuda is refused by name.
TEST(BackendChoiceTest, WhatCudaLacksRunsOnTheCpu) {
  const Environment none(nullptr);
  vattn_options options = OptionsWith(VATTN_BACKEND_AUTO);
  options.num_q_heads = 256;
  options.num_kv_heads = 1;
  EXPECT_EQ(Chosen(options), VATTN_BACKEND_CPU);
  options.backend = VATTN_BACKEND_CUDA;
  ExpectNotSupported(options, "num_q_heads is 256");
}

TEST_F(DeviceTest, FactsAreThere) {
  const DeviceFacts& facts = device_->facts();
  EXPECT_EQ(device_->ordinal(), 0);
  EXPECT_FALSE(facts.name.empty());
  EXPECT_GE(facts.compute_major, 8);
  EXPECT_GT(facts.multiprocessors, 0);
  EXPECT_GT(facts.memory_bytes, uint64_t{1} << 30);
  EXPECT_GT(facts.l2_bytes, 0);
  EXPECT_GE(facts.driver, facts.runtime / 1000 * 1000);
  EXPECT_NE(device_->stream(), nullptr);
  EXPECT_FALSE(device_->lost());
}

TEST_F(DeviceTest, OrdinalsOutOfRangeAreRefused) {
  const int count = static_cast<int>(ListDevices().size());
  for (const int ordinal : {-1, count, 1000}) {
    const absl::StatusOr<std::unique_ptr<Device>> device = Device::Open(ordinal);
    ASSERT_FALSE(device.ok());
    EXPECT_EQ(CodeOf(device.status()), Code::kInvalidArgument);
    EXPECT_NE(Text(device.status()).find("device is " + std::to_string(ordinal)), std::string::npos)
        << device.status();
  }
  vattn_options options = OptionsWith(VATTN_BACKEND_CUDA);
  options.device = count;
  vattn_runtime* runtime = nullptr;
  EXPECT_EQ(vattn_runtime_create(&options, &runtime), VATTN_INVALID_ARGUMENT);
}

TEST_F(DeviceTest, BytesGoThereAndBack) {
  constexpr uint64_t kBytes = (1 << 20) + 3;
  std::vector<std::byte> host(kBytes), back(kBytes);
  for (uint64_t i = 0; i < kBytes; ++i) host[i] = static_cast<std::byte>(i * 7919 >> 3);
  absl::StatusOr<DeviceMemory> there = device_->Allocate(kBytes);
  absl::StatusOr<DeviceMemory> pinned = device_->AllocatePinned(kBytes);
  ASSERT_TRUE(there.ok() && pinned.ok()) << there.status() << pinned.status();
  EXPECT_EQ(there->size(), kBytes);
  const DeviceStream stream = device_->stream();
  EXPECT_TRUE(device_->Copy(there->data(), host.data(), kBytes, stream).ok());
  EXPECT_TRUE(device_->Copy(pinned->data(), there->data(), kBytes, stream).ok());
  EXPECT_TRUE(device_->Synchronize(stream).ok());
  EXPECT_EQ(std::memcmp(pinned->data(), host.data(), kBytes), 0);
  EXPECT_TRUE(device_->Fill(there->data(), 0x5a, kBytes - 1, stream).ok());
  EXPECT_TRUE(device_->Copy(back.data(), there->data(), kBytes, stream).ok());
  EXPECT_TRUE(device_->Copy(back.data(), there->data(), 0, stream).ok());
  EXPECT_TRUE(device_->SynchronizeAll().ok());
  EXPECT_EQ(back[0], std::byte{0x5a});
  EXPECT_EQ(back[kBytes - 2], std::byte{0x5a});
  EXPECT_EQ(back[kBytes - 1], host[kBytes - 1]);
}

TEST_F(DeviceTest, MemoryHasOneOwner) {
  absl::StatusOr<DeviceMemory> made = device_->Allocate(4096);
  ASSERT_TRUE(made.ok());
  DeviceMemory first = *std::move(made);
  std::byte* const data = first.data();
  EXPECT_NE(data, nullptr);
  DeviceMemory second = std::move(first);
  EXPECT_EQ(second.data(), data);
  EXPECT_EQ(second.size(), 4096u);
  second = DeviceMemory();
  EXPECT_EQ(second.data(), nullptr);
  EXPECT_EQ(second.size(), 0u);
}

TEST_F(DeviceTest, EventsArePassed) {
  DeviceEvent event;
  EXPECT_TRUE(device_->Wait(event).ok());  // never recorded
  absl::StatusOr<DeviceMemory> there = device_->Allocate(256);
  absl::StatusOr<DeviceMemory> pinned = device_->AllocatePinned(256);
  ASSERT_TRUE(there.ok() && pinned.ok());
  for (const int byte : {1, 2}) {
    EXPECT_TRUE(device_->Fill(there->data(), byte, 256, device_->stream()).ok());
    EXPECT_TRUE(device_->Copy(pinned->data(), there->data(), 256, device_->stream()).ok());
    EXPECT_TRUE(device_->Record(event, device_->stream()).ok());
    EXPECT_TRUE(device_->Wait(event).ok());
    EXPECT_EQ(pinned->data()[255], static_cast<std::byte>(byte));
  }
  DeviceEvent moved = std::move(event);
  EXPECT_TRUE(device_->Wait(moved).ok());
}

TEST_F(DeviceTest, RegisteredMemoryIsFollowed) {
  constexpr uint64_t kBytes = 1 << 20;
  std::byte* const base = static_cast<std::byte*>(std::aligned_alloc(4096, kBytes));
  ASSERT_NE(base, nullptr);
  std::memset(base, 3, kBytes);
  absl::StatusOr<DeviceMemory> there = device_->Allocate(256);
  absl::StatusOr<DeviceMemory> pinned = device_->AllocatePinned(256);
  ASSERT_TRUE(there.ok() && pinned.ok());
  EXPECT_TRUE(device_->CanFollow(there->data()));
  EXPECT_TRUE(device_->CanFollow(pinned->data()));
  EXPECT_FALSE(device_->CanFollow(base));
  const absl::StatusOr<std::byte*> mapped = device_->Register(base, kBytes, 1);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  EXPECT_TRUE(device_->CanFollow(base));
  EXPECT_TRUE(device_->Copy(there->data(), *mapped + kBytes - 256, 256, device_->stream()).ok());
  EXPECT_TRUE(device_->Copy(pinned->data(), there->data(), 256, device_->stream()).ok());
  EXPECT_TRUE(device_->Synchronize(device_->stream()).ok());
  EXPECT_EQ(pinned->data()[255], std::byte{3});
  EXPECT_FALSE(device_->Register(base, kBytes, 1).ok());  // twice
  EXPECT_FALSE(device_->lost());
  device_.reset();
  std::free(base);
}

TEST_F(DeviceTest, OutOfMemoryNamesBytes) {
  constexpr uint64_t kTooMany = uint64_t{1} << 44;
  const absl::StatusOr<DeviceMemory> memory = device_->Allocate(kTooMany);
  ASSERT_FALSE(memory.ok());
  EXPECT_EQ(CodeOf(memory.status()), Code::kOutOfMemory);
  EXPECT_NE(Text(memory.status()).find(std::to_string(kTooMany) + " bytes"), std::string::npos)
      << memory.status();
  EXPECT_NE(Text(memory.status()).find("are free"), std::string::npos) << memory.status();
  EXPECT_FALSE(device_->lost());
  EXPECT_TRUE(device_->Allocate(256).ok());  // and all goes on
}

}  // namespace
}  // namespace vattn
