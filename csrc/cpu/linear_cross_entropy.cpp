// Linear cross entropy on the CPU: which engine runs, and what none of them can do.
#include "linear_cross_entropy.h"

#ifdef __x86_64__
#include "linear_columns.h"
#include "linear_tiles_amx.h"
#include "linear_tokens.h"

namespace fastloss {
using namespace linear;

namespace {

int engine(const LinearCrossEntropy &args, int isa) {
  const int best = best_isa();
  if (isa == kBestIsa) isa = best == kAvx512Bf16 && has_amx_bf16() ? kAmxBf16 : best;
  return args.dtype == kBFloat16 ? isa : std::min<int>(isa, kAvx512);
}

} // namespace

const char *linear_cross_entropy_why_not(const LinearCrossEntropy &args, int isa) {
  if (best_isa() < kAvx512) return "the processor has no AVX-512";
  if (isa != kBestIsa && isa < kAvx512) return "the kernel exists for AVX-512 only";
  if (isa == kAvx512Bf16 && best_isa() < kAvx512Bf16) return "the processor has no AVX-512 bf16";
  if (isa == kAmxBf16 && !has_amx_bf16()) return "the processor has no AMX bf16, or the system does not lend it";
  if (args.want & ~kSum) return "the kernel has no statistics beyond max, logsum, target and sum";
  if (args.softcap != 0 && args.want & kSum) return "the sum of the logits is not linear in x under a softcap";
  if (!std::isfinite(args.scale) || args.scale == 0) return "scale must be finite and not 0";
  if (args.d < 1 || args.v < 1) return "x and w must have columns and w rows";
  if (args.v > INT32_MAX - kTile) return "more than 2^31 columns";
  if (!args.epilogue && args.n > 0 && (args.dx || args.dw || args.dbias)) return "gradients need an epilogue";
  return nullptr;
}

void linear_cross_entropy_cpu(const LinearCrossEntropy &args, int isa) {
  isa = engine(args, isa);
  if (args.dtype == kFloat32) LinearRun<Fp32Tiles, float>(args).run();
  else if (args.dtype == kFloat16) LinearRun<Fp32Tiles, Float16>(args).run();
  else if (isa == kAvx512) LinearRun<Fp32Tiles, BFloat16>(args).run();
  else if (isa == kAvx512Bf16) LinearRun<Bf16Tiles, BFloat16>(args).run();
  else LinearRun<AmxTiles, BFloat16>(args).run();
}

} // namespace fastloss

#else
namespace fastloss {
const char *linear_cross_entropy_why_not(const LinearCrossEntropy &, int) { return "the processor is not an x86-64"; }
void linear_cross_entropy_cpu(const LinearCrossEntropy &, int) {}
} // namespace fastloss
#endif
