// Builds without CUDA.
#include "tests/api/engine_device.h"

namespace vattn::test {

std::unique_ptr<EngineDevice> MakeEngineDevice() { return MakeHostDevice(); }

}  // namespace vattn::test
