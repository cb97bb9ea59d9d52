// How fast, and how well, llama.cpp decodes at a depth of context: over a text that is given, token by token, so
// that runs with and without the backend of api/llama_cpp answer the same questions.
//
//   llama_cpp_decode MODEL TEXT STATES DEPTH [--tokens N] [--threads N] [--tokens-a-step N]
//       [--reference FILE] [--stretch BASE] [--batch-threads N] [--turn N]
//
// STATES is a folder where what the model has read is kept, every 4,096 tokens, so that a text is read once.
// --tokens 0 only reads it. --reference: log-probabilities; written if the file is not there, else compared
// with. --turn: so many tokens are read in one call before those that are timed, as in a second turn, because
// a state has no queries that the backend could learn from; default 64. The first step, in which it learns,
// is told apart. --stretch: the context is the first BASE tokens again and again, at their later positions, where
// reading DEPTH tokens would take too long: for speed, not for what the model says. Prints a line of JSON.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

namespace {

constexpr int64_t kSaveEvery = 4096;
constexpr int kChunk = 512;

[[noreturn]] void Fail(const std::string& text) {
  std::fprintf(stderr, "llama_cpp_decode: %s\n", text.c_str());
  std::exit(1);
}

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of the processor, in all threads: what other programs do hardly counts.
double CpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

std::vector<llama_token> Tokens(const llama_model* model, const std::string& path, size_t most) {
  std::ifstream file(path);
  if (!file) Fail(path + " cannot be read");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<llama_token> tokens(text.size() + 16);
  const int count =
      llama_tokenize(llama_model_get_vocab(model), text.data(), static_cast<int32_t>(text.size()),
                     tokens.data(), static_cast<int32_t>(tokens.size()), true, false);
  if (count < 0) Fail("tokens do not fit");
  tokens.resize(std::min(most, static_cast<size_t>(count)));
  return tokens;
}

// Reads tokens [position, position + count); logits of all of them if `wanted`.
void Read(llama_context* context, const std::vector<llama_token>& tokens, int64_t position,
          int count, bool wanted) {
  llama_batch batch = llama_batch_init(count, 0, 1);
  for (int i = 0; i < count; ++i) {
    batch.token[i] = tokens[static_cast<size_t>(position + i)];
    batch.pos[i] = static_cast<llama_pos>(position + i);
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = wanted;
  }
  batch.n_tokens = count;
  if (llama_decode(context, batch) != 0) Fail("llama_decode failed");
  llama_batch_free(batch);
}

std::string StatePath(const std::string& folder, int64_t depth) {
  return folder + "/" + std::to_string(depth) + ".state";
}

// Brings the context to `depth` tokens of the text.
void Fill(llama_context* context, const std::vector<llama_token>& tokens, const std::string& folder,
          int64_t depth) {
  int64_t at = depth;
  while (at > 0 && !(std::filesystem::exists(StatePath(folder, at)))) --at;
  if (at > 0) {
    std::vector<llama_token> kept(static_cast<size_t>(at));
    size_t count = 0;
    if (llama_state_seq_load_file(context, StatePath(folder, at).c_str(), 0, kept.data(),
                                  kept.size(), &count) == 0)
      Fail("a state cannot be read");
    if (!std::equal(kept.begin(), kept.end(), tokens.begin())) Fail("a state is of another text");
  }
  while (at < depth) {
    const double start = Seconds();
    const int64_t end = std::min(depth, (at / kSaveEvery + 1) * kSaveEvery);
    for (int64_t i = at; i < end; i += kChunk)
      Read(context, tokens, i, static_cast<int>(std::min<int64_t>(kChunk, end - i)), false);
    std::fprintf(stderr, "%lld tokens read, the last %lld at %.1f tokens/s\n",
                 static_cast<long long>(end), static_cast<long long>(end - at),
                 static_cast<double>(end - at) / (Seconds() - start));
    at = end;
    const std::string path = StatePath(folder, at), part = path + ".part";
    if (llama_state_seq_save_file(context, part.c_str(), 0, tokens.data(),
                                  static_cast<size_t>(at)) == 0)
      Fail("a state cannot be written");
    std::filesystem::rename(part, path);
  }
}

// Brings the context to copies of its first `base` tokens, one behind the other.
void Stretch(llama_context* context, const std::vector<llama_token>& tokens,
             const std::string& folder, int64_t depth, int64_t base) {
  Fill(context, tokens, folder, base);
  llama_memory_t memory = llama_get_memory(context);
  std::vector<llama_token> kept(static_cast<size_t>(base));
  for (int32_t i = 1; i < depth / base; ++i) {
    size_t count = 0;
    if (llama_state_seq_load_file(context, StatePath(folder, base).c_str(), i, kept.data(),
                                  kept.size(), &count) == 0)
      Fail("a state cannot be read");
    llama_memory_seq_add(memory, i, -1, -1, static_cast<llama_pos>(i * base));
    llama_memory_seq_cp(memory, i, 0, -1, -1);
    llama_memory_seq_rm(memory, i, -1, -1);
  }
}

// Natural logarithms of the probabilities of one token's successors.
void LogProbabilities(const float* logits, std::vector<float>& out) {
  const float most = *std::max_element(logits, logits + out.size());
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) sum += std::exp(static_cast<double>(logits[i] - most));
  const float log_sum = most + static_cast<float>(std::log(sum));
  for (size_t i = 0; i < out.size(); ++i) out[i] = logits[i] - log_sum;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) Fail("usage: MODEL TEXT STATES DEPTH [--NAME VALUE ...]");
  const std::string model_path = argv[1], text_path = argv[2], folder = argv[3];
  const int64_t depth = std::atoll(argv[4]);
  int count = 64, threads = 2, batch_threads = 0, step = 1, turn = 64;
  int64_t base = 0;
  std::string reference_path;
  for (int i = 5; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const char* const value = argv[i + 1];
    if (name == "--tokens") {
      count = std::atoi(value);
    } else if (name == "--threads") {
      threads = std::atoi(value);
    } else if (name == "--batch-threads") {
      batch_threads = std::atoi(value);
    } else if (name == "--tokens-a-step") {
      step = std::atoi(value);
    } else if (name == "--turn") {
      turn = std::atoi(value);
    } else if (name == "--reference") {
      reference_path = value;
    } else if (name == "--stretch") {
      base = std::atoll(value);
    } else {
      Fail("unknown: " + name);
    }
  }
  if (base != 0 && depth % base != 0) Fail("DEPTH must be a multiple of BASE");

  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  ggml_backend_load_all_from_path(VATTN_LLAMA_CPP_BIN);
  llama_model_params m = llama_model_default_params();
  const std::unique_ptr<llama_model, decltype(&llama_model_free)> model(
      llama_model_load_from_file(model_path.c_str(), m), llama_model_free);
  if (!model) Fail(model_path + " cannot be read");
  llama_context_params c = llama_context_default_params();
  c.n_ctx = static_cast<uint32_t>(depth + std::max(count + turn, 256));
  c.n_batch = c.n_ubatch = kChunk;
  c.n_threads = threads;
  c.n_threads_batch = batch_threads == 0 ? threads : batch_threads;
  c.n_seq_max = base == 0 ? 1 : static_cast<uint32_t>(depth / base);
  c.kv_unified = true;
  c.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  std::unique_ptr<llama_context, decltype(&llama_free)> context(
      llama_init_from_model(model.get(), c), llama_free);
  if (!context) Fail("no context");
  const std::vector<llama_token> tokens =
      Tokens(model.get(), text_path, static_cast<size_t>(depth + turn + count + 1));
  if (static_cast<int64_t>(tokens.size()) < depth + turn + count + 1)
    Fail("the text has only " + std::to_string(tokens.size()) + " tokens");
  if (base == 0) {
    Fill(context.get(), tokens, folder, depth);
  } else {
    Stretch(context.get(), tokens, folder, depth, base);
  }
  if (count == 0) return 0;

  const size_t words =
      static_cast<size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model.get())));
  const bool compares = !reference_path.empty() && std::filesystem::exists(reference_path);
  std::fstream reference;
  if (!reference_path.empty())
    reference.open(reference_path, std::ios::binary | (compares ? std::ios::in : std::ios::out));
  const int64_t begin = depth + turn;
  if (turn > 0) Read(context.get(), tokens, depth, turn, false);
  std::vector<float> log_p(words), other(words);
  std::vector<double> seconds, cpu_seconds;
  double loss = 0, divergence = 0;
  int same = 0;
  for (int i = 0; i < count; i += step) {
    const int n = std::min(step, count - i);
    const double start = Seconds(), cpu_start = CpuSeconds();
    Read(context.get(), tokens, begin + i, n, true);
    seconds.push_back(Seconds() - start);
    cpu_seconds.push_back(CpuSeconds() - cpu_start);
    for (int t = 0; t < n; ++t) {
      LogProbabilities(llama_get_logits_ith(context.get(), t), log_p);
      loss -= static_cast<double>(log_p[static_cast<size_t>(tokens[begin + i + t + 1])]);
      if (compares) {
        reference.read(reinterpret_cast<char*>(other.data()),
                       static_cast<std::streamsize>(words * sizeof(float)));
        for (size_t w = 0; w < words; ++w)
          divergence +=
              std::exp(static_cast<double>(other[w])) * static_cast<double>(other[w] - log_p[w]);
        same += std::max_element(other.begin(), other.end()) - other.begin() ==
                std::max_element(log_p.begin(), log_p.end()) - log_p.begin();
      } else if (reference.is_open()) {
        reference.write(reinterpret_cast<const char*>(log_p.data()),
                        static_cast<std::streamsize>(words * sizeof(float)));
      }
    }
  }
  const double first = cpu_seconds[0];
  if (seconds.size() > 1) {
    seconds.erase(seconds.begin());
    cpu_seconds.erase(cpu_seconds.begin());
  }
  std::sort(seconds.begin(), seconds.end());
  std::sort(cpu_seconds.begin(), cpu_seconds.end());
  std::printf(
      "{\"depth\": %lld, \"tokens\": %d, \"threads\": %d, \"tokens_a_step\": %d, "
      "\"stretched_from\": %lld, \"cpu_seconds_first\": %.6f, \"cpu_seconds\": %.6f, "
      "\"seconds_least\": %.6f, \"seconds_median\": %.6f, \"loss\": %.6f",
      static_cast<long long>(depth), count, threads, step, static_cast<long long>(base), first,
      cpu_seconds[cpu_seconds.size() / 2], seconds[0], seconds[seconds.size() / 2], loss / count);
  if (compares)
    std::printf(", \"divergence\": %.8f, \"same_first\": %.4f", divergence / count,
                static_cast<double>(same) / count);
  std::printf("}\n");
  return 0;
}
