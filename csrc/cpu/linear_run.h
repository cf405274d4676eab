// Linear cross entropy with the gradients made in the forward: three products, logits never stored.
//   1. E[v][token] = 2^(z log2 e - offset) leaves the cache of the first product already rounded. The offset is the
//      target's own logit, known beforehand from one dot product: no maximum is needed first, and S = sum E =
//      e^-margin. A token whose sum leaves the safe range is done again with its true maximum.
//   2. dx_i = a_i sum_v E_vi w_v + ..., while E is in the cache. One factor a_i a token finishes everything.
//   3. dw_v = sum_i E_vi (a_i x_i) + .... E waits for a_i in the memory of dw itself, which holds d / 32 panels of 32
//      tokens for each strip of 32 columns; the E of tokens beyond that is computed a second time.
// Threads share out tokens in 1 and 2 and columns in 3. Every sum has one order, whatever the number of threads.
#pragma once
#include "linear_cross_entropy.h"

#ifdef __x86_64__
#include <omp.h>

#include <memory>
#include <new>
#include <vector>

#include "huge_pages.h"
#include "kept_memory.h"
#include "linear_exponentials.h"
#include "linear_packing.h"

namespace fastloss::linear {

constexpr double kLn2 = 0.693147180559945309;
// A sum of exponentials outside of these is computed again: beyond, products of E and a_i x_i leave the range of bf16.
constexpr float kSmallestSum = 0x1p-64f, kLargestSum = 0x1p64f;
constexpr int64_t kGroup = 8; // panels of tokens that pass a strip of w while it is in the first-level cache

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct GiveBack {
  size_t bytes = 0;
  void operator()(void *memory) const { give_memory(memory, bytes); }
};
template <class T> using Memory = std::unique_ptr<T[], GiveBack>;
template <class T> Memory<T> allocate(int64_t count) {
  const size_t bytes = size_t(std::max<int64_t>(count, 1)) * sizeof(T);
  return Memory<T>(static_cast<T *>(take_memory(bytes)), GiveBack{bytes});
}

// Where the panels [first, end) of E are kept for the third product, as left operands.
struct Store {
  uint32_t *strips, *tail;
  int64_t strip_units, tail_strip, first, end; // the strip that is not whole has no room in dw: it goes to the tail
  uint32_t *at(int64_t strip, int64_t panel, int64_t panel_units) const {
    if (panel < first || panel >= end) return nullptr;
    return (strip == tail_strip ? tail : strips + strip * strip_units) + (panel - first) * panel_units;
  }
};

// What one thread works in.
struct Scratch {
  Memory<uint32_t> w, w_transposed, exponentials, again;
  Memory<float> products, gradient, bias, ignored_sum, ignored_top;
  std::vector<int64_t> panels;
};

template <class Tiles, class T> class LinearRun {
  typedef typename Tiles::Element Element;
  static constexpr int64_t kPanelSteps = 2 / Tiles::kPerUnit; // steps of a reduction over 32
  static constexpr int64_t kPanelUnits = kPanelSteps * kBlock;
  static constexpr int64_t kCachedPanels = kStepsInCache / kPanelSteps;

  const LinearCrossEntropy &args;
  const T *const x, *const w;
  T *const dx, *const dw;
  const int64_t d, v, panels_d, steps_d, strips; // panels and steps of d, strips of v
  const bool with_sum;
  int64_t block_strips, dw_strips; // strips of a block of columns in products 1 and 2, and in 3
  int64_t chunk;                   // tokens at a time
  float shift = 0;                 // taken from every bias, so that a common offset costs no digits
  LogitMap map;
  std::vector<int64_t> kept; // tokens that are not ignored
  // a chunk
  int64_t first_token, tokens, panels;
  std::vector<int64_t> row; // token -> row of x, -1 for the padding of the last panel
  std::vector<int32_t> target;
  std::vector<float> own_logit, offset, sum, block_sum, top, factor, own, column;
  std::vector<std::pair<int32_t, int32_t>> by_target;
  Memory<uint32_t> x_right, scaled_x, tail;
  Memory<float> dx_sums, own_accumulator;
  Store store;
  // the column weights as one more token: wbar = sum_v c_v w_v, and its counterpart for dw
  std::vector<float> weighted_w, weighted_x;
  double weighted_bias = 0, weight_total = 0, column_total = 0;
  std::vector<Scratch> scratch;

public:
  explicit LinearRun(const LinearCrossEntropy &a)
      : args(a), x(static_cast<const T *>(a.x)), w(static_cast<const T *>(a.w)), dx(static_cast<T *>(a.dx)),
        dw(static_cast<T *>(a.dw)), d(a.d), v(a.v), panels_d(round_up(a.d, kTile) / kTile),
        steps_d(panels_d * kPanelSteps), strips(round_up(a.v, kTile) / kTile), with_sum(a.want & kSum) {
    const float inner = a.softcap != 0 ? a.softcap : a.scale;
    map.log2_scale = inner * kLog2e;
    map.inner = a.softcap != 0 ? a.scale / a.softcap : 1.f;
    map.nothing = a.scale < 0 ? kInfinity : -kInfinity;
    for (int64_t i = 0; i < a.n; ++i)
      if (!a.target || a.target[i] != a.ignore_index) kept.push_back(i);
    if (a.bias && a.softcap == 0) shift = common_offset();
    plan();
  }

  FASTLOSS_AVX512 void run() {
    clear_what_is_ignored();
    if (kept.empty()) return;
    if (with_sum) weigh_columns();
    for (first_token = 0; first_token < int64_t(kept.size()); first_token += chunk) {
      begin_chunk();
#pragma omp parallel num_threads(int(scratch.size()))
      {
        Scratch &mine = scratch[omp_get_thread_num()];
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        Tiles::begin();
        mine.panels.clear();
        for (int64_t p = panels * me / threads; p < panels * (me + 1) / threads; ++p) mine.panels.push_back(p);
        for (int64_t p : mine.panels) prepare(p);
        sweep(mine);
        if (raise_offsets(mine)) sweep(mine);
        for (int64_t p = panels * me / threads; p < panels * (me + 1) / threads; ++p) finish(p);
        if (dw || args.dbias) {
#pragma omp barrier
#pragma omp single
          gather_by_target();
#pragma omp for schedule(dynamic, 1)
          for (int64_t strip = 0; strip < strips; strip += dw_strips)
            weight_gradient(strip, std::min(dw_strips, strips - strip), mine);
        }
        Tiles::end();
      }
    }
  }

private:
  const float *epilogue(int which) const { return args.epilogue ? args.epilogue + which * args.n : nullptr; }
  float bias_of(int64_t j) const { return args.bias ? args.bias[j] - shift : 0.f; }
  float weight_of(int64_t j) const { return args.column_weight ? args.column_weight[j] : 1.f; }
  bool keeps_exponentials() const { return dw || args.dbias; }

  void plan();
  float common_offset() const;
  void clear_what_is_ignored();
  FASTLOSS_AVX512 void weigh_columns();
  void begin_chunk();

  // linear_tokens.h: products 1 and 2, one thread and its tokens
  FASTLOSS_AVX512 void prepare(int64_t panel);
  FASTLOSS_AVX512 float mapped_logit(int64_t i, int64_t j) const;
  void clear_sums(int64_t panel);
  FASTLOSS_AVX512 void sweep(Scratch &mine);
  FASTLOSS_AVX512 void pack_columns(int64_t strip, int64_t count, Scratch &mine);
  FASTLOSS_AVX512 void logits(int64_t strip, int64_t count, const int64_t *group, int64_t members,
                              const TokenSums &sums, const Store &to, int64_t numbered, uint32_t *right, Scratch &mine);
  template <bool kSoftcap>
  FASTLOSS_AVX512 void logits_of(int64_t strip, int64_t count, const int64_t *group, int64_t members,
                                 const TokenSums &sums, const Store &to, int64_t numbered, uint32_t *right,
                                 Scratch &mine);
  FASTLOSS_AVX512 void input_gradient(int64_t count, const int64_t *group, int64_t members, Scratch &mine);
  bool raise_offsets(Scratch &mine);
  FASTLOSS_AVX512 void finish(int64_t panel);
  FASTLOSS_AVX512 void finish_token(int64_t i, int64_t n);
  FASTLOSS_AVX512 void store_dx(int64_t panel);

  // linear_columns.h: product 3, one thread and a few strips of columns
  FASTLOSS_AVX512 void gather_by_target();
  FASTLOSS_AVX512 void weight_gradient(int64_t strip, int64_t count, Scratch &mine);
  FASTLOSS_AVX512 void compute_again(int64_t strip, int64_t count, const Store &to, Scratch &mine);
  FASTLOSS_AVX512 void add_targets(int64_t strip, int64_t count, float *bias_gradient, Scratch &mine);
  float *gradient_row(Scratch &mine, int64_t r, int64_t j) const;
  FASTLOSS_AVX512 void store_dw(int64_t strip, int64_t count, Scratch &mine);
};

template <class Tiles, class T> void LinearRun<Tiles, T>::plan() {
  const int64_t count = kept.size(), wide = panels_d * kTile;
  const int64_t room = dw ? kTile * d * int64_t(sizeof(T)) / (kTile * kTile * int64_t(sizeof(Element))) * kTile : 0;
  // With AMX a product costs less than a pass over an accumulator; without, room in dw decides.
  const bool recomputing_is_cheap = Tiles::kFast || room < 256 || count <= room + room / 4;
  int64_t most = dw && !recomputing_is_cheap ? std::min<int64_t>(room, 1024) : 4096;
  const int64_t token_bytes = wide * (int64_t(sizeof(Element)) * (dw ? 2 : 1) + (dx ? 4 : 0));
  const int64_t eighth = count * v * int64_t(sizeof(T)) / 8;
  const int64_t budget = args.max_extra_bytes ? args.max_extra_bytes : std::max<int64_t>(eighth, 8 << 20);
  most = std::max(kTile, std::min(most, budget / token_bytes / kTile * kTile));
  const int64_t chunks = std::max<int64_t>((count + most - 1) / most, 1);
  chunk = round_up((count + chunks - 1) / chunks, kTile);
  // 512 KB of w in the second-level cache, but enough columns for a worthwhile reduction in product 2
  block_strips = wide > 512 ? kCachedPanels / 2 : kCachedPanels;
  block_strips = std::min(std::max<int64_t>(block_strips, 1), strips);
  dw_strips = std::min(std::max<int64_t>((512 << 10) / (wide * 4 * kTile), 1), std::min<int64_t>(8, strips));

  const int64_t chunk_panels = chunk / kTile, w_units = std::max(block_strips, dw_strips) * steps_d * kBlock;
  store = {reinterpret_cast<uint32_t *>(dw),    nullptr, kTile * d * int64_t(sizeof(T)) / 4, -1, 0,
           std::min(chunk_panels, room / kTile)};
  if (v % kTile) {
    store.tail_strip = strips - 1;
    tail = allocate<uint32_t>(store.end * kPanelUnits);
    store.tail = tail.get();
  }
  x_right = allocate<uint32_t>(chunk_panels * steps_d * kBlock);
  if (dx) dx_sums = allocate<float>(chunk * wide);
  if (dw) scaled_x = allocate<uint32_t>(chunk_panels * kPanelUnits * panels_d);
  if (dw && chunks > 1 && !args.dw_accumulator) own_accumulator = allocate<float>(v * d);
  if (dw) ask_for_huge_pages(dw, size_t(v * d) * sizeof(T));
  for (std::vector<float> *numbers : {&own_logit, &offset, &sum, &block_sum, &top, &factor, &own, &column})
    numbers->resize(chunk);
  row.resize(chunk);
  target.resize(chunk);
  scratch.resize(omp_get_max_threads());
  for (Scratch &s : scratch) {
    s.w = allocate<uint32_t>(w_units);
    s.products = allocate<float>((kGroup + 1) * kProduct);
    s.bias = allocate<float>(block_strips * kTile + dw_strips * kTile);
    if (dx) s.w_transposed = allocate<uint32_t>(w_units);
    if (dx) s.exponentials = allocate<uint32_t>(kGroup * block_strips * kPanelUnits);
    if (!keeps_exponentials()) continue;
    s.again = allocate<uint32_t>(dw_strips * kCachedPanels * kPanelUnits);
    s.gradient = allocate<float>(dw_strips * panels_d * kProduct);
    s.ignored_sum = allocate<float>(chunk);
    s.ignored_top = allocate<float>(chunk);
  }
}

// The number nearest to zero between the smallest and the largest finite bias.
template <class Tiles, class T> float LinearRun<Tiles, T>::common_offset() const {
  float low = kInfinity, high = -kInfinity;
  for (int64_t j = 0; j < v; ++j) {
    if (!std::isfinite(args.bias[j])) continue;
    low = std::min(low, args.bias[j]);
    high = std::max(high, args.bias[j]);
  }
  return low > high ? 0.f : std::max(low, 0.f) + std::min(high, 0.f);
}

// Rows that are ignored cost nothing later: their results are written here.
template <class Tiles, class T> void LinearRun<Tiles, T>::clear_what_is_ignored() {
  memset(args.stats, 0, size_t(kNumStats * args.n) * sizeof(float));
  if (args.dbias) memset(args.dbias, 0, size_t(v) * sizeof(float));
  size_t next = 0;
  for (int64_t i = 0; dx && i < args.n; ++i) {
    if (next < kept.size() && kept[next] == i) ++next;
    else memset(static_cast<void *>(dx + i * d), 0, size_t(d) * sizeof(T));
  }
  if (dw && kept.empty()) memset(static_cast<void *>(dw), 0, size_t(v * d) * sizeof(T));
}

// wbar = sum_v c_v w_v, so that sum_v c_v z_v is one dot product a token. Parts of fixed size: one order of summation.
template <class Tiles, class T> FASTLOSS_AVX512 void LinearRun<Tiles, T>::weigh_columns() {
  constexpr int64_t kPart = 1024;
  const int64_t parts = (v + kPart - 1) / kPart;
  std::vector<float> part_sums(size_t(parts * d), 0.f);
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t j = part * kPart; j < std::min(v, (part + 1) * kPart); ++j)
      add_row(part_sums.data() + part * d, weight_of(j), w + j * args.ldw, d);
  weighted_w.assign(size_t(d), 0.f);
  for (int64_t part = 0; part < parts; ++part) add_row(weighted_w.data(), 1.f, part_sums.data() + part * d, d);
  for (int64_t j = 0; j < v; ++j) {
    weight_total += weight_of(j);
    weighted_bias += double(weight_of(j)) * bias_of(j);
  }
}

template <class Tiles, class T> void LinearRun<Tiles, T>::begin_chunk() {
  tokens = std::min<int64_t>(chunk, int64_t(kept.size()) - first_token);
  panels = round_up(tokens, kTile) / kTile;
  store.end = std::min(store.end, panels);
  for (int64_t i = 0; i < chunk; ++i) row[i] = i < tokens ? kept[first_token + i] : -1;
}

} // namespace fastloss::linear

#endif
