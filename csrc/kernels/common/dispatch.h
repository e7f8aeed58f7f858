// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <type_traits>

#include "host/check.h"

namespace nf {

// Calls f with `value` as a compile-time constant; an error if `value` is none of those that are built.
template <int... kValues, class F>
void dispatch(const char* name, int value, F&& f) {
  const bool hit = ((value == kValues && (f(std::integral_constant<int, kValues>{}), true)) || ...);
  if (!hit) throw Error(std::string(name) + "=" + std::to_string(value) + " is not built");
}

}  // namespace nf
