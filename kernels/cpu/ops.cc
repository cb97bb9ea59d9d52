#include "kernels/ops.h"

#include "kernels/cpu/attend.h"
#include "kernels/cpu/decode.h"
#include "kernels/cpu/encode.h"
#include "kernels/cpu/write.h"

namespace vattn {

const Ops kCpuOps = {
    .name = "cpu",
    .write = cpu::Write,
    .encode = cpu::Encode,
    .select = cpu::Select,
    .decode = cpu::Decode,
    .attend_selected = cpu::AttendSelected,
};

}  // namespace vattn
