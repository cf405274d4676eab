// Sums over pairs of tokens whose weight is a product of two rows, in time linear in the number of tokens
// (docs/design.md, "hash_attention"): the forward and each gradient of hash_attention is one of them.
#pragma once
#include <cstdint>

namespace fastloss {

// Rows [groups, tokens, width] without gaps, row i times scale[i] (null: 1).
struct TokenRows {
  const void *data;
  const float *scale;
  int64_t width;
};

// y_i = sum over j of (<x_i, w_j> + alpha_i beta_j) z_j + own z_i, j all keys (direction 0), j <= i (1) or j >= i (-1).
struct HashAttention {
  TokenRows x, w, z;  // x, w: of one width; x and y have `queries` tokens, w and z `keys`
  const float *alpha; // [groups, queries], or null: alpha_constant
  const float *beta;  // [groups, keys], or null: 1
  float alpha_constant;
  float own;
  float *d; // null, or [groups, queries]: D_i = sum over j of (<x_i, w_j> + bias) is written, and y is divided by it
  float bias;
  void *y; // [groups, queries, z.width]
  int64_t groups, queries, keys;
  int direction;
  int dtype; // of x, w, z and y
};

// For i in 0..tokens: inverse_i = 1 / d_i, slope_i = -<grad_i, out_i> / d_i.
struct HashSlopes {
  const void *grad, *out; // [tokens, width]
  const float *d;
  float *inverse, *slope;
  int64_t tokens, width;
  int dtype;
};

void hash_attention_cpu(const HashAttention &args, int isa);
void hash_slopes_cpu(const HashSlopes &args, int isa);

} // namespace fastloss
