// Kernels of the fast training path on CPUs, one thread each: the caller runs one micro-batch per thread.
//
// Matrix products go to ATen (oneDNN uses avx512_bf16 where the CPU has it); everything between them is a fused loop over
// bfloat16 rows with float32 arithmetic that the compiler vectorises. fast.py holds the meaning of each call; model.py
// holds the plain PyTorch form that the tests compare with.

#include <torch/extension.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using at::Tensor;
using bf16 = uint16_t;

constexpr int64_t kBlock = 128;     // query rows per attention block
constexpr int64_t kRowAlign = 32;   // expert segments are padded, so that oneDNN sees few distinct shapes
constexpr int64_t kMaxExperts = 256;
constexpr int64_t kMaxTopK = 16;

inline float to_float(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// exp(x) to about 2e-7 relative; vectorises because it has no branch and no call.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float scaled = x * 1.44269504f;
  const float whole = std::nearbyint(scaled);
  const float f = (scaled - whole) * 0.69314718f;
  float p = 1.0f / 720.0f;
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

bf16* data(const Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kBFloat16 && tensor.is_contiguous(), "expected contiguous bfloat16");
  return reinterpret_cast<bf16*>(tensor.data_ptr());
}

float* data32(const Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(), "expected contiguous float32");
  return tensor.data_ptr<float>();
}

int32_t* ints(const Tensor& tensor) {
  TORCH_CHECK(tensor.scalar_type() == at::kInt && tensor.is_contiguous(), "expected contiguous int32");
  return tensor.data_ptr<int32_t>();
}

Tensor wrap(bf16* pointer, int64_t rows, int64_t cols) {
  return at::from_blob(pointer, {rows, cols}, at::TensorOptions().dtype(at::kBFloat16));
}

Tensor empty16(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions().dtype(at::kBFloat16)); }
Tensor empty32(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions().dtype(at::kFloat)); }
Tensor empty_ints(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions().dtype(at::kInt)); }

void product(Tensor out, const Tensor& left, const Tensor& right) { at::mm_out(out, left, right); }

// x + delta (when given), and its RMS norm. Returns (sum, normed, 1 / rms).
std::vector<Tensor> add_norm(const Tensor& x, const c10::optional<Tensor>& delta, const Tensor& weight, double eps) {
  at::NoGradGuard guard;
  const int64_t n = x.size(0), h = x.size(1);
  Tensor sum = delta ? empty16({n, h}) : x, normed = empty16({n, h}), rstd = empty32({n});
  const bf16* px = data(x);
  const bf16* pd = delta ? data(*delta) : nullptr;
  const bf16* pw = data(weight);
  bf16 *ps = data(sum), *py = data(normed);
  float* pr = data32(rstd);
  std::vector<float> row(h), w(h);
  for (int64_t j = 0; j < h; ++j) w[j] = to_float(pw[j]);
  for (int64_t i = 0; i < n; ++i) {
    float* r = row.data();
    float total = 0;
    if (pd) {
      for (int64_t j = 0; j < h; ++j) {
        const bf16 s = to_bf16(to_float(px[i * h + j]) + to_float(pd[i * h + j]));
        ps[i * h + j] = s;
        r[j] = to_float(s);
        total += r[j] * r[j];
      }
    } else {
      for (int64_t j = 0; j < h; ++j) {
        r[j] = to_float(px[i * h + j]);
        total += r[j] * r[j];
      }
    }
    const float scale = 1.0f / std::sqrt(total / h + static_cast<float>(eps));
    pr[i] = scale;
    for (int64_t j = 0; j < h; ++j) py[i * h + j] = to_bf16(r[j] * scale * w[j]);
  }
  return {sum, normed, rstd};
}

