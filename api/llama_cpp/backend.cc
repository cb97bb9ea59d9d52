// A ggml backend: one device of type ACCEL, which llama.cpp adds to every context's scheduler before the
// CPU. It owns no memory and claims one operation, FLASH_ATTN_EXT over a cache in host memory.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "api/llama_cpp/engine.h"
#include "api/llama_cpp/team.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-impl.h"

namespace vattn::llama_cpp {
namespace {

const char* const kName = "VATTN";

// ---- A context's backend ---------------------------------------------------------------------

struct Backend {
  explicit Backend(const Settings& settings) : engine(settings) {}
  Engine engine;
  int threads = GGML_DEFAULT_N_THREADS;
  bool has_team = false;  // ggml's threads are an OpenMP team
  bool used = false;      // its context has computed a graph, with attention or without
  std::string counters;   // text of CountersOf
  // ggml's own, for what is not answered here.
  std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)> cpu{nullptr, ggml_backend_free};
};

Backend& Of(ggml_backend_t backend) { return *static_cast<Backend*>(backend->context); }

const char* Name(ggml_backend_t) { return kName; }

void Report(Backend& b) {
  const std::string& where = b.engine.settings().stats;
  if (where.empty() || !b.used) return;
  if (where == "1") {
    std::fputs(CountersText(b.engine.counters(), b.engine.Stats()).c_str(), stderr);
    return;
  }
  std::FILE* const file = std::fopen(where.c_str(), "a");
  if (file == nullptr) {
    GGML_LOG_ERROR("vattn: GGML_VATTN_STATS: cannot write to %s\n", where.c_str());
    return;
  }
  std::fputs(CountersJson(b.engine.counters(), b.engine.Stats()).c_str(), file);
  std::fclose(file);
}

void Free(ggml_backend_t backend) {
  Report(Of(backend));
  delete &Of(backend);
  delete backend;
}

// Has ggml's CPU backend compute a node.
ggml_status ByGgml(Backend& b, ggml_tensor* node) {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (!b.cpu) b.cpu.reset(device == nullptr ? nullptr : ggml_backend_dev_init(device, nullptr));
  if (!b.cpu) {
    GGML_LOG_ERROR("vattn: there is no CPU backend to leave a node to\n");
    return GGML_STATUS_FAILED;
  }
  const auto set_threads =
      reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads"));
  if (set_threads != nullptr) set_threads(b.cpu.get(), b.threads);
  ggml_cgraph graph = {};
  graph.size = graph.n_nodes = 1;
  graph.nodes = &node;
  return ggml_backend_graph_compute(b.cpu.get(), &graph);
}

// One stream of a node as a node of its own.
ggml_status StreamByGgml(Backend& b, const ggml_tensor& node, int64_t stream) {
  ggml_tensor part = node;
  ggml_tensor sources[4];
  const auto cut = [stream](ggml_tensor& t) {
    t.data = static_cast<char*>(t.data) + stream * static_cast<int64_t>(t.nb[3]);
    t.ne[3] = 1;
  };
  for (int i = 0; i < 4; ++i) {
    sources[i] = *node.src[i];
    cut(sources[i]);
    part.src[i] = &sources[i];
  }
  cut(part);
  return ByGgml(b, &part);
}

// Whether ggml's CPU backend divides its work by OpenMP.
bool UsesOpenMp() {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  const auto features =
      device == nullptr
          ? nullptr
          : reinterpret_cast<ggml_backend_get_features_t>(ggml_backend_reg_get_proc_address(
                ggml_backend_dev_backend_reg(device), "ggml_backend_get_features"));
  if (features == nullptr) return false;
  for (const ggml_backend_feature* f = features(ggml_backend_dev_backend_reg(device));
       f->name != nullptr; ++f) {
    if (std::strcmp(f->name, "OPENMP") == 0) return true;
  }
  return false;
}

bool Answer(Backend& b, const FlashAttention& f) {
  // Sleeping and waking takes longer than spinning for what is short.
  constexpr int64_t kLeastWork = 2048;  // query tokens times cells
  if (!b.has_team || f.num_tokens * f.num_cells < kLeastWork) return b.engine.Answer(f);
  bool answered = false;
  RunAlone(b.threads, [&] { answered = b.engine.Answer(f); });
  return answered;
}

ggml_status Attend(Backend& b, const ggml_tensor& node) {
  b.engine.set_num_threads(b.threads);
  for (int64_t stream = 0; stream < NumStreams(node); ++stream) {
    if (Answer(b, Describe(node, stream))) continue;
    const int64_t start = ggml_time_us();
    const ggml_status status = StreamByGgml(b, node, stream);
    if (status != GGML_STATUS_SUCCESS) return status;
    ++b.engine.counters().ggml_calls;
    b.engine.counters().ggml_ns += static_cast<uint64_t>(ggml_time_us() - start) * 1000;
  }
  return GGML_STATUS_SUCCESS;
}

ggml_status Compute(ggml_backend_t backend, ggml_cgraph* graph) {
  for (int i = 0; i < graph->n_nodes; ++i) {
    ggml_tensor* const node = graph->nodes[i];
    if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || node->op != GGML_OP_FLASH_ATTN_EXT)
      continue;  // views
    const ggml_status status = Attend(Of(backend), *node);
    if (status != GGML_STATUS_SUCCESS) return status;
  }
  return GGML_STATUS_SUCCESS;
}

