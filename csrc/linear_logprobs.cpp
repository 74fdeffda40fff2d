// Token log-probs of a linear head on CPUs, without storing all logits.
//
// Each block of rows is processed in tiles of the vocabulary. A tile takes one ATen GEMM, one softmax pass while the tile is in
// cache, and, if a gradient is wanted, a second GEMM that multiplies the exponentials by the rows of W:
//
//   lp_n = -log1p(S_n / e_n)                     S_n = sum over v != y_n of exp(z_nv - m_n),   e_n = exp(z_ny - m_n)
//   d lp_n / d hidden_n = (1 - p_n) z'_ny W[y_n] - sum over v != y_n of p_nv z'_nv W[v]
//
// The target is excluded from S and from the second GEMM, and its logit is a separate fp32 dot product, not a rounded entry of a
// tile. So lp cannot exceed 0, and a confident token (1 - p far below one ulp of 1) keeps its gradient. m starts at the target's
// logit and follows the running maximum; earlier partial sums are scaled down as it grows.
//
// fp16 tiles are converted to fp32, because ATen's fp16 GEMM on CPUs is orders of magnitude slower than its fp32 one.
#include "linear_logprobs.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace synpo_fast {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kRowBlock = 1024;            // rows that are processed together in one pass over the vocabulary
constexpr int64_t kTileElements = 512 * 2048;  // logits held at a time: 2-4 MB, so that a tile is still in cache for the softmax pass
constexpr int64_t kMinTileColumns = 512;       // narrower GEMMs lose efficiency
constexpr int64_t kMaxTileColumns = 4096;

struct Softmax {
  float scale;
  float softcap;  // 0: none

  // slope is z' = dz/d(raw), computed from z alone.
  Vec value(Vec raw) const {
    Vec z = raw * Vec(scale);
    return softcap == 0.f ? z : (z / Vec(softcap)).tanh() * Vec(softcap);
  }
  Vec slope(Vec z) const {
    Vec t = z / Vec(softcap);
    return Vec(scale) * (Vec(1.f) - t * t);
  }
  float value(float raw) const {
    float z = raw * scale;
    return softcap == 0.f ? z : std::tanh(z / softcap) * softcap;
  }
  float slope(float z) const {
    return softcap == 0.f ? scale : scale * (1.f - (z / softcap) * (z / softcap));
  }
};

template <typename T>
Vec load(const T* p, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    return n == Vec::size() ? Vec::loadu(p) : Vec::loadu(p, n);
  } else {
    using Half = at::vec::Vectorized<T>;
    return std::get<0>(at::vec::convert_to_float<T>(Half::loadu(p, n)));
  }
}

template <typename T>
void store(T* p, Vec x, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    n == Vec::size() ? x.store(p) : x.store(p, n);
  } else {
    at::vec::convert_from_float<T>(x, Vec(0.f)).store(p, n);
  }
}

template <typename Body>
void each_vector(int64_t n, Body body) {
  for (int64_t i = 0; i < n; i += Vec::size()) body(i, std::min<int64_t>(Vec::size(), n - i));
}

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
  Vec sum(0.f);
  each_vector(n, [&](int64_t i, int64_t k) { sum = at::vec::fmadd(load(a + i, k), load(b + i, k), sum); });
  return at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, sum);
}

// Writes the logits of one row of a tile in fp32, with bias, scale and softcap applied, padded with -inf to whole vectors.
// Returns their maximum.
template <typename T>
float unpack_row(const T* raw, const T* bias, float* z, int64_t n, const Softmax& f) {
  Vec top(-std::numeric_limits<float>::infinity());
  each_vector(n, [&](int64_t i, int64_t k) {
    Vec x = load(raw + i, k);
    if (bias) x = x + load(bias + i, k);
    x = f.value(x);
    if (k < Vec::size()) x = Vec::set(Vec(-std::numeric_limits<float>::infinity()), x, k);
    x.store(z + i);
    top = at::vec::maximum(top, x);
  });
  return at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return at::vec::maximum(x, y); }, top);
}

struct RowState {
  float target;  // z_ny
  float top;     // m: the reference of the exponentials
  float others;  // S
  // Only with statistics: the sums over v != y of e (z - m) and of e^2, where e = exp(z - m).
  float weighted;
  float squares;
};

