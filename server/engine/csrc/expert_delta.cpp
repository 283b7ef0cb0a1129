// alter::expert_delta on a CPU: adds the experts' delta of one adapted linear, in place.
//
// Legend: T tokens, I input features, O output features, R rank, E experts, P routed (token, expert) pairs.
//
// A step's routes are a plan, made once by `alter::route` and read by every linear (see routes.h). With an
// empty plan nothing is done. A token's delta does not depend on what else is in the batch: the order of its
// sums is fixed.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <unordered_map>
#include <vector>

#include "lanes.h"
#include "routes.h"

namespace alter {
namespace {

constexpr int kRanks = 8;           // rows of A at a time
constexpr int64_t kTile = 4;        // tokens that share a load of B
constexpr int64_t kColumns = 512;   // columns of B that stay in the first-level cache meanwhile
constexpr int64_t kGrain = 1 << 15; // multiplications that are worth a thread

struct Site {
  at::Tensor lora_a;  // (R, I)
  at::Tensor lora_b;  // (E, R, O)
  double scaling;
};

std::unordered_map<std::string, Site>& sites() {
  static std::unordered_map<std::string, Site> all;
  return all;
}

void set_site(const std::string& name, const at::Tensor& lora_a, const at::Tensor& lora_b,
              double scaling) {
  TORCH_CHECK(lora_a.is_contiguous() && lora_b.is_contiguous(), "A and B must be contiguous");
  sites()[name] = Site{lora_a, lora_b, scaling};
}

void clear_sites() { sites().clear(); }

// COUNT rows of A times one x, COUNT sums at a time so that none waits for its last addition.
template <int COUNT, typename T>
void dots(const T* x, const T* a, int64_t size, float* out) {
  Floats totals[COUNT] = {};
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = std::min(kLanes, size - i);
    const Floats x_lanes = load_some(x + i, count);
    for (int r = 0; r < COUNT; ++r) totals[r] += x_lanes * load_some(a + r * size + i, count);
  }
  for (int r = 0; r < COUNT; ++r) out[r] = sum(totals[r]);
}

#ifdef __AVX512BF16__
inline __m512bh load_pairs(const c10::BFloat16* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}

// Pairs of products summed in float32, without unpacking.
template <int COUNT>
void dots(const c10::BFloat16* x, const c10::BFloat16* a, int64_t size, float* out) {
  const int64_t whole = size / (2 * kLanes) * (2 * kLanes);
  __m512 totals[COUNT];
  for (auto& total : totals) total = _mm512_setzero_ps();
  for (int64_t i = 0; i < whole; i += 2 * kLanes) {
    const __m512bh pairs = load_pairs(x + i);
    for (int r = 0; r < COUNT; ++r) {
      totals[r] = _mm512_dpbf16_ps(totals[r], pairs, load_pairs(a + r * size + i));
    }
  }
  for (int r = 0; r < COUNT; ++r) {
    out[r] = _mm512_reduce_add_ps(totals[r]);
    for (int64_t i = whole; i < size; ++i) {
      out[r] += static_cast<float>(x[i]) * static_cast<float>(a[r * size + i]);
    }
  }
}
#endif

// w * scaling * A x for one token, rounded where the reference rounds. Shapes: x (I,), a (R, I) -> (R,).
template <typename T>
void shrink(const T* x, const T* a, int64_t size, int64_t rank, float weight, float* gated) {
  int64_t r = 0;
  for (; r + kRanks <= rank; r += kRanks) dots<kRanks>(x, a + r * size, size, gated + r);
  for (; r < rank; ++r) dots<1>(x, a + r * size, size, gated + r);
  for (r = 0; r < rank; ++r) {
    const float shrunk = static_cast<float>(static_cast<T>(gated[r]));
    gated[r] = static_cast<float>(static_cast<T>(weight * shrunk));
  }
}

// y += B^T g for COUNT tokens and columns [begin, end). Shapes: b (R, O), gated (COUNT, R).
template <int COUNT, typename T>
void expand(T* const* y, const float* const* gated, const T* b, int64_t features, int64_t rank,
            int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += kLanes) {
    const int64_t count = std::min(kLanes, end - o);
    Floats totals[COUNT];
    for (int t = 0; t < COUNT; ++t) totals[t] = load_some(y[t] + o, count);
    for (int64_t r = 0; r < rank; ++r) {
      const Floats b_lanes = load_some(b + r * features + o, count);
      for (int t = 0; t < COUNT; ++t) totals[t] += gated[t][r] * b_lanes;
    }
    for (int t = 0; t < COUNT; ++t) store_some(y[t] + o, totals[t], count);
  }
}