// Gradient of add_norm by its input, plus the gradient that comes down the residual stream. Adds to weight_grad.
Tensor norm_backward(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& weight,
                     const c10::optional<Tensor>& residual, Tensor weight_grad) {
  at::NoGradGuard guard;
  const int64_t n = x.size(0), h = x.size(1);
  Tensor dx = empty16({n, h});
  const bf16 *pdy = data(dy), *px = data(x), *pw = data(weight);
  const bf16* pres = residual ? data(*residual) : nullptr;
  const float* pr = data32(rstd);
  bf16* pdx = data(dx);
  std::vector<float> w(h), dw(h, 0.0f), g(h), v(h);
  for (int64_t j = 0; j < h; ++j) w[j] = to_float(pw[j]);
  for (int64_t i = 0; i < n; ++i) {
    const float scale = pr[i];
    float dot = 0;
    for (int64_t j = 0; j < h; ++j) {
      const float up = to_float(pdy[i * h + j]);
      v[j] = to_float(px[i * h + j]) * scale;
      dw[j] += up * v[j];
      g[j] = up * w[j];
      dot += g[j] * v[j];
    }
    dot /= h;
    if (pres) {
      for (int64_t j = 0; j < h; ++j)
        pdx[i * h + j] = to_bf16(to_float(pres[i * h + j]) + scale * (g[j] - v[j] * dot));
    } else {
      for (int64_t j = 0; j < h; ++j) pdx[i * h + j] = to_bf16(scale * (g[j] - v[j] * dot));
    }
  }
  float* pg = data32(weight_grad);
  for (int64_t j = 0; j < h; ++j) pg[j] += dw[j];
  return dx;
}

// Where head `head` of row t of sequence b lies, in blocks: [b, kv_head, block, head in group, row in block, dim].
inline int64_t query_offset(int64_t b, int64_t head, int64_t t, int64_t kv, int64_t group, int64_t length, int64_t dim) {
  const int64_t blocks = length / kBlock;
  return ((((b * kv + head / group) * blocks + t / kBlock) * group + head % group) * kBlock + t % kBlock) * dim;
}

// Splits q, k, v heads, norms q and k per head and rotates them. Returns (q in blocks, k, v, 1 / rms per head).
std::vector<Tensor> split_heads(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight, const Tensor& cosine,
                                const Tensor& sine, int64_t length, int64_t heads, int64_t kv, double eps) {
  at::NoGradGuard guard;
  const int64_t n = qkv.size(0), width = qkv.size(1), dim = width / (heads + 2 * kv), half = dim / 2;
  const int64_t group = heads / kv;
  TORCH_CHECK(length % kBlock == 0 && n % length == 0 && dim <= 256, "unsupported sequence length or head size");
  Tensor q = empty16({n * heads, dim}), k = empty16({n * kv, dim}), v = empty16({n * kv, dim});
  Tensor rstd = empty32({n, heads + kv});
  const bf16* px = data(qkv);
  bf16 *pq = data(q), *pk = data(k), *pv = data(v);
  const bf16 *wq = data(q_weight), *wk = data(k_weight);
  const float *pc = data32(cosine), *ps = data32(sine);
  float* pr = data32(rstd);
  float w[2][256], row[256];
  for (int64_t j = 0; j < dim; ++j) {
    w[0][j] = to_float(wq[j]);
    w[1][j] = to_float(wk[j]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / length, t = i % length;
    const float *c = pc + t * half, *s = ps + t * half;
    for (int64_t head = 0; head < heads + kv; ++head) {
      const bf16* in = px + i * width + head * dim;
      float total = 0;
      for (int64_t j = 0; j < dim; ++j) {
        row[j] = to_float(in[j]);
        total += row[j] * row[j];
      }
      const float scale = 1.0f / std::sqrt(total / dim + static_cast<float>(eps));
      pr[i * (heads + kv) + head] = scale;
      const float* weight = w[head >= heads];
      bf16* out = head < heads ? pq + query_offset(b, head, t, kv, group, length, dim)
                               : pk + ((b * kv + head - heads) * length + t) * dim;
      for (int64_t j = 0; j < half; ++j) {
        const float first = row[j] * scale * weight[j], second = row[j + half] * scale * weight[j + half];
        out[j] = to_bf16(first * c[j] - second * s[j]);
        out[j + half] = to_bf16(second * c[j] + first * s[j]);
      }
    }
    for (int64_t head = 0; head < kv; ++head)
      std::memcpy(pv + ((b * kv + head) * length + t) * dim, px + i * width + (heads + kv + head) * dim, 2 * dim);
  }
  return {q, k, v, rstd};
}

// Gradient of split_heads by qkv; dq is bfloat16 in blocks, dk and dv are float32. Adds to the norm weights' gradients.
Tensor split_heads_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& qkv, const Tensor& rstd,
                            const Tensor& q_weight, const Tensor& k_weight, const Tensor& cosine, const Tensor& sine,
                            int64_t length, int64_t heads, int64_t kv, Tensor q_grad, Tensor k_grad) {
  at::NoGradGuard guard;
  const int64_t n = qkv.size(0), width = qkv.size(1), dim = width / (heads + 2 * kv), half = dim / 2;
  const int64_t group = heads / kv;
  Tensor dx = empty16({n, width});
  const bf16 *px = data(qkv), *pq = data(dq), *wq = data(q_weight), *wk = data(k_weight);
  const float *pk = data32(dk), *pv = data32(dv), *pc = data32(cosine), *ps = data32(sine), *pr = data32(rstd);
  bf16* out = data(dx);
  float w[2][256], dw[2][256] = {}, up[256], g[256], value[256];
  for (int64_t j = 0; j < dim; ++j) {
    w[0][j] = to_float(wq[j]);
    w[1][j] = to_float(wk[j]);
  }
  for (int64_t i = 0; i < n; ++i) {
    const int64_t b = i / length, t = i % length;
    const float *c = pc + t * half, *s = ps + t * half;
    for (int64_t head = 0; head < heads + kv; ++head) {
      const int side = head >= heads;
      if (side) {
        const float* in = pk + ((b * kv + head - heads) * length + t) * dim;
        for (int64_t j = 0; j < half; ++j) {
          up[j] = in[j] * c[j] + in[j + half] * s[j];
          up[j + half] = in[j + half] * c[j] - in[j] * s[j];
        }
      } else {
        const bf16* in = pq + query_offset(b, head, t, kv, group, length, dim);
        for (int64_t j = 0; j < half; ++j) {
          const float first = to_float(in[j]), second = to_float(in[j + half]);
          up[j] = first * c[j] + second * s[j];
          up[j + half] = second * c[j] - first * s[j];
        }
      }
      const float scale = pr[i * (heads + kv) + head];
      const bf16* x = px + i * width + head * dim;
      float dot = 0;
      for (int64_t j = 0; j < dim; ++j) {
        value[j] = to_float(x[j]) * scale;
        dw[side][j] += up[j] * value[j];
        g[j] = up[j] * w[side][j];
        dot += g[j] * value[j];
      }
      dot /= dim;
      bf16* to = out + i * width + head * dim;
      for (int64_t j = 0; j < dim; ++j) to[j] = to_bf16(scale * (g[j] - value[j] * dot));
    }
    for (int64_t head = 0; head < kv; ++head) {
      const float* in = pv + ((b * kv + head) * length + t) * dim;
      bf16* to = out + i * width + (heads + kv + head) * dim;
      for (int64_t j = 0; j < dim; ++j) to[j] = to_bf16(in[j]);
    }
  }
  float *gq = data32(q_grad), *gk = data32(k_grad);
  for (int64_t j = 0; j < dim; ++j) {
    gq[j] += dw[0][j];
    gk[j] += dw[1][j];
  }
  return dx;
}

