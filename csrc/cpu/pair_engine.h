// What every kernel on the sweep of pair_sweep.inc includes, and how it finds its engine.
#pragma once
#include "linear_cross_entropy.h"
#include "pair_problem.h"
#include "pair_stats.h"
#include "pair_tiles.h"
#include "simd.h"

#include <cmath>
#include <limits>
#include <omp.h>
#include <type_traits>

// kernel<Tiles>(...) in the namespace of the instruction set, with the products that suit the operands' dtype.
#ifdef __x86_64__
#define FASTLOSS_ON_ENGINE(dtype, isa, kernel, ...)                                                                    \
  do {                                                                                                                 \
    const int level_ = pair_isa(isa);                                                                                  \
    if (level_ >= kAvx512Bf16 && (dtype) == kBFloat16) {                                                               \
      if (level_ == kAmxBf16) avx512bf16::kernel<pairs::PackedTiles<linear::AmxTiles>>(__VA_ARGS__);                   \
      else avx512bf16::kernel<pairs::PackedTiles<linear::Bf16Tiles>>(__VA_ARGS__);                                     \
    } else if (level_ >= kAvx512) {                                                                                    \
      avx512::kernel<pairs::PackedTiles<linear::Fp32Tiles>>(__VA_ARGS__);                                              \
    } else if (level_ == kAvx2) {                                                                                      \
      avx2::kernel<avx2::WordTiles>(__VA_ARGS__);                                                                      \
    } else {                                                                                                           \
      scalar::kernel<scalar::WordTiles>(__VA_ARGS__);                                                                  \
    }                                                                                                                  \
  } while (false)
#else
#define FASTLOSS_ON_ENGINE(dtype, isa, kernel, ...) scalar::kernel<scalar::WordTiles>(__VA_ARGS__)
#endif
