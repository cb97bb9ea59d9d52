// vattn for C++17 and later: vattn.h with owners and exceptions. Contracts are those of vattn.h.
//
// Classes are move-only; get() lends the handle. A moved-from object holds none and may only be
// destroyed or assigned to. Sequences and batches go before their runtime: declare them after it.
#ifndef VATTN_HPP_
#define VATTN_HPP_

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "vattn.h"

namespace vattn {

// A call that failed: its code and the text of vattn_last_error().
class Error : public std::runtime_error {
 public:
  Error(vattn_code code, const char* text)
      : std::runtime_error(std::string(vattn_code_name(code)) + ": " + text), code_(code) {}
  vattn_code code() const noexcept { return code_; }

 private:
  vattn_code code_;
};

inline void Check(vattn_code code) {
  if (code != VATTN_OK) throw Error(code, vattn_last_error());
}

// A struct of vattn.h as its _init function fills it: Init<vattn_options>().
inline void InitStruct(vattn_options* s) { vattn_options_init(s, sizeof(*s)); }
inline void InitStruct(vattn_sequence_options* s) { vattn_sequence_options_init(s, sizeof(*s)); }
inline void InitStruct(vattn_append_params* s) { vattn_append_params_init(s, sizeof(*s)); }
inline void InitStruct(vattn_attend_params* s) { vattn_attend_params_init(s, sizeof(*s)); }
inline void InitStruct(vattn_selection* s) { vattn_selection_init(s, sizeof(*s)); }
inline void InitStruct(vattn_prefix* s) { vattn_prefix_init(s, sizeof(*s)); }
template <class Struct>
Struct Init() {
  Struct s;
  InitStruct(&s);
  return s;
}

template <class Handle, void (*kDestroy)(Handle*)>
struct Destroyer {
  void operator()(Handle* handle) const noexcept { kDestroy(handle); }
};

class Runtime {
 public:
  explicit Runtime(const vattn_options& options) {
    vattn_runtime* made = nullptr;
    Check(vattn_runtime_create(&options, &made));
    handle_.reset(made);
  }
  explicit Runtime(const std::string& json) {
    vattn_runtime* made = nullptr;
    Check(vattn_runtime_create_json(json.c_str(), &made));
    handle_.reset(made);
  }

  vattn_options Options() const {
    vattn_options options = Init<vattn_options>();
    Check(vattn_runtime_options(get(), &options));
    return options;
  }
  vattn_stats Stats() const {
    vattn_stats stats;
    Check(vattn_runtime_stats(get(), &stats, sizeof(stats)));
    return stats;
  }
  // How many went.
  int64_t ForgetPrefixes(const std::string& salt) {
    int64_t prefixes = 0;
    Check(vattn_prefix_forget(get(), salt.data(), salt.size(), &prefixes));
    return prefixes;
  }
  void LimitTenant(uint64_t tenant, uint64_t host_bytes) {
    Check(vattn_tenant_limit(get(), tenant, host_bytes));
  }
  vattn_tenant_use TenantUse(uint64_t tenant) const {
    vattn_tenant_use use;
    Check(vattn_tenant_stats(get(), tenant, &use, sizeof(use)));
    return use;
  }
  vattn_runtime* get() const noexcept { return handle_.get(); }

 private:
  std::unique_ptr<vattn_runtime, Destroyer<vattn_runtime, vattn_runtime_destroy>> handle_;
};

class Sequence {
 public:
  explicit Sequence(const Runtime& runtime, uint64_t id = 0, int64_t reserve_tokens = 0,
                    uint64_t tenant = 0) {
    vattn_sequence_options options = Init<vattn_sequence_options>();
    options.id = id;
    options.reserve_tokens = reserve_tokens;
    options.tenant = tenant;
    vattn_sequence* made = nullptr;
    Check(vattn_sequence_create(runtime.get(), &options, &made));
    handle_.reset(made);
  }
  static Sequence Restore(const Runtime& runtime, const std::string& path) {
    vattn_sequence* made = nullptr;
    Check(vattn_sequence_restore(runtime.get(), path.c_str(), &made));
    return Sequence(made);
  }
  static Sequence Restore(const Runtime& runtime, const std::string& path,
                          const vattn_sequence_options& options) {
    vattn_sequence* made = nullptr;
    Check(vattn_sequence_restore_as(runtime.get(), path.c_str(), &options, &made));
    return Sequence(made);
  }
  // Begins with *tokens tokens of a stored prefix; NOT_FOUND is thrown, too.
  static Sequence Begin(const Runtime& runtime, const vattn_prefix& prefix, int64_t* tokens,
                        uint64_t id = 0) {
    vattn_sequence* made = nullptr;
    Check(vattn_prefix_restore(runtime.get(), &prefix, id, tokens, &made));
    return Sequence(made);
  }
  Sequence Fork(uint64_t id = 0) const {
    vattn_sequence* made = nullptr;
    Check(vattn_sequence_fork(get(), id, &made));
    return Sequence(made);
  }