#ifdef __AVX512BF16__
inline __m512i rounded(__m512 lanes) {
  const UInts halves = upper_halves(reinterpret_cast<const Floats&>(lanes));
  return reinterpret_cast<const __m512i&>(halves);
}

// Two rows of B at a time. Interleaving them by halves of 128 bits leaves columns in another order, in which
// y is taken apart as well, and put together again.
template <int COUNT>
void expand_pairs(c10::BFloat16* const* y, const uint32_t* const* gated, const c10::BFloat16* b,
                  int64_t features, int64_t rank, int64_t begin, int64_t end) {
  const __m512i zero = _mm512_setzero_si512();
  for (int64_t o = begin; o < end; o += 2 * kLanes) {
    const int64_t count = std::min(2 * kLanes, end - o);
    const __mmask32 mask = count == 2 * kLanes ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
    __m512 low[COUNT], high[COUNT];
#pragma GCC unroll 4
    for (int t = 0; t < COUNT; ++t) {
      const __m512i old = _mm512_maskz_loadu_epi16(mask, y[t] + o);
      low[t] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, old));
      high[t] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, old));
    }
    for (int64_t r = 0; r < rank; r += 2) {
      const auto* row = b + r * features + o;
      const __m512i even = _mm512_maskz_loadu_epi16(mask, row);
      const __m512i odd = r + 1 < rank ? _mm512_maskz_loadu_epi16(mask, row + features) : zero;
      const auto b_low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(even, odd));
      const auto b_high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(even, odd));
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; ++t) {
        const auto g = reinterpret_cast<__m512bh>(_mm512_set1_epi32(gated[t][r / 2]));
        low[t] = _mm512_dpbf16_ps(low[t], b_low, g);
        high[t] = _mm512_dpbf16_ps(high[t], b_high, g);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < COUNT; ++t) {
      const __m512i packed = _mm512_packus_epi32(rounded(low[t]), rounded(high[t]));
      _mm512_mask_storeu_epi16(y[t] + o, mask, packed);
    }
  }
}
#endif

// How `gated` is kept between the two products: as it is, or two bfloat16 numbers in one.
template <typename T>
struct Gates {
  using Value = float;
  static int64_t size(int64_t rank) { return rank; }
  static void keep(const float* gated, int64_t rank, Value* to) { std::copy_n(gated, rank, to); }
  template <int COUNT, typename... Arguments>
  static void run(Arguments... arguments) {
    expand<COUNT>(arguments...);
  }
};

#ifdef __AVX512BF16__
template <>
struct Gates<c10::BFloat16> {
  using Value = uint32_t;
  static int64_t size(int64_t rank) { return (rank + 1) / 2; }
  static void keep(const float* gated, int64_t rank, Value* to) {
    std::fill_n(to, size(rank), 0u);
    for (int64_t r = 0; r < rank; ++r) {
      to[r / 2] |= static_cast<uint32_t>(c10::BFloat16(gated[r]).x) << (r % 2 * 16);
    }
  }
  template <int COUNT, typename... Arguments>
  static void run(Arguments... arguments) {
    expand_pairs<COUNT>(arguments...);
  }
};
#endif

