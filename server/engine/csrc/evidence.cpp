// Router logits on a CPU, from tables of what each token adds to each unit of each evidence head.
//
// A head is w2 . relu(sum_g W1_g e(x_{t-G+1+g}) + b1) + b2. Its first layer is linear, so that W1_g e(v) is
// looked up instead of multiplied out: a table holds it for every token v seen so far, b1 included at the last
// place. The window's maximum is kept per request in two parts: the maximum of its current block of W tokens,
// and, of the block before, the maxima of its ends.
//
// Legend: Q requests, M positions, G n-gram, H units (padded to a multiple of 16), N active domains, W window,
// S states, R table rows, C heads that lie together, K such groups.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace alter {
namespace {

constexpr float kNoEvidence = -1e4f;
constexpr int64_t kPrefetch = 4;    // domains ahead
constexpr int64_t kGrain = 1 << 14; // table numbers that are worth a thread

struct Heads {
  const c10::Half* table;   // (K, R, G, C, H): a token's part of C heads lies together
  const int64_t* columns;   // (N,) of K C
  const float* w2;          // (N, H)
  const float* b2;          // (N,)
  int64_t num_domains, num_rows, ngram, group, units;

  Heads(const at::Tensor& table, const at::Tensor& columns, const at::Tensor& w2, const at::Tensor& b2)
      : table(table.const_data_ptr<c10::Half>()),
        columns(columns.const_data_ptr<int64_t>()),
        w2(w2.const_data_ptr<float>()),
        b2(b2.const_data_ptr<float>()),
        num_domains(w2.size(0)),
        num_rows(table.size(1)),
        ngram(table.size(2)),
        group(table.size(3)),
        units(table.size(4)) {
    TORCH_CHECK(units % kLanes == 0 && w2.size(1) == units, "units must be padded");
    TORCH_CHECK(w2.is_contiguous() && table.is_contiguous(), "tables must be contiguous");
  }

  const c10::Half* part(int64_t domain, int64_t row, int64_t place) const {
    const int64_t column = columns[domain];
    const int64_t parts = (column / group * num_rows + row) * ngram + place;
    return table + (parts * group + column % group) * units;
  }

  // Evidence of all domains for one token. `rows` are the table rows of the n-gram, -1 before the start.
  void score(const int32_t* rows, float* scores) const {
    for (int64_t n = 0; n < num_domains; ++n) {
      if (n + kPrefetch < num_domains) {
        for (int64_t g = 0; g < ngram; ++g) {
          if (rows[g] < 0) continue;
          const auto* ahead = reinterpret_cast<const char*>(part(n + kPrefetch, rows[g], g));
          for (int64_t byte = 0; byte < units * 2; byte += 64) __builtin_prefetch(ahead + byte);
        }
      }
      Floats total = {};
      for (int64_t h = 0; h < units; h += kLanes) {
        Floats unit = {};
        for (int64_t g = 0; g < ngram; ++g) {
          if (rows[g] >= 0) unit += load(part(n, rows[g], g) + h);
        }
        total += positive(unit) * load(w2 + n * units + h);
      }
      scores[n] = sum(total) + b2[n];
    }
  }
};

// Positions [first, end) of one request.
struct Span {
  const int32_t* token_ids;
  int64_t first, start, end;  // [first, start) only warms the window up
  int64_t offset;             // of `first` in scores
};

// Table rows of the n-grams that end at positions [first, end): (end - first + G - 1,). Notes missing tokens.
void look_up(const Span& span, int64_t ngram, const int32_t* row_of_token, std::vector<int32_t>& rows,
             std::vector<int64_t>& missing) {
  for (int64_t p = span.first - (ngram - 1); p < span.end; ++p) {
    const int32_t row = p < 0 ? -1 : row_of_token[span.token_ids[p]];
    if (p >= 0 && row < 0) missing.push_back(span.token_ids[p]);
    rows.push_back(row);
  }
}

at::Tensor unique(std::vector<int64_t>& tokens) {
  std::sort(tokens.begin(), tokens.end());
  tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
  auto result = at::empty({static_cast<int64_t>(tokens.size())}, at::TensorOptions().dtype(at::kLong));
  std::copy(tokens.begin(), tokens.end(), result.data_ptr<int64_t>());
  return result;
}

void score_all(const Heads& heads, const std::vector<Span>& spans, const std::vector<int32_t>& rows,
               float* scores) {
  // Position i of a span ends the n-gram that starts at its i-th row.
  std::vector<int64_t> first_row;
  int64_t at = 0;
  for (const Span& span : spans) {
    for (int64_t p = span.first; p < span.end; ++p) first_row.push_back(at++);
    at += heads.ngram - 1;
  }
  const int64_t work = std::max<int64_t>(1, heads.num_domains * heads.ngram * heads.units);
  at::parallel_for(0, first_row.size(), std::max<int64_t>(1, kGrain / work), [&](auto begin, auto end) {
    for (int64_t m = begin; m < end; ++m) {
      heads.score(&rows[first_row[m]], scores + m * heads.num_domains);
    }
  });
}

// A request's window: `blocks` (W, N), `running` (N,), `filled` tokens so far.
struct Window {
  float* blocks;
  float* running;
  int64_t* filled;
  int64_t width, num_domains;

  void clear() {
    std::fill_n(blocks, width * num_domains, kNoEvidence);
    std::fill_n(running, num_domains, kNoEvidence);
    *filled = 0;
  }

