// hash_attention on the CPU: the context, sum over tokens of w_tᵀ z_t, is a small matrix that stays in cache; tokens
// pass by it in chunks, widened to fp32. Blocks of tokens have contexts of their own, added in a fixed order, so that
// few heads keep all threads busy and no sum is longer than a block.
#include "hash_attention.h"
#include "cpu.h"
#include "simd.h"

#include <algorithm>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

constexpr int64_t kChunk = 64;       // tokens that are widened at a time: their rows stay in the first cache
constexpr int64_t kBlock = 512;      // tokens of a context, at least
constexpr int64_t kSerial = 1 << 16; // products that are not worth waking a second thread

// Rows of tokens to be widened, and what is put behind each.
struct Tokens {
  const void *from;
  const float *scale;
  int64_t count, width, stride;
  const float *extra;
  float constant;
  bool with_extra;
};

// Finished sums: y, plus own times z (null: without), divided by d (null: not), rounded.
struct Answers {
  void *to;
  const float *y, *z, *d;
  int64_t count, width, stride;
  float own;
};

enum Pass { kAdd, kAsk, kCausal };

// Rows of the context with the columns of x and w that belong to them; `first` writes y, else adds to it.
struct Tile {
  const float *x, *w, *z;
  float *context, *y;
  int64_t count, depth, columns;
  bool first, backwards;
};

struct HashLoops {
  void (*read)(const Tokens &, float *to);
  void (*write)(const Answers &);
  void (*run)(Pass, Tile, int64_t rows);
  void (*add_codes)(const float *w, int64_t count, int64_t width, int64_t depth, float *sums);
  void (*denominators)(const float *x, const float *w, int64_t count, int64_t width, int64_t depth, float *sums,
                       float bias, int64_t seen, float *d);
  void (*slopes)(const HashSlopes &, int64_t begin, int64_t end);
  int64_t piece;
};

} // namespace

#define FASTLOSS_LOOPS "hash_attention.inc"
#include "each_isa.inc"
#undef FASTLOSS_LOOPS

namespace {

HashLoops loops_for(int dtype, int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
#ifdef __x86_64__
  const int level = isa == kBestIsa ? best : isa;
  if (level == kAvx512Bf16) return avx512bf16::hash_loops(dtype);
  if (level == kAvx512) return avx512::hash_loops(dtype);
  if (level == kAvx2) return avx2::hash_loops(dtype);
#endif
  return scalar::hash_loops(dtype);
}

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// One call: sizes, and what a thread does with a block of tokens.
struct Run {
  const HashAttention &args;
  HashLoops loops;
  bool extra;                            // alpha beta is a column of x and w
  int64_t rows, depth, columns, context; // of the context, of widened x and w, of widened z and y; numbers of a context

  Run(const HashAttention &given, int isa) : args(given), loops(loops_for(given.dtype, isa)) {
    extra = args.alpha || args.alpha_constant != 0.f;
    rows = depth = args.x.width + extra;
    columns = (args.z.width + loops.piece - 1) / loops.piece * loops.piece;
    context = rows * columns + args.w.width; // then the sums of w
  }

  void read(const TokenRows &rows_of, int64_t token, int64_t count, const float *more, float constant, bool with,
            int64_t stride, std::vector<float> &to) const {
    const char *from = static_cast<const char *>(rows_of.data) + token * rows_of.width * bytes_of(args.dtype);
    const float *scale = rows_of.scale ? rows_of.scale + token : nullptr;
    to.resize(size_t(kChunk * stride));
    loops.read({from, scale, count, rows_of.width, stride, more ? more + token : nullptr, constant, with}, to.data());
  }

  void read_x(int64_t token, int64_t count, std::vector<float> &to) const {
    read(args.x, token, count, args.alpha, args.alpha_constant, extra, depth, to);
  }
  void read_w(int64_t token, int64_t count, std::vector<float> &to) const {
    read(args.w, token, count, args.beta, 1.f, extra, depth, to);
  }
  void read_z(int64_t token, int64_t count, std::vector<float> &to) const {
    read(args.z, token, count, nullptr, 0.f, false, columns, to);
  }

