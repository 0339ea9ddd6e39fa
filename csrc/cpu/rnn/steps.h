// The masked RNN on the CPU: what the registration (rnn.cpp) hands to the loops (rnn_loops.h), which are compiled once per
// instruction set. Plain pointers only: no std container may be instantiated in an ISA's translation unit.
//
// The batch is cut into strips of up to 64 lanes. A slab holds what one step has of one strip: (rows, width), rows being
// neurons or inputs, so that a weight meets a contiguous run of lanes. Lanes of the batch do not meet but in the gradients
// of weights and biases, where every sum has a fixed order: results do not depend on the number of threads.
#pragma once

#include <cstdint>

namespace moduli {

enum class Nonlinearity { TANH, RELU };

// Widths of strips: other numbers of lanes are filled up.
constexpr int64_t WIDTHS[] = {1, 4, 8, 16, 24, 32, 48, 64};

// Rows of a dense matrix that are multiplied at a time: chunks of rows begin at multiples of it, and slabs have room for it.
constexpr int64_t PANEL = 4;

// How a weight's values lie. ENTRIES: its kept ones, sorted by block of columns, row and column. A dense matrix, masked
// entries 0: PANELS [row / PANEL][column][row % PANEL], rows filled up with 0, for several lanes; for one lane alone as
// tensors have it, ROWS [row][column], or, where that is the transposed matrix, COLUMNS [column][row].
enum class Layout { ENTRIES, PANELS, ROWS, COLUMNS };

// A weight as the products read it. A block's share of a slab stays in the first-level cache while all rows go over it.
template <typename T>
struct Matrix {
  Layout layout;
  int64_t rows, columns;
  int64_t blocks, block_columns;  // of kept entries; the last block may be narrower
  const int64_t* begin;  // (blocks * rows + 1): where the entries of each block and row begin; null where dense
  const uint16_t* column;  // of each entry, counted from its block's first; null where dense
  const T* value;
};

// A dense matrix that panels are made of: weight (rows, columns), of which mask, bytes like it or null, keeps some; and
// rows, whose mask is not null.
template <typename T>
struct DenseOf {
  const T* weight;
  const uint8_t* mask;
  int64_t rows, columns;
  T* to;
};

// h' = (1 - leak) h + leak s(bias + input x + hidden h) of rows begin .. end of a strip.
template <typename T>
struct ForwardStep {
  Matrix<T> input, hidden;
  const T *x, *h;  // slabs
  const T* bias;   // (rows) or null
  T* next;         // slab
  T* activation;   // slab of s(a), or null
  const T* active;  // (width): 0 where a lane keeps its state; null: all are active
  int64_t width;
  Nonlinearity nonlinearity;
  T leak;
};

// With d = grad_output + stays + hidden^T da_after: da = leak s' d, stays = (1 - leak) d, sum += da, of rows begin .. end.
template <typename T>
struct BackwardStep {
  Matrix<T> hidden_transposed;
  const T* da_after;     // slab of the step after, or null
  const T* grad_output;  // slab, or null: 0
  const T* activation;   // slab of s(a)
  T* da;                 // slab
  T* stays;              // slab, read and written
  T* sum;                // the same, or null
  const T* active;
  int64_t width;
  Nonlinearity nonlinearity;
  T leak;
};

// to += matrix from, of rows begin .. end.
template <typename T>
struct Product {
  Matrix<T> matrix;
  const T* from;
  T* to;
  int64_t width;
};

// grad[e] += sum over steps and lanes of da[row of e] other[column of e], of the entries e of rows begin .. end; of a dense
// matrix e counts all entries, row by row. Slabs of successive steps lie da_step and other_step elements apart.
template <typename T>
struct SampledProduct {
  Matrix<T> matrix;
  const T *da, *other;
  int64_t da_step, other_step, steps, width;
  T* grad;
};

// Between (lanes, rows) with a stride, as tensors have it, and a slab: rows begin .. end; lanes that are only filled up
// are 0 in slabs.
template <typename T>
struct Transposition {
  T* lanes_first;
  int64_t stride, lanes;
  T* slab;
  int64_t width;
};

template <typename T>
struct RnnLoops {
  void (*forward)(const ForwardStep<T>&, int64_t begin, int64_t end);
  void (*backward)(const BackwardStep<T>&, int64_t begin, int64_t end);
  void (*product)(const Product<T>&, int64_t begin, int64_t end);
  void (*sampled)(const SampledProduct<T>&, int64_t begin, int64_t end);
  void (*to_slab)(const Transposition<T>&, int64_t begin, int64_t end);
  void (*from_slab)(const Transposition<T>&, int64_t begin, int64_t end);
  // panels begin .. end of a dense matrix, and of the transposed of one
  void (*fill_panels)(const DenseOf<T>&, int64_t begin, int64_t end);
  void (*transpose_panels)(const Matrix<T>&, T* to, int64_t begin, int64_t end);
  // rows begin .. end with 0 where they are masked
  void (*fill_rows)(const DenseOf<T>&, int64_t begin, int64_t end);
  // of one row: bit l of bits[w] is entry 64 w + l
  void (*find_kept)(const uint8_t* mask, int64_t columns, uint64_t* bits);
  int64_t (*count_bits)(const uint64_t* bits, int64_t words);
};

#define MODULI_DECLARE_RNN(isa)         \
  namespace isa {                       \
  extern const RnnLoops<float> rnn_f32;  \
  extern const RnnLoops<double> rnn_f64; \
  }
MODULI_DECLARE_RNN(portable)
#if MODULI_KERNELS_X86
MODULI_DECLARE_RNN(avx2)
MODULI_DECLARE_RNN(avx512)
#endif

}  // namespace moduli
