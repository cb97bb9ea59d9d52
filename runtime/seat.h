// Where a sequence sits while a batch steps it, as the sequence sees it.
#ifndef VATTN_RUNTIME_SEAT_H_
#define VATTN_RUNTIME_SEAT_H_

#include "absl/status/status.h"

namespace vattn {

class Sequence;

class Seat {
 public:
  // True while calls of a step may come.
  virtual bool open() const = 0;
  // Refused while layers of a step with a new token wait for attention: whoever reads or changes a
  // sequence would find a token that some layers have and others do not.
  virtual absl::Status CheckWhole() const = 0;
  // The sequence is about to change: ends the step. Refused as CheckWhole.
  virtual absl::Status EndStep() = 0;
  // Takes a sequence out that is about to die.
  virtual void Forget(Sequence* sequence) = 0;

 protected:
  ~Seat() = default;
};

}  // namespace vattn

#endif  // VATTN_RUNTIME_SEAT_H_