  void add(const float* scores, float* maximum) {
    const int64_t at = *filled % width;
    if (at == 0 && *filled > 0) begin_block();
    float* row = blocks + at * num_domains;
    const float* before = at + 1 < width ? row + num_domains : nullptr;
    for (int64_t n = 0; n < num_domains; ++n) {
      row[n] = scores[n];
      running[n] = std::max(running[n], scores[n]);
    }
    if (maximum != nullptr) {
      for (int64_t n = 0; n < num_domains; ++n) {
        maximum[n] = before == nullptr ? running[n] : std::max(running[n], before[n]);
      }
    }
    ++*filled;
  }

  // Turns the block just filled into the maxima of its ends; the next one overwrites what it no longer needs.
  void begin_block() {
    for (int64_t i = width - 2; i >= 0; --i) {
      float* row = blocks + i * num_domains;
      for (int64_t n = 0; n < num_domains; ++n) row[n] = std::max(row[n], row[n + num_domains]);
    }
    std::fill_n(running, num_domains, kNoEvidence);
  }
};

// Router logits of all new tokens: `logits` (sum of counts, N) is written, windows are moved on.
// Returns token ids without a table row; if there are any, nothing was done.
at::Tensor step(const at::Tensor& token_ids, const at::Tensor& starts, const at::Tensor& counts,
                const at::Tensor& states, at::Tensor& ends, at::Tensor& filled, at::Tensor& blocks,
                at::Tensor& running, const at::Tensor& row_of_token, const at::Tensor& table,
                const at::Tensor& columns, const at::Tensor& w2, const at::Tensor& b2,
                at::Tensor& logits) {
  const Heads heads(table, columns, w2, b2);
  const int64_t width = blocks.size(1), num_domains = heads.num_domains;
  const int64_t* start_of = starts.const_data_ptr<int64_t>();
  const int64_t* count_of = counts.const_data_ptr<int64_t>();
  const int64_t* state_of = states.const_data_ptr<int64_t>();
  int64_t* end_of = ends.data_ptr<int64_t>();

  std::vector<Span> spans;
  std::vector<int32_t> rows;
  std::vector<int64_t> missing;
  int64_t offset = 0;
  for (int64_t q = 0; q < starts.size(0); ++q) {
    const int64_t start = start_of[q];
    const bool is_known = end_of[state_of[q]] == start;
    Span span{token_ids.const_data_ptr<int32_t>() + q * token_ids.stride(0),
              is_known ? start : std::max<int64_t>(0, start - (width - 1)), start,
              start + count_of[q], offset};
    offset += span.end - span.first;
    look_up(span, heads.ngram, row_of_token.const_data_ptr<int32_t>(), rows, missing);
    spans.push_back(span);
  }
  if (!missing.empty()) return unique(missing);

  std::vector<float> scores(offset * num_domains);
  score_all(heads, spans, rows, scores.data());
  std::vector<int64_t> first_logit(spans.size());
  for (size_t q = 1; q < spans.size(); ++q) first_logit[q] = first_logit[q - 1] + count_of[q - 1];
  float* to = logits.data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 4 * num_domains));
  at::parallel_for(0, spans.size(), grain, [&](auto begin, auto end) {
    for (int64_t q = begin; q < end; ++q) {
      const Span& span = spans[q];
      const int64_t state = state_of[q];
      Window window{blocks.data_ptr<float>() + state * width * num_domains,
                    running.data_ptr<float>() + state * num_domains,
                    filled.data_ptr<int64_t>() + state, width, num_domains};
      if (end_of[state] != span.start) window.clear();
      for (int64_t p = span.first; p < span.end; ++p) {
        window.add(&scores[(span.offset + p - span.first) * num_domains],
                   p < span.start ? nullptr : to + (first_logit[q] + p - span.start) * num_domains);
      }
      end_of[state] = span.end;
    }
  });
  return unique(missing);
}

// Evidence of every token of one text: `scores` (M, N) is written. Returns what `step` returns.
at::Tensor scores(const at::Tensor& token_ids, const at::Tensor& row_of_token, const at::Tensor& table,
                  const at::Tensor& columns, const at::Tensor& w2, const at::Tensor& b2,
                  at::Tensor& scores) {
  const Heads heads(table, columns, w2, b2);
  const std::vector<Span> spans{{token_ids.const_data_ptr<int32_t>(), 0, 0, token_ids.size(0), 0}};
  std::vector<int32_t> rows;
  std::vector<int64_t> missing;
  look_up(spans[0], heads.ngram, row_of_token.const_data_ptr<int32_t>(), rows, missing);
  if (missing.empty()) score_all(heads, spans, rows, scores.data_ptr<float>());
  return unique(missing);
}

}  // namespace
}  // namespace alter

TORCH_LIBRARY_FRAGMENT(alter_cpu, library) {
  library.def(
      "evidence_step(Tensor token_ids, Tensor starts, Tensor counts, Tensor states, Tensor(a!) ends, "
      "Tensor(b!) filled, Tensor(c!) blocks, Tensor(d!) running, Tensor row_of_token, Tensor table, "
      "Tensor columns, Tensor w2, Tensor b2, Tensor(e!) logits) -> Tensor",
      &alter::step);
  library.def(
      "evidence_scores(Tensor token_ids, Tensor row_of_token, Tensor table, Tensor columns, "
      "Tensor w2, Tensor b2, Tensor(a!) scores) -> Tensor",
      &alter::scores);
}