ggml_guid_t Guid() {
  static ggml_guid guid = {0x76, 0x61, 0x74, 0x74, 0x6e, 0x2d, 0x67, 0x67,
                           0x6d, 0x6c, 0x2d, 0x61, 0x63, 0x63, 0x65, 0x6c};
  return &guid;
}

// What the backend has counted so far, as a line of JSON that is valid until the next call.
const char* CountersOf(ggml_backend_t backend) {
  Backend& b = Of(backend);
  b.counters = CountersJson(b.engine.counters(), b.engine.Stats());
  return b.counters.c_str();
}

// Called by a context before each graph.
void SetThreads(ggml_backend_t backend, int threads) {
  Of(backend).threads = threads;
  Of(backend).used = true;
}

// ---- The device ------------------------------------------------------------------------------

const char* DeviceName(ggml_backend_dev_t) { return kName; }
const char* DeviceDescription(ggml_backend_dev_t) { return "verified sparse attention"; }
void DeviceMemory(ggml_backend_dev_t, size_t* free, size_t* total) { *free = *total = 0; }
enum ggml_backend_dev_type DeviceType(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }

void DeviceProps(ggml_backend_dev_t device, ggml_backend_dev_props* props) {
  props->name = DeviceName(device);
  props->description = DeviceDescription(device);
  props->type = DeviceType(device);
  DeviceMemory(device, &props->memory_free, &props->memory_total);
  props->caps = {};
}

ggml_backend_t MakeBackend(ggml_backend_dev_t device, const char*) {
  const Settings settings = ReadSettings();
  if (!settings.error.empty()) {
    GGML_LOG_ERROR("vattn: %s\n", settings.error.c_str());
    return nullptr;
  }
  ggml_backend_i calls = {};
  calls.get_name = Name;
  calls.free = Free;
  calls.graph_compute = Compute;
  Backend* const backend = new Backend(settings);
  backend->has_team = UsesOpenMp();
  return new ggml_backend{.guid = Guid(), .iface = calls, .device = device, .context = backend};
}

ggml_backend_buffer_type_t BufferType(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }

bool SupportsOp(ggml_backend_dev_t, const ggml_tensor* op) {
  switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
      return true;
    default:
      return IsServed(*op);
  }
}

bool SupportsBuffer(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_is_host(type);
}

// ---- Registration ----------------------------------------------------------------------------

const char* RegName(ggml_backend_reg_t) { return kName; }
size_t DeviceCount(ggml_backend_reg_t) { return ReadSettings().asked ? 1 : 0; }

ggml_backend_dev_t GetDevice(ggml_backend_reg_t reg, size_t) {
  static ggml_backend_device device = [reg] {
    ggml_backend_device_i calls = {};
    calls.get_name = DeviceName;
    calls.get_description = DeviceDescription;
    calls.get_memory = DeviceMemory;
    calls.get_type = DeviceType;
    calls.get_props = DeviceProps;
    calls.init_backend = MakeBackend;
    calls.get_buffer_type = BufferType;
    calls.supports_op = SupportsOp;
    calls.supports_buft = SupportsBuffer;
    return ggml_backend_device{.iface = calls, .reg = reg, .context = nullptr};
  }();
  return &device;
}

void* ProcAddress(ggml_backend_reg_t, const char* name) {
  if (std::strcmp(name, "ggml_backend_set_n_threads") == 0)
    return reinterpret_cast<void*>(SetThreads);
  if (std::strcmp(name, "ggml_backend_vattn_counters") == 0)
    return reinterpret_cast<void*>(CountersOf);
  return nullptr;
}

ggml_backend_reg_t Registry() {
  static ggml_backend_reg registry = {.api_version = GGML_BACKEND_API_VERSION,
                                      .iface = {.get_name = RegName,
                                                .get_device_count = DeviceCount,
                                                .get_device = GetDevice,
                                                .get_proc_address = ProcAddress},
                                      .context = nullptr};
  return &registry;
}

}  // namespace
}  // namespace vattn::llama_cpp

GGML_BACKEND_DL_IMPL(vattn::llama_cpp::Registry)
