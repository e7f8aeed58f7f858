# SPDX-License-Identifier: Apache-2.0
"""The `nemotron-fast` command."""
