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
  // The code's name and the text are what() says.
  Error(vattn_code code, const char* text)
      : std::runtime_error(std::string(vattn_code_name(code)) + ": " + text), code_(code) {}
  // The code that the call answered.
  vattn_code code() const noexcept { return code_; }

 private:
  vattn_code code_;
};

// Throws Error with the thread's last text unless code is VATTN_OK.
inline void Check(vattn_code code) {
  if (code != VATTN_OK) throw Error(code, vattn_last_error());
}

// Fills a struct of vattn.h with its defaults, by its _init function.
inline void InitStruct(vattn_options* s) { vattn_options_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_sequence_options* s) { vattn_sequence_options_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_append_params* s) { vattn_append_params_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_prefill_params* s) { vattn_prefill_params_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_attend_params* s) { vattn_attend_params_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_selection* s) { vattn_selection_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_prefix* s) { vattn_prefix_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_merge_params* s) { vattn_merge_params_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_paged_options* s) { vattn_paged_options_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_paged_rows* s) { vattn_paged_rows_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_paged_step* s) { vattn_paged_step_init(s, sizeof(*s)); }
// The same for this struct.
inline void InitStruct(vattn_paged_prefill_params* s) {
  vattn_paged_prefill_params_init(s, sizeof(*s));
}
// A struct of vattn.h as its _init function fills it: Init<vattn_options>().
template <class Struct>
Struct Init() {
  Struct s;
  InitStruct(&s);
  return s;
}

// Destroys a handle of vattn.h when its std::unique_ptr goes.
template <class Handle, void (*kDestroy)(Handle*)>
struct Destroyer {
  // Calls the handle's destroy function.
  void operator()(Handle* handle) const noexcept { kDestroy(handle); }
};

// A runtime: the host pool, its options and its counters. Several threads may use it at a time.
class Runtime {
 public:
  // As vattn_runtime_create.
  explicit Runtime(const vattn_options& options) {
    vattn_runtime* made = nullptr;
    Check(vattn_runtime_create(&options, &made));
    handle_.reset(made);
  }
  // As vattn_runtime_create_json: options by name, others at their defaults.
  explicit Runtime(const std::string& json) {
    vattn_runtime* made = nullptr;
    Check(vattn_runtime_create_json(json.c_str(), &made));
    handle_.reset(made);
  }

  // The options in use, with what was chosen for those given as auto.
  vattn_options Options() const {
    vattn_options options = Init<vattn_options>();
    Check(vattn_runtime_options(get(), &options));
    return options;
  }
  // The counters since the runtime was made.
  vattn_stats Stats() const {
    vattn_stats stats;
    Check(vattn_runtime_stats(get(), &stats, sizeof(stats)));
    return stats;
  }
  // Forgets the stored prefixes with this salt; answers how many there were.
  int64_t ForgetPrefixes(const std::string& salt) {
    int64_t prefixes = 0;
    Check(vattn_prefix_forget(get(), salt.data(), salt.size(), &prefixes));
    return prefixes;
  }
  // Limits the bytes of the host pool that a tenant may use and reserve; see vattn_tenant_limit.
  void LimitTenant(uint64_t tenant, uint64_t host_bytes) {
    Check(vattn_tenant_limit(get(), tenant, host_bytes));
  }
  // What a tenant holds now.
  vattn_tenant_use TenantUse(uint64_t tenant) const {
    vattn_tenant_use use;
    Check(vattn_tenant_stats(get(), tenant, &use, sizeof(use)));
    return use;
  }
  // The handle, lent.
  vattn_runtime* get() const noexcept { return handle_.get(); }

 private:
  std::unique_ptr<vattn_runtime, Destroyer<vattn_runtime, vattn_runtime_destroy>> handle_;
};

// A sequence: the K and V rows of its tokens in every layer. One thread may use it at a time.
class Sequence {
 public:
  // An empty sequence, as vattn_sequence_create; the arguments are fields of
  // vattn_sequence_options.
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
  // The sequence that Save wrote to a file.
  static Sequence Restore(const Runtime& runtime, const std::string& path) {
    vattn_sequence* made = nullptr;
    Check(vattn_sequence_restore(runtime.get(), path.c_str(), &made));
    return Sequence(made);
  }
  // The same for a tenant and with a reservation.
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
  // A copy that shares blocks until one of the two writes to them.
  Sequence Fork(uint64_t id = 0) const {
    vattn_sequence* made = nullptr;
    Check(vattn_sequence_fork(get(), id, &made));
    return Sequence(made);
  }

