// Eight float32 lanes, by the compiler's vector types where it has them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define LMN_INLINE inline __attribute__((always_inline))
// For loops over what should be registers: left rolled, their arrays would be memory.
#define LMN_UNROLL _Pragma("GCC unroll 16")
#else
#define LMN_INLINE inline
#define LMN_UNROLL
#endif

namespace lmn {

constexpr int64_t kLanes = 8;

#if defined(__GNUC__)
typedef float F8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));

LMN_INLINE F8 splat(float value) { return F8{value, value, value, value, value, value, value, value}; }
LMN_INLINE F8 as_floats(U8 bits) { return reinterpret_cast<F8>(bits); }
LMN_INLINE U8 as_words(F8 value) { return reinterpret_cast<U8>(value); }
LMN_INLINE F8 larger(F8 a, F8 b) { return a < b ? b : a; }  // a where one is NaN
#else
template <class T>
struct Lanes {
  T lane[kLanes];
  T operator[](int64_t i) const { return lane[i]; }
  T& operator[](int64_t i) { return lane[i]; }
};
using F8 = Lanes<float>;
using U8 = Lanes<uint32_t>;

inline F8 operator*(F8 a, const F8& b) {
  for (int64_t i = 0; i < kLanes; ++i) a[i] *= b[i];
  return a;
}
inline F8& operator+=(F8& a, const F8& b) {
  for (int64_t i = 0; i < kLanes; ++i) a[i] += b[i];
  return a;
}
inline F8 operator+(F8 a, const F8& b) { return a += b; }
inline F8 operator-(F8 a, const F8& b) {
  for (int64_t i = 0; i < kLanes; ++i) a[i] -= b[i];
  return a;
}
inline U8 operator+(U8 a, uint32_t b) {
  for (int64_t i = 0; i < kLanes; ++i) a[i] += b;
  return a;
}
inline U8 operator<<(U8 a, int count) {
  for (int64_t i = 0; i < kLanes; ++i) a[i] <<= count;
  return a;
}
inline U8 operator&(U8 a, uint32_t mask) {
  for (int64_t i = 0; i < kLanes; ++i) a[i] &= mask;
  return a;
}
inline F8 splat(float value) { return F8{{value, value, value, value, value, value, value, value}}; }
inline F8 as_floats(U8 bits) {
  F8 value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline U8 as_words(F8 value) {
  U8 bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline F8 larger(F8 a, const F8& b) {
  for (int64_t i = 0; i < kLanes; ++i) a[i] = a[i] < b[i] ? b[i] : a[i];
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
