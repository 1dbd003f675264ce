// In the place of torch's header: the CPU is no accelerator, and there is no device to switch to.
#pragma once

#include <cstdint>

namespace torch::stable::accelerator {

class DeviceGuard {
  public:
    explicit DeviceGuard(std::int32_t) {}
};

}  // namespace torch::stable::accelerator
