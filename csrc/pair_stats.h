// What bindings.cpp and the pair kernels share. See docs/design.md, "The pair contract".
#pragma once
#include "fastloss.h"

namespace fastloss {

enum PairWant : int { kPairColumns = 1, kPairMean = 2, kPairSecond = 4 };
enum PairNeeds : int { kPairQ = 1, kPairK = 2, kPairRowScale = 4, kPairColumnScale = 8 };

// Rows of the tables of pair_stats; a column's table ends before kNegMean.
enum PairStat : int {
  kNegMax,
  kNegLogSum,
  kPosMax,
  kPosLogSum,
  kPosSum,
  kNegCount,
  kPosCount,
  kNegMean,
  kNegSecond,
  kNumPairStats
};
constexpr int kNumColumnStats = kNegMean;

// phi of pair_map, and the rows of its table.
enum PairFunction : int { kSoftplus, kHinge, kSquaredHinge, kSigmoid };
enum PairMapStat : int {
  kMapNeg,
  kMapPos,
  kMapNegSlope,
  kMapPosSlope,
  kMapNegActive,
  kMapPosActive,
  kMapNegCount,
  kMapPosCount,
  kNumPairMapStats
};

// Which pairs are positive, or excluded: the union of what is given.
struct PairClass {
  const int32_t *rows;    // [m] ids, with `columns`; without: [m][ceil(n / 32)] bits
  const int32_t *columns; // [n] ids
  int num_diagonals;      // 0, 1 or 2
  int64_t diagonals[2];   // j - i
};

// The matrix and the class of each of its pairs: what every pair op begins with.
struct Pairing {
  const void *q, *k; // [m][ldq], [n][ldk] of dtype
  int64_t m, n, d, ldq, ldk;
  int dtype;
  const float *row_scale, *column_scale;   // [m]; [n] or null
  const uint8_t *row_valid, *column_valid; // null: all are
  PairClass positive, excluded;
  const float *low, *high;       // [m], each may be null
  const void *guide_q, *guide_k; // [m][ld_guide_q], [n][ld_guide_k] of guide_dtype, or null
  int64_t guide_d, ld_guide_q, ld_guide_k;
  int guide_dtype;
  const float *guide_limit; // [m]
};

// Gradients of a pair op; null where none is needed.
struct PairGradients {
  void *dq, *dk; // [m][d], [n][d] of dtype, contiguous
  float *drow_scale, *dcolumn_scale;
};

struct PairStats {
  Pairing pairing;
  const float *boost, *margin; // [m] or null
  int want;
  float second;
  float *rows, *columns;               // [kNumPairStats][m], [kNumColumnStats][n]: written forwards, read backwards
  const float *row_grad, *column_grad; // the same shapes, backwards; null: forwards
  PairGradients gradients;
  float *kept; // [keep] floats for parts of <q, k>, between a forward and its backward
  int64_t keep;
};

struct PairMap {
  Pairing pairing;
  const float *neg_threshold, *pos_threshold; // [m] or null
  int function;
  float *table;      // [kNumPairMapStats][m], forwards
  const float *grad; // [kNumPairMapStats][m], backwards; null: forwards
  PairGradients gradients;
};

struct PairHistogram {
  Pairing pairing;
  int64_t bins;
  double first, step;
  float *table;      // [2][bins], forwards
  const float *grad; // [2][bins], backwards; null: forwards
  PairGradients gradients;
};

struct RowTopk {
  Pairing pairing;
  int64_t count;
  int classes;      // 1 negatives, 2 positives, 3 both
  float *values;    // [m][count]
  int64_t *columns; // [m][count]
};

// The kernels of pairs along a list of edges.
struct EdgeDot {
  const void *q, *k; // [m][ldq], [n][ldk] of dtype
  int64_t m, n, d, ldq, ldk, edges;
  const int64_t *rows, *columns; // [edges]
  float *dots;                   // [edges]
  int dtype;
};

struct EdgeSum {
  const void *x;                   // [n][ldx] of dtype
  const float *weight;             // [edges]
  const int64_t *pointer, *source; // [m + 1], [edges]
  void *sums;                      // [m][d] of dtype
  int64_t m, n, d, ldx, edges;
  int dtype;
};

} // namespace fastloss
