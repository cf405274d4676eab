// Pointwise losses on the CPU: every operand is read once and every result written once, block by block through L1.
#include "pointwise_loss.h"
#include "huge_pages.h"
#include "pointwise_loops.h"

#include <algorithm>
#include <cstring>
#include <omp.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastloss {
namespace {

constexpr int64_t kBlock = 1024;        // elements in L1 at a time, summed in fp32 lanes
constexpr int64_t kPart = 16 * kBlock;  // summed in double, by one thread: sums do not depend on the number of threads
constexpr int64_t kSerial = 1 << 15;    // elements that are not worth waking a second thread
constexpr int64_t kStreamed = 16 << 20; // bytes of a result that would push everything else out of the cache

int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

char *at(const Elements &e, int64_t i) { return static_cast<char *>(e.data) + i * bytes_of(e.dtype); }

// An operand, of which any block can be read in one piece: a short period is written out until it covers a block.
class Operand {
public:
  Operand(const Elements &elements, int64_t n) : elements_(elements) {
    if (!elements.data || elements.period >= n) return;
    const int64_t size = bytes_of(elements.dtype), period = elements.period;
    repeated_.resize(size_t((period + kBlock) * size));
    for (int64_t i = 0; i < period + kBlock; i += period)
      memcpy(&repeated_[size_t(i * size)], elements.data, size_t(std::min(period, period + kBlock - i) * size));
    elements_.data = repeated_.data();
  }

  explicit operator bool() const { return elements_.data; }

  // Elements first.. of the loss as fp32: in place where that is possible, else in `room`.
  const float *read(const Level &level, int64_t first, int64_t count, float fill, float *room) const {
    if (!elements_.data) { // a weight that is not there, beside one that is
      std::fill(room, room + kBlock, 1.f);
      return room;
    }
    const char *from = at(elements_, first % elements_.period);
    if (elements_.dtype == kFloat32 && count % level.width == 0) return reinterpret_cast<const float *>(from);
    level.widen[elements_.dtype](from, count, fill, room);
    return room;
  }

private:
  Elements elements_;
  std::vector<char> repeated_;
};

class Run {
public:
  Run(const PointwiseLoss &args, int isa)
      : args_(args), level_(level_of(isa)),
        loops_(level_.loops_for(args.kind, args.weight.data || args.pos_weight.data)), input_(args.input, args.n),
        target_(args.target, args.n), weight_(args.weight, args.n), pos_weight_(args.pos_weight, args.n) {
    if (args.upstream.data && args.upstream.period == 1) {
      level_.widen[args.upstream.dtype](args.upstream.data, 1, 0.f, factor_);
    } else {
      factor_[0] = 1;
      each_ = args.upstream.data;
    }
    factor_[0] = float(factor_[0] * args.share);
    stream_values_ = streamed(args.values), stream_slopes_ = streamed(args.dinput);
  }

  void run() {
    const int64_t parts = (args_.n + kPart - 1) / kPart;
    std::vector<double> sums(static_cast<size_t>(parts));
    const int threads = args_.n <= kSerial ? 1 : int(std::min<int64_t>(omp_get_max_threads(), parts));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < parts; ++i) sums[size_t(i)] = part(i * kPart, std::min(args_.n, (i + 1) * kPart));
    double sum = 0;
    for (double s : sums) sum += s;
    if (args_.loss) *args_.loss = float(sum * args_.share);
  }

private:
  const PointwiseLoss &args_;
  const Level level_;
  const BlockLoops loops_;
  const Operand input_, target_, weight_, pos_weight_;
  bool each_ = false, stream_values_ = false, stream_slopes_ = false; // each_: an upstream gradient for each element
  float factor_[16];

  bool streamed(const Elements &result) const {
    const int64_t bytes = args_.n * bytes_of(result.dtype);
    if (!result.data || bytes <= kStreamed || reinterpret_cast<uintptr_t>(result.data) % 64) return false;
    ask_for_huge_pages(result.data, size_t(bytes));
    return true;
  }

  double part(int64_t begin, int64_t end) const {
    double sum = 0;
    for (int64_t i = begin; i < end; i += kBlock) sum += block(i, std::min(kBlock, end - i));
#ifdef __x86_64__
    if (stream_values_ || stream_slopes_) _mm_sfence(); // before anyone reads them
#endif
    return sum;
  }

  float block(int64_t first, int64_t count) const {
    alignas(64) float input[kBlock], target[kBlock], weight[kBlock], pos_weight[kBlock], values[kBlock], slopes[kBlock];
    Block b = {};
    b.input = input_.read(level_, first, count, loops_.fill, input);
    b.target = target_.read(level_, first, count, 0.f, target);
    if (weight_ || pos_weight_) {
      b.weight = weight_.read(level_, first, count, 0.f, weight);
      b.pos_weight = pos_weight_.read(level_, first, count, 1.f, pos_weight);
    }
    b.values = values, b.slopes = slopes, b.factor = factor_[0];
    const int64_t whole = (count + level_.width - 1) / level_.width * level_.width;
    float sum = 0;
    if (args_.loss) sum = (args_.dinput.data ? loops_.sum_and_slopes : loops_.sum)(b, whole);
    else if (args_.dinput.data) loops_.slopes(b, whole);
    if (args_.values.data) {
      loops_.values(b, whole);
      level_.narrow[args_.values.dtype](values, count, stream_values_, at(args_.values, first));
    }
    if (!args_.dinput.data) return sum;
    if (each_) {
      level_.widen[args_.upstream.dtype](at(args_.upstream, first), count, 0.f, values);
      level_.multiply_by(slopes, values, whole);
    }
    level_.narrow[args_.dinput.dtype](slopes, count, stream_slopes_, at(args_.dinput, first));
    return sum;
  }
};

} // namespace

void pointwise_loss_cpu(const PointwiseLoss &args, int isa) {
  const int best = best_isa();
  if (isa < kBestIsa || isa > best)
    throw std::invalid_argument("isa must be -1 (best) to " + std::to_string(best) + " (" + isa_name(best) +
                                ") on this machine, got " + std::to_string(isa));
  Run(args, isa == kBestIsa ? best : isa).run();
}

} // namespace fastloss