  // The context of keys begin..end of a group.
  void add(int64_t group, int64_t begin, int64_t end, float *sums) const {
    std::vector<float> w, z;
    std::fill(sums, sums + context, 0.f);
    for (int64_t t = begin; t < end; t += kChunk) {
      const int64_t count = std::min(kChunk, end - t), token = group * args.keys + t;
      read_w(token, count, w), read_z(token, count, z);
      loops.run(kAdd, {nullptr, w.data(), z.data(), sums, nullptr, count, depth, columns, false, false}, rows);
      if (args.d) loops.add_codes(w.data(), count, args.w.width, depth, sums + rows * columns);
    }
  }

  // The answers of tokens begin..end of a group. Causal: `sums` holds what came before, and goes on.
  void answer(int64_t group, int64_t begin, int64_t end, float *sums) const {
    std::vector<float> x, w, z, y(size_t(kChunk * columns));
    const bool causal = args.direction != 0, backwards = args.direction < 0;
    const int64_t chunks = (end - begin + kChunk - 1) / kChunk;
    for (int64_t n = 0; n < chunks; ++n) {
      const int64_t t = begin + (backwards ? chunks - 1 - n : n) * kChunk, count = std::min(kChunk, end - t);
      const int64_t token = group * args.queries + t;
      read_x(token, count, x);
      if (causal) read_w(token, count, w);
      if (causal || args.own != 0.f) read_z(token, count, z);
      loops.run(causal ? kCausal : kAsk,
                {x.data(), w.data(), z.data(), sums, y.data(), count, depth, columns, true, backwards}, rows);
      float *d = args.d ? args.d + token : nullptr;
      if (d)
        loops.denominators(x.data(), causal ? w.data() : nullptr, count, args.w.width, depth, sums + rows * columns,
                           args.bias, causal ? t : args.keys, d);
      char *to = static_cast<char *>(args.y) + token * args.z.width * bytes_of(args.dtype);
      loops.write({to, y.data(), z.data(), d, count, args.z.width, columns, args.own});
    }
  }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Contexts of all blocks, to be those of all keys (first block) or of what comes before each block.
void combine(const Run &run, float *contexts, int64_t blocks) {
  const int64_t size = run.context;
  if (!run.args.direction) {
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = 0; i < size; ++i) contexts[i] += contexts[b * size + i];
    return;
  }
  const bool backwards = run.args.direction < 0;
  for (int64_t i = 0; i < size; ++i) {
    float before = 0;
    for (int64_t n = 0; n < blocks; ++n) {
      float &own = contexts[(backwards ? blocks - 1 - n : n) * size + i];
      const float more = own;
      own = before, before += more;
    }
  }
}

} // namespace

void hash_attention_cpu(const HashAttention &args, int isa) {
  const Run run(args, isa);
  const bool causal = args.direction != 0;
  const int64_t products = args.groups * (args.queries + args.keys) * run.rows * run.columns;
  const int threads = products <= kSerial ? 1 : omp_get_max_threads();
  int64_t block = std::max(kBlock, 4 * std::min(run.rows, run.columns));
  if (causal && args.groups >= threads) block = args.queries; // then contexts need not be made beforehand
  block = std::max<int64_t>(1, block);
  const int64_t key_blocks = ceil_div(args.keys, block), blocks = ceil_div(args.queries, block), size = run.context;
  if (!args.groups || !args.queries || !key_blocks) return;
  std::vector<float> contexts(size_t(args.groups * key_blocks * size));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (!causal || blocks > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < args.groups * key_blocks; ++i) {
        const int64_t begin = i % key_blocks * block;
        run.add(i / key_blocks, begin, std::min(args.keys, begin + block), contexts.data() + i * size);
      }
#pragma omp for schedule(static)
      for (int64_t g = 0; g < args.groups; ++g) combine(run, contexts.data() + g * key_blocks * size, key_blocks);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < args.groups * blocks; ++i) {
      const int64_t group = i / blocks, b = i % blocks, begin = b * block;
      float *sums = contexts.data() + (group * key_blocks + (causal ? b : 0)) * size;
      run.answer(group, begin, std::min(args.queries, begin + block), sums);
    }
  }
}

void hash_slopes_cpu(const HashSlopes &args, int isa) {
  const HashLoops loops = loops_for(args.dtype, isa);
  const int threads = args.tokens * args.width <= kSerial ? 1 : omp_get_max_threads();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    loops.slopes(args, args.tokens * thread / team, args.tokens * (thread + 1) / team);
  }
}

} // namespace fastloss
