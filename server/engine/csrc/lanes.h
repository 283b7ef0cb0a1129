// Sixteen numbers at a time, computed in float32, from and to the types that models are served in.
//
// GCC's and Clang's vector extension, so that one text serves every processor; intrinsics where the
// extension cannot say what an instruction does.
#pragma once

#include <ATen/Dispatch.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Runs a lambda with `scalar_t` for the types that models are served in.
#define ALTER_DISPATCH(TYPE, NAME, ...)                                       \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__)           \
                                     AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__)           \
                                         AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__))

namespace alter {

constexpr int64_t kLanes = 16;

using Floats = float __attribute__((vector_size(64)));
using UInts = uint32_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32)));

inline Floats load(const float* from) {
  Floats lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline Floats load(const c10::BFloat16* from) {
  Shorts halves;
  std::memcpy(&halves, from, sizeof halves);
  const UInts bits = __builtin_convertvector(halves, UInts) << 16;
  return reinterpret_cast<const Floats&>(bits);
}

inline Floats load(const c10::Half* from) {
#ifdef __AVX512F__
  const auto lanes = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return reinterpret_cast<const Floats&>(lanes);
#else
  Floats lanes;
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(from[i]);
  return lanes;
#endif
}

inline void store(float* to, Floats lanes) { std::memcpy(to, &lanes, sizeof lanes); }

// The upper halves, to the nearest bfloat16, ties to even.
inline UInts upper_halves(Floats lanes) {
  const UInts bits = reinterpret_cast<const UInts&>(lanes);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

inline void store(c10::BFloat16* to, Floats lanes) {
  const UInts bits = upper_halves(lanes);
  const Shorts halves = __builtin_convertvector(bits, Shorts);
  std::memcpy(to, &halves, sizeof halves);
}

inline void store(c10::Half* to, Floats lanes) {
  for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<c10::Half>(lanes[i]);
}

// The first `count` <= 16 numbers; the other lanes are zero.
template <typename T>
Floats load_some(const T* from, int64_t count) {
  if (count == kLanes) return load(from);
  T whole[kLanes] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return load(whole);
}

template <typename T>
void store_some(T* to, Floats lanes, int64_t count) {
  if (count == kLanes) return store(to, lanes);
  T whole[kLanes];
  store(whole, lanes);
  std::memcpy(to, whole, count * sizeof(T));
}

inline Floats positive(Floats lanes) {
  const Ints is_positive = lanes > 0;
  const Ints kept = reinterpret_cast<const Ints&>(lanes) & is_positive;
  return reinterpret_cast<const Floats&>(kept);
}

inline float sum(Floats lanes) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(reinterpret_cast<const __m512&>(lanes));
#else
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
#endif
}

}  // namespace alter
