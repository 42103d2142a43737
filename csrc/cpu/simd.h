// Eight or sixteen float32 lanes, by the compiler's vector types where it has them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define LMN_INLINE inline __attribute__((always_inline))
#define LMN_LAMBDA __attribute__((always_inline))
// For loops over what should be registers: left rolled, their arrays would be memory.
#define LMN_UNROLL _Pragma("GCC unroll 16")
#else
#define LMN_INLINE inline
#define LMN_LAMBDA
#define LMN_UNROLL
#endif

// One binary for all processors of a family: each marked function exists once per instruction set, and the loader
// picks. The helpers are inlined into them, and so are compiled for each.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(LMN_NO_CLONES)
#define LMN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define LMN_CLONES
#endif

namespace lmn {

constexpr int64_t kLanes = 8;

#if defined(__GNUC__)
typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef float F16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

// As a difference it is one instruction; gcc 12 builds a list of equal lanes from pieces.
LMN_INLINE F8 splat(float value) { return value - F8{}; }
LMN_INLINE F16 splat16(float value) { return value - F16{}; }
LMN_INLINE F8 as_floats(U8 bits) { return reinterpret_cast<F8>(bits); }
LMN_INLINE U8 as_words(F8 value) { return reinterpret_cast<U8>(value); }
LMN_INLINE F16 as_floats(U16 bits) { return reinterpret_cast<F16>(bits); }
LMN_INLINE U16 as_words(F16 value) { return reinterpret_cast<U16>(value); }
// a where one is NaN
LMN_INLINE F8 larger(F8 a, F8 b) { return a < b ? b : a; }
LMN_INLINE F16 larger(F16 a, F16 b) { return a < b ? b : a; }
#else
template <class T, int64_t N>
struct Lanes {
  T lane[N];
  T operator[](int64_t i) const { return lane[i]; }
  T& operator[](int64_t i) { return lane[i]; }
};
using F8 = Lanes<float, 8>;
using U8 = Lanes<uint32_t, 8>;
using F16 = Lanes<float, 16>;
using U16 = Lanes<uint32_t, 16>;

template <int64_t N>
Lanes<float, N> operator*(Lanes<float, N> a, const Lanes<float, N>& b) {
  for (int64_t i = 0; i < N; ++i) a[i] *= b[i];
  return a;
}
template <int64_t N>
Lanes<float, N> operator/(Lanes<float, N> a, const Lanes<float, N>& b) {
  for (int64_t i = 0; i < N; ++i) a[i] /= b[i];
  return a;
}
template <int64_t N>
Lanes<float, N>& operator+=(Lanes<float, N>& a, const Lanes<float, N>& b) {
  for (int64_t i = 0; i < N; ++i) a[i] += b[i];
  return a;
}
template <int64_t N>
Lanes<float, N> operator+(Lanes<float, N> a, const Lanes<float, N>& b) {
  return a += b;
}
template <int64_t N>
Lanes<float, N> operator-(Lanes<float, N> a, const Lanes<float, N>& b) {
  for (int64_t i = 0; i < N; ++i) a[i] -= b[i];
  return a;
}
template <int64_t N>
Lanes<uint32_t, N> operator+(Lanes<uint32_t, N> a, uint32_t b) {
  for (int64_t i = 0; i < N; ++i) a[i] += b;
  return a;
}
template <int64_t N>
Lanes<uint32_t, N> operator-(Lanes<uint32_t, N> a, uint32_t b) {
  for (int64_t i = 0; i < N; ++i) a[i] -= b;
  return a;
}
template <int64_t N>
Lanes<uint32_t, N> operator<<(Lanes<uint32_t, N> a, int count) {
  for (int64_t i = 0; i < N; ++i) a[i] <<= count;
  return a;
}
template <int64_t N>
Lanes<uint32_t, N> operator>>(Lanes<uint32_t, N> a, int count) {
  for (int64_t i = 0; i < N; ++i) a[i] >>= count;
  return a;
}
template <int64_t N>
Lanes<uint32_t, N> operator&(Lanes<uint32_t, N> a, uint32_t mask) {
  for (int64_t i = 0; i < N; ++i) a[i] &= mask;
  return a;
}
inline F8 splat(float value) { return F8{{value, value, value, value, value, value, value, value}}; }
inline F16 splat16(float x) { return F16{{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}}; }
template <int64_t N>
Lanes<float, N> as_floats(const Lanes<uint32_t, N>& bits) {
  Lanes<float, N> value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
template <int64_t N>
Lanes<uint32_t, N> as_words(const Lanes<float, N>& value) {
  Lanes<uint32_t, N> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
template <int64_t N>
Lanes<float, N> larger(Lanes<float, N> a, const Lanes<float, N>& b) {
  for (int64_t i = 0; i < N; ++i) a[i] = a[i] < b[i] ? b[i] : a[i];
  return a;
}
#endif

template <class T>
LMN_INLINE T load8(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
LMN_INLINE void store8(void* to, const F8& value) { std::memcpy(to, &value, sizeof(value)); }
LMN_INLINE void store16(void* to, const F16& value) { std::memcpy(to, &value, sizeof(value)); }

LMN_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
LMN_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// bfloat16: the high half of a float32. Of two neighbours read as one word the even one is the low half
// (little-endian, as every target of ours is).
LMN_INLINE float widen(uint16_t value) { return as_float(static_cast<uint32_t>(value) << 16); }
LMN_INLINE F8 even(U8 words) { return as_floats(words << 16); }
LMN_INLINE F8 odd(U8 words) { return as_floats(words & 0xffff0000u); }
LMN_INLINE uint16_t narrow(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
#define LMN_SHUFFLES 1
#endif

// The sum of the lanes, in a fixed order: halves, then quarters, then neighbours.
LMN_INLINE float total(F8 v) {
#ifdef LMN_SHUFFLES
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

// Eight rows of eight become eight columns.
LMN_INLINE void transpose8(const F8* in, F8* out) {
#ifdef LMN_SHUFFLES
  F8 a[8], b[8];
  LMN_UNROLL for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(in[i], in[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    a[i + 1] = __builtin_shufflevector(in[i], in[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  LMN_UNROLL for (int i = 0; i < 8; i += 4)
    LMN_UNROLL for (int j = 0; j < 2; ++j) {
      b[i + j] = __builtin_shufflevector(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + j + 2] = __builtin_shufflevector(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  LMN_UNROLL for (int i = 0; i < 4; ++i) {
    out[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    out[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) out[i][j] = in[j][i];
#endif
}

// The totals of eight at once, each as `total` sums it.
LMN_INLINE F8 totals(const F8* v) {
#ifdef LMN_SHUFFLES
  F8 half[4], quarter[2];
  LMN_UNROLL for (int i = 0; i < 4; ++i) {
    const F8 &a = v[2 * i], &b = v[2 * i + 1];
    half[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
              __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  LMN_UNROLL for (int i = 0; i < 2; ++i) {
    const F8 &a = half[2 * i], &b = half[2 * i + 1];
    quarter[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                 __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  const F8 &a = quarter[0], &b = quarter[1];
  const F8 sums = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
                  __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  return __builtin_shufflevector(sums, sums, 0, 4, 1, 5, 2, 6, 3, 7);
#else
  F8 sums;
  for (int i = 0; i < 8; ++i) sums[i] = total(v[i]);
  return sums;
#endif
}

}  // namespace lmn
