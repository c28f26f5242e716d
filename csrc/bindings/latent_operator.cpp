// The latent operators: tensors in, tensors out.
#include "../cpu/latent_operator.h"

#include "schemas.h"
#include "tensors.h"

namespace fastfusion {
namespace {

using Wanted = std::vector<bool>;

// The contiguous form of some tensors, kept alive, and pointers to their elements.
class Parameters {
 public:
  const void* operator()(const Tensor& tensor) {
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }
  const void* operator()(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? (*this)(*tensor) : nullptr;
  }

 private:
  std::vector<Tensor> kept_;
};

// The gradients that are wanted, one after another as the arguments have them.
class Gradients {
 public:
  Gradients(const Tensor& x, const Wanted& wanted) : x_(x), wanted_(wanted) {}

  void* operator()(const Tensor& like) {
    const bool wanted = wanted_[made.size()];
    made.push_back(wanted ? empty_tensor(x_, shape_of(like)) : no_gradient(x_));
    return wanted ? made.back().mutable_data_ptr() : nullptr;
  }
  void* operator()(const std::optional<Tensor>& like) {
    if (like.has_value()) return (*this)(*like);
    made.push_back(no_gradient(x_));
    return nullptr;
  }
  Image of_image(const Tensor& like) {
    const bool wanted = wanted_[made.size()];
    made.push_back(wanted ? empty_image_like(like) : no_gradient(x_));
    return wanted ? image(made.back()) : Image{};
  }

  std::vector<Tensor> made;

 private:
  const Tensor& x_;
  const Wanted& wanted_;
};

LatentCall call_of(const Tensor& x, int64_t patch_rows, int64_t patch_columns) {
  LatentCall call{};
  call.type = type_of(x);
  call.x = image(x);
  call.patch_rows = patch_rows;
  call.patch_columns = patch_columns;
  return call;
}

int64_t patches_of(const Tensor& x, int64_t patch_rows, int64_t patch_columns) {
  const auto count = [](int64_t size, int64_t patch) { return (size + patch - 1) / patch; };
  return count(x.size(2), patch_rows) * count(x.size(3), patch_columns);
}

// -- latent_encode --------------------------------------------------------------------------------

struct Encoding {
  Tensor x, prompts, key_weight, key_bias, value_weight, value_bias;
  int64_t patch_rows, patch_columns;