// Softmax pass over one row of a tile: updates the state and, with `keep`, overwrites the logits with exp(z - m) (target: 0), times z' if
// there is a softcap. Returns the factor by which earlier partial sums must be multiplied.
template <bool kStats, typename T>
float softmax_row(T* tile, const T* bias, float* z, int64_t n, int64_t target, bool keep, const Softmax& f, RowState& s) {
  const Vec nothing(-std::numeric_limits<float>::infinity());
  float top = unpack_row(tile, bias, z, n, f);
  if (target >= 0 && target < n) {
    z[target] = -std::numeric_limits<float>::infinity();
    top = -std::numeric_limits<float>::infinity();
    each_vector(n, [&](int64_t i, int64_t) { top = std::max(top, at::vec::vec_reduce_all<float>(
        [](Vec x, Vec y) { return at::vec::maximum(x, y); }, Vec::loadu(z + i))); });
  }
  float shrink = 1.f;
  if (top > s.top) {
    shrink = std::exp(s.top - top);
    if constexpr (kStats) {
      s.weighted = shrink == 0.f ? 0.f : shrink * (s.weighted + (s.top - top) * s.others);
      s.squares *= shrink * shrink;
    }
    s.top = top;
  }
  Vec sum(0.f), weighted(0.f), squares(0.f), reference(s.top);
  each_vector(n, [&](int64_t i, int64_t k) {
    Vec x = Vec::loadu(z + i);
    Vec below = x - reference;
    Vec e = below.exp();
    sum = sum + e;
    if constexpr (kStats) {
      weighted = at::vec::fmadd(e, at::vec::maximum(below, Vec(-1e4f)), weighted);  // e is 0 there, and 0 * -inf would be NaN
      squares = at::vec::fmadd(e, e, squares);
    }
    if (!keep) return;
    if (f.softcap != 0.f) {
      e = e * f.slope(x);
      // The padding and the target hold -inf, where the slope is NaN.
      e = Vec::blendv(e, Vec(0.f), x == nothing);
    }
    store(tile + i, e, k);
  });
  const auto total = [](Vec x) { return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, x); };
  s.others = s.others * shrink + total(sum);
  if constexpr (kStats) {
    s.weighted += total(weighted);
    s.squares += total(squares);
  }
  return shrink;
}

// log sum exp z, entropy, 1 if no logit exceeds the label's, log sum of squared probabilities.
void write_stats(float* out, const RowState& s) {
  const float below = s.target - s.top, e = std::exp(below), total = s.others + e, log_total = std::log(total);
  out[0] = s.top + log_total;
  out[1] = log_total - (s.weighted + (e == 0.f ? 0.f : e * below)) / total;
  out[2] = s.target == s.top ? 1.f : 0.f;
  out[3] = std::log(s.squares + e * e) - 2.f * log_total;
}

// The weight in vocabulary tiles, converted to the dtype of the GEMMs (fp32 for fp16 inputs).
struct Tiles {
  const at::Tensor& weight;
  at::ScalarType gemm_dtype;
  int64_t columns;

  at::Tensor rows(int64_t begin, int64_t count) const { return weight.narrow(0, begin, count).to(gemm_dtype); }
};

int64_t tile_columns(int64_t rows, int64_t vocabulary) {
  int64_t wanted = kTileElements / std::max<int64_t>(rows, 1) / 64 * 64;
  return std::min(vocabulary, std::clamp(wanted, kMinTileColumns, kMaxTileColumns));
}

at::Tensor unit_stride_rows(const at::Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

// Rescales the exponentials of every tile to the row's final reference. Sets the target's entry so that the product with the row's
// coefficient also gives the target's logit gradient, (1 - p) z'.
template <typename T>
void settle_exponentials(
    const at::Tensor& exponentials, const std::vector<float>& tile_top, int64_t columns, const std::vector<RowState>& state,
    const int64_t* label, const Softmax& f) {
  const int64_t N = exponentials.size(0), V = exponentials.size(1), stride = exponentials.stride(0);
  T* e = exponentials.mutable_data_ptr<T>();
  at::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const RowState& s = state[n];
      for (int64_t v0 = 0; v0 < V; v0 += columns) {
        const float top = tile_top[v0 / columns * N + n];
        if (top == s.top) continue;
        const Vec factor(std::exp(top - s.top));
        T* row = e + n * stride + v0;
        each_vector(std::min(columns, V - v0), [&](int64_t i, int64_t k) { store(row + i, load(row + i, k) * factor, k); });
      }
      e[n * stride + label[n]] = static_cast<T>(-s.others * f.slope(s.target) / (f.softcap == 0.f ? f.scale : 1.f));
    }
  });
}