// Rows of block outputs to or from token order: [n, heads * dim].
void reorder_heads(const bf16* from, bf16* to, int64_t n, int64_t length, int64_t heads, int64_t kv, int64_t dim,
                   bool to_tokens) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t blocked = query_offset(i / length, head, i % length, kv, heads / kv, length, dim);
      const int64_t flat = (i * heads + head) * dim;
      if (to_tokens) std::memcpy(to + flat, from + blocked, 2 * dim);
      else std::memcpy(to + blocked, from + flat, 2 * dim);
    }
}

// Causal attention over blocks of queries. Returns (output in token order, output in blocks, probabilities).
std::vector<Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t length, int64_t heads,
                              int64_t kv) {
  at::NoGradGuard guard;
  const int64_t dim = q.size(1), n = k.size(0) / kv, group = heads / kv, rows = group * kBlock;
  const int64_t blocks = length / kBlock, sequences = n / length;
  const int64_t per_pair = rows * kBlock * blocks * (blocks + 1) / 2;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  Tensor out = empty16({n * heads, dim}), flat = empty16({n, heads * dim});
  Tensor probabilities = empty16({sequences * kv * per_pair});
  bf16 *pq = data(q), *pk = data(k), *pv = data(v), *po = data(out), *pp = data(probabilities);
  std::vector<float> line(length);
  for (int64_t pair = 0; pair < sequences * kv; ++pair) {
    bf16* p = pp + pair * per_pair;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t keys = (block + 1) * kBlock, start = block * kBlock;
      const int64_t at_q = (pair * blocks + block) * rows * dim;
      Tensor scores = wrap(p, rows, keys);
      product(scores, wrap(pq + at_q, rows, dim), wrap(pk + pair * length * dim, keys, dim).t());
      for (int64_t r = 0; r < rows; ++r) {
        bf16* row = p + r * keys;
        const int64_t seen = start + r % kBlock + 1;
        float* l = line.data();
        float top = -1e30f, total = 0;
        for (int64_t j = 0; j < seen; ++j) {
          l[j] = to_float(row[j]) * scale;
          top = l[j] > top ? l[j] : top;
        }
        for (int64_t j = 0; j < seen; ++j) {
          l[j] = fast_exp(l[j] - top);
          total += l[j];
        }
        const float inverse = 1.0f / total;
        for (int64_t j = 0; j < seen; ++j) row[j] = to_bf16(l[j] * inverse);
        for (int64_t j = seen; j < keys; ++j) row[j] = 0;
      }
      product(wrap(po + at_q, rows, dim), scores, wrap(pv + pair * length * dim, keys, dim));
      p += rows * keys;
    }
  }
  reorder_heads(po, data(flat), n, length, heads, kv, dim, true);
  return {flat, out, probabilities};
}

