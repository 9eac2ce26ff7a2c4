// The schemas of all operators. Shapes: B samples, E key channels (of query and key), C value channels, *S the spatial
// sizes of the queries, *T those of the keys and values. logsumexp is float64 for float64 inputs, else float32.
//
// needs_input_grad of a backward says which gradients are wanted, in the order of the results; one that is not wanted
// is an empty tensor of shape (0).
#include "registration.h"

SEGATTN_LIBRARY(SEGATTN_NAMESPACE, m) {
  // query (B, E, *S), key (B, E, *T), value (B, C, *T) -> output (B, C, *S), logsumexp (B, *S), output_low: the
  // rounding error of output, itself rounded, (B, C, *S), for 16-bit types and with_low; else empty, (B, 0, *S);
  // logsumexp_low: the rounding error of logsumexp, (B, *S); for 16-bit types empty, (B, 0, *S[1:]).
  // key_padding_mask (B, *T), bool: true for a key that is padding and takes no part. Without any other key, output is
  // 0 and logsumexp -inf.
  m.def(
      "position_attention(Tensor query, Tensor key, Tensor value, float scale, bool with_low=False,"
      " Tensor? key_padding_mask=None)"
      " -> (Tensor output, Tensor logsumexp, Tensor output_low, Tensor logsumexp_low)");
  // grad_output, output, output_low (B, C, *S), logsumexp, logsumexp_low, grad_logsumexp (B, *S) -> gradients of query,
  // key and value. The weights are exp((energy - logsumexp) - logsumexp_low): with the logsumexp and the output over
  // more keys than those of the call, the gradients are the call's part of those over all keys. keys_complete says that
  // they are over the keys of the call alone. The kernels then take the rounding error of output off, by a sum that is
  // known. Without output_low, that is an error of grad_query for 16-bit types (docs/decisions.md). Without
  // logsumexp_low, the rounding of logsumexp is an error of the weights for float32 and float64; 16-bit weights are
  // rounded more coarsely, and it is not read.
  m.def(
      "position_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output,"
      " Tensor logsumexp, float scale, Tensor? output_low=None, Tensor? logsumexp_low=None,"
      " Tensor? grad_logsumexp=None, bool[3] needs_input_grad=[True, True, True], Tensor? key_padding_mask=None,"
      " bool keys_complete=False)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  // Attention over a part of the keys, perhaps none, for merging with that over others: output (B, C, *S), logsumexp
  // (B, *S) and its rounding error logsumexp_low (B, *S), all in the dtype of accumulation. Of a query without keys, or
  // whose energies are all -inf, output is 0, logsumexp -inf and logsumexp_low 0.
  m.def(
      "position_attention_partial(Tensor query, Tensor key, Tensor value, float scale,"
      " Tensor? key_padding_mask=None) -> (Tensor output, Tensor logsumexp, Tensor logsumexp_low)");
  // The call's part of the gradients, in the dtype of accumulation. grad_output (B, C, *S) has the dtype of query;
  // logsumexp + logsumexp_low (B, *S) is over all keys, those of other calls too; delta (B, *S) is
  // sum_c grad_output output - grad_logsumexp with the output over all keys.
  m.def(
      "position_attention_partial_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value,"
      " Tensor logsumexp, Tensor logsumexp_low, Tensor delta, float scale,"
      " bool[3] needs_input_grad=[True, True, True], Tensor? key_padding_mask=None)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");

  // query (B, C, *S), key (B, K, *S), value (B, K, *T) -> output (B, C, *T), logsumexp (B, C)
  m.def(
      "channel_attention(Tensor query, Tensor key, Tensor value, float scale)"
      " -> (Tensor output, Tensor logsumexp)");
  m.def(
      "channel_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, float scale,"
      " bool[3] needs_input_grad=[True, True, True])"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  // input (B, C, *S), which is query, key and value -> output (B, C, *S), logsumexp (B, C). The energy is symmetric, so
  // half of it is computed. With gamma (B, C), in logsumexp's dtype: output = gamma * attention + input
  m.def("channel_self_attention(Tensor input, float scale, Tensor? gamma=None) -> (Tensor output, Tensor logsumexp)");
  // grad_input (B, C, *S), grad_gamma (B, C); grad_gamma is computed without a gamma too
  m.def(
      "channel_self_attention_backward(Tensor grad_output, Tensor input, float scale, Tensor? gamma=None,"
      " bool[2] needs_input_grad=[True, True])"
      " -> (Tensor grad_input, Tensor grad_gamma)");
  // The two halves of channel attention. query (B, C, *S), key (B, K, *S), perhaps without positions -> energy
  // (B, C, K), sum_n query_cn key_kn, in the dtype of accumulation. Without key it is query, and half is computed.
  m.def("channel_energy(Tensor query, Tensor? key=None) -> Tensor energy");
  // grad_energy (B, C, K). Without key, grad_query has both parts, and grad_key is not wanted.
  m.def(
      "channel_energy_backward(Tensor grad_energy, Tensor query, Tensor? key=None,"
      " bool[2] needs_input_grad=[True, True])"
      " -> (Tensor grad_query, Tensor grad_key)");
  // energy (B, C, K), value (B, K, *T) -> output (B, C, *T) = softmax_k(scale * energy) value, logsumexp (B, C). With
  // gamma (B, C), in energy's dtype: output = gamma * attention + value, for K = C.
  m.def(
      "channel_apply(Tensor energy, Tensor value, float scale, Tensor? gamma=None)"
      " -> (Tensor output, Tensor logsumexp)");
  // grad_output (B, C, *T) -> grad_energy (B, C, K), grad_value (B, K, *T), grad_gamma (B, C); grad_gamma is computed
  // without a gamma too
  m.def(
      "channel_apply_backward(Tensor grad_output, Tensor energy, Tensor value, float scale, Tensor? gamma=None,"
      " bool[3] needs_input_grad=[True, True, True])"
      " -> (Tensor grad_energy, Tensor grad_value, Tensor grad_gamma)");

  // query (B, E, H, W), key (B, E, H, W) -> affinity (B, H + W - 1, H, W)
  m.def("criss_cross_affinity(Tensor query, Tensor key) -> Tensor affinity");
  m.def(
      "criss_cross_affinity_backward(Tensor grad_affinity, Tensor query, Tensor key,"
      " bool[2] needs_input_grad=[True, True])"
      " -> (Tensor grad_query, Tensor grad_key)");
  // attention (B, H + W - 1, H, W), value (B, C, H, W) -> output (B, C, H, W)
  m.def("criss_cross_aggregation(Tensor attention, Tensor value) -> Tensor output");
  m.def(
      "criss_cross_aggregation_backward(Tensor grad_output, Tensor attention, Tensor value,"
      " bool[2] needs_input_grad=[True, True])"
      " -> (Tensor grad_attention, Tensor grad_value)");
  // query (B, E, H, W), key (B, E, H, W), value (B, C, H, W) -> output (B, C, H, W), logsumexp (B, H, W) and its
  // rounding error, logsumexp_low (B, H, W), which the gradient needs where energies are large. The backward's
  // logsumexp, output and keys_complete are as in position_attention_backward.
  m.def(
      "criss_cross_attention(Tensor query, Tensor key, Tensor value, float scale)"
      " -> (Tensor output, Tensor logsumexp, Tensor logsumexp_low)");
  m.def(
      "criss_cross_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output,"
      " Tensor logsumexp, float scale, Tensor? logsumexp_low=None, Tensor? grad_logsumexp=None,"
      " bool[3] needs_input_grad=[True, True, True], bool keys_complete=False)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  // The two parts of criss-cross attention: over the row, self included, and over the column, self left out. Results
  // and backward as of position_attention_partial, with logsumexp, logsumexp_low and delta (B, H, W).
  m.def(
      "criss_cross_rows(Tensor query, Tensor key, Tensor value, float scale)"
      " -> (Tensor output, Tensor logsumexp, Tensor logsumexp_low)");
  m.def(
      "criss_cross_rows_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp,"
      " Tensor logsumexp_low, Tensor delta, float scale, bool[3] needs_input_grad=[True, True, True])"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "criss_cross_columns(Tensor query, Tensor key, Tensor value, float scale)"
      " -> (Tensor output, Tensor logsumexp, Tensor logsumexp_low)");
  m.def(
      "criss_cross_columns_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor logsumexp,"
      " Tensor logsumexp_low, Tensor delta, float scale, bool[3] needs_input_grad=[True, True, True])"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
}
