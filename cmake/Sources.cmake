# SPDX-License-Identifier: Apache-2.0
# The lists that setup.py reads too: csrc/SOURCES and csrc/NVCC_FLAGS.

# The sources of one folder of csrc/ ("host", "kernels"), as absolute paths.
function(nf_sources result folder)
  file(STRINGS ${PROJECT_SOURCE_DIR}/csrc/SOURCES lines REGEX "^(any|cuda) +${folder}/")
  list(TRANSFORM lines REPLACE "^(any|cuda) +" "${PROJECT_SOURCE_DIR}/csrc/")
  set(${result} ${lines} PARENT_SCOPE)
endfunction()

file(STRINGS ${CMAKE_CURRENT_LIST_DIR}/../csrc/NVCC_FLAGS NF_NVCC_FLAGS REGEX "^-")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS csrc/SOURCES csrc/NVCC_FLAGS)
