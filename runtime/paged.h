// Attention over a pool of rows that the caller owns, as vattn_paged: arguments are checked here, and
// the work is the backend's.
#ifndef VATTN_RUNTIME_PAGED_H_
#define VATTN_RUNTIME_PAGED_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "runtime/backend.h"
#include "runtime/files/tables_file.h"
#include "runtime/paged_pool.h"
#include "runtime/runtime.h"

namespace vattn {

// Used by one thread at a time.
class Paged {
 public:
  // Errors as vattn_paged_create.
  static absl::StatusOr<std::unique_ptr<Paged>> Create(std::shared_ptr<Runtime> runtime,
                                                       const PagedOptions& options);

  absl::Status Write(const PagedRows& rows, DeviceStream stream);
  absl::Status BeginStep(const PagedStep& step, DeviceStream stream);
  absl::Status Attend(const AttendRequest& request, DeviceStream stream);
  absl::Status Prefill(const PagedPrefill& request);

  ~Paged();
  Paged(const Paged&) = delete;
  Paged& operator=(const Paged&) = delete;

  const Runtime& runtime() const { return *runtime_; }

 private:
  Paged(std::shared_ptr<Runtime> runtime, PagedPool pool);

  const std::shared_ptr<Runtime> runtime_;
  const PagedPool pool_;
  std::unique_ptr<PagedHalf> half_;
  PagedStep step_;  // the open one
  bool open_ = false;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_PAGED_H_