// Computes one block of rows: fills logps and normalisers and, if they are not empty, the direction, the exponentials and the statistics.
// T is the type of the products, W that of the inputs, R that of the direction.
template <typename T, typename W, typename R>
void forward_block(
    const at::Tensor& hidden, const at::Tensor& hidden_gemm, const Tiles& tiles, const at::Tensor& labels,
    const at::Tensor* bias, const Softmax& f, const at::Tensor& logps, const at::Tensor& normalisers,
    const at::Tensor& direction, const at::Tensor& exponentials, const at::Tensor& stats) {
  const int64_t N = hidden.size(0), D = hidden.size(1), V = tiles.weight.size(0), columns = tiles.columns;
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const W* x = hidden.const_data_ptr<W>();
  const W* w = tiles.weight.const_data_ptr<W>();
  const int64_t w_stride = tiles.weight.stride(0);
  const T* b = bias ? bias->const_data_ptr<T>() : nullptr;
  const bool weigh = direction.numel() > 0, keep_all = exponentials.numel() > 0, want_stats = stats.numel() > 0;
  const bool keep = weigh || keep_all;

  std::vector<RowState> state(N);
  at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      float raw = dot(x + n * D, w + label[n] * w_stride, D) + (b ? static_cast<float>(b[label[n]]) : 0.f);
      float z = f.value(raw);
      state[n] = {z, z, 0.f, 0.f, 0.f};
    }
  });

  auto options = hidden_gemm.options();
  at::Tensor buffer = at::empty({keep_all ? 0 : N * columns}, options);
  std::vector<float> tile_top(keep_all ? (V + columns - 1) / columns * N : 0);
  at::Tensor partial = weigh ? at::empty({N, D}, options) : at::Tensor();
  at::Tensor total = weigh ? at::zeros({N, D}, options.dtype(at::kFloat)) : at::Tensor();
  std::vector<float> shrink(N);

  for (int64_t v0 = 0; v0 < V; v0 += columns) {
    const int64_t width = std::min(columns, V - v0);
    at::Tensor strip = tiles.rows(v0, width);
    at::Tensor tile = keep_all ? exponentials.narrow(1, v0, width) : buffer.narrow(0, 0, N * width).view({N, width});
    at::mm_out(tile, hidden_gemm, strip.t());
    T* z = tile.mutable_data_ptr<T>();
    const int64_t stride = tile.stride(0);
    float* reference = keep_all ? tile_top.data() + v0 / columns * N : nullptr;
    at::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
      std::vector<float> row(width + Vec::size());
      for (int64_t n = begin; n < end; ++n) {
        T* logits = z + n * stride;
        const T* shift = b ? b + v0 : nullptr;
        shrink[n] = want_stats ? softmax_row<true>(logits, shift, row.data(), width, label[n] - v0, keep, f, state[n])
                               : softmax_row<false>(logits, shift, row.data(), width, label[n] - v0, keep, f, state[n]);
        if (reference) reference[n] = state[n].top;
      }
    });
    if (!weigh) continue;
    at::mm_out(partial, tile, strip);
    const T* p = partial.const_data_ptr<T>();
    float* u = total.mutable_data_ptr<float>();
    at::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        Vec factor(shrink[n]);
        each_vector(D, [&](int64_t i, int64_t k) {
          store(u + n * D + i, at::vec::fmadd(load(u + n * D + i, k), factor, load(p + n * D + i, k)), k);
        });
      }
    });
  }

  if (keep_all) settle_exponentials<T>(exponentials, tile_top, columns, state, label, f);

  float* lp = logps.mutable_data_ptr<float>();
  float* normaliser = normalisers.mutable_data_ptr<float>();
  R* out = weigh ? direction.mutable_data_ptr<R>() : nullptr;
  float* stat = want_stats ? stats.mutable_data_ptr<float>() : nullptr;
  const float* u = weigh ? total.const_data_ptr<float>() : nullptr;
  const float slope_scale = f.softcap == 0.f ? f.scale : 1.f;  // the part of z' that the softmax pass did not apply
  at::parallel_for(0, N, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const RowState& s = state[n];
      const float e = std::exp(s.target - s.top);
      const float sum = s.others + e;
      lp[n] = s.target == s.top ? -std::log1p(s.others) : (s.target - s.top) - std::log(sum);
      normaliser[2 * n] = s.top;
      normaliser[2 * n + 1] = sum;
      if (want_stats) write_stats(stat + 4 * n, s);
      if (!weigh) continue;
      const Vec toward(s.others / sum * f.slope(s.target)), away(-slope_scale / sum);
      const W* row = w + label[n] * w_stride;
      each_vector(D, [&](int64_t i, int64_t k) {
        store(out + n * D + i, at::vec::fmadd(load(row + i, k), toward, load(u + n * D + i, k) * away), k);
      });
    }
  });
}

