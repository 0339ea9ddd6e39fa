// Lists of functor types. Code for each member of a list is made by templates, so that a new member needs no other
// edit.
#pragma once

#include <type_traits>

#include "math/simd.h"

namespace moduli::MODULI_NAMESPACE {

// A type as a value that can be passed to a generic lambda.
template <typename Member_>
struct Type {
  using Member = Member_;
};

template <typename... Members>
struct TypeList {};

// The function calls run(Type<M>()) for the first member M for which test(Type<M>()) holds. It returns false if there
// is no such member.
template <typename... Members, typename Test, typename Run>
__attribute__((always_inline)) inline bool with_first(TypeList<Members...>, const Test& test, const Run& run) {
  return ((test(Type<Members>()) && (run(Type<Members>()), true)) || ...);
}

// The position of a type in a list, which is the length of the list if the type isn't in it.
template <typename Sought, typename... Members>
constexpr int position_of(TypeList<Members...>) {
  int position = 0;
  (void)((std::is_same_v<Sought, Members> || (++position, false)) || ...);
  return position;
}

// The size of the largest member of a list, in bytes.
template <typename... Members>
constexpr unsigned largest_size(TypeList<Members...>) {
  unsigned largest = 0;
  ((largest = sizeof(Members) > largest ? sizeof(Members) : largest), ...);
  return largest;
}

}  // namespace moduli::MODULI_NAMESPACE