  void Append(const vattn_append_params& params) { Check(vattn_append(get(), &params)); }
  void Reserve(int64_t tokens) { Check(vattn_sequence_reserve(get(), tokens)); }
  void Truncate(int64_t tokens) { Check(vattn_sequence_truncate(get(), tokens)); }
  void BuildIndex() { Check(vattn_sequence_build_index(get())); }
  int64_t Length(int32_t layer) const {
    int64_t tokens = 0;
    Check(vattn_sequence_length(get(), layer, &tokens));
    return tokens;
  }
  void Save(const std::string& path) const { Check(vattn_sequence_save(get(), path.c_str())); }
  void Hibernate(const std::string& path) { Check(vattn_sequence_hibernate(get(), path.c_str())); }
  void Wake() { Check(vattn_sequence_wake(get())); }
  void SavePrefix(const vattn_prefix& prefix) const { Check(vattn_prefix_save(get(), &prefix)); }
  vattn_sequence* get() const noexcept { return handle_.get(); }

 private:
  explicit Sequence(vattn_sequence* handle) : handle_(handle) {}

  std::unique_ptr<vattn_sequence, Destroyer<vattn_sequence, vattn_sequence_destroy>> handle_;
};

class Batch {
 public:
  Batch(const Runtime& runtime, int32_t slots) {
    vattn_batch* made = nullptr;
    Check(vattn_batch_create(runtime.get(), slots, &made));
    handle_.reset(made);
  }

  void Set(int32_t slot, const Sequence& sequence) {
    Check(vattn_batch_set(get(), slot, sequence.get()));
  }
  void Clear(int32_t slot) { Check(vattn_batch_clear(get(), slot)); }
  void BeginStep(int32_t new_tokens, CUstream_st* stream = nullptr) {
    Check(vattn_batch_begin_step(get(), new_tokens, stream));
  }
  void Abandon() { Check(vattn_batch_abandon(get())); }
  void Attend(const vattn_attend_params& params, CUstream_st* stream = nullptr) {
    Check(vattn_attend(get(), &params, stream));
  }
  void AttendSelected(const vattn_attend_params& params, const vattn_selection& selection,
                      CUstream_st* stream = nullptr) {
    Check(vattn_attend_selected(get(), &params, &selection, stream));
  }
  void Select(const vattn_attend_params& params, vattn_selection& selection,
              CUstream_st* stream = nullptr) {
    Check(vattn_select(get(), &params, &selection, stream));
  }
  vattn_batch* get() const noexcept { return handle_.get(); }

 private:
  std::unique_ptr<vattn_batch, Destroyer<vattn_batch, vattn_batch_destroy>> handle_;
};

// Two calls: the length, then the text.
inline std::string DoctorJson() {
  size_t needed = 0;
  Check(vattn_doctor(nullptr, 0, &needed));
  std::string text(needed + 1, '\0');
  Check(vattn_doctor(&text[0], text.size(), &needed));
  text.resize(needed < text.size() ? needed : text.size() - 1);
  return text;
}

inline std::string PrometheusText(const Runtime& runtime) {
  size_t needed = 0;
  Check(vattn_stats_prometheus(runtime.get(), nullptr, 0, &needed));
  // Counters may grow by a digit between the two calls.
  std::string text(needed + 256, '\0');
  Check(vattn_stats_prometheus(runtime.get(), &text[0], text.size(), &needed));
  text.resize(needed < text.size() ? needed : text.size() - 1);
  return text;
}

}  // namespace vattn

#endif  // VATTN_HPP_
