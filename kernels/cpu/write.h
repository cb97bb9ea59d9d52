// Writes new rows into their blocks.
#ifndef VATTN_KERNELS_CPU_WRITE_H_
#define VATTN_KERNELS_CPU_WRITE_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

void Write(const WriteParams& params, Workers* workers);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_WRITE_H_
