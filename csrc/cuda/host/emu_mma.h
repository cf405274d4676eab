// Tensor core instructions on the host.
#pragma once

// Tensor core fragments as the PTX ISA lays them out, g = lane / 4, t = lane % 4. A: rows g, g+8; B: column g; C: rows
// g, g+8, columns 2t, 2t+1.
namespace emu {
template <class C> struct Mma {
  C *c;
  const unsigned *a, *b;
};
template <class C> EMU_FN Mma<C> &fragment(Lanes &l, int lane) { return *static_cast<Mma<C> *>(l.arg[lane]); }
template <class C, class Dot>
EMU_FN void mma_tile(Lanes &l, Dot dot) { // dot(acc, a word, b word): both words hold the same ks
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      Mma<C> &owner = fragment<C>(l, m % 8 * 4 + n / 2);
      decltype(dot(0, 0u, 0u)) acc = owner.c[m / 8 * 2 + n % 2];
      for (int h = 0; h < 2; ++h) // half of k
        for (int t = 0; t < 4; ++t)
          acc = dot(acc, fragment<C>(l, m % 8 * 4 + t).a[h * 2 + m / 8], fragment<C>(l, n * 4 + t).b[h]);
      owner.c[m / 8 * 2 + n % 2] = C(acc);
    }
}
EMU_FN void fin_mma_b1(Lanes &l, unsigned) {
  mma_tile<int>(l, [](int acc, unsigned a, unsigned b) { return acc + __builtin_popcount(a & b); });
}
EMU_FN void fin_mma_s8(Lanes &l, unsigned) {
  mma_tile<int>(l, [](int acc, unsigned a, unsigned b) {
    for (int i = 0; i < 32; i += 8) acc += int8_t(a >> i) * int8_t(b >> i);
    return acc;
  });
}
// Each lane names a row and gets the four places that it reads from: itself, so that a sanitizer sees it.
struct LoadMatrix {
  const char *row, *from[4];
};
EMU_FN void fin_ldmatrix(Lanes &l, unsigned) {
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < 4; ++m)
      static_cast<LoadMatrix *>(l.arg[lane])->from[m] =
          static_cast<LoadMatrix *>(l.arg[8 * m + lane / 4])->row + lane % 4 * 4;
}
EMU_FN void fin_mma_bf16(Lanes &l,
                         unsigned) { // summed in double: a tensor core rounds more often, so compare with a tolerance
  mma_tile<float>(l, [](double acc, unsigned a, unsigned b) {
    return acc + double(::__uint_as_float(a << 16)) * ::__uint_as_float(b << 16) +
           double(::__uint_as_float(a & 0xffff0000u)) * ::__uint_as_float(b & 0xffff0000u);
  });
}
} // namespace emu
namespace fastloss {
inline void mma_m16n8k256_b1_and(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMU_AT) {
  emu::Mma<int> m{c, a, b};
  emu::collective(~0u, emu::fin_mma_b1, &m, {"mma b1", file_, line_});
}
inline void mma_m16n8k32_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMU_AT) {
  emu::Mma<int> m{c, a, b};
  emu::collective(~0u, emu::fin_mma_s8, &m, {"mma s8", file_, line_});
}
inline void ldmatrix_x4(unsigned (&r)[4], SharedAddress row, EMU_AT) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emu::fail("ldmatrix: a row off 16 bytes, %s:%d", file_, line_);
  emu::LoadMatrix load{row, {}};
  emu::collective(~0u, emu::fin_ldmatrix, &load, {"ldmatrix", file_, line_});
  for (int m = 0; m < 4; ++m) memcpy(&r[m], load.from[m], 4);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMU_AT) {
  emu::Mma<float> m{c, a, b};
  emu::collective(~0u, emu::fin_mma_bf16, &m, {"mma bf16", file_, line_});
}
} // namespace fastloss
