// The operators' schemas: the CPU library and the CUDA library each define the same ones.
#pragma once

namespace fastfusion {

template <class Library>
void define_haar(Library& m) {
  m.def("haar_dwt2d(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "haar_dwt2d_backward(Tensor grad_0, Tensor grad_1, Tensor grad_2, Tensor grad_3, Tensor x,"
      " bool[] mask) -> Tensor");
  m.def("haar_idwt2d(Tensor ll, Tensor lh, Tensor hl, Tensor hh, int rows, int columns) -> Tensor");
  m.def(
      "haar_idwt2d_backward(Tensor grad_0, Tensor ll, Tensor lh, Tensor hl, Tensor hh, int rows,"
      " int columns, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("haar_split2d(Tensor x) -> (Tensor, Tensor)");
  m.def("haar_split2d_backward(Tensor grad_0, Tensor grad_1, Tensor x, bool[] mask) -> Tensor");
}

template <class Library>
void define_spectral_stage(Library& m) {
  m.def(
      "spectral_maxima(Tensor x, Tensor low_weight, Tensor? low_bias, Tensor high_weight,"
      " Tensor? high_bias) -> Tensor");
  m.def(
      "spectral_maxima_backward(Tensor grad_0, Tensor x, Tensor low_weight, Tensor? low_bias,"
      " Tensor high_weight, Tensor? high_bias, bool[] mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "spectral_mix(Tensor x, Tensor low_weight, Tensor? low_bias, Tensor high_weight,"
      " Tensor? high_bias, Tensor low_gate, Tensor high_gate) -> Tensor");
  m.def(
      "spectral_mix_backward(Tensor grad_0, Tensor x, Tensor low_weight, Tensor? low_bias,"
      " Tensor high_weight, Tensor? high_bias, Tensor low_gate, Tensor high_gate, bool[] mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

template <class Library>
void define_coordinate_mixing(Library& m) {
  m.def("coordinate_mixing(Tensor candidates, Tensor state, int k) -> Tensor");
  m.def(
      "coordinate_mixing_backward(Tensor grad_0, Tensor candidates, Tensor state, int k,"
      " bool[] mask) -> (Tensor, Tensor)");
}

template <class Library>
void define_depthwise(Library& m) {
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int dilation_rows, "
      "int dilation_columns, str activation) -> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad_0, Tensor x, Tensor weight, Tensor? bias, "
      "int dilation_rows, int dilation_columns, str activation, bool[] mask) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "large_kernel_attention(Tensor x, Tensor local_weight, Tensor? local_bias, "
      "Tensor context_weight, Tensor? context_bias, Tensor mix_weight, Tensor? mix_bias, "
      "int dilation_rows, int dilation_columns) -> Tensor");
  m.def(
      "large_kernel_attention_backward(Tensor grad_0, Tensor x, Tensor local_weight, "
      "Tensor? local_bias, Tensor context_weight, Tensor? context_bias, Tensor mix_weight, "
      "Tensor? mix_bias, int dilation_rows, int dilation_columns, bool[] mask) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("multiscale_attention(Tensor x, Tensor weight, Tensor bias, int[] sizes) -> Tensor");
  m.def(
      "multiscale_attention_backward(Tensor grad_0, Tensor x, Tensor weight, Tensor bias, "
      "int[] sizes, bool[] mask) -> (Tensor, Tensor, Tensor)");
}

template <class Library>
void define_latent_operator(Library& m) {
  m.def(
      "latent_encode(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,"
      " Tensor value_weight, Tensor value_bias, int patch_rows, int patch_columns) -> Tensor");
  m.def(
      "latent_encode_backward(Tensor grad_0, Tensor x, Tensor prompts, Tensor key_weight,"
      " Tensor key_bias, Tensor value_weight, Tensor value_bias, int patch_rows,"
      " int patch_columns, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "trigonometric_solve(Tensor latents, Tensor sine, Tensor cosine, Tensor? offset,"
      " float fundamental, bool squash) -> Tensor");
  m.def(
      "trigonometric_solve_backward(Tensor grad_0, Tensor latents, Tensor sine, Tensor cosine,"
      " Tensor? offset, float fundamental, bool squash, bool[] mask)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "latent_decode(Tensor x, Tensor latents, Tensor query_weight, Tensor query_bias, int heads,"
      " int patch_rows, int patch_columns) -> Tensor");
  m.def(
      "latent_decode_backward(Tensor grad_0, Tensor x, Tensor latents, Tensor query_weight,"
      " Tensor query_bias, int heads, int patch_rows, int patch_columns, bool[] mask)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "latent_operator(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,"
      " Tensor value_weight, Tensor value_bias, Tensor query_weight, Tensor query_bias,"
      " Tensor sine, Tensor cosine, Tensor? offset, int patch_rows, int patch_columns,"
      " float fundamental, bool squash) -> Tensor");
  m.def(
      "latent_operator_backward(Tensor grad_0, Tensor x, Tensor prompts, Tensor key_weight,"
      " Tensor key_bias, Tensor value_weight, Tensor value_bias, Tensor query_weight,"
      " Tensor query_bias, Tensor sine, Tensor cosine, Tensor? offset, int patch_rows,"
      " int patch_columns, float fundamental, bool squash, bool[] mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
      " Tensor)");
}

template <class Library>
void define_frequency_filter(Library& m) {
  m.def(
      "frequency_filter2d(Tensor x, Tensor mixing, Tensor kernel, Tensor? mixing_bias,"
      " Tensor? gain, Tensor? bias, str padding_mode) -> Tensor");
  m.def(
      "frequency_filter2d_backward(Tensor grad_0, Tensor x, Tensor mixing, Tensor kernel,"
      " Tensor? mixing_bias, Tensor? gain, Tensor? bias, str padding_mode, bool[] mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "frequency_response2d(Tensor x, Tensor mixing, Tensor kernel, Tensor? mixing_bias)"
      " -> (Tensor, Tensor)");
  m.def(
      "frequency_response2d_backward(Tensor grad_0, Tensor grad_1, Tensor x, Tensor mixing,"
      " Tensor kernel, Tensor? mixing_bias, bool[] mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace fastfusion
