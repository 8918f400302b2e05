# flash_entmax_warnings(TARGET): the warnings that this project's own C++ must not raise.
function(flash_entmax_warnings target)
  set(warnings
    -Wall -Wextra -Wshadow -Wnon-virtual-dtor -Wcast-align -Wunused -Woverloaded-virtual
    -Wnull-dereference -Wdouble-promotion -Wformat=2 -Wimplicit-fallthrough)
  if(FLASH_ENTMAX_WERROR)
    list(APPEND warnings -Werror)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12 and 13 see overlaps in "text" + std::to_string(x) that are not there (GCC bug 105651).
    list(APPEND warnings -Wno-restrict)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${warnings}>")
endfunction()