void check_inputs(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, const std::optional<at::Tensor>& bias) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && weight.dim() == 2 && labels.dim() == 1,
      "hidden, weight and labels must have 2, 2 and 1 dimensions, got ", hidden.dim(), ", ", weight.dim(), " and ", labels.dim());
  TORCH_CHECK_VALUE(hidden.size(1) == weight.size(1),
      "hidden has ", hidden.size(1), " features but weight has ", weight.size(1));
  TORCH_CHECK_VALUE(hidden.size(0) == labels.size(0), "hidden has ", hidden.size(0), " rows but there are ", labels.size(0), " labels");
  TORCH_CHECK_VALUE(hidden.scalar_type() == weight.scalar_type(),
      "hidden is ", hidden.scalar_type(), " but weight is ", weight.scalar_type());
  TORCH_CHECK_VALUE(labels.scalar_type() == at::kLong, "labels must be int64, got ", labels.scalar_type());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == weight.scalar_type()),
      "bias must be [", weight.size(0), "] ", weight.scalar_type());
  const int64_t* y = labels.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < labels.size(0); ++n) {
    TORCH_CHECK_VALUE(y[n] >= 0 && y[n] < weight.size(0), "label ", y[n], " at position ", n, " is outside [0, ", weight.size(0), ")");
  }
}

void check_output(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.sizes() == sizes && t.scalar_type() == dtype && t.is_contiguous(),
      name, " must be contiguous, ", dtype, " ", sizes, ", got ", t.scalar_type(), " ", t.sizes());
}

template <typename Body>
void dispatch(at::ScalarType dtype, Body body) {
  // body(type of the products, of the inputs)
  switch (dtype) {
    case at::kFloat: return body(float{}, float{});
    case at::kBFloat16: return body(at::BFloat16{}, at::BFloat16{});
    case at::kHalf: return body(float{}, at::Half{});
    default: TORCH_CHECK_VALUE(false, "the native backend takes float32, bfloat16 and float16, got ", dtype);
  }
}

}  // namespace

void linear_logprobs_forward(
    const at::Tensor& hidden_in, const at::Tensor& weight_in, const at::Tensor& labels_in,
    const std::optional<at::Tensor>& bias_in, double logit_scale, std::optional<double> softcap, at::Tensor logps,
    at::Tensor normalisers, at::Tensor direction, at::Tensor exponentials, at::Tensor stats) {
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor labels = labels_in.contiguous();
  check_inputs(hidden_in, weight_in, labels, bias_in);
  at::Tensor hidden = hidden_in.contiguous(), weight = unit_stride_rows(weight_in);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0), kept = exponentials.size(0);
  check_output("logps", logps, {N}, at::kFloat);
  check_output("normalisers", normalisers, {N, 2}, at::kFloat);
  if (stats.size(0)) check_output("stats", stats, {N, 4}, at::kFloat);
  const Softmax f{static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))};

  dispatch(hidden.scalar_type(), [&](auto gemm, auto input) {
    using T = decltype(gemm);
    using W = decltype(input);
    const auto gemm_dtype = c10::CppTypeToScalarType<T>::value;
    // 16-bit inputs may get a direction in fp32. fp16 inputs must, because fp16 has too small a range for it.
    const bool wide = direction.scalar_type() == at::kFloat;
    if (direction.size(0)) check_output("direction", direction, {N, D}, wide ? at::kFloat : gemm_dtype);
    if (kept) check_output("exponentials", exponentials, {kept, V}, gemm_dtype);
    TORCH_CHECK_VALUE(kept <= N, "exponentials of ", kept, " rows cannot be kept: there are ", N);
    std::optional<at::Tensor> bias;
    if (bias_in) bias = bias_in->to(gemm_dtype).contiguous();
    const Tiles tiles{weight, gemm_dtype, tile_columns(std::min(N, kRowBlock), V)};
    for (int64_t n0 = 0, count = 0; n0 < N; n0 += count) {
      count = std::min(kRowBlock, (n0 < kept ? kept : N) - n0);  // no block has both kept and other rows
      auto part = [&](const at::Tensor& t) { return t.narrow(0, t.size(0) > n0 ? n0 : 0, t.size(0) > n0 ? count : 0); };
      at::Tensor rows = part(hidden);
      const auto block = wide ? forward_block<T, W, float> : forward_block<T, W, T>;
      block(rows, rows.to(gemm_dtype), tiles, part(labels), bias ? &*bias : nullptr, f, part(logps), part(normalisers),
            part(direction), part(exponentials), part(stats));
    }
  });
}

