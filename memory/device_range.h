// Device memory that grows where it lies: addresses are reserved once for all that there may ever
// be, physical pages are mapped below them as they are wanted. Nothing is copied and no address
// changes, so that captured graphs stay valid.
#ifndef VATTN_MEMORY_DEVICE_RANGE_H_
#define VATTN_MEMORY_DEVICE_RANGE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "memory/page_ops.h"

namespace vattn {

struct PageCounts {
  uint64_t reserved_bytes = 0;  // of addresses, over all ranges
  uint64_t mapped_bytes = 0;
  uint64_t spare_bytes = 0;  // of pages that are mapped nowhere
  uint64_t growths = 0;      // commits that mapped a page
  uint64_t growth_ns = 0;    // time that they took
};

// The physical pages of one device's ranges. Pages that a range gives back serve the next that
// wants one; of more than `keep_bytes` the rest goes back to the driver. Thread-safe. Outlives its
// ranges.
class DevicePages {
 public:
  // NOT_SUPPORTED where pages cannot be mapped one by one.
  static absl::StatusOr<std::unique_ptr<DevicePages>> Create(int device, uint64_t keep_bytes,
                                                             const PageOps& ops = kDevicePageOps);
  ~DevicePages();
  DevicePages(const DevicePages&) = delete;
  DevicePages& operator=(const DevicePages&) = delete;

  uint64_t page_bytes() const { return page_bytes_; }
  PageCounts counts() const;

 private:
  friend class DeviceRange;
  DevicePages(int device, uint64_t keep_bytes, uint64_t page_bytes, const PageOps& ops);

  // Maps a page at `at`; its number.
  absl::StatusOr<uint64_t> Map(std::byte* at);
  // False if the driver refuses: the page then stays where it is.
  bool Unmap(std::byte* at, uint64_t page);
  void CountReserved(int64_t bytes);
  void CountGrowth(uint64_t ns);

  const int device_;
  const uint64_t keep_bytes_, page_bytes_;
  const PageOps& ops_;
  mutable std::mutex mutex_;  // guards what follows
  std::vector<uint64_t> spare_;
  PageCounts counts_;
};

// An array of equal items. Thread-safe.
class DeviceRange {
 public:
  // Stretches [first, second) of bytes from data().
  using Stretches = std::vector<std::pair<uint64_t, uint64_t>>;

  static absl::StatusOr<std::unique_ptr<DeviceRange>> Reserve(DevicePages& pages, int64_t items,
                                                              uint64_t item_bytes);
  // The device must have passed whatever uses the range.
  ~DeviceRange();
  DeviceRange(const DeviceRange&) = delete;
  DeviceRange& operator=(const DeviceRange&) = delete;

  // Never changes. Null for a range of no bytes.
  std::byte* data() const { return data_; }
  uint64_t size() const { return size_; }

  // Memory below each of the listed items: below all of them or, with an error (OUT_OF_MEMORY), no
  // more than before. And below the page after the last of them where there is any to be had, so
  // that who comes to it finds it there. Adds what memory is new, which holds anything, to `fresh`
  // if given.
  absl::Status Commit(const int32_t* items, int64_t count, Stretches* fresh);

  // Unmaps pages that have idle items alone, all but the lowest `keep` of them. idle(first, end)
  // says whether nobody uses items [first, end), and that the device has passed all who did; who
  // begins to use an item commits it afterwards.
  void Reclaim(int64_t keep, const std::function<bool(int64_t, int64_t)>& idle);

  int64_t mapped_pages() const;
  // How many of the mapped pages hold idle items alone; idle as in Reclaim.
  int64_t idle_pages(const std::function<bool(int64_t, int64_t)>& idle) const;
  // All that has memory.
  Stretches mapped() const;

 private:
  DeviceRange(DevicePages& pages, std::byte* data, uint64_t size, int64_t items,
              uint64_t item_bytes);

  // Callers hold mutex_.
  bool IsIdleLocked(size_t page, const std::function<bool(int64_t, int64_t)>& idle) const;
  absl::Status MapLocked(int64_t page, Stretches* fresh);

  DevicePages& pages_;
  std::byte* const data_;
  const uint64_t size_;
  const int64_t items_;
  const uint64_t item_bytes_;
  mutable std::mutex mutex_;    // guards what follows
  std::vector<uint64_t> page_;  // [pages] what is mapped there
  std::vector<char> mapped_;    // [pages]
};

}  // namespace vattn

#endif  // VATTN_MEMORY_DEVICE_RANGE_H_