  LatentCall call(Parameters& parameters) const {
    LatentCall call = call_of(x, patch_rows, patch_columns);
    call.heads = prompts.size(0);
    call.tokens = prompts.size(1);
    call.prompts = parameters(prompts);
    call.key_weight = parameters(key_weight);
    call.key_bias = parameters(key_bias);
    call.value_weight = parameters(value_weight);
    call.value_bias = parameters(value_bias);
    return call;
  }
  LatentResult result(Gradients& gradients) const {
    LatentResult result{};
    result.image = gradients.of_image(x);
    result.prompts = gradients(prompts);
    result.key_weight = gradients(key_weight);
    result.key_bias = gradients(key_bias);
    result.value_weight = gradients(value_weight);
    result.value_bias = gradients(value_bias);
    return result;
  }
};

Tensor latent_encode(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,
                     Tensor value_weight, Tensor value_bias, int64_t patch_rows,
                     int64_t patch_columns) {
  const Encoding e{x,          prompts,    key_weight,   key_bias, value_weight,
                   value_bias, patch_rows, patch_columns};
  Parameters parameters;
  Tensor latents = empty_tensor(
      x, {x.size(0), patches_of(x, patch_rows, patch_columns), prompts.size(1), x.size(1)});
  LatentResult result{};
  result.latents = latents.mutable_data_ptr();
  FF_CALL(latent_forward)(e.call(parameters), result);
  return latents;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> latent_encode_backward(
    Tensor grad, Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias, Tensor value_weight,
    Tensor value_bias, int64_t patch_rows, int64_t patch_columns, Wanted mask) {
  const Encoding e{x,          prompts,    key_weight,   key_bias, value_weight,
                   value_bias, patch_rows, patch_columns};
  Parameters parameters;
  Gradients gradients(x, mask);
  const LatentResult result = e.result(gradients);
  FF_CALL(latent_backward)(e.call(parameters), Image{}, parameters(grad), result);
  const auto& g = gradients.made;
  return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

// -- trigonometric_solve --------------------------------------------------------------------------

SolverCall solver_call(const Tensor& latents, const Tensor& sine, const Tensor& cosine,
                       const std::optional<Tensor>& offset, double fundamental, bool squash,
                       Parameters& parameters) {
  SolverCall call{};
  call.type = type_of(latents);
  call.count = latents.size(0) * latents.size(1) * latents.size(2);
  call.channels = latents.size(3);
  call.basis = sine.size(1);
  call.latents = parameters(latents);
  call.sine = parameters(sine);
  call.cosine = parameters(cosine);
  call.offset = parameters(offset);
  call.fundamental = fundamental;
  call.squash = squash;
  return call;
}

Tensor trigonometric_solve(Tensor latents, Tensor sine, Tensor cosine, std::optional<Tensor> offset,
                           double fundamental, bool squash) {
  Parameters parameters;
  Tensor solved = empty_tensor(latents, shape_of(latents));
  FF_CALL(trigonometric_solve)
  (solver_call(latents, sine, cosine, offset, fundamental, squash, parameters),
   solved.mutable_data_ptr());
  return solved;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> trigonometric_solve_backward(
    Tensor grad, Tensor latents, Tensor sine, Tensor cosine, std::optional<Tensor> offset,
    double fundamental, bool squash, Wanted mask) {
  Parameters parameters;
  Gradients gradients(latents, mask);
  SolverResult result{};
  result.latents = gradients(latents);
  result.sine = gradients(sine);
  result.cosine = gradients(cosine);
  result.offset = gradients(offset);
  FF_CALL(trigonometric_solve_backward)
  (solver_call(latents, sine, cosine, offset, fundamental, squash, parameters), parameters(grad),
   result);
  const auto& g = gradients.made;
  return {g[0], g[1], g[2], g[3]};
}

// -- latent_decode --------------------------------------------------------------------------------

LatentCall decoding_call(const Tensor& x, const Tensor& latents, const Tensor& query_weight,
                         const Tensor& query_bias, int64_t heads, int64_t patch_rows,
                         int64_t patch_columns, Parameters& parameters) {
  LatentCall call = call_of(x, patch_rows, patch_columns);
  call.heads = heads;
  call.tokens = latents.size(2);
  call.latents = parameters(latents);
  call.query_weight = parameters(query_weight);
  call.query_bias = parameters(query_bias);
  return call;
}

Tensor latent_decode(Tensor x, Tensor latents, Tensor query_weight, Tensor query_bias,
                     int64_t heads, int64_t patch_rows, int64_t patch_columns) {
  Parameters parameters;
  Tensor y = empty_image_like(x);
  LatentResult result{};
  result.image = image(y);
  FF_CALL(latent_forward)
  (decoding_call(x, latents, query_weight, query_bias, heads, patch_rows, patch_columns,
                 parameters),
   result);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> latent_decode_backward(
    Tensor grad, Tensor x, Tensor latents, Tensor query_weight, Tensor query_bias, int64_t heads,
    int64_t patch_rows, int64_t patch_columns, Wanted mask) {
  Parameters parameters;
  Gradients gradients(x, mask);
  LatentResult result{};
  result.image = gradients.of_image(x);
  result.latents = gradients(latents);
  result.query_weight = gradients(query_weight);
  result.query_bias = gradients(query_bias);
  FF_CALL(latent_backward)
  (decoding_call(x, latents, query_weight, query_bias, heads, patch_rows, patch_columns,
                 parameters),
   image(grad), nullptr, result);
  const auto& g = gradients.made;
  return {g[0], g[1], g[2], g[3]};
}

// -- latent_operator ------------------------------------------------------------------------------

struct Whole {
  Encoding encoding;
  Tensor query_weight, query_bias, sine, cosine;
  std::optional<Tensor> offset;
  double fundamental;
  bool squash;

  LatentCall call(Parameters& parameters) const {
    LatentCall call = encoding.call(parameters);
    call.query_weight = parameters(query_weight);
    call.query_bias = parameters(query_bias);
    call.basis = sine.size(1);
    call.sine = parameters(sine);
    call.cosine = parameters(cosine);
    call.offset = parameters(offset);
    call.fundamental = fundamental;
    call.squash = squash;
    return call;
  }
  LatentResult result(Gradients& gradients) const {
    LatentResult result = encoding.result(gradients);
    result.query_weight = gradients(query_weight);
    result.query_bias = gradients(query_bias);
    result.sine = gradients(sine);
    result.cosine = gradients(cosine);
    result.offset = gradients(offset);
    return result;
  }
};

Tensor latent_operator(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,
                       Tensor value_weight, Tensor value_bias, Tensor query_weight,
                       Tensor query_bias, Tensor sine, Tensor cosine, std::optional<Tensor> offset,
                       int64_t patch_rows, int64_t patch_columns, double fundamental, bool squash) {
  const Whole whole{
      {x, prompts, key_weight, key_bias, value_weight, value_bias, patch_rows, patch_columns},
      query_weight,
      query_bias,
      sine,
      cosine,
      offset,
      fundamental,
      squash};
  Parameters parameters;
  Tensor y = empty_image_like(x);
  LatentResult result{};
  result.image = image(y);
  FF_CALL(latent_forward)(whole.call(parameters), result);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
latent_operator_backward(Tensor grad, Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,
                         Tensor value_weight, Tensor value_bias, Tensor query_weight,
                         Tensor query_bias, Tensor sine, Tensor cosine,
                         std::optional<Tensor> offset, int64_t patch_rows, int64_t patch_columns,
                         double fundamental, bool squash, Wanted mask) {
  const Whole whole{
      {x, prompts, key_weight, key_bias, value_weight, value_bias, patch_rows, patch_columns},
      query_weight,
      query_bias,
      sine,
      cosine,
      offset,
      fundamental,
      squash};
  Parameters parameters;
  Gradients gradients(x, mask);
  const LatentResult result = whole.result(gradients);
  FF_CALL(latent_backward)(whole.call(parameters), image(grad), nullptr, result);
  const auto& g = gradients.made;
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10]};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) { define_latent_operator(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("latent_encode", TORCH_BOX(&latent_encode));
  m.impl("latent_encode_backward", TORCH_BOX(&latent_encode_backward));
  m.impl("trigonometric_solve", TORCH_BOX(&trigonometric_solve));
  m.impl("trigonometric_solve_backward", TORCH_BOX(&trigonometric_solve_backward));
  m.impl("latent_decode", TORCH_BOX(&latent_decode));
  m.impl("latent_decode_backward", TORCH_BOX(&latent_decode_backward));
  m.impl("latent_operator", TORCH_BOX(&latent_operator));
  m.impl("latent_operator_backward", TORCH_BOX(&latent_operator_backward));
}

}  // namespace
}  // namespace fastfusion
