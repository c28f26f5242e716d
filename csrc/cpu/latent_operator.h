// Entry points of the latent operator's kernels.
#pragma once

#include "capability.h"
#include "types.h"

namespace fastfusion {

// A call of latent_encode, latent_decode or latent_operator. What a step does not have is null:
// prompts for no encoding, sine for no solver, query_weight for no decoding. All but the images are
// contiguous, of the images' type, in the shapes of the operator's definition.
struct LatentCall {
  Type type;
  Image x;
  int64_t patch_rows, patch_columns, heads, tokens, basis;
  const void *prompts, *key_weight, *value_weight, *value_bias, *query_weight, *query_bias;
  const void *key_bias, *sine, *cosine, *offset;
  double fundamental;
  bool squash;
  const void* latents;  // read by latent_decode
};

// Where the results go; null where one is not wanted. In the backward pass these are gradients.
struct LatentResult {
  Image image;    // y, or the gradient of x
  void* latents;  // of latent_encode, or the gradient of latent_decode's
  void *prompts, *key_weight, *key_bias, *value_weight, *value_bias, *query_weight, *query_bias;
  void *sine, *cosine, *offset;
};

// A call of trigonometric_solve on `count` rows of `channels` values.
struct SolverCall {
  Type type;
  int64_t count, channels, basis;
  const void *latents, *sine, *cosine, *offset;
  double fundamental;
  bool squash;
};
struct SolverResult {
  void *latents, *sine, *cosine, *offset;
};

}  // namespace fastfusion

FF_DECLARE(void latent_forward(const LatentCall& call, const LatentResult& result))
// `grad` is that of y, or `grad_latents` that of latent_encode's result.
FF_DECLARE(void latent_backward(const LatentCall& call, const Image& grad, const void* grad_latents,
                                const LatentResult& result))
FF_DECLARE(void trigonometric_solve(const SolverCall& call, void* solved))
FF_DECLARE(void trigonometric_solve_backward(const SolverCall& call, const void* grad,
                                             const SolverResult& result))
