// Registration of the CPU's masked RNN. The ops bring weights into the layouts of matrix.h and run the steps on torch's
// threads. Schemas and contracts stand in moduli_kernels/ops/masked_rnn.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/rnn/sequence.h"

namespace moduli {
namespace {

Direction direction(const Tensor& x, const Tensor& h, const std::string& nonlinearity, double leak, bool reverse) {
  STD_TORCH_CHECK(nonlinearity == "tanh" || nonlinearity == "relu", "nonlinearity must be 'tanh' or 'relu', got '",
                  nonlinearity, "'");
  return {.steps = x.size(0),
          .batch = x.size(1),
          .input = x.size(2),
          .hidden = h.size(1),
          .nonlinearity = nonlinearity == "tanh" ? Nonlinearity::TANH : Nonlinearity::RELU,
          .leak = leak,
          .reverse = reverse};
}

void check_type(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "the RNN's tensors must be float32 or float64 on the CPU; cast them");
}

// A layer's weights as the products read them, and the order in which they have inputs and neurons. The order that the
// op gets is that in which a mask falls into blocks; it isn't used if there are none, since it costs a little.
template <typename T>
class Layer {
 public:
  Layer(const Direction& d, const Weight& w_ih, const Weight& w_hh, const OptionalTensor& order_x,
        const OptionalTensor& order_h, bool transposed_input, bool transposed_hidden)
      : inputs(order_x, d.input), neurons(order_h, d.hidden) {
    const auto find = [&](std::optional<KeptEntries>& kept, const Weight& w, int64_t columns, const Order& order) {
      if (w.mask || w.crow) kept.emplace(w, d.hidden, columns, neurons, order, d.batch);
    };
    std::optional<KeptEntries> kept_ih, kept_hh;
    find(kept_ih, w_ih, d.input, inputs);
    find(kept_hh, w_hh, d.hidden, neurons);
    if ((inputs.of || neurons.of) && !(kept_ih && kept_ih->side) && !(kept_hh && kept_hh->side)) {
      inputs = neurons = Order();
      find(kept_ih, w_ih, d.input, inputs);
      find(kept_hh, w_hh, d.hidden, neurons);
    }
    mostly_blocks = kept_hh && kept_hh->mostly_blocks();
    strips = strips_of(d.batch, d.hidden, mostly_blocks);
    const int64_t width = widest(strips);
    const auto pointer = [](std::optional<KeptEntries>& kept) { return kept ? &*kept : nullptr; };
    input_.emplace(w_ih, pointer(kept_ih), d.hidden, d.input, neurons, inputs, width, transposed_input);
    hidden_.emplace(w_hh, pointer(kept_hh), d.hidden, d.hidden, neurons, neurons, width, transposed_hidden);
  }

  Order inputs, neurons;
  std::vector<Strip> strips;
  bool mostly_blocks = false;  // in products with the hidden weight
  const Matrix<T>& input() const { return input_->matrix; }
  const Matrix<T>& hidden() const { return hidden_->matrix; }

