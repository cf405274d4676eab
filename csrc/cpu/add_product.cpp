// total += a^T b on the tiles of linear_tiles.h. A thread takes strips of 32 columns of a past all of b, which is
// packed once; the strip is transposed into the first-level cache, and each product of 32 x 32 is added to the total
// while its next one is in the tile unit.
#include "add_product.h"

#ifdef __x86_64__
#include <algorithm>
#include <omp.h>
#include <vector>

#include "kept_memory.h"
#include "linear_cross_entropy.h"
#include "linear_packing.h"
#include "linear_tiles_amx.h"

namespace fastloss {
namespace linear {
namespace {

constexpr int64_t kPanelUnits = kBlock; // 32 rows of bf16 are one step

// Fetches the rows of the total that a product will be added to.
struct FetchTotal {
  const float *total;
  int64_t stride, next = 0;
  FASTLOSS_AVX512_INLINE bool pending() const { return next < kTile; }
  FASTLOSS_AVX512_INLINE void two_rows() {
    for (int64_t end = next + 2; next < end; ++next) {
      const char *row = reinterpret_cast<const char *>(total + next * stride);
      _mm_prefetch(row, _MM_HINT_T0);
      _mm_prefetch(row + 64, _MM_HINT_T0);
    }
  }
};

template <class Tiles> class ProductRun {
  const AddProduct &args;
  const BFloat16 *const a, *const b;
  const int64_t panels, panels_d, strips;
  std::vector<uint32_t> right; // b: [panels_d][panels][kPanelUnits]

public:
  explicit ProductRun(const AddProduct &args)
      : args(args), a(static_cast<const BFloat16 *>(args.a)), b(static_cast<const BFloat16 *>(args.b)),
        panels((args.n + kTile - 1) / kTile), panels_d((args.d + kTile - 1) / kTile),
        strips((args.v + kTile - 1) / kTile), right(size_t(panels * panels_d * kPanelUnits)) {}

  FASTLOSS_AVX512 void run() {
    const int threads = int(std::min<int64_t>(omp_get_max_threads(), strips));
#pragma omp parallel num_threads(threads)
    {
      const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      pack(panels * me / team, panels * (me + 1) / team);
#pragma omp barrier
      Tiles::begin();
      std::vector<uint32_t> left(size_t(panels * kPanelUnits + 16));
      uint32_t *aligned = left.data() + (-(reinterpret_cast<uintptr_t>(left.data()) / 4) & 15);
      for (int64_t s = strips * me / team; s < strips * (me + 1) / team; ++s) strip(s, aligned);
      Tiles::end();
    }
  }

private:
  FASTLOSS_AVX512 void pack(int64_t begin, int64_t end) {
    const std::vector<float> ones(kTile, 1.f);
    for (int64_t p = begin; p < end; ++p) {
      int64_t rows[kTile];
      for (int64_t r = 0; r < kTile; ++r) rows[r] = p * kTile + r < args.n ? p * kTile + r : -1;
      pack_scaled<Tiles>(b, args.ldb, rows, ones.data(), args.d, panels * kPanelUnits, right.data() + p * kPanelUnits);
    }
  }

  FASTLOSS_AVX512 void strip(int64_t s, uint32_t *left) {
    alignas(64) uint32_t block[kBlock];
    alignas(64) float product[kProduct];
    const int64_t column = s * kTile, columns = std::min(kTile, args.v - column);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = p * kTile;
      pack_left<Tiles>(a + row * args.lda + column, args.lda, std::min(kTile, args.n - row), columns, 1, block);
      Tiles::transpose(block, left + p * kPanelUnits);
    }
    for (int64_t j = 0; j < panels_d; ++j) {
      float *total = args.total + column * args.d + j * kTile;
      FetchTotal fetch{total, args.d, args.first || columns < kTile ? kTile : 0};
      Tiles::multiply(left, right.data() + j * panels * kPanelUnits, panels, product, false, fetch);
      add(product, total, columns, std::min(kTile, args.d - j * kTile), j * kTile + column * args.d);
    }
  }

  FASTLOSS_AVX512 void add(const float *product, float *total, int64_t rows, int64_t count, int64_t offset) {
    BFloat16 *rounded = args.rounded ? static_cast<BFloat16 *>(args.rounded) + offset : nullptr;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < count; k += 16) {
        __m512 sum = _mm512_loadu_ps(product + r * kTile + k);
        float *to = total + r * args.d + k;
        if (!args.first) sum = _mm512_add_ps(sum, load_some(to, count - k));
        if (!rounded) store_some(to, sum, count - k);
        else if (count - k >= 16) avx512bf16::store(rounded + r * args.d + k, sum);
        else avx512bf16::store_part(rounded + r * args.d + k, sum, count - k);
      }
  }
};

} // namespace
} // namespace linear

const char *add_product_why_not(int isa) {
  if (best_isa() < kAvx512Bf16) return "the processor has no AVX-512 bf16";
  if (isa != kBestIsa && isa < kAvx512Bf16) return "the kernel exists for AVX-512 bf16 and AMX only";
  if (isa == kAmxBf16 && !linear::has_amx_bf16())
    return "the processor has no AMX bf16, or the system does not lend it";
  return nullptr;
}

void add_product_cpu(const AddProduct &args, int isa) {
  if (args.n == 0 || args.v == 0 || args.d == 0) return;
  const bool has_amx = linear::has_amx_bf16(); // which also asks for the tiles
  if (has_amx && (isa == kAmxBf16 || isa == kBestIsa)) linear::ProductRun<linear::AmxTiles>(args).run();
  else linear::ProductRun<linear::Bf16Tiles>(args).run();
}

} // namespace fastloss

#else
namespace fastloss {
const char *add_product_why_not(int) { return "the processor is not an x86-64"; }
void add_product_cpu(const AddProduct &, int) {}
} // namespace fastloss
#endif
