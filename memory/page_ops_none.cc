// A build without CUDA: no device has pages.
#include "memory/page_ops.h"
#include "memory/status.h"

namespace vattn {
namespace {

absl::Status NoCuda() { return NotSupportedError("this build has no CUDA backend"); }

}  // namespace

constinit const PageOps kDevicePageOps = {
    .page_bytes = [](int) -> absl::StatusOr<uint64_t> { return NoCuda(); },
    .reserve = [](uint64_t) -> absl::StatusOr<std::byte*> { return NoCuda(); },
    .release = [](std::byte*, uint64_t) {},
    .create = [](int, uint64_t) -> absl::StatusOr<uint64_t> { return NoCuda(); },
    .destroy = [](uint64_t) {},
    .map = [](int, std::byte*, uint64_t, uint64_t) { return NoCuda(); },
    .unmap = [](std::byte*, uint64_t) { return NoCuda(); },
};

}  // namespace vattn
