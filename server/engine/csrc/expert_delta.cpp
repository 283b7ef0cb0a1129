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

template <typename T>
float dot(const T* x, const T* a, int64_t size) {
  Floats total = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) total += load(x + i) * load(a + i);
  if (i < size) total += load_some(x + i, size - i) * load_some(a + i, size - i);
  return sum(total);
}

#ifdef __AVX512BF16__
// Pairs of products summed in float32, without unpacking.
template <>
float dot(const c10::BFloat16* x, const c10::BFloat16* a, int64_t size) {
  __m512 total = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    total = _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(x + i),
                             (__m512bh)_mm512_loadu_si512(a + i));
  }
  float rest = 0;
  for (; i < size; ++i) rest += static_cast<float>(x[i]) * static_cast<float>(a[i]);
  return _mm512_reduce_add_ps(total) + rest;
}
#endif

// w * scaling * A x for one token, rounded where the reference rounds. Shapes: x (I,), a (R, I) -> (R,).
template <typename T>
void shrink(const T* x, const T* a, int64_t size, int64_t rank, float weight, float* gated) {
  for (int64_t r = 0; r < rank; ++r) {
    const float shrunk = static_cast<float>(static_cast<T>(dot(x, a + r * size, size)));
    gated[r] = static_cast<float>(static_cast<T>(weight * shrunk));
  }
}

// y += B^T g for COUNT tokens and columns [begin, end). Shapes: b (R, O), gated (COUNT, R).
template <int COUNT, typename T>
void expand(T* const* y, const float* const* gated, const T* b, int64_t features, int64_t rank,
            int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + 2 * kLanes <= end; o += 2 * kLanes) {
    Floats low[COUNT], high[COUNT];
    for (int t = 0; t < COUNT; ++t) {
      low[t] = load(y[t] + o);
      high[t] = load(y[t] + o + kLanes);
    }
    for (int64_t r = 0; r < rank; ++r) {
      const Floats b_low = load(b + r * features + o), b_high = load(b + r * features + o + kLanes);
      for (int t = 0; t < COUNT; ++t) {
        low[t] += gated[t][r] * b_low;
        high[t] += gated[t][r] * b_high;
      }
    }
    for (int t = 0; t < COUNT; ++t) {
      store(y[t] + o, low[t]);
      store(y[t] + o + kLanes, high[t]);
    }
  }
  for (; o < end; o += kLanes) {
    const int64_t count = std::min(kLanes, end - o);
    for (int t = 0; t < COUNT; ++t) {
      Floats total = load_some(y[t] + o, count);
      for (int64_t r = 0; r < rank; ++r) {
        total += gated[t][r] * load_some(b + r * features + o, count);
      }
      store_some(y[t] + o, total, count);
    }
  }
}

template <typename T>
void add_delta(at::Tensor& y, const at::Tensor& x, const Routes& routes, const Site& site) {
  const int64_t rank = site.lora_a.size(0), in = site.lora_a.size(1), out = site.lora_b.size(2);
  const T* x_data = x.const_data_ptr<T>();
  const T* a = site.lora_a.const_data_ptr<T>();
  const T* b = site.lora_b.const_data_ptr<T>();
  T* y_data = y.data_ptr<T>();
  const int64_t x_stride = x.stride(0), y_stride = y.stride(0), pairs = routes.size();

  std::vector<float> gated(pairs * rank);
  at::parallel_for(0, pairs, std::max<int64_t>(1, kGrain / (rank * in)), [&](auto begin, auto end) {
    for (int64_t p = begin; p < end; ++p) {
      shrink(x_data + routes.token(p) * x_stride, a, in, rank,
             static_cast<float>(routes.weight(p) * site.scaling), &gated[p * rank]);
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
        const float* gates[kTile];
        for (int64_t p = first; p < next;) {
          const int64_t count = next - p >= kTile ? kTile : 1;
          for (int64_t t = 0; t < count; ++t) {
            rows[t] = y_data + routes.token(p + t) * y_stride;
            gates[t] = &gated[(p + t) * rank];
          }
          if (count == kTile) {
            expand<kTile>(rows, gates, b_expert, out, rank, o, o_end);
          } else {
            expand<1>(rows, gates, b_expert, out, rank, o, o_end);
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
