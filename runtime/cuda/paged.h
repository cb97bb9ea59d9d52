// The CUDA half of a pool of the caller's own: the pool mapped, codes and the hot set by slot, sinks
// and windows by request row, and steps whose groups the device makes from the caller's arrays.
#ifndef VATTN_RUNTIME_CUDA_PAGED_H_
#define VATTN_RUNTIME_CUDA_PAGED_H_

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/launch.h"
#include "runtime/backend.h"
#include "runtime/cuda/backend.h"

namespace vattn {

class CudaPaged final : public PagedHalf {
 public:
  static absl::StatusOr<std::unique_ptr<CudaPaged>> Create(Runtime& runtime, const PagedPool& pool);
  ~CudaPaged() override;

  absl::Status Write(const PagedRows& rows, DeviceStream stream) override;
  absl::Status BeginStep(const PagedStep& step, DeviceStream stream) override;
  absl::Status Attend(const AttendRequest& request, DeviceStream stream) override;
  absl::Status Prefill(int layer, const PrefillParams& params) override;

 private:
  // Bytes of host memory.
  using Range = std::pair<std::byte*, uint64_t>;
  // Plain host arrays of a call and where they are on the device meanwhile.
  class Staging {
   public:
    explicit Staging(Device& device) : device_(&device) {}
    // `bytes` at *array are to travel, unless the device can follow them; out: also back. Nothing for
    // null.
    template <class T>
    void Add(T*& array, int64_t bytes, bool out);
    // Copies, and points the arrays to their places on the device.
    absl::Status Send(DeviceStream stream);
    // Copies back what was changed, and waits.
    absl::Status Receive(DeviceStream stream);
    bool empty() const { return items_.empty(); }

   private:
    struct Item {
      void** array;
      void* host;
      int64_t bytes, offset;
      bool out;
    };
    Device* device_;
    DeviceMemory pinned_, memory_;
    std::vector<Item> items_;
    int64_t used_ = 0;
  };

  CudaPaged(Runtime& runtime, const PagedPool& pool);
  // Steps of Create.
  absl::Status CheckAlignment() const;
  absl::Status MapPool();
  absl::Status AllocateLayers();
  absl::Status AllocateHotSet();
  absl::Status AllocateSteps();
  absl::Status SendTables(int layer, cuda::PagedLayer& to);

  // Memory that lives as long as this, filled with zeros.
  template <class T>
  absl::Status Keep(int64_t count, T** at);
  // Bytes of working memory of a layer that any step fits in.
  uint64_t ScratchBytes(int layer) const;
  const cuda::AnswerShape& ShapeOf(int layer);

  Runtime& runtime_;
  CudaBackend& backend_;
  const PagedPool& pool_;
  std::vector<Range> mapped_;                  // by us
  std::vector<cuda::DeviceStorage> storages_;  // [layers]
  std::vector<cuda::PagedLayer> layers_;       // [layers], as the device has them
  cuda::PagedLayer* device_layers_ = nullptr;
  std::vector<DeviceMemory> kept_;
  cuda::HotSetRef hot_;
  cuda::PagedStepParams step_;  // what all steps share, then the open one
  std::map<std::pair<int, int>, cuda::AnswerShape> shapes_;  // by heads and groups
  Staging step_arrays_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_CUDA_PAGED_H_
