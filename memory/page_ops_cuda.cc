// The driver's calls are asked of the runtime by name: the library does not link against libcuda
// and loads on machines without it.
#include <cuda.h>
#include <cuda_runtime.h>

#include "memory/page_ops.h"
#include "memory/status.h"

namespace vattn {
namespace {

struct Driver {
  decltype(&cuDeviceGet) device_get = nullptr;
  decltype(&cuDeviceGetAttribute) device_get_attribute = nullptr;
  decltype(&cuGetErrorName) error_name = nullptr;
  decltype(&cuMemGetAllocationGranularity) granularity = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) release = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) destroy = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  bool complete = true;

  template <class F>
  void Find(const char* name, F& function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, 11000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    complete = complete && error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    function = reinterpret_cast<F>(found);
  }

  Driver() {
    Find("cuDeviceGet", device_get);
    Find("cuDeviceGetAttribute", device_get_attribute);
    Find("cuGetErrorName", error_name);
    Find("cuMemGetAllocationGranularity", granularity);
    Find("cuMemAddressReserve", reserve);
    Find("cuMemAddressFree", release);
    Find("cuMemCreate", create);
    Find("cuMemRelease", destroy);
    Find("cuMemMap", map);
    Find("cuMemSetAccess", set_access);
    Find("cuMemUnmap", unmap);
  }
};

// First used by PageBytes, which refuses a driver that lacks a call.
const Driver& TheDriver() {
  static const Driver driver;
  return driver;
}

absl::Status Checked(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return absl::OkStatus();
  const char* name = nullptr;
  TheDriver().error_name(result, &name);
  return DeviceError("the CUDA driver failed in ", what, ": ",
                     name == nullptr ? "unknown error" : name);
}

CUmemAllocationProp PageOf(int device) {
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  return prop;
}

absl::StatusOr<uint64_t> PageBytes(int device) {
  const Driver& d = TheDriver();
  CUdevice handle = 0;
  int can = 0;
  if (!d.complete || d.device_get(&handle, device) != CUDA_SUCCESS ||
      d.device_get_attribute(&can, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                             handle) != CUDA_SUCCESS ||
      can == 0) {
    return NotSupportedError("device ", device,
                             " or its driver cannot map memory by pages (cuMemMap)");
  }
  const CUmemAllocationProp prop = PageOf(device);
  size_t bytes = 0;
  VATTN_RETURN_IF_ERROR(Checked(d.granularity(&bytes, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                                "asking for the size of a page"));
  return bytes;
}

absl::StatusOr<std::byte*> Reserve(uint64_t bytes) {
  CUdeviceptr base = 0;
  const CUresult result = TheDriver().reserve(&base, bytes, 0, 0, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    return OutOfMemoryError("the CUDA driver has no ", bytes, " bytes of addresses left");
  }
  VATTN_RETURN_IF_ERROR(Checked(result, "reserving addresses"));
  return reinterpret_cast<std::byte*>(base);
}

// A lost device or a driver that is shutting down lets go of everything with the process.
void Release(std::byte* base, uint64_t bytes) {
  TheDriver().release(reinterpret_cast<CUdeviceptr>(base), bytes);
}

absl::StatusOr<uint64_t> Create(int device, uint64_t bytes) {
  const CUmemAllocationProp prop = PageOf(device);
  CUmemGenericAllocationHandle page = 0;
  const CUresult result = TheDriver().create(&page, bytes, &prop, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return OutOfMemoryError("device ", device, " has no ", bytes, " bytes left: ", free, " of ",
                            total, " are free");
  }
  VATTN_RETURN_IF_ERROR(Checked(result, "making a page"));
  return page;
}

void Destroy(uint64_t page) { TheDriver().destroy(page); }

absl::Status Map(int device, std::byte* at, uint64_t bytes, uint64_t page) {
  const Driver& d = TheDriver();
  const CUdeviceptr address = reinterpret_cast<CUdeviceptr>(at);
  VATTN_RETURN_IF_ERROR(Checked(d.map(address, bytes, 0, page, 0), "mapping a page"));
  CUmemAccessDesc access = {};
  access.location = PageOf(device).location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const absl::Status status =
      Checked(d.set_access(address, bytes, &access, 1), "opening a page to its device");
  if (!status.ok()) d.unmap(address, bytes);
  return status;
}

absl::Status Unmap(std::byte* at, uint64_t bytes) {
  return Checked(TheDriver().unmap(reinterpret_cast<CUdeviceptr>(at), bytes), "unmapping a page");
}

}  // namespace

constinit const PageOps kDevicePageOps = {.page_bytes = PageBytes,
                                          .reserve = Reserve,
                                          .release = Release,
                                          .create = Create,
                                          .destroy = Destroy,
                                          .map = Map,
                                          .unmap = Unmap};

}  // namespace vattn
