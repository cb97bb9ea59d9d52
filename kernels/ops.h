// The operations of a backend as a table; one table a backend, picked at runtime create.
#ifndef VATTN_KERNELS_OPS_H_
#define VATTN_KERNELS_OPS_H_

#include "kernels/params.h"

namespace vattn {

struct Ops {
  const char* name;
  void (*write)(const WriteParams&, Stream);
  void (*encode)(const EncodeParams&, Stream);
  void (*select)(const SelectParams&, Stream);
  void (*decode)(const DecodeParams&, Stream);
  void (*attend_selected)(const AttendSelectedParams&, Stream);
};

extern const Ops kCpuOps;

}  // namespace vattn

#endif  // VATTN_KERNELS_OPS_H_