// Gradients (dq in blocks, dk, dv) of attention; dk and dv are float32.
std::vector<Tensor> attention_backward(const Tensor& dflat, const Tensor& out, const Tensor& probabilities,
                                       const Tensor& q, const Tensor& k, const Tensor& v, int64_t length, int64_t heads,
                                       int64_t kv) {
  at::NoGradGuard guard;
  const int64_t dim = q.size(1), n = k.size(0) / kv, group = heads / kv, rows = group * kBlock;
  const int64_t blocks = length / kBlock, sequences = n / length;
  const int64_t per_pair = rows * kBlock * blocks * (blocks + 1) / 2;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  Tensor dout = empty16({n * heads, dim}), dq = empty16({n * heads, dim});
  Tensor dk = at::zeros({n * kv, dim}, at::kFloat), dv = at::zeros({n * kv, dim}, at::kFloat);
  Tensor scratch = empty16({rows * length}), part = empty16({length * dim});
  bf16 *pq = data(q), *pk = data(k), *pv = data(v), *po = data(out), *pp = data(probabilities), *pdo = data(dout);
  bf16 *pdq = data(dq), *pds = data(scratch), *ppart = data(part);
  float *pdk = data32(dk), *pdv = data32(dv);
  reorder_heads(data(dflat), pdo, n, length, heads, kv, dim, false);
  for (int64_t pair = 0; pair < sequences * kv; ++pair) {
    bf16* p = pp + pair * per_pair;
    const int64_t at_k = pair * length * dim;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t keys = (block + 1) * kBlock;
      const int64_t at_q = (pair * blocks + block) * rows * dim;
      Tensor grad = wrap(pdo + at_q, rows, dim), weights = wrap(p, rows, keys), scores = wrap(pds, rows, keys);
      Tensor partial = wrap(ppart, keys, dim);
      product(partial, weights.t(), grad);
      for (int64_t j = 0; j < keys * dim; ++j) pdv[at_k + j] += to_float(ppart[j]);
      product(scores, grad, wrap(pv + at_k, keys, dim).t());
      for (int64_t r = 0; r < rows; ++r) {
        const bf16 *o = po + at_q + r * dim, *g = pdo + at_q + r * dim, *prob = p + r * keys;
        bf16* row = pds + r * keys;
        float delta = 0;
        for (int64_t j = 0; j < dim; ++j) delta += to_float(o[j]) * to_float(g[j]);
        for (int64_t j = 0; j < keys; ++j)
          row[j] = to_bf16(to_float(prob[j]) * (to_float(row[j]) - delta) * scale);
      }
      product(wrap(pdq + at_q, rows, dim), scores, wrap(pk + at_k, keys, dim));
      product(partial, scores.t(), wrap(pq + at_q, rows, dim));
      for (int64_t j = 0; j < keys * dim; ++j) pdk[at_k + j] += to_float(ppart[j]);
      p += rows * keys;
    }
  }
  return {dq, dk, dv};
}

