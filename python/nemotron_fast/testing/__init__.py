# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share: the shapes that matter, comparing, timing, the benches' main loop."""
