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
