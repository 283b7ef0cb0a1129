// Eq. 7 and 9 on a CPU: from router logits and the residual stream at the tap layer to a plan.
//
// Legend: T tokens of the batch, padding included; L of them real; N active domains; D hidden; H units;
// E experts; K experts that a token may combine.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"

namespace alter {
namespace {

struct Route {
  int32_t expert;
  int32_t token;
  float weight;
};

// h / rms(h) of the residual stream. Shapes: hidden (T, D), residual (T, D) or none -> (L, D) float32.
template <typename T>
void normalise(const at::Tensor& hidden, const std::optional<at::Tensor>& residual, at::Tensor& out) {
  const int64_t size = hidden.size(1);
  const T* h = hidden.const_data_ptr<T>();
  const T* r = residual ? residual->const_data_ptr<T>() : nullptr;
  float* to = out.data_ptr<float>();
  at::parallel_for(0, out.size(0), 16, [&](auto begin, auto end) {
    for (int64_t t = begin; t < end; ++t) {
      const T *h_row = h + t * size, *r_row = r ? r + t * size : nullptr;
      float* row = to + t * size;
      Floats squares = {};
      for (int64_t d = 0; d < size; d += kLanes) {
        const int64_t count = std::min(kLanes, size - d);
        Floats sum = load_some(h_row + d, count);
        if (r_row) {  // rounded as the model's own addition is
          T rounded[kLanes];
          store(rounded, sum + load_some(r_row + d, count));
          sum = load(rounded);
        }
        squares += sum * sum;
        store_some(row + d, sum, count);
      }
      const float mean = alter::sum(squares) / static_cast<float>(size);
      const float scale = 1 / std::sqrt(mean + 1e-6f);
      for (int64_t d = 0; d < size; ++d) row[d] *= scale;
    }
  });
}

// Which tokens have an estimated entropy above the threshold. Shapes: -> (L,).
std::vector<char> high_entropy(const at::Tensor& hidden, const std::optional<at::Tensor>& residual,
                               int64_t num_tokens, const at::Tensor& fc1_weight,
                               const at::Tensor& fc1_bias, const at::Tensor& fc2_weight,
                               double fc2_bias, double threshold) {
  auto rows = at::empty({num_tokens, hidden.size(1)}, hidden.options().dtype(at::kFloat));
  ALTER_DISPATCH(hidden.scalar_type(), "route",
                           [&] { normalise<scalar_t>(hidden, residual, rows); });
  const auto units = at::addmm(fc1_bias, rows, fc1_weight.t());
  const float* u = units.const_data_ptr<float>();
  const float* w = fc2_weight.const_data_ptr<float>();
  std::vector<char> is_high(num_tokens);
  for (int64_t t = 0; t < num_tokens; ++t) {
    float score = 0;
    for (int64_t h = 0; h < units.size(1); ++h) score += w[h] * std::max(u[t * units.size(1) + h], 0.f);
    const double logit = score + fc2_bias;
    const double entropy = logit > 20 ? logit : std::log1p(std::exp(logit));
    is_high[t] = entropy > threshold;
  }
  return is_high;
}

// Softmax weights of the `top_k` best of the domains that beat retain. Shapes: logits (N,).
void combine(const float* logits, int64_t num_domains, double temperature, int64_t top_k,
             std::vector<std::pair<float, int64_t>>& best) {
  best.clear();
  float largest = 0;  // retain's
  for (int64_t n = 0; n < num_domains; ++n) largest = std::max(largest, logits[n]);
  double total = std::exp(-largest / temperature);
  for (int64_t n = 0; n < num_domains; ++n) {
    const double part = std::exp((logits[n] - largest) / temperature);
    total += part;
    if (logits[n] > 0) best.emplace_back(static_cast<float>(part), n);
  }
  const auto kept = std::min<size_t>(best.size(), top_k);
  std::partial_sort(best.begin(), best.begin() + kept, best.end(), [](auto& a, auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  best.resize(kept);
  for (auto& [weight, n] : best) weight = static_cast<float>(weight / total);
  std::erase_if(best, [](const auto& entry) { return entry.first == 0; });
}

// See `Gate.route`; `counts` (E, 2) of int64 [high, low] is added to. -> plan (1 + 3 T K,) of int32.
at::Tensor route(const at::Tensor& hidden, const std::optional<at::Tensor>& residual,
                 const at::Tensor& fc1_weight, const at::Tensor& fc1_bias,
                 const at::Tensor& fc2_weight, double fc2_bias, double threshold,
                 const at::Tensor& logits, const at::Tensor& experts, at::Tensor& counts,
                 double temperature, int64_t top_k, bool has_retain_expert) {
  TORCH_CHECK(hidden.is_contiguous() && (!residual || residual->is_contiguous()),
              "the residual stream must be contiguous");
  const int64_t num_tokens = logits.size(0), num_domains = logits.size(1);
  TORCH_CHECK(num_tokens <= hidden.size(0), "more tokens than the batch has rows");
  const int64_t capacity = hidden.size(0) * (1 + top_k);
  auto plan = at::empty({1 + 3 * capacity}, at::TensorOptions().dtype(at::kInt));
  int32_t* data = plan.data_ptr<int32_t>();
  data[0] = 0;
  if (num_tokens == 0) return plan;

  const auto is_high = high_entropy(hidden, residual, num_tokens, fc1_weight, fc1_bias, fc2_weight,
                                    fc2_bias, threshold);
  const float* all = logits.const_data_ptr<float>();
  const int64_t* expert_of = experts.const_data_ptr<int64_t>();
  int64_t* count = counts.data_ptr<int64_t>();
  std::vector<Route> routes;
  std::vector<std::pair<float, int64_t>> best;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const float* row = all + t * num_domains;
    const int path = is_high[t] ? 0 : 1;
    const auto token = static_cast<int32_t>(t);
    float largest = 0;
    for (int64_t n = 0; n < num_domains; ++n) largest = std::max(largest, row[n]);
    if (largest <= 0) {
      ++count[path];
      if (has_retain_expert) routes.push_back({0, token, 1.f});
    } else if (is_high[t]) {
      combine(row, num_domains, temperature, top_k, best);
      if (best.empty()) ++count[path];
      for (const auto& [weight, n] : best) {
        routes.push_back({static_cast<int32_t>(expert_of[n]), token, weight});
        ++count[expert_of[n] * 2 + path];
      }
      if (has_retain_expert) routes.push_back({0, token, 1.f});
    } else {
      const int64_t n = std::max_element(row, row + num_domains) - row;
      routes.push_back({static_cast<int32_t>(expert_of[n]), token, 1.f});
      ++count[expert_of[n] * 2 + path];
    }
  }
  std::stable_sort(routes.begin(), routes.end(),
                   [](const Route& a, const Route& b) { return a.expert < b.expert; });
  data[0] = static_cast<int32_t>(routes.size());
  for (size_t p = 0; p < routes.size(); ++p) {
    data[1 + p] = routes[p].expert;
    data[1 + capacity + p] = routes[p].token;
    std::memcpy(data + 1 + 2 * capacity + p, &routes[p].weight, sizeof(float));
  }
  return plan;
}

}  // namespace
}  // namespace alter

TORCH_LIBRARY_FRAGMENT(alter_cpu, library) {
  library.def(
      "route(Tensor hidden, Tensor? residual, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, "
      "float fc2_bias, float threshold, Tensor logits, Tensor experts, Tensor(a!) counts, "
      "float temperature, int top_k, bool has_retain_expert) -> Tensor",
      &alter::route);
}
