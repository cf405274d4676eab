// Pointwise losses on the CPU: docs/design.md, "Pointwise losses".
#pragma once
#include "cpu.h"

namespace fastloss {

void pointwise_loss_cpu(const PointwiseLoss &args, int isa);

} // namespace fastloss
