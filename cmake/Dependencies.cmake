# Libraries from the system; where one is missing and FLASH_ENTMAX_DOWNLOAD is on, a pinned version.
include(FetchContent)

# The fifth argument, if given, is the name of its package on Debian and Ubuntu.
macro(flash_entmax_dependency name fetch_name url hash)
  find_package(${name} QUIET)
  if(NOT ${name}_FOUND)
    if(FLASH_ENTMAX_DOWNLOAD)
      message(STATUS "flash_entmax: ${name} is not installed, downloading ${url}; "
        "without a network, install it first (Debian, Ubuntu: ${ARGN})")
      FetchContent_Declare(${fetch_name} URL ${url} URL_HASH SHA256=${hash})
      FetchContent_MakeAvailable(${fetch_name})
    else()
      message(FATAL_ERROR
        "flash_entmax needs ${name}. Install it (./dev does; Debian, Ubuntu: ${ARGN}), or configure "
        "with -DFLASH_ENTMAX_DOWNLOAD=ON to let CMake download it.")
    endif()
  endif()
endmacro()

# In every folder that uses hwy::hwy, since imported targets are known where they are found.
macro(flash_entmax_find_highway)
  flash_entmax_dependency(hwy highway
    https://github.com/google/highway/archive/refs/tags/1.2.0.tar.gz
    7e0be78b8318e8bdbf6fa545d2ecb4c90f947df03f7aadc42c1967f019e63343 libhwy-dev)
endmacro()
