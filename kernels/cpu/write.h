// Writes new rows into the blocks of a sequence, or to the slots of a pool.
#ifndef VATTN_KERNELS_CPU_WRITE_H_
#define VATTN_KERNELS_CPU_WRITE_H_

#include "kernels/params.h"

namespace vattn::cpu {

class Workers;

void Write(const WriteParams& params, Workers* workers);
// Writes rows, unless they are there, and makes their codes.
void WriteSlots(const WriteSlotsParams& params, Workers* workers);

}  // namespace vattn::cpu

#endif  // VATTN_KERNELS_CPU_WRITE_H_