template <typename T>
void add_delta(at::Tensor& y, const at::Tensor& x, const Routes& routes, const Site& site) {
  const int64_t rank = site.lora_a.size(0), in = site.lora_a.size(1), out = site.lora_b.size(2);
  const T* x_data = x.const_data_ptr<T>();
  const T* a = site.lora_a.const_data_ptr<T>();
  const T* b = site.lora_b.const_data_ptr<T>();
  T* y_data = y.data_ptr<T>();
  const int64_t x_stride = x.stride(0), y_stride = y.stride(0), pairs = routes.size();

  using Kept = Gates<T>;
  const int64_t kept_size = Kept::size(rank);
  std::vector<typename Kept::Value> kept(pairs * kept_size);
  at::parallel_for(0, pairs, std::max<int64_t>(1, kGrain / (rank * in)), [&](auto begin, auto end) {
    std::vector<float> gated(rank);
    for (int64_t p = begin; p < end; ++p) {
      shrink(x_data + routes.token(p) * x_stride, a, in, rank,
             static_cast<float>(routes.weight(p) * site.scaling), gated.data());
      Kept::keep(gated.data(), rank, &kept[p * kept_size]);
    }
  });

  const int64_t blocks = (out + 2 * kLanes - 1) / (2 * kLanes);
  const int64_t grain = std::max<int64_t>(1, kGrain / (pairs * rank * 2 * kLanes));
  at::parallel_for(0, blocks, grain, [&](auto begin, auto end) {
    const int64_t last = std::min(out, static_cast<int64_t>(end) * 2 * kLanes);
    for (int64_t first = 0, next; first < pairs; first = next) {
      const int64_t expert = routes.expert(first);
      for (next = first + 1; next < pairs && routes.expert(next) == expert;) ++next;
      const T* b_expert = b + expert * rank * out;
      for (int64_t o = begin * 2 * kLanes; o < last; o += kColumns) {
        const int64_t o_end = std::min(last, o + kColumns);
        T* rows[kTile];
        const typename Kept::Value* gates[kTile];
        for (int64_t p = first; p < next;) {
          const int64_t left = next - p, count = left >= kTile ? kTile : left >= 2 ? 2 : 1;
          for (int64_t t = 0; t < count; ++t) {
            rows[t] = y_data + routes.token(p + t) * y_stride;
            gates[t] = &kept[(p + t) * kept_size];
          }
          if (count == kTile) {
            Kept::template run<kTile>(+rows, +gates, b_expert, out, rank, o, o_end);
          } else if (count == 2) {
            Kept::template run<2>(+rows, +gates, b_expert, out, rank, o, o_end);
          } else {
            Kept::template run<1>(+rows, +gates, b_expert, out, rank, o, o_end);
          }
          p += count;
        }
      }
    }
  });
}

void expert_delta(at::Tensor& y, const at::Tensor& x, const at::Tensor& plan,
                  const std::string& site_name) {
  const Routes routes(plan);
  if (routes.size() == 0) return;
  const auto found = sites().find(site_name);
  TORCH_CHECK(found != sites().end(), "no such site: ", site_name);
  const Site& site = found->second;
  TORCH_CHECK(y.dim() == 2 && x.dim() == 2 && y.stride(1) == 1 && x.stride(1) == 1,
              "x and y must be rows of features");
  TORCH_CHECK(x.size(1) == site.lora_a.size(1) && y.size(1) == site.lora_b.size(2),
              site_name, " takes ", site.lora_a.size(1), " features and gives ", site.lora_b.size(2),
              ", not ", x.size(1), " and ", y.size(1));
  TORCH_CHECK(x.scalar_type() == site.lora_a.scalar_type() && y.scalar_type() == x.scalar_type(),
              site_name, " is served in another type");
  ALTER_DISPATCH(x.scalar_type(), "expert_delta",
                           [&] { add_delta<scalar_t>(y, x, routes, site); });
}

}  // namespace
}  // namespace alter

TORCH_LIBRARY_FRAGMENT(alter_cpu, library) {
  library.def("set_site(str name, Tensor lora_a, Tensor lora_b, float scaling) -> ()",
              &alter::set_site);
  library.def("clear_sites() -> ()", &alter::clear_sites);
}

TORCH_LIBRARY_IMPL(alter, CPU, library) { library.impl("expert_delta", &alter::expert_delta); }
