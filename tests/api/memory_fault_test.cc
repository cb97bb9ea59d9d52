// Every public operation while memory is refused: its n-th allocation, once or from then on, for
// every n. A refused call says OUT_OF_MEMORY and changes nothing that counts: the same call
// succeeds afterwards, and later answers have the bits that they have without the refusal. Nothing
// leaks. Calls that read or write JSON are left out: nlohmann::json allocates in destructors.
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/api/memory_fault_fixture.h"

namespace vattn::test {
namespace {

TEST_F(MemoryFaultTest, RuntimeCreate) {
  std::unique_ptr<vattn_runtime, Destroyer<vattn_runtime, vattn_runtime_destroy>> made;
  EveryFailingAllocation([&] { made.reset(); },
                         [&] {
                           vattn_runtime* out = nullptr;
                           const vattn_options options = MakeOptions(path_.c_str());
                           const vattn_code code = vattn_runtime_create(&options, &out);
                           EXPECT_EQ(out != nullptr, code == VATTN_OK);
                           made.reset(out);
                           return code;
                         },
                         [&] {
                           vattn_options options = Init<vattn_options>();
                           Check(vattn_runtime_options(made.get(), &options));
                           return std::to_string(options.layer_kv_heads[1]);
                         },
                         10);
}

TEST_F(MemoryFaultTest, Text) {
  std::string text(1 << 14, '\0');
  size_t needed = 0;
  EveryFailingAllocation(
      [] {}, [&] { return vattn_stats_prometheus(runtime_.get(), &text[0], text.size(), &needed); },
      [&] { return text; }, 1);
}

TEST_F(MemoryFaultTest, Create) {
  EveryFailingAllocation([&] { handle_.reset(); },
                         [&] {
                           vattn_sequence_options options = Init<vattn_sequence_options>();
                           options.reserve_tokens = 1000;
                           vattn_sequence* made = nullptr;
                           return Keep(vattn_sequence_create(runtime_.get(), &options, &made),
                                       made);
                         },
                         [&] { return std::to_string(runtime_.Stats().host_bytes_used); }, 4);
}

TEST_F(MemoryFaultTest, Append) {
  // Into a new sequence, a reserved one, and one that shares its tail with a fork.
  for (int kind = 0; kind < 3; ++kind) {
    std::unique_ptr<Sequence> fork;
    EveryFailingAllocation(
        [&] {
          fork.reset();
          sequence_ = kind == 1 ? std::make_unique<Sequence>(runtime_, 7, 2000)
                                : MakeSequence(7, kind == 0 ? 0 : kPrompt);
          if (kind == 2) fork = std::make_unique<Sequence>(sequence_->Fork(8));
        },
        [&] {
          const vattn_append_params params = AppendParams(inputs_.more, 0, true);
          return vattn_append(sequence_->get(), &params);
        },
        [&] {
          sequence_->Append(AppendParams(inputs_.more, 1, true));
          const std::string forks = fork ? Answers(*fork) : "";
          return Answers(*sequence_) + forks + std::to_string(runtime_.Stats().host_bytes_used);
        },
        5);
  }
}

// A chunk whose attention finds no memory is not added either.
TEST_F(MemoryFaultTest, Prefill) {
  std::vector<float> out(static_cast<size_t>(16 * kShape.q_heads * kShape.dim_v));
  vattn_prefill_params params = Init<vattn_prefill_params>();
  params.num_tokens = 16;
  params.q = inputs_.queries.data();
  params.k = inputs_.more.k.data();
  params.v = inputs_.more.v.data();
  params.out = out.data();
  EveryFailingAllocation([&] { sequence_ = MakeSequence(); },
                         [&] { return vattn_prefill(sequence_->get(), &params); },
                         [&] {
                           vattn_append_params rest = AppendParams(inputs_.more, 1, true);
                           rest.num_tokens = 16;
                           sequence_->Append(rest);
                           std::string text = Answers(*sequence_);
                           Add(text, out);
                           return text + std::to_string(runtime_.Stats().host_bytes_used);
                         },
                         5);
}

TEST_F(MemoryFaultTest, Fork) {
  EveryFailingAllocation(
      [&] {
        handle_.reset();
        sequence_ = MakeSequence();
      },
      [&] {
        vattn_sequence* made = nullptr;
        return Keep(vattn_sequence_fork(sequence_->get(), 9, &made), made);
      },
      [&] {
        const std::string bytes = std::to_string(runtime_.Stats().host_bytes_used);
        return Answers(*sequence_) + bytes;
      },
      10);
}

TEST_F(MemoryFaultTest, Truncate) {
  EveryFailingAllocation([&] { sequence_ = MakeSequence(); },
                         [&] { return vattn_sequence_truncate(sequence_->get(), 200); },
                         [&] { return Answers(*sequence_); }, 0);
}

// What is reserved beside what is used: both must come out the same.
TEST_F(MemoryFaultTest, Reserve) {
  std::unique_ptr<Sequence> fork;
  const auto pool = [&] {
    const vattn_stats stats = runtime_.Stats();
    return std::to_string(stats.host_bytes_used) + "/" + std::to_string(stats.host_bytes_reserved);
  };
  EveryFailingAllocation([&] { sequence_ = MakeSequence(); },
                         [&] { return vattn_sequence_reserve(sequence_->get(), 1500); }, pool, 0);
  // A fork of one with a reservation, and cutting into what it shares.
  EveryFailingAllocation(
      [&] {
        handle_.reset();
        sequence_ = MakeSequence();
        sequence_->Reserve(1500);
      },
      [&] {
        vattn_sequence* made = nullptr;
        return Keep(vattn_sequence_fork(sequence_->get(), 9, &made), made);
      },
      pool, 10);
  EveryFailingAllocation(
      [&] {
        fork.reset();
        handle_.reset();
        sequence_ = MakeSequence();
        sequence_->Reserve(1500);
        fork = std::make_unique<Sequence>(sequence_->Fork(8));
      },
      [&] { return vattn_sequence_truncate(sequence_->get(), 100); },
      [&] { return pool() + Answers(*fork); }, 0);
}

TEST_F(MemoryFaultTest, Tenants) {
  const auto use = [&] {
    const vattn_tenant_use use = runtime_.TenantUse(3);
    return std::to_string(use.host_bytes_limit) + "/" + std::to_string(use.host_bytes_used);
  };
  EveryFailingAllocation([&] { runtime_.LimitTenant(3, 0); },
                         [&] { return vattn_tenant_limit(runtime_.get(), 3, 1 << 20); }, use, 1);
  runtime_.LimitTenant(3, 0);
  EveryFailingAllocation([&] { handle_.reset(); },
                         [&] {
                           vattn_sequence_options options = Init<vattn_sequence_options>();
                           options.reserve_tokens = 1000;
                           options.tenant = 3;
                           vattn_sequence* made = nullptr;
                           return Keep(vattn_sequence_create(runtime_.get(), &options, &made),
                                       made);
                         },
                         use, 5);
  handle_.reset();
  EXPECT_EQ(runtime_.TenantUse(3).host_bytes_used, 0u);
}

TEST_F(MemoryFaultTest, BuildIndex) {
  std::unique_ptr<Sequence> fork;
  EveryFailingAllocation(
      [&] {
        fork.reset();
        sequence_ = MakeSequence();
        fork = std::make_unique<Sequence>(sequence_->Fork(8));
      },
      [&] { return vattn_sequence_build_index(sequence_->get()); },
      [&] { return Answers(*sequence_) + Answers(*fork); }, 10);
}

TEST_F(MemoryFaultTest, SaveAndRestore) {
  sequence_ = MakeSequence();
  EveryFailingAllocation([] {},
                         [&] { return vattn_sequence_save(sequence_->get(), path_.c_str()); },
                         [&] {
                           const auto entries = std::filesystem::directory_iterator(folder_);
                           return std::to_string(std::distance(begin(entries), end(entries)));
                         },
                         10);
  EveryFailingAllocation([&] { handle_.reset(); },
                         [&] {
                           vattn_sequence* made = nullptr;
                           return Keep(vattn_sequence_restore(runtime_.get(), path_.c_str(), &made),
                                       made);
                         },
                         [&] { return std::to_string(runtime_.Stats().host_bytes_used); }, 10);
}

TEST_F(MemoryFaultTest, HibernateAndWake) {
  EveryFailingAllocation([&] { sequence_ = MakeSequence(); },
                         [&] { return vattn_sequence_hibernate(sequence_->get(), path_.c_str()); },
                         [&] {
                           const uint64_t asleep = runtime_.Stats().host_bytes_used;
                           sequence_->Wake();
                           return Answers(*sequence_) + std::to_string(asleep);
                         },
                         10);
  EveryFailingAllocation(
      [&] {
        sequence_ = MakeSequence();
        sequence_->Hibernate(path_);
      },
      [&] { return vattn_sequence_wake(sequence_->get()); }, [&] { return Answers(*sequence_); },
      10);
}

// An append that needs the room of a sequence that nobody uses.
TEST_F(MemoryFaultTest, Spill) {
  Batch batch(runtime_, 1);
  const int64_t room = static_cast<int64_t>(runtime_.Stats().host_bytes_limit / block_bytes_ / 4);
  std::unique_ptr<Sequence> cold;
  EveryFailingAllocation(
      [&] {
        cold.reset(), sequence_.reset(), hog_.reset();
        hog_ = std::make_unique<Sequence>(runtime_, 1, (room - 3) * 256);
        batch.Set(0, *hog_);  // stays
        cold = MakeSequence(5);
        sequence_ = std::make_unique<Sequence>(runtime_, 7);
        sequence_->Append(AppendParams(inputs_.prompt, 1, true));
      },
      [&] {
        const vattn_append_params params = AppendParams(inputs_.prompt, 0, true);
        return vattn_append(sequence_->get(), &params);
      },
      [&] { return Answers(*sequence_) + Answers(*cold); }, 20);
  EXPECT_GT(runtime_.Stats().spills, 50u);
}

TEST_F(MemoryFaultTest, Prefixes) {
  const OwnedPrefix prefix("salt", std::vector<int32_t>(390, 3));
  EveryFailingAllocation(
      [&] {
        runtime_.ForgetPrefixes("salt");
        sequence_ = MakeSequence();
      },
      [&] { return vattn_prefix_save(sequence_->get(), &prefix); },
      [&] {
        int64_t tokens = 0;
        const Sequence begun = Sequence::Begin(runtime_, prefix, &tokens, 7);
        return Answers(begun) + std::to_string(tokens);
      },
      20);
  EveryFailingAllocation(
      [&] { handle_.reset(); },
      [&] {
        vattn_sequence* made = nullptr;
        int64_t tokens = 0;
        return Keep(vattn_prefix_restore(runtime_.get(), &prefix, 7, &tokens, &made), made);
      },
      [&] { return std::to_string(runtime_.Stats().host_bytes_used); }, 20);
  EveryFailingAllocation([] {},
                         [&] { return vattn_prefix_forget(runtime_.get(), "salt", 4, nullptr); },
                         [&] { return std::to_string(runtime_.Stats().disk_bytes_used); }, 0);
}

TEST_F(MemoryFaultTest, KeptPrefixes) {
  std::vector<int32_t> ids(390, 3), others(390, 4);
  OwnedPrefix prefix("salt", ids), other("salt", others);
  prefix.tier = other.tier = VATTN_TIER_MEMORY;
  EveryFailingAllocation(
      [&] {
        runtime_.ForgetPrefixes("salt");
        sequence_ = MakeSequence();
      },
      [&] { return vattn_prefix_save(sequence_->get(), &prefix); },
      [&] {
        int64_t tokens = 0;
        const Sequence begun = Sequence::Begin(runtime_, prefix, &tokens, 7);
        EXPECT_EQ(runtime_.Stats().memory_prefixes, 1u);
        return Answers(begun) + Answers(*sequence_) + std::to_string(tokens);
      },
      20);
  prefix.reserve_tokens = 1000;
  EveryFailingAllocation(
      [&] { handle_.reset(); },
      [&] {
        vattn_sequence* made = nullptr;
        int64_t tokens = 0;
        return Keep(vattn_prefix_restore(runtime_.get(), &prefix, 7, &tokens, &made), made);
      },
      [&] { return std::to_string(runtime_.Stats().host_bytes_used); }, 10);
  // Another one is let go for room, also where it takes a look at who holds which block.
  std::unique_ptr<Sequence> rest;
  EveryFailingAllocation(
      [&] {
        handle_.reset(), rest.reset(), sequence_.reset();
        runtime_.ForgetPrefixes("salt");
        runtime_.ForgetPrefixes("second name");
        sequence_ = MakeSequence();
        OwnedPrefix again("second name", others);
        again.tier = VATTN_TIER_MEMORY;
        sequence_->SavePrefix(other);
        sequence_->SavePrefix(again);
        sequence_.reset();
        const vattn_stats stats = runtime_.Stats();
        const int64_t free = static_cast<int64_t>((stats.host_bytes_limit - stats.host_bytes_used) /
                                                  block_bytes_ / 4);
        rest = std::make_unique<Sequence>(runtime_, 1, free * 256);
        EXPECT_EQ(runtime_.Stats().memory_prefixes, 2u);
      },
      [&] {
        vattn_sequence_options options = Init<vattn_sequence_options>();
        options.reserve_tokens = 256;
        vattn_sequence* made = nullptr;
        return Keep(vattn_sequence_create(runtime_.get(), &options, &made), made);
      },
      [&] { return std::to_string(runtime_.Stats().memory_prefixes); }, 5);
  handle_.reset(), rest.reset();
  runtime_.ForgetPrefixes("second name");
  EveryFailingAllocation([] {},
                         [&] { return vattn_prefix_forget(runtime_.get(), "salt", 4, nullptr); },
                         [&] { return std::to_string(runtime_.Stats().host_bytes_used); }, 0);
}

TEST_F(MemoryFaultTest, Batch) {
  vattn_batch* made = nullptr;
  EveryFailingAllocation([&] { vattn_batch_destroy(std::exchange(made, nullptr)); },
                         [&] { return vattn_batch_create(runtime_.get(), kSlots, &made); },
                         [&] { return made == nullptr ? "none" : "made"; }, 3);
  vattn_batch_destroy(made);
  const auto make = [&] {
    batch_.reset();
    sequence_ = MakeSequence();
    batch_ = std::make_unique<vattn::Batch>(runtime_, kSlots);
    batch_->Set(0, *sequence_);
  };
  const auto result = [&] {
    for (size_t i : {2, 3}) batch_->Attend(inputs_.calls[i].Params());
    batch_->Clear(0);
    return Answers(*sequence_);
  };
  EveryFailingAllocation(
      make, [&] { return vattn_batch_begin_step(batch_->get(), 1, nullptr); }, result, 10);
  // A step that is given up after its first layer.
  EveryFailingAllocation(
      [&] {
        make();
        batch_->BeginStep(1);
        batch_->Attend(inputs_.calls[2].Params());
      },
      [&] { return vattn_batch_abandon(batch_->get()); },
      [&] {
        batch_->Clear(0);
        return Answers(*sequence_);
      },
      0);
  // The first call of each layer, and one where the hot set is in use.
  for (const size_t at : {0, 2}) {
    vattn_attend_params params;
    EveryFailingAllocation(
        [&] {
          make();
          for (size_t i = 0; i < at; i += kLayers) {
            batch_->BeginStep(0);
            for (size_t l = 0; l < kLayers; ++l) batch_->Attend(inputs_.calls[l].Params());
          }
          batch_->BeginStep(at > 0 ? 1 : 0);
          params = inputs_.calls[at].Params();
        },
        [&] {
          const vattn_code code = vattn_attend(batch_->get(), &params, nullptr);
          EXPECT_TRUE(!memory_faults.armed || memory_faults.calls == 0) << "attention allocates";
          return code;
        },
        [&] {
          std::string text;
          Add(text, inputs_.calls[at].Out(0, 3));
          batch_->Attend(inputs_.calls[at + 1].Params());
          batch_->Clear(0);
          return text + Answers(*sequence_);
        },
        0);
  }
}

}  // namespace
}  // namespace vattn::test
