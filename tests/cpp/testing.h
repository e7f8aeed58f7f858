// SPDX-License-Identifier: Apache-2.0
// All the test framework that these tests need: a test is a program, a failed check ends it with the values
// in hand.
#pragma once

#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

namespace testing {

constexpr int kSkipped = 77;  // the exit code that ctest shows as "skipped"

template <class A, class B>
void expect_eq(const A& found, const B& want, const char* what) {
  if (found == want) return;
  std::ostringstream message;
  message << what << " is " << found << ", want " << want;
  throw std::runtime_error(message.str());
}

template <class F>
void expect_throws(F&& f, const std::string& part_of_message) {
  try {
    f();
  } catch (const std::exception& e) {
    if (std::string(e.what()).find(part_of_message) != std::string::npos) return;
    throw std::runtime_error("want an error with \"" + part_of_message + "\", found \"" + e.what() + "\"");
  }
  throw std::runtime_error("want an error with \"" + part_of_message + "\", found none");
}

inline int run(void (*tests)()) {
  try {
    tests();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "FAILED: %s\n", e.what());
    return 1;
  }
  std::puts("ok");
  return 0;
}

}  // namespace testing

#define EXPECT_EQ(found, want) ::testing::expect_eq(found, want, #found)
