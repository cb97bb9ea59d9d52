// The blocks of a sequence: what it takes from the pool, shares, has reserved, and gives back.
//
// A reservation promises room for a number of tokens in every layer. The pool sets one block aside
// for each block that the sequence still lacks below that length, and one for each block that it
// has but shares, since the next write copies it: Unmet counts both. What the sequence takes below
// that length it draws from its reservation, and what it gives back there returns to it.
#ifndef VATTN_RUNTIME_BLOCK_TABLES_H_
#define VATTN_RUNTIME_BLOCK_TABLES_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "memory/host_store.h"
#include "runtime/layer.h"

namespace vattn {

class Runtime;
class Sequence;

// A block that a write needs: a new one, or a copy of a shared one.
struct BlockNeed {
  int layer, kv_head;
  int64_t block;
  bool copy;
};

// Used as the sequence: by one thread at a time. Works on the block tables in `layers`, which
// belong to the sequence as everything else that these hold.
class BlockTables {
 public:
  BlockTables(Runtime& runtime, const Sequence& owner, TenantSlot tenant,
              std::vector<Layer>& layers);

  // Sets aside what `tokens` tokens in every layer need beside the blocks that are there, in place
  // of what was set aside before. FULL changes nothing.
  absl::Status Reserve(int64_t tokens);
  int64_t reserve_tokens() const { return reserve_tokens_; }
  // The length that TakeForFile reserves for.
  void set_reserve_tokens(int64_t tokens) { reserve_tokens_ = tokens; }
  // With a reservation: ready for the copies that sharing the first `tokens` tokens may ask for.
  // FULL.
  absl::Status ReserveForSharing(int64_t tokens);
  // With a reservation: it still holds once `tokens` tokens are left, though blocks that others
  // hold too do not return to it. FULL.
  absl::Status ReserveForCut(int64_t tokens);
  // Gives back what the reservation holds beyond what is unmet.
  void GiveBackExcess();

  // Lists what writing tokens [begin, end) of a layer needs.
  void ListNeeds(int layer, int64_t begin, int64_t end, std::vector<BlockNeed>& needs) const;
  // Takes them all from the pool and the device, or none (FULL, OUT_OF_MEMORY). Where there are
  // copies among them no step may still read the blocks that are let go.
  absl::Status Take(const std::vector<BlockNeed>& needs);
  // Before rows are written behind the last one of a layer, whose block is the sequence's own by
  // now: rows to come are not those that a hot set may know.
  void ClaimLastBlock(Layer& layer);

  // `count` blocks for the tables of a file, and `beyond` more for the reservation; then each to
  // its table, which has room for it.
  absl::Status TakeForFile(int64_t count, int64_t beyond, BlockId* out);
  void AppendFromFile(BlockTable& table, BlockId id);

  // Gives back blocks that no token lies in.
  void ReleaseSpare();
  // Gives back all blocks and the reservation's; the length that it was for is kept.
  void ReleaseAll();
  bool HoldsBlocks() const;

  // Blocks whose codes were written by the host and that the device has not loaded; some may be let
  // go since. Empty where codes have no second copy.
  std::vector<int32_t>& codes_to_load() { return codes_to_load_; }
  const std::vector<int32_t>& codes_to_load() const { return codes_to_load_; }

 private:
  // Blocks that a reservation of that length still has to hold ready, once `keep_tokens` tokens
  // are left and blocks of the first `shared_tokens` are shared.
  int64_t Unmet(int64_t reserve_tokens, int64_t keep_tokens, int64_t shared_tokens) const;
  absl::Status ReserveUpTo(int64_t blocks);
  // `count` free blocks, with memory on the device if there is one; the first `own` of the
  // reservation. All or none.
  absl::Status TakeBlocks(int64_t own, int64_t count, BlockId* out);
  // True if the block goes back to the reservation when the sequence lets go of it.
  bool ReturnsToReservation(const BlockTable& table, int64_t block) const;

  Runtime& runtime_;
  HostStore& store_;
  const Sequence& owner_;  // whom the pool is asked for; only handed on
  const TenantSlot tenant_;
  std::vector<Layer>& layers_;
  int64_t reserve_tokens_ = 0;  // what the reservation is for
  int64_t reserved_ = 0;        // blocks promised by the pool: Unmet or more
  std::vector<int32_t> codes_to_load_;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_BLOCK_TABLES_H_
