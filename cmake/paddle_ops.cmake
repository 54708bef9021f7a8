# pypkg_ops.so: the Paddle custom operators, compiled by the host compiler alone.

if(NOT PYPKG_PADDLE_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import sys; sys.path.insert(0, r'${CMAKE_SOURCE_DIR}/tools'); import find_paddle as f; p = f.find_paddle(); print(p.folder or '', p.version, sep=';') if p.found else sys.exit(f.not_found_message(p))"
    OUTPUT_VARIABLE paddle_answer OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE paddle_error RESULT_VARIABLE paddle_failed)
  if(paddle_failed)
    message(FATAL_ERROR "${paddle_error}")
  endif()
  list(GET paddle_answer 0 paddle_folder)
  list(GET paddle_answer 1 paddle_version)
  set(PYPKG_PADDLE_DIR "${paddle_folder}" CACHE PATH "" FORCE)
  set(PYPKG_PADDLE_VERSION "${paddle_version}" CACHE STRING "" FORCE)
endif()

file(GLOB_RECURSE paddle_sources CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/paddle/*.cc")
file(GLOB paddle_libraries
  "${PYPKG_PADDLE_DIR}/base/libpaddle.so"
  "${PYPKG_PADDLE_DIR}/libs/libphi*.so"
  "${PYPKG_PADDLE_DIR}/libs/libcommon.so")
if(NOT paddle_libraries)
  message(FATAL_ERROR "No libpaddle.so below PYPKG_PADDLE_DIR (${PYPKG_PADDLE_DIR})")
endif()

add_library(pypkg_ops MODULE ${paddle_sources})
target_include_directories(pypkg_ops PRIVATE "${CMAKE_SOURCE_DIR}/csrc/paddle")
target_include_directories(pypkg_ops SYSTEM PRIVATE
  "${PYPKG_PADDLE_DIR}/include" "${PYPKG_PADDLE_DIR}/include/third_party")
target_compile_definitions(pypkg_ops PRIVATE PADDLE_WITH_CUSTOM_KERNEL _GLIBCXX_USE_CXX11_ABI=1)
target_compile_options(pypkg_ops PRIVATE -Wall)
target_link_libraries(pypkg_ops PRIVATE pypkg_kernels ${paddle_libraries})
# Paddle's own libraries leave symbols to each other; only ours must be complete.
target_link_options(pypkg_ops PRIVATE "LINKER:--allow-shlib-undefined")
set_target_properties(pypkg_ops PROPERTIES
  PREFIX "" LIBRARY_OUTPUT_DIRECTORY "${library_dir}" INSTALL_RPATH "$ORIGIN")
if(PYPKG_WITH_CUDA)
  target_compile_definitions(pypkg_ops PRIVATE PADDLE_WITH_CUDA)
  target_include_directories(pypkg_ops SYSTEM PRIVATE
    ${CUDAToolkit_INCLUDE_DIRS} "${CUDAToolkit_TARGET_DIR}/include/cccl")
endif()
pypkg_strict_link(pypkg_ops)