std::tuple<at::Tensor, at::Tensor> linear_logprobs_weight_grad(
    const at::Tensor& hidden_in, const at::Tensor& weight_in, const at::Tensor& labels_in,
    const std::optional<at::Tensor>& bias_in, double logit_scale, std::optional<double> softcap,
    const at::Tensor& logps_in, const at::Tensor& normalisers_in, const at::Tensor& coefficients_in, bool want_bias) {
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor labels = labels_in.contiguous();
  check_inputs(hidden_in, weight_in, labels, bias_in);
  at::Tensor hidden = hidden_in.contiguous(), weight = unit_stride_rows(weight_in);
  at::Tensor logps = logps_in.contiguous(), normalisers = normalisers_in.contiguous(), coefficients = coefficients_in.contiguous();
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  for (const at::Tensor* t : {&logps, &coefficients}) {
    TORCH_CHECK_VALUE(t->sizes() == labels.sizes() && t->scalar_type() == at::kFloat,
        "logps and coefficients must be float32 of shape [", N, "]");
  }
  TORCH_CHECK_VALUE(normalisers.dim() == 2 && normalisers.size(0) == N && normalisers.size(1) == 2 &&
          normalisers.scalar_type() == at::kFloat, "normalisers must be float32 of shape [", N, ", 2]");
  at::Tensor grad_weight = at::empty({V, D}, weight.options());
  at::Tensor grad_bias = at::empty({want_bias ? V : 0}, weight.options());
  const Softmax f{static_cast<float>(logit_scale), static_cast<float>(softcap.value_or(0.0))};

  dispatch(hidden.scalar_type(), [&](auto gemm, auto input) {
    using T = decltype(gemm);
    using W = decltype(input);
    const auto gemm_dtype = c10::CppTypeToScalarType<T>::value;
    at::Tensor bias;
    if (bias_in) bias = bias_in->to(gemm_dtype).contiguous();
    const T* b = bias_in ? bias.const_data_ptr<T>() : nullptr;
    at::Tensor rows = hidden.to(gemm_dtype);
    const int64_t columns = std::min(V, std::max<int64_t>(64, 4 * kTileElements / std::max<int64_t>(N, 1) / 64 * 64));
    const Tiles tiles{weight, gemm_dtype, columns};
    at::Tensor buffer = at::empty({N * columns}, rows.options());

    const int64_t* label = labels.const_data_ptr<int64_t>();
    const float* lp = logps.const_data_ptr<float>();
    const float* normaliser = normalisers.const_data_ptr<float>();
    const float* c = coefficients.const_data_ptr<float>();

    // Processes all rows of one strip at a time, so that a strip of dW is a single GEMM: summed over the rows in fp32, rounded once.
    for (int64_t v0 = 0; v0 < V; v0 += columns) {
      const int64_t width = std::min(columns, V - v0);
      at::Tensor tile = buffer.narrow(0, 0, N * width).view({N, width});
      at::mm_out(tile, rows, tiles.rows(v0, width).t());
      T* dz = tile.mutable_data_ptr<T>();
      at::parallel_for(0, N, 4, [&](int64_t begin, int64_t end) {
        std::vector<float> row(width + Vec::size());
        for (int64_t n = begin; n < end; ++n) {
          unpack_row(dz + n * width, b ? b + v0 : nullptr, row.data(), width, f);
          const Vec reference(normaliser[2 * n]);
          const Vec away(-c[n] * (f.softcap == 0.f ? f.scale : 1.f) / normaliser[2 * n + 1]);
          each_vector(width, [&](int64_t i, int64_t k) {
            Vec z = Vec::loadu(row.data() + i);
            Vec g = (z - reference).exp() * away;
            if (f.softcap != 0.f) g = g * f.slope(z);
            store(dz + n * width + i, g, k);
          });
          const int64_t hit = label[n] - v0;
          if (hit >= 0 && hit < width) dz[n * width + hit] = static_cast<T>(-std::expm1(lp[n]) * c[n] * f.slope(row[hit]));
        }
      });
      at::Tensor strip = grad_weight.narrow(0, v0, width);
      if constexpr (std::is_same_v<T, W>) {
        at::mm_out(strip, tile.t(), rows);
      } else {
        strip.copy_(at::mm(tile.t(), rows));
      }
      if (want_bias) grad_bias.narrow(0, v0, width).copy_(at::sum(tile, 0, false, at::kFloat));
    }
  });
  return {grad_weight, grad_bias};
}

}  // namespace synpo_fast