 private:
  std::optional<StoredMatrix<T>> input_, hidden_;
};

template <typename T>
void forward(const Direction& d, const Tensor& x, const Tensor& h, const Weight& w_ih, const Weight& w_hh,
             const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& lengths,
             const OptionalTensor& order_x, const OptionalTensor& order_h, Tensor& output, Tensor& h_n,
             Tensor* activations) {
  const Layer<T> layer(d, w_ih, w_hh, order_x, order_h, false, false);
  const Sequence<T> sequence(d, lengths, layer.inputs, layer.neurons, layer.strips, layer.mostly_blocks);
  std::unique_ptr<T[]> bias;
  if (b_ih || b_hh) {
    bias.reset(new T[d.hidden]());
    for (const auto& each : {b_ih, b_hh})
      if (each)
        for (int64_t i = 0; i < d.hidden; ++i) bias[i] += data<T>(*each)[layer.neurons.at(i)];
  }
  sequence.forward(layer.input(), layer.hidden(), bias.get(), data<T>(x), data<T>(h), mutable_data<T>(output),
                   mutable_data<T>(h_n), activations ? mutable_data<T>(*activations) : nullptr);
}

std::tuple<Tensor, Tensor, Tensor> masked_rnn(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                                              OptionalTensor b_hh, OptionalTensor mask_ih, OptionalTensor mask_hh,
                                              OptionalTensor crow_ih, OptionalTensor col_ih, OptionalTensor crow_hh,
                                              OptionalTensor col_hh, OptionalTensor lengths, OptionalTensor order_x,
                                              OptionalTensor order_h, std::string nonlinearity, double leak, bool reverse,
                                              bool keep) {
  check_type(x);
  const Direction d = direction(x, h, nonlinearity, leak, reverse);
  const auto type = x.scalar_type();
  Tensor output = new_result({d.steps, d.batch, d.hidden}, type), h_n = new_result({d.batch, d.hidden}, type);
  const bool need_activations = keep && leak != 1;
  Tensor activations =
      new_result(need_activations ? std::vector<int64_t>{d.steps, d.batch, d.hidden} : std::vector<int64_t>{0}, type);
  const auto run = type == ScalarType::Double ? forward<double> : forward<float>;
  run(d, x, h, {.weight = w_ih, .mask = mask_ih, .crow = crow_ih, .col = col_ih},
      {.weight = w_hh, .mask = mask_hh, .crow = crow_hh, .col = col_hh}, b_ih, b_hh, lengths, order_x, order_h, output, h_n,
      need_activations ? &activations : nullptr);
  return {output, h_n, activations};
}

template <typename T>
void backward(const Direction& d, const OptionalTensor& grad_output, const Tensor& grad_h_n, const Tensor& x,
              const Tensor& h, const Weight& w_ih, const Weight& w_hh, const OptionalTensor& lengths,
              const OptionalTensor& order_x, const OptionalTensor& order_h, const Tensor& output, const Tensor* activations,
              Tensor* dx, Tensor* dh, Tensor* dw_ih, Tensor* dw_hh, Tensor* dbias) {
  const Layer<T> layer(d, w_ih, w_hh, order_x, order_h, dx != nullptr, true);
  const Sequence<T> sequence(d, lengths, layer.inputs, layer.neurons, layer.strips, layer.mostly_blocks);
  const auto pointer = [](Tensor* tensor) { return tensor ? mutable_data<T>(*tensor) : nullptr; };
  sequence.backward(layer.input(), layer.hidden(), data_or_null<T>(grad_output), data<T>(grad_h_n), data<T>(x), data<T>(h),
                    data<T>(output), activations ? data<T>(*activations) : nullptr,
                    {.x = pointer(dx),
                     .h = pointer(dh),
                     .w_ih = pointer(dw_ih),
                     .w_hh = pointer(dw_hh),
                     .bias = pointer(dbias),
                     .mask_ih = data_or_null<uint8_t>(w_ih.mask),
                     .mask_hh = data_or_null<uint8_t>(w_hh.mask)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> masked_rnn_grads(
    OptionalTensor grad_output, Tensor grad_h_n, Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, OptionalTensor mask_ih,
    OptionalTensor mask_hh, OptionalTensor lengths, OptionalTensor order_x, OptionalTensor order_h, Tensor output,
    Tensor activations, std::string nonlinearity, double leak, bool reverse, bool need_x, bool need_h, bool need_w_ih,
    bool need_w_hh, bool need_bias) {
  check_type(x);
  const Direction d = direction(x, h, nonlinearity, leak, reverse);
  const auto type = x.scalar_type();
  const auto make = [&](bool need, std::vector<int64_t> sizes) {
    return new_result(need ? sizes : std::vector<int64_t>{0}, type);
  };
  Tensor dx = make(need_x, {d.steps, d.batch, d.input}), dh = make(need_h, {d.batch, d.hidden});
  Tensor dw_ih = make(need_w_ih, {d.hidden, d.input}), dw_hh = make(need_w_hh, {d.hidden, d.hidden});
  Tensor dbias = make(need_bias, {d.hidden});
  const auto run = type == ScalarType::Double ? backward<double> : backward<float>;
  const OptionalTensor none;
  run(d, grad_output, grad_h_n, x, h, {.weight = w_ih, .mask = mask_ih, .crow = none, .col = none},
      {.weight = w_hh, .mask = mask_hh, .crow = none, .col = none}, lengths, order_x, order_h, output,
      leak == 1 ? nullptr : &activations, need_x ? &dx : nullptr, need_h ? &dh : nullptr, need_w_ih ? &dw_ih : nullptr,
      need_w_hh ? &dw_hh : nullptr, need_bias ? &dbias : nullptr);
  return {dx, dh, dw_ih, dw_hh, dbias};
}

// Contract: moduli_kernels/ops/found_blocks.py
Tensor found_blocks(Tensor mask, OptionalTensor row_order, OptionalTensor column_order, int64_t batch) {
  STD_TORCH_CHECK(mask.dim() == 2 && mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool,
                  "mask must be a contiguous bool matrix on the CPU; call .contiguous()");
  const int64_t rows = mask.size(0), columns = mask.size(1);
  const OptionalTensor its = mask, none;
  const KeptEntries kept({.weight = mask, .mask = its, .crow = none, .col = none}, rows, columns, Order(row_order, rows),
                         Order(column_order, columns), batch);
  Tensor result = torch::stable::empty({4}, ScalarType::Long);
  auto* found = mutable_data<int64_t>(result);
  found[0] = kept.side;
  found[1] = kept.blocks;
  found[2] = kept.entries - kept.strays;
  found[3] = kept.strays;
  return result;
}

}  // namespace
}  // namespace moduli

STABLE_TORCH_LIBRARY_IMPL(moduli_kernels, CPU, m) {
  m.impl("masked_rnn", TORCH_BOX(&moduli::masked_rnn));
  m.impl("masked_rnn_grads", TORCH_BOX(&moduli::masked_rnn_grads));
  m.impl("found_blocks", TORCH_BOX(&moduli::found_blocks));
}
