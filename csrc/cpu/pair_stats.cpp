// pair_stats on the CPU: docs/design.md, "The pair contract". Tiles of <q, k> never leave the cache (pair_sweep.inc).
#include "pair_stats.h"

#include <cmath>
#include <limits>
#include <omp.h>
#include <type_traits>

#include "linear_cross_entropy.h"
#include "pair_problem.h"
#include "pair_tiles.h"
#include "simd.h"

namespace fastloss {

#define FASTLOSS_LOOPS "pair_stats.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

int pair_isa(int isa) {
#ifdef __x86_64__
  const int best = best_isa();
  const bool has_amx = best == kAvx512Bf16 && linear::has_amx_bf16(); // which also asks for the tiles
  if (isa == kBestIsa) return has_amx ? kAmxBf16 : best;
  return std::min(isa, has_amx ? kAmxBf16 : best);
#else
  (void)isa;
  return kScalar;
#endif
}

int64_t pair_kept_floats(int64_t m, int64_t n) { return pairs::kept_floats(m, n); }

void pair_stats_cpu(const PairStats &args, int isa) {
  isa = pair_isa(isa);
#ifdef __x86_64__
  if (isa >= kAvx512Bf16 && args.pairing.dtype == kBFloat16) {
    if (isa == kAmxBf16) avx512bf16::pair_stats_on<pairs::PackedTiles<linear::AmxTiles>>(args);
    else avx512bf16::pair_stats_on<pairs::PackedTiles<linear::Bf16Tiles>>(args);
    return;
  }
  if (isa >= kAvx512) return avx512::pair_stats_on<pairs::PackedTiles<linear::Fp32Tiles>>(args);
  if (isa == kAvx2) return avx2::pair_stats_on<avx2::WordTiles>(args);
#endif
  scalar::pair_stats_on<scalar::WordTiles>(args);
}

} // namespace fastloss
