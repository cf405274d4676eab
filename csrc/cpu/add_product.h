// The gradient of a head's weight over chunks of rows: total += a^T b with total in fp32, a [n][v] and b [n][d] in
// bf16. The library multiplies bf16 into bf16 only; its product, rounded and added by a second pass, took longer than
// the rest.
#pragma once
#include "cpu.h"

namespace fastloss {

struct AddProduct {
  float *total;  // [v][d] without gaps
  const void *a; // [n][lda] bf16
  const void *b; // [n][ldb] bf16
  void *rounded; // [v][d] bf16, or null: where the sums go, rounded, instead of back to total
  int64_t n, v, d, lda, ldb;
  bool first; // total holds nothing yet
};

// Why this machine cannot, or null.
const char *add_product_why_not(int isa);

// Same result, bit for bit, with any number of threads.
void add_product_cpu(const AddProduct &args, int isa);

} // namespace fastloss
