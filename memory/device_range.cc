#include "memory/device_range.h"

#include <algorithm>
#include <chrono>

namespace vattn {

absl::StatusOr<std::unique_ptr<DevicePages>> DevicePages::Create(int device, uint64_t keep_bytes,
                                                                 const PageOps& ops) {
  const absl::StatusOr<uint64_t> bytes = ops.page_bytes(device);
  if (!bytes.ok()) return bytes.status();
  return std::unique_ptr<DevicePages>(new DevicePages(device, keep_bytes, *bytes, ops));
}

DevicePages::DevicePages(int device, uint64_t keep_bytes, uint64_t page_bytes, const PageOps& ops)
    : device_(device), keep_bytes_(keep_bytes), page_bytes_(page_bytes), ops_(ops) {}

DevicePages::~DevicePages() {
  for (const uint64_t page : spare_) ops_.destroy(page);
}

PageCounts DevicePages::counts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return counts_;
}

absl::StatusOr<uint64_t> DevicePages::Map(std::byte* at) {
  const std::lock_guard<std::mutex> lock(mutex_);
  spare_.reserve(spare_.size() + 1);
  if (spare_.empty()) {
    const absl::StatusOr<uint64_t> made = ops_.create(device_, page_bytes_);
    if (!made.ok()) return made.status();
    spare_.push_back(*made);
    counts_.spare_bytes += page_bytes_;
  }
  const uint64_t page = spare_.back();
  const absl::Status status = ops_.map(device_, at, page_bytes_, page);
  if (!status.ok()) return status;
  spare_.pop_back();
  counts_.spare_bytes -= page_bytes_;
  counts_.mapped_bytes += page_bytes_;
  return page;
}

bool DevicePages::Unmap(std::byte* at, uint64_t page) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!ops_.unmap(at, page_bytes_).ok()) return false;
  counts_.mapped_bytes -= page_bytes_;
  if (counts_.spare_bytes + page_bytes_ > keep_bytes_) {
    ops_.destroy(page);
    return true;
  }
  spare_.push_back(page);
  counts_.spare_bytes += page_bytes_;
  return true;
}

void DevicePages::CountReserved(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  counts_.reserved_bytes += static_cast<uint64_t>(bytes);
}

void DevicePages::CountGrowth(uint64_t ns) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++counts_.growths;
  counts_.growth_ns += ns;
}

absl::StatusOr<std::unique_ptr<DeviceRange>> DeviceRange::Reserve(DevicePages& pages, int64_t items,
                                                                  uint64_t item_bytes) {
  const uint64_t page = pages.page_bytes();
  const uint64_t size = (static_cast<uint64_t>(items) * item_bytes + page - 1) / page * page;
  std::byte* data = nullptr;
  if (size > 0) {
    const absl::StatusOr<std::byte*> base = pages.ops_.reserve(size);
    if (!base.ok()) return base.status();
    data = *base;
  }
  return std::unique_ptr<DeviceRange>(new DeviceRange(pages, data, size, items, item_bytes));
}

DeviceRange::DeviceRange(DevicePages& pages, std::byte* data, uint64_t size, int64_t items,
                         uint64_t item_bytes)
    : pages_(pages),
      data_(data),
      size_(size),
      items_(items),
      item_bytes_(item_bytes),
      page_(size / pages.page_bytes()),
      mapped_(page_.size()) {
  pages_.CountReserved(static_cast<int64_t>(size));
}

DeviceRange::~DeviceRange() {
  Reclaim(0, [](int64_t, int64_t) { return true; });
  if (size_ > 0) pages_.ops_.release(data_, size_);
  pages_.CountReserved(-static_cast<int64_t>(size_));
}

absl::Status DeviceRange::MapLocked(int64_t page, Stretches* fresh) {
  const uint64_t bytes = pages_.page_bytes(), at = static_cast<uint64_t>(page) * bytes;
  if (fresh != nullptr) fresh->reserve(fresh->size() + 1);
  const absl::StatusOr<uint64_t> mapped = pages_.Map(data_ + at);
  if (!mapped.ok()) return mapped.status();
  page_[page] = *mapped;
  mapped_[page] = 1;
  if (fresh != nullptr) fresh->emplace_back(at, at + bytes);
  return absl::OkStatus();
}

absl::Status DeviceRange::Commit(const int32_t* items, int64_t count, Stretches* fresh) {
  if (size_ == 0 || count == 0) return absl::OkStatus();
  const uint64_t bytes = pages_.page_bytes();
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t last = 0;
  std::vector<int64_t> missing;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t at = static_cast<uint64_t>(items[i]) * item_bytes_;
    const int64_t end = static_cast<int64_t>((at + item_bytes_ - 1) / bytes);
    for (int64_t page = static_cast<int64_t>(at / bytes); page <= end; ++page) {
      if (!mapped_[page] && (missing.empty() || missing.back() != page)) missing.push_back(page);
    }
    last = std::max(last, end);
  }
  const bool ahead = last + 1 < static_cast<int64_t>(mapped_.size()) && !mapped_[last + 1];
  if (missing.empty() && !ahead) return absl::OkStatus();

  const auto start = std::chrono::steady_clock::now();
  std::sort(missing.begin(), missing.end());
  missing.erase(std::unique(missing.begin(), missing.end()), missing.end());
  const size_t before = fresh == nullptr ? 0 : fresh->size();
  for (size_t i = 0; i < missing.size(); ++i) {
    const absl::Status status = MapLocked(missing[i], fresh);
    if (status.ok()) continue;
    if (fresh != nullptr) fresh->resize(before);
    for (size_t k = 0; k < i; ++k) {
      const int64_t page = missing[k];
      mapped_[page] = !pages_.Unmap(data_ + static_cast<uint64_t>(page) * bytes, page_[page]);
    }
    return status;
  }
  const bool grew = (ahead && MapLocked(last + 1, fresh).ok()) || !missing.empty();
  const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
  if (grew) pages_.CountGrowth(static_cast<uint64_t>(took.count()));
  return absl::OkStatus();
}

void DeviceRange::Reclaim(int64_t keep, const std::function<bool(int64_t, int64_t)>& idle) {
  const uint64_t bytes = pages_.page_bytes();
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t page = 0; page < mapped_.size(); ++page) {
    if (!IsIdleLocked(page, idle) || --keep >= 0) continue;
    mapped_[page] = !pages_.Unmap(data_ + page * bytes, page_[page]);
  }
}

bool DeviceRange::IsIdleLocked(size_t page,
                               const std::function<bool(int64_t, int64_t)>& idle) const {
  if (!mapped_[page]) return false;
  const uint64_t begin = page * pages_.page_bytes(), end = begin + pages_.page_bytes();
  const int64_t last = static_cast<int64_t>((end + item_bytes_ - 1) / item_bytes_);
  return idle(static_cast<int64_t>(begin / item_bytes_), std::min(last, items_));
}

int64_t DeviceRange::idle_pages(const std::function<bool(int64_t, int64_t)>& idle) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t count = 0;
  for (size_t page = 0; page < mapped_.size(); ++page) count += IsIdleLocked(page, idle);
  return count;
}

DeviceRange::Stretches DeviceRange::mapped() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Stretches stretches;
  for (size_t page = 0; page < mapped_.size(); ++page) {
    if (mapped_[page])
      stretches.emplace_back(page * pages_.page_bytes(), (page + 1) * pages_.page_bytes());
  }
  return stretches;
}

int64_t DeviceRange::mapped_pages() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::count(mapped_.begin(), mapped_.end(), 1);
}

}  // namespace vattn
