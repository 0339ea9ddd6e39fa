// What the sequence of a masked RNN (sequence.h) hands to its loops (loops.h). The loops are compiled once per
// instruction set, therefore these structs hold plain pointers: a std container that is instantiated in such a file
// could be the copy that the linker keeps for all of them.
//
// A lane is one sample of the batch. The batch is cut into strips of up to 64 lanes. A slab (rows, width) holds the
// numbers of one strip at one step, where rows are neurons or inputs, so that a weight meets a contiguous run of lanes.
// Lanes meet each other in the gradients of weights and biases only, where every sum has a fixed order: results don't
// depend on the number of threads.
#pragma once

#include <cstdint>

namespace moduli {

enum class Nonlinearity { TANH, RELU };

// The widths that strips have. Other numbers of lanes are filled up to the next width.
constexpr int64_t WIDTHS[] = {1, 4, 8, 16, 24, 32, 48, 64};

// The number of rows of a dense matrix that are multiplied at a time. Chunks of rows begin at its multiples, and slabs
// have room for whole panels.
constexpr int64_t PANEL = 4;

// The layout of a weight's values in memory.
enum class Layout {
  ENTRIES,  // kept entries only: in blocks, and strays sorted by band of columns and row
  // All entries, 0 where masked:
  PANELS,  // [row / PANEL][column][row % PANEL], filled up with rows of 0; for several lanes
  ROWS,  // [row][column], which is a tensor's own layout; for one lane
  COLUMNS,  // [column][row], which is a tensor's own layout of the transposed matrix; for one lane
};

// Squares of `side` rows and columns in which many entries are kept, multiplied whole: a matrix is cut into squares from
// its first row and column on, and those at its last rows and columns may reach beyond it.
template <typename T>
struct Blocks {
  int64_t side;  // 8 or 16, or 0 if there are no blocks
  const int64_t* begin;  // (rows of squares + 1): where the blocks of each row of squares begin
  const uint16_t* column;  // (blocks): the column of squares that each block is in, ascending in a row of squares
  const T* value;  // (blocks, side, side): [column][row], 0 where masked or beyond the matrix
};

// A weight as the products read it. If its layout is ENTRIES, its kept entries are those in blocks and, one by one, the
// strays beside them. Their columns are cut into bands, so that a band's share of a slab stays in the first-level cache
// while all rows are multiplied with it.
template <typename T>
struct Matrix {
  Layout layout;
  int64_t rows, columns;
  int64_t bands, band_columns;  // the last band may be narrower; a dense matrix is one band
  const int64_t* begin;  // (bands * rows + 1): where the strays of each band and row begin; null if dense
  const uint16_t* column;  // (strays): column of each stray, counted from the first one of its band; null if dense
  const T* value;  // (strays), or all entries if dense
  Blocks<T> blocks;
};

namespace {

template <typename T>
inline int64_t strays_of(const Matrix<T>& m) {
  return m.begin[m.bands * m.rows];
}
// Whether each band of columns, or each column, should be read once for all rows.
template <typename T>
inline bool is_read_once(const Matrix<T>& m) {
  return m.bands > 1 || m.layout == Layout::COLUMNS;
}

}  // namespace

// A masked weight that is copied to a dense layout, its rows and columns brought into an order if there is one.
template <typename T>
struct DenseCopy {
  const T* weight;  // (rows, columns)
  const uint8_t* mask;  // (rows, columns), not 0 where an entry is kept; null if all are kept
  int64_t rows, columns;
  const int64_t *row_order, *column_order;  // (rows), (columns): which row and column of the weight comes next; or null
  T* to;
};

// Blocks that are filled from a masked weight, its rows and columns brought into an order if there is one.
template <typename T>
struct BlockCopy {
  const T* weight;  // (rows, columns)
  const uint64_t* bits;  // (rows in the order, words): bit l of word w is 1 if the entry in column 64 w + l is kept
  int64_t rows, columns, words;
  const int64_t *row_order, *column_order;  // see DenseCopy
  Blocks<T> blocks;
  T* to;  // the blocks' values
};

// One step of a strip, h' = (1 - leak) h + leak s(bias + input x + hidden h), where s is the nonlinearity. Slabs of
// hidden neurons are (hidden.rows, width), those of inputs (input.columns, width).
template <typename T>
struct ForwardStep {
  Matrix<T> input, hidden;
  const T *x, *h;  // slabs of the input and of the state before
  const T* bias;  // (hidden.rows), or null
  T* next;  // slab of the state after
  T* activation;  // slab of s, or null if it isn't kept
  const T* active;  // (width): 0 if a lane keeps its state; null if all lanes are active
  int64_t width;
  Nonlinearity nonlinearity;
  T leak;
};

// The same step backward. With d = grad_output + stays + hidden^T da_after it computes da = leak s' d,
// stays = (1 - leak) d and sum += da.
template <typename T>
struct BackwardStep {
  Matrix<T> hidden_transposed;
  const T* da_after;  // slab of da at the step after, or null at the last step
  const T* grad_output;  // slab, or null for 0
  const T* activation;  // slab of s
  T* da;  // slab: gradient of the nonlinearity's argument
  T* stays;  // slab, read and written: gradient of the state that doesn't pass through the weights
  T* sum;  // slab, added to: the bias's gradient, lane by lane; or null
  const T* active;  // see ForwardStep
  int64_t width;
  Nonlinearity nonlinearity;
  T leak;
};

// to += matrix from, for slabs `to` and `from`.
template <typename T>
struct Product {
  Matrix<T> matrix;
  const T* from;
  T* to;
  int64_t width;
};

// A weight's gradient at its entries: grad[e] += the sum over steps and lanes of da[row of e] other[column of e], where e
// counts the strays or, in a dense matrix, all entries row by row; the same for grad_blocks and the blocks. Slabs of
// successive steps are da_step and other_step elements apart.
template <typename T>
struct SampledProduct {
  Matrix<T> matrix;
  const T *da, *other;
  int64_t da_step, other_step, steps, width;
  T* grad;
  const T* da_of_lanes;  // (steps, lanes, lane_stride): da, lane by lane; null if there are no blocks
  int64_t lanes, lane_stride;  // lanes without those that fill up the slab; rows, with room for whole blocks
  T* grad_blocks;  // (blocks, side, side)
};

// The strip of a tensor and its slab. Lanes that only fill up the slab are 0 there.
template <typename T>
struct Transposition {
  T* lanes_first;  // (lanes, rows), the strip's first lane, with a stride in elements
  int64_t stride, lanes;
  T* slab;  // (rows, width)
  int64_t width;
  const int32_t* place;  // (rows): where the slab has each row of the tensor; null if in the same place
};

// The loops of one instruction set. Each works on rows (or panels) begin .. end.
template <typename T>
struct RnnLoops {
  void (*forward)(const ForwardStep<T>&, int64_t begin, int64_t end);
  void (*backward)(const BackwardStep<T>&, int64_t begin, int64_t end);
  void (*product)(const Product<T>&, int64_t begin, int64_t end);
  void (*sampled)(const SampledProduct<T>&, int64_t begin, int64_t end);
  void (*to_slab)(const Transposition<T>&, int64_t begin, int64_t end);
  void (*from_slab)(const Transposition<T>&, int64_t begin, int64_t end);
  // Copies to PANELS, from a weight or from the panels of the transposed matrix
  void (*fill_panels)(const DenseCopy<T>&, int64_t begin, int64_t end);
  void (*transpose_panels)(const Matrix<T>&, T* to, int64_t begin, int64_t end);
  // Copies to blocks, those in rows begin .. end of squares, and of one block to that of the transposed matrix
  void (*fill_blocks)(const BlockCopy<T>&, int64_t begin, int64_t end);
  void (*transpose_block)(const T* from, T* to, int64_t side);
  // Copies to ROWS
  void (*fill_rows)(const DenseCopy<T>&, int64_t begin, int64_t end);
  // For one row of a mask, bit l of bits[w] becomes 1 if entry 64 w + l is kept
  void (*find_kept)(const uint8_t* mask, int64_t columns, uint64_t* bits);
  int64_t (*count_bits)(const uint64_t* bits, int64_t words);
  // counts (8 words): the ones in each square of 8 columns, over `rows` rows of such bits
  void (*count_squares)(const uint64_t* bits, int64_t rows, int64_t words, uint8_t* counts);
};

}  // namespace moduli