  // Adds prompt tokens to one layer.
  void Append(const vattn_append_params& params) { Check(vattn_append(get(), &params)); }
  // Adds prompt tokens to one layer and attends with each of them, exactly.
  void Prefill(const vattn_prefill_params& params) { Check(vattn_prefill(get(), &params)); }
  // Sets blocks aside for this many tokens in every layer.
  void Reserve(int64_t tokens) { Check(vattn_sequence_reserve(get(), tokens)); }
  // Cuts every layer to this many tokens.
  void Truncate(int64_t tokens) { Check(vattn_sequence_truncate(get(), tokens)); }
  // Codes every token that has left the window.
  void BuildIndex() { Check(vattn_sequence_build_index(get())); }
  // Tokens in a layer.
  int64_t Length(int32_t layer) const {
    int64_t tokens = 0;
    Check(vattn_sequence_length(get(), layer, &tokens));
    return tokens;
  }
  // Writes a file that appears whole or not at all.
  void Save(const std::string& path) const { Check(vattn_sequence_save(get(), path.c_str())); }
  // Saves, then frees the host blocks; the next use wakes the sequence.
  void Hibernate(const std::string& path) { Check(vattn_sequence_hibernate(get(), path.c_str())); }
  // Brings a hibernated sequence back from its file.
  void Wake() { Check(vattn_sequence_wake(get())); }
  // Learns tables from the rows and queries for pools of pages, and writes them to a file; model is
  // what vattn_paged_options.model is compared with.
  void SaveTables(const std::string& path, const std::string& model = "") const {
    Check(vattn_tables_save(get(), path.c_str(), model.c_str()));
  }
  // Stores the first tokens of the sequence under their ids.
  void SavePrefix(const vattn_prefix& prefix) const { Check(vattn_prefix_save(get(), &prefix)); }
  // The handle, lent.
  vattn_sequence* get() const noexcept { return handle_.get(); }

 private:
  explicit Sequence(vattn_sequence* handle) : handle_(handle) {}

  std::unique_ptr<vattn_sequence, Destroyer<vattn_sequence, vattn_sequence_destroy>> handle_;
};

// Sequences that take decode steps together. One thread may use it at a time.
class Batch {
 public:
  // A batch with room for this many sequences.
  Batch(const Runtime& runtime, int32_t slots) {
    vattn_batch* made = nullptr;
    Check(vattn_batch_create(runtime.get(), slots, &made));
    handle_.reset(made);
  }

  // Puts a sequence into a slot; it must outlive its stay there.
  void Set(int32_t slot, const Sequence& sequence) {
    Check(vattn_batch_set(get(), slot, sequence.get()));
  }
  // Empties a slot.
  void Clear(int32_t slot) { Check(vattn_batch_clear(get(), slot)); }
  // Opens a step of new_tokens (0 to 16) tokens in every layer of every sequence.
  void BeginStep(int32_t new_tokens, CUstream_st* stream = nullptr) {
    Check(vattn_batch_begin_step(get(), new_tokens, stream));
  }
  // Gives the open step up: the sequences are as they were before it.
  void Abandon() { Check(vattn_batch_abandon(get())); }
  // Writes the new tokens' rows and attends, for one layer of every filled slot.
  void Attend(const vattn_attend_params& params, CUstream_st* stream = nullptr) {
    Check(vattn_attend(get(), &params, stream));
  }
  // Goes on with a layer of which every rank has a slice.
  void AttendMore(const vattn_attend_params& params, CUstream_st* stream = nullptr) {
    Check(vattn_attend_more(get(), &params, stream));
  }
  // Attends exactly the tokens that the selection lists.
  void AttendSelected(const vattn_attend_params& params, const vattn_selection& selection,
                      CUstream_st* stream = nullptr) {
    Check(vattn_attend_selected(get(), &params, &selection, stream));
  }
  // Fills the selection with the tokens that a kernel of the caller's is to attend.
  void Select(const vattn_attend_params& params, vattn_selection& selection,
              CUstream_st* stream = nullptr) {
    Check(vattn_select(get(), &params, &selection, stream));
  }
  // The handle, lent.
  vattn_batch* get() const noexcept { return handle_.get(); }

 private:
  std::unique_ptr<vattn_batch, Destroyer<vattn_batch, vattn_batch_destroy>> handle_;
};

// A pool of KV blocks that the caller owns, and steps over it; see vattn_paged. One thread may use it
// at a time. The pool outlives it.
class Paged {
 public:
  // As vattn_paged_create.
  Paged(const Runtime& runtime, const vattn_paged_options& options) {
    vattn_paged* made = nullptr;
    Check(vattn_paged_create(runtime.get(), &options, &made));
    handle_.reset(made);
  }

  // Writes rows to their slots unless they are there, and codes them.
  void Write(const vattn_paged_rows& rows, CUstream_st* stream = nullptr) {
    Check(vattn_paged_write(get(), &rows, stream));
  }
  // Opens a step: which requests attend, over which blocks.
  void BeginStep(const vattn_paged_step& step, CUstream_st* stream = nullptr) {
    Check(vattn_paged_begin_step(get(), &step, stream));
  }
  // Attends for one layer of every request of the open step.
  void Attend(const vattn_attend_params& params, CUstream_st* stream = nullptr) {
    Check(vattn_paged_attend(get(), &params, stream));
  }
  // Exact attention of a chunk of one request's prompt.
  void Prefill(const vattn_paged_prefill_params& params) {
    Check(vattn_paged_prefill(get(), &params));
  }
  // The handle, lent.
  vattn_paged* get() const noexcept { return handle_.get(); }

 private:
  std::unique_ptr<vattn_paged, Destroyer<vattn_paged, vattn_paged_destroy>> handle_;
};

// What the records of several ranks say together.
inline void Merge(const Runtime& runtime, const vattn_merge_params& params,
                  CUstream_st* stream = nullptr) {
  Check(vattn_merge(runtime.get(), &params, stream));
}

// What vattn sees of the machine, as JSON.
inline std::string DoctorJson() {
  size_t needed = 0;
  Check(vattn_doctor(nullptr, 0, &needed));
  std::string text(needed + 1, '\0');
  Check(vattn_doctor(&text[0], text.size(), &needed));
  text.resize(needed < text.size() ? needed : text.size() - 1);
  return text;
}

// The counters of the runtime and of its tenants as Prometheus text.
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
