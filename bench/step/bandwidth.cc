#include "bench/step/bandwidth.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "bench/cli/parallel.h"

namespace vattn::bench {
namespace {

typedef uint64_t Wide __attribute__((vector_size(16)));

// Four streams in flight keep the loads from waiting for each other's additions.
uint64_t Sum(const uint64_t* words, size_t bytes) {
  const auto* wide = reinterpret_cast<const Wide*>(words);
  Wide a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i < bytes / sizeof(Wide); i += 4) {
    a += wide[i];
    b += wide[i + 1];
    c += wide[i + 2];
    d += wide[i + 3];
  }
  a += b + c + d;
  return a[0] + a[1];
}

}  // namespace

void ReadBuffer::Free::operator()(void* memory) const { std::free(memory); }

// Huge pages where the system grants them on request: without, address translation takes a third of
// the bandwidth, and what is left would flatter whatever is compared with it.
ReadBuffer::ReadBuffer(size_t bytes, int num_threads)
    : chunks_((bytes + kChunk - 1) / kChunk),
      num_threads_(num_threads),
      memory_(static_cast<uint64_t*>(std::aligned_alloc(kChunk, chunks_ * kChunk))) {
  if (!memory_) throw std::bad_alloc();
  madvise(memory_.get(), chunks_ * kChunk, MADV_HUGEPAGE);
  ParallelFor(num_threads, static_cast<int64_t>(chunks_), [&](int64_t i) {
    std::memset(memory_.get() + i * (kChunk / sizeof(uint64_t)), 1, kChunk);
  });
}

void ReadBuffer::ReadAll() const {
  std::atomic<uint64_t> total = 0;  // keeps the reads from being optimised away
  ParallelFor(num_threads_, static_cast<int64_t>(chunks_), [&](int64_t i) {
    total += Sum(memory_.get() + i * (kChunk / sizeof(uint64_t)), kChunk);
  });
}

double ReadBuffer::Bandwidth(int repeats) const {
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    ReadAll();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(chunks_ * kChunk) / seconds.count() / 1e9);
  }
  return best;
}

}  // namespace vattn::bench