// Chooses experts. Returns (probabilities, chosen, weights, row of each choice, first row per expert with the end, load).
std::vector<Tensor> route(const Tensor& logits, int64_t top_k) {
  at::NoGradGuard guard;
  const int64_t n = logits.size(0), experts = logits.size(1);
  TORCH_CHECK(experts <= kMaxExperts && top_k <= kMaxTopK, "too many experts");
  Tensor probabilities = empty32({n, experts}), chosen = empty_ints({n, top_k}), weights = empty32({n, top_k});
  Tensor rows = empty_ints({n, top_k}), starts = empty_ints({experts + 1}), load = empty_ints({experts});
  const bf16* pl = data(logits);
  float *pp = data32(probabilities), *pw = data32(weights);
  int32_t *pc = ints(chosen), *prow = ints(rows), *pstart = ints(starts), *pload = ints(load);
  std::memset(pload, 0, sizeof(int32_t) * experts);
  for (int64_t i = 0; i < n; ++i) {
    float* p = pp + i * experts;
    float top = -1e30f, total = 0, work[kMaxExperts];
    for (int64_t e = 0; e < experts; ++e) {
      p[e] = to_float(pl[i * experts + e]);
      top = p[e] > top ? p[e] : top;
    }
    for (int64_t e = 0; e < experts; ++e) {
      p[e] = fast_exp(p[e] - top);
      total += p[e];
    }
    for (int64_t e = 0; e < experts; ++e) {
      p[e] /= total;
      work[e] = p[e];
    }
    float kept = 0;
    for (int64_t j = 0; j < top_k; ++j) {
      int64_t best = 0;
      for (int64_t e = 1; e < experts; ++e) best = work[e] > work[best] ? e : best;
      pc[i * top_k + j] = static_cast<int32_t>(best);
      pw[i * top_k + j] = p[best];
      kept += p[best];
      work[best] = -1.0f;
      ++pload[best];
    }
    for (int64_t j = 0; j < top_k; ++j) pw[i * top_k + j] /= kept;
  }
  int32_t next[kMaxExperts], row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    pstart[e] = next[e] = row;
    row += static_cast<int32_t>((pload[e] + kRowAlign - 1) / kRowAlign * kRowAlign);
  }
  pstart[experts] = row;
  for (int64_t i = 0; i < n * top_k; ++i) prow[i] = next[pc[i]]++;
  return {probabilities, chosen, weights, rows, starts, load};
}

// Copies token rows to expert order; the rows that pad a segment are zero.
Tensor gather(const Tensor& x, const Tensor& rows, const Tensor& starts, const Tensor& load) {
  const int64_t n = x.size(0), h = x.size(1), top_k = rows.size(1), experts = load.size(0);
  const int32_t *prow = ints(rows), *pstart = ints(starts), *pload = ints(load);
  Tensor out = empty16({pstart[experts], h});
  const bf16* px = data(x);
  bf16* po = data(out);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < top_k; ++j) std::memcpy(po + prow[i * top_k + j] * h, px + i * h, 2 * h);
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t used = pstart[e] + pload[e];
    std::memset(po + used * h, 0, 2 * h * (pstart[e + 1] - used));
  }
  return out;
}

// Sum over a token's choices of its expert rows, times weights when given.
Tensor combine(const Tensor& expert_rows, const Tensor& rows, const c10::optional<Tensor>& weights) {
  const int64_t n = rows.size(0), top_k = rows.size(1), h = expert_rows.size(1);
  Tensor out = empty16({n, h});
  const bf16* px = data(expert_rows);
  const int32_t* prow = ints(rows);
  const float* pw = weights ? data32(*weights) : nullptr;
  bf16* po = data(out);
  std::vector<float> sum(h);
  for (int64_t i = 0; i < n; ++i) {
    float* s = sum.data();
    std::memset(s, 0, sizeof(float) * h);
    for (int64_t j = 0; j < top_k; ++j) {
      const bf16* row = px + prow[i * top_k + j] * h;
      const float w = pw ? pw[i * top_k + j] : 1.0f;
      for (int64_t c = 0; c < h; ++c) s[c] += w * to_float(row[c]);
    }
    for (int64_t c = 0; c < h; ++c) po[i * h + c] = to_bf16(s[c]);
  }
  return out;
}

