// Sums over the columns of rows of a times rows of b, both in planes of bits, block by block: what bgemm writes and
// what hamming_topk looks through. Exact in int32 whatever computes it.
#pragma once
#include "../bits.h"
#include "cpu.h"

namespace fastloss {

// What multiplies. kTableEngine: ones of words counted by the best instructions of `isa` without VPOPCNTDQ.
enum BitEngine : int { kBestEngine = -1, kTableEngine = 0, kPopcountEngine = 1, kVnniEngine = 2, kAmxEngine = 3 };

bool has_bit_engine(int engine);

// The sums of `rows` rows from `row` on with `columns` columns from `column` on (rows of b), `stride` numbers a row.
// Beyond `columns`, up to a multiple of 32, a row may be read; what is there means nothing.
struct BitSums {
  int64_t row, rows, column, columns, stride;
  const int32_t *sums;
};

struct BitConsumer {
  virtual ~BitConsumer() = default;
  virtual void take(const BitSums &block) = 0;
};

struct BitProducts {
  Planes a, b;
  int isa, engine; // -1: the best
};

// Threads that are worth their start for these operands.
int bit_threads(const BitProducts &products);

// Every sum once, to the consumer of the thread that made it: consumers[thread], `threads` of them. A consumer gets the
// blocks of one column in the order of their rows.
void multiply_bits(const BitProducts &products, BitConsumer *const *consumers, int threads);

// The level of cpu.h that `isa` names, or std::invalid_argument; an engine that this machine has not is one, too.
int checked_level(int isa, int engine);

} // namespace fastloss
