// The operations of PoolWorld that attend, and those that must be refused.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "tests/api/pool_world.h"

namespace vattn::test {
namespace {

void Expect(bool right, const std::string& what) {
  if (!right) throw std::runtime_error(what);
}

}  // namespace

void PoolWorld::CheckAnswer(const Call& call, int slot, const Content& content) {
  const int head = static_cast<int>(Draw(call.shape.q_heads)),
            token = static_cast<int>(Draw(call.tokens));
  const Answer answer =
      Attend(call.shape, RowsOf(content, call.layer), content.tokens() - call.tokens + 1 + token,
             head * call.shape.kv_heads / call.shape.q_heads, call.Query(slot, head, token));
  const double distance = Distance(answer, call.Out(slot, head, token).data());
  const double lse = call.lse[call.At(slot, head, token)];
  Expect(distance <= Tolerance(answer, VATTN_F32),
         "an answer over " + std::to_string(content.tokens()) + " tokens is off by " +
             std::to_string(distance));
  Expect(std::abs(lse - answer.lse) <= 1e-4, "a logarithm of a sum is off");
}

void PoolWorld::Step(Known& first) {
  std::vector<Known*> members = {&first};
  for (int more = static_cast<int>(Draw(kSlots)); more > 0; --more) {
    Known* other = known_[Draw(static_cast<int64_t>(known_.size()))].get();
    if (other->asleep.empty() &&
        std::find(members.begin(), members.end(), other) == members.end()) {
      members.push_back(other);
    }
  }
  const int new_tokens = Draw(4) == 0 ? 0 : 1 + static_cast<int>(Draw(3) * Draw(3));
  std::erase_if(members, [&](const Known* one) { return one->content.tokens() + new_tokens < 1; });
  size_t placed = 0;  // a spilled sequence comes back, if there is room
  while (placed < members.size() &&
         Try([&] { batch_.Set(static_cast<int32_t>(placed), *members[placed]->sequence); })) {
    ++placed;
  }
  members.resize(placed);
  if (members.empty()) return;
  const auto covered = [&](const Known* one) {
    return one->Covers(one->content.tokens() + new_tokens);
  };
  const int64_t num_covered = std::count_if(members.begin(), members.end(), covered);
  if (!Try([&] { batch_.BeginStep(new_tokens); })) {
    Expect(num_covered < static_cast<int64_t>(members.size()),
           "a step is FULL that reservations cover");
  } else {
    tally_.covered += num_covered;
    for (int layer = 0; layer < kLayers; ++layer) {
      const Shape shape = LayerShape(layer);
      const int64_t size = int64_t{shape.kv_heads} * shape.dim_k;
      Call call(shape, kSlots, layer, VATTN_F32, std::max(new_tokens, 1));
      const uint32_t query = Draw(1 << 30);
      const int heads = kSlots * call.tokens * shape.q_heads;
      call.q.resize(static_cast<size_t>(heads * shape.dim_k));
      for (int h = 0; h < heads; ++h) {
        RowOf(query + static_cast<uint32_t>(h), 3, 0, false, call.q.data() + h * shape.dim_k);
      }
      call.k_new.resize(static_cast<size_t>(kSlots * new_tokens * size));
      call.v_new.resize(call.k_new.size());
      for (size_t row = 0; row < members.size() * static_cast<size_t>(new_tokens); ++row) {
        const uint32_t seed = seeds_++;
        members[row / static_cast<size_t>(new_tokens)]->content.seeds[layer].push_back(seed);
        for (int h = 0; h < shape.kv_heads; ++h) {
          const int64_t at = static_cast<int64_t>(row) * size + h * shape.dim_k;
          RowOf(seed, layer, h, false, call.k_new.data() + at);
          RowOf(seed, layer, h, true, call.v_new.data() + at);
        }
      }
      batch_.Attend(call.Params());
      const uint32_t slot = Draw(static_cast<int64_t>(members.size()));
      CheckAnswer(call, static_cast<int>(slot), members[slot]->content);
    }
    ++tally_.steps;
  }
  for (size_t slot = 0; slot < members.size(); ++slot) {
    CheckLengths(*members[slot]);
    batch_.Clear(static_cast<int32_t>(slot));
  }
}

void PoolWorld::ReadRows(Known& one) {
  if (one.content.tokens() == 0) return;
  if (!Try([&] { batch_.Set(0, *one.sequence); })) return;
  // A step codes what has left the window, and that may need copies of shared blocks.
  if (!Try([&] { batch_.BeginStep(0); })) {
    Expect(!one.Covers(one.content.tokens()), "coding is FULL that a reservation covers");
  } else {
    for (int layer = 0; layer < kLayers; ++layer) {
      const Shape shape = LayerShape(layer);
      Call call(shape, kSlots, layer);
      call.q.resize(static_cast<size_t>(kSlots * shape.q_heads * shape.dim_k));
      for (int h = 0; h < shape.q_heads; ++h)
        RowOf(7, 3, 0, false, call.q.data() + h * shape.dim_k);
      std::vector<int32_t> tokens, counts(static_cast<size_t>(kSlots * shape.kv_heads), 1);
      for (size_t i = 0; i < counts.size(); ++i) {
        tokens.push_back(static_cast<int32_t>(Draw(one.content.tokens())));
      }
      vattn_selection selection = Init<vattn_selection>();
      selection.capacity = 1;
      selection.tokens = tokens.data();
      selection.counts = counts.data();
      batch_.AttendSelected(call.Params(), selection);
      for (int h = 0; h < shape.q_heads; ++h) {
        const int kv_head = h * shape.kv_heads / shape.q_heads;
        const uint32_t seed = one.content.seeds[layer][static_cast<size_t>(tokens[kv_head])];
        std::vector<float> k(static_cast<size_t>(shape.dim_k)), v(k.size());
        RowOf(seed, layer, kv_head, false, k.data());
        RowOf(seed, layer, kv_head, true, v.data());
        double logit = 0;
        for (int i = 0; i < shape.dim_k; ++i) logit += double{k[i]} * call.Query(0, h)[i];
        logit /= std::sqrt(static_cast<double>(shape.dim_k));
        const std::string where = "token " + std::to_string(tokens[kv_head]) + " of " +
                                  std::to_string(one.content.tokens()) + ", layer " +
                                  std::to_string(layer) + ", KV head " + std::to_string(kv_head);
        Expect(call.Out(0, h) == v, "another value row at " + where);
        Expect(std::abs(call.lse[h] - logit) <= 1e-5, "another key row at " + where);
      }
      tally_.rows_read += shape.kv_heads;
    }
  }
  batch_.Clear(0);
}

void PoolWorld::Misuse(Known& one) {
  const Rows row = RowsOf({{{1}, {1}}}, 0);
  vattn_append_params params = Init<vattn_append_params>();
  params.num_tokens = 1;
  params.k = row.k.data();
  params.v = row.v.data();
  const int32_t any = static_cast<int32_t>(Draw(UINT32_MAX));
  vattn_code code = VATTN_OK;
  switch (Draw(8)) {
    case 0:
      params.layer = any < 0 ? any : any % 1000 + kLayers;
      code = vattn_append(one.sequence->get(), &params);
      break;
    case 1:
      params.num_tokens = any < 0 ? any : 0;
      code = vattn_append(one.sequence->get(), &params);
      break;
    case 2:
      params.num_tokens = (int64_t{1} << 31) + 1 + int64_t{any & 0xffff};
      code = vattn_append(one.sequence->get(), &params);
      break;
    case 3:
      params.num_queries = any == 0 ? 2 : any;  // without q
      code = vattn_append(one.sequence->get(), &params);
      break;
    case 4:
      params.k_token_stride = -1 - static_cast<int64_t>(any & 0xffff);
      code = vattn_append(one.sequence->get(), &params);
      break;
    case 5:
      code = vattn_sequence_truncate(one.sequence->get(), -1 - int64_t{any & 0xffff});
      break;
    case 6:
      code =
          vattn_batch_set(batch_.get(), any < 0 ? any : any % 1000 + kSlots, one.sequence->get());
      break;
    default: {
      Call call(LayerShape(0), kSlots, 0);  // no step is open
      call.q.resize(1);
      const vattn_attend_params attend = call.Params();
      code = vattn_attend(batch_.get(), &attend, nullptr);
    }
  }
  if (options_.spill && code == VATTN_FULL) {  // no room to bring it back
    ++tally_.refused;
    tally_.over_quota += std::strstr(vattn_last_error(), " is at its quota") != nullptr;
    return;
  }
  Expect(code == VATTN_INVALID_ARGUMENT, std::string("misuse gave ") + vattn_code_name(code));
  Expect(vattn_last_error()[0] != '\0', "misuse without a text");
  CheckLengths(one);
  ++tally_.misused;
}

}  // namespace vattn::test