// The experts' SwiGLU on rows in expert order. Returns (output rows, gate and up rows).
std::vector<Tensor> experts_forward(const Tensor& x, const Tensor& starts, const Tensor& gate_up, const Tensor& down) {
  at::NoGradGuard guard;
  const int64_t experts = gate_up.size(0), wide = gate_up.size(1), h = gate_up.size(2), inner = wide / 2;
  const int64_t total = x.size(0);
  const int32_t* pstart = ints(starts);
  Tensor both = empty16({total, wide}), out = empty16({total, h}), hidden = empty16({total, inner});
  bf16 *px = data(x), *pb = data(both), *po = data(out), *ph = data(hidden), *pg = data(gate_up), *pd = data(down);
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = pstart[e], count = pstart[e + 1] - first;
    if (count == 0) continue;
    product(wrap(pb + first * wide, count, wide), wrap(px + first * h, count, h), wrap(pg + e * wide * h, wide, h).t());
    for (int64_t i = first; i < first + count; ++i)
      for (int64_t j = 0; j < inner; ++j) {
        const float gate = to_float(pb[i * wide + j]), up = to_float(pb[i * wide + inner + j]);
        ph[i * inner + j] = to_bf16(gate / (1.0f + fast_exp(-gate)) * up);
      }
    product(wrap(po + first * h, count, h), wrap(ph + first * inner, count, inner),
            wrap(pd + e * h * inner, h, inner).t());
  }
  return {out, both};
}

// Backward of experts_forward followed by the weighted sum. dout holds the unweighted output gradient in expert order,
// weight the routing weight per row. Returns (dx rows, gradient by the routing weight per row); adds to both gradients.
std::vector<Tensor> experts_backward(const Tensor& dout, const Tensor& x, const Tensor& both, const Tensor& weight,
                                     const Tensor& starts, const Tensor& gate_up, const Tensor& down,
                                     Tensor gate_up_grad, Tensor down_grad) {
  at::NoGradGuard guard;
  const int64_t experts = gate_up.size(0), wide = gate_up.size(1), h = gate_up.size(2), inner = wide / 2;
  const int64_t total = x.size(0);
  const int32_t* pstart = ints(starts);
  Tensor dx = empty16({total, h}), dboth = empty16({total, wide}), hidden = empty16({total, inner});
  Tensor scratch = empty16({wide * h}), dweight = empty32({total});
  bf16 *px = data(x), *pb = data(both), *pdo = data(dout), *pdx = data(dx), *pdb = data(dboth), *ph = data(hidden);
  bf16 *pg = data(gate_up), *pd = data(down), *ps = data(scratch);
  const float* pw = data32(weight);
  float *gg = data32(gate_up_grad), *gd = data32(down_grad), *pdw = data32(dweight);
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t first = pstart[e], count = pstart[e + 1] - first;
    if (count == 0) continue;
    Tensor grad = wrap(pdo + first * h, count, h), inner_rows = wrap(ph + first * inner, count, inner);
    Tensor wide_rows = wrap(pdb + first * wide, count, wide);
    product(inner_rows, grad, wrap(pd + e * h * inner, h, inner));
    for (int64_t i = first; i < first + count; ++i) {
      const float w = pw[i];
      float dot = 0;
      for (int64_t j = 0; j < inner; ++j) {
        const float gate = to_float(pb[i * wide + j]), up = to_float(pb[i * wide + inner + j]);
        const float sigmoid = 1.0f / (1.0f + fast_exp(-gate)), act = gate * sigmoid;
        const float raw = to_float(ph[i * inner + j]), value = act * up, d = raw * w;
        dot += raw * value;
        ph[i * inner + j] = to_bf16(value * w);
        pdb[i * wide + j] = to_bf16(d * up * (sigmoid + act * (1.0f - sigmoid)));
        pdb[i * wide + inner + j] = to_bf16(d * act);
      }
      pdw[i] = dot;
    }
    Tensor down_part = wrap(ps, h, inner), both_part = wrap(ps, wide, h);
    product(down_part, grad.t(), inner_rows);
    for (int64_t j = 0; j < h * inner; ++j) gd[e * h * inner + j] += to_float(ps[j]);
    product(both_part, wide_rows.t(), wrap(px + first * h, count, h));
    for (int64_t j = 0; j < wide * h; ++j) gg[e * wide * h + j] += to_float(ps[j]);
    product(wrap(pdx + first * h, count, h), wide_rows, wrap(pg + e * wide * h, wide, h));
  }
  return {dx, dweight};
}

