// SynPO's loss of each pair and its gradient to every token log-prob, in one parallel loop over the pairs.
// The formulas are in synpo_fast/ops/pair_loss/pair_loss.py.
#include "pair_loss.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <atomic>
#include <cmath>

namespace synpo_fast {
namespace {

struct Response {
  const float* logps;
  const bool* mask;
  int64_t begin, end;

  int64_t count = 0;
  double sum = 0, likelihood = 0;

  Response(const float* logps, const bool* mask, int64_t begin, int64_t end)
      : logps(logps), mask(mask), begin(begin), end(end) {
    each([&](int64_t t) {
      ++count;
      sum += logps[t];
      likelihood += std::exp(logps[t]);
    });
  }

  template <typename Body>
  void each(Body body) const {
    for (int64_t t = begin; t < end; ++t) {
      if (!mask || mask[t]) body(t);
    }
  }
};

float sigmoid(float x) {
  const float e = std::exp(-std::abs(x));
  return (x >= 0 ? 1.f : e) / (1.f + e);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> synpo_pair_loss(
    const at::Tensor& logps, const at::Tensor& chosen_offsets, const at::Tensor& rejected_offsets,
    const std::optional<at::Tensor>& mask, double alpha_in, double beta_in, bool logsigmoid) {
  TORCH_CHECK_VALUE(logps.dim() == 1 && logps.is_contiguous() && logps.scalar_type() == at::kFloat, "logps must be contiguous float32 [N]");
  for (const at::Tensor* offsets : {&chosen_offsets, &rejected_offsets}) {
    TORCH_CHECK_VALUE(offsets->dim() == 1 && offsets->is_contiguous() && offsets->scalar_type() == at::kLong &&
            offsets->size(0) == chosen_offsets.size(0) && offsets->size(0) >= 2,
        "offsets must be contiguous int64 [P + 1] of the same length");
    const int64_t* o = offsets->const_data_ptr<int64_t>();
    const int64_t n = offsets->size(0);
    TORCH_CHECK_VALUE(o[0] >= 0 && o[n - 1] <= logps.size(0) && std::is_sorted(o, o + n), "offsets must rise within [0, ", logps.size(0), "]");
  }
  TORCH_CHECK_VALUE(!mask || (mask->is_contiguous() && mask->scalar_type() == at::kBool && mask->sizes() == logps.sizes()),
      "mask must be contiguous bool [", logps.size(0), "]");

  const int64_t num_pairs = chosen_offsets.size(0) - 1;
  at::Tensor losses = at::empty({num_pairs}, logps.options());
  at::Tensor statistics = at::zeros({5, num_pairs}, logps.options());
  at::Tensor coefficients = at::zeros_like(logps);
  const float* lp = logps.const_data_ptr<float>();
  const bool* counted = mask ? mask->const_data_ptr<bool>() : nullptr;
  const int64_t* chosen_at = chosen_offsets.const_data_ptr<int64_t>();
  const int64_t* rejected_at = rejected_offsets.const_data_ptr<int64_t>();
  float* loss = losses.mutable_data_ptr<float>();
  float* stats = statistics.mutable_data_ptr<float>();
  float* c = coefficients.mutable_data_ptr<float>();
  const float alpha = static_cast<float>(alpha_in), beta = static_cast<float>(beta_in);
  std::atomic<int> empty{0};

  at::parallel_for(0, num_pairs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Response chosen(lp, counted, chosen_at[i], chosen_at[i + 1]);
      const Response rejected(lp, counted, rejected_at[i], rejected_at[i + 1]);
      if (chosen.count == 0 || rejected.count == 0) {
        loss[i] = 0.f;
        ++empty;
        continue;
      }
      const float mean_chosen = chosen.sum / chosen.count, mean_rejected = rejected.sum / rejected.count;
      const float G_chosen = std::exp(mean_chosen), G_rejected = std::exp(mean_rejected);
      const float A_chosen = chosen.likelihood / chosen.count;
      const float x = alpha * (G_chosen - G_rejected);
      const float link = logsigmoid ? std::min(x, 0.f) - std::log1p(std::exp(-std::abs(x))) : sigmoid(x);
      const float w = logsigmoid ? sigmoid(-x) : sigmoid(x) * sigmoid(-x);
      loss[i] = -link - beta * A_chosen;
      const float values[5] = {mean_chosen, mean_rejected, G_chosen, G_rejected, A_chosen};
      for (int64_t k = 0; k < 5; ++k) stats[k * num_pairs + i] = values[k];
      chosen.each([&](int64_t t) { c[t] = -(alpha * w * G_chosen + beta * std::exp(lp[t])) / chosen.count; });
      rejected.each([&](int64_t t) { c[t] = alpha * w * G_rejected / rejected.count; });
    }
  });
  at::Tensor num_empty = at::empty({1}, logps.options().dtype(at::kInt));
  *num_empty.mutable_data_ptr<int>() = empty.load();
  return {losses, statistics, coefficients, num_empty};
}

}  // namespace synpo_fast