// Routing weights in expert order, zero where a row only pads.
Tensor spread_weights(const Tensor& weights, const Tensor& rows, const Tensor& starts) {
  Tensor out = at::zeros({starts[-1].item<int64_t>()}, at::kFloat);
  float* po = data32(out);
  const float* pw = data32(weights);
  const int32_t* prow = ints(rows);
  for (int64_t i = 0; i < rows.numel(); ++i) po[prow[i]] = pw[i];
  return out;
}

// Gradient by the router's logits, from the routing weights and from the balance loss (pull: its gradient by the mean
// probability of each expert, per token).
Tensor route_backward(const Tensor& dweight_rows, const Tensor& probabilities, const Tensor& chosen,
                      const Tensor& weights, const Tensor& rows, const Tensor& pull) {
  const int64_t n = probabilities.size(0), experts = probabilities.size(1), top_k = chosen.size(1);
  Tensor out = empty16({n, experts});
  const float *pdw = data32(dweight_rows), *pp = data32(probabilities), *pw = data32(weights), *pull_e = data32(pull);
  const int32_t *pc = ints(chosen), *prow = ints(rows);
  bf16* po = data(out);
  for (int64_t i = 0; i < n; ++i) {
    float line[kMaxExperts], mean = 0, dot = 0;
    const float* p = pp + i * experts;
    for (int64_t e = 0; e < experts; ++e) mean += p[e] * pull_e[e];
    for (int64_t e = 0; e < experts; ++e) line[e] = p[e] * (pull_e[e] - mean);
    for (int64_t j = 0; j < top_k; ++j) dot += pw[i * top_k + j] * pdw[prow[i * top_k + j]];
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t at = i * top_k + j;
      line[pc[at]] += pw[at] * (pdw[prow[at]] - dot);
    }
    for (int64_t e = 0; e < experts; ++e) po[i * experts + e] = to_bf16(line[e]);
  }
  return out;
}

// Cross-entropy of each row; when scale is not zero the logits become scale times their gradient.
Tensor cross_entropy(Tensor logits, const Tensor& targets, double scale) {
  const int64_t n = logits.size(0), vocab = logits.size(1);
  Tensor losses = empty32({n});
  bf16* pl = data(logits);
  const int32_t* pt = ints(targets);
  float* out = data32(losses);
  const float by = static_cast<float>(scale);
  std::vector<float> line(vocab);
  for (int64_t i = 0; i < n; ++i) {
    bf16* row = pl + i * vocab;
    float* l = line.data();
    float top = -1e30f, total = 0;
    for (int64_t j = 0; j < vocab; ++j) {
      l[j] = to_float(row[j]);
      top = l[j] > top ? l[j] : top;
    }
    const float target = l[pt[i]];
    for (int64_t j = 0; j < vocab; ++j) {
      l[j] = fast_exp(l[j] - top);
      total += l[j];
    }
    out[i] = std::log(total) + top - target;
    if (by == 0.0f) continue;
    const float inverse = by / total;
    for (int64_t j = 0; j < vocab; ++j) row[j] = to_bf16(l[j] * inverse);
    row[pt[i]] = to_bf16(l[pt[i]] * inverse - by);
  }
  return losses;
}

// Adds each row of the gradient to the row of its token.
void embedding_backward(const Tensor& dx, const Tensor& tokens, Tensor grad) {
  const int64_t n = dx.size(0), h = dx.size(1);
  const bf16* px = data(dx);
  const int32_t* pt = ints(tokens);
  float* pg = data32(grad);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < h; ++j) pg[pt[i] * h + j] += to_float(px[i * h + j]);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("add_norm", &add_norm, release());
  m.def("norm_backward", &norm_backward, release());
  m.def("split_heads", &split_heads, release());
  m.def("split_heads_backward", &split_heads_backward, release());
  m.def("attention", &attention, release());
  m.def("attention_backward", &attention_backward, release());
  m.def("route", &route, release());
  m.def("gather", &gather, release());
  m.def("combine", &combine, release());
  m.def("experts_forward", &experts_forward, release());
  m.def("experts_backward", &experts_backward, release());
  m.def("spread_weights", &spread_weights, release());
  m.def("route_backward", &route_backward, release());
  m.def("cross_entropy", &cross_entropy, release());
  m.def("embedding_backward", &embedding_backward, release());
}
